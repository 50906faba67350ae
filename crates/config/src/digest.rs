//! Printing a configuration, and the hash that tells runs apart.

use crate::raw::Raw;
use crate::sections::{Coordinator, Evaluation, Security, Workers};
use duet_core::Digest;
use duet_core::url::without_credentials;

/// Resets what does not decide results, then hashes the rest in a fixed order.
pub(crate) fn of(raw: &Raw) -> Digest {
    let mut deciding = raw.clone();
    // A preset is nothing but values, and they are here.
    deciding.preset = None;
    deciding.run.name.clear();
    deciding.run.store = None;
    deciding.run.iterations = 0;
    // The small world's base model is the same wherever it lies.
    if deciding.model.bootstrap.is_some() {
        deciding.model.path = None;
    }
    // How many ranks there are, and what they share out, changes no more than rounding.
    deciding.trainer = crate::sections::Trainer {
        world_size: 0,
        min_world_size: None,
        zero: 0,
        overlap: true,
        collective: crate::sections::Collective::Auto,
        collective_timeout_ms: 0,
        ..deciding.trainer
    };
    deciding.workers = Workers { rollout: 0, reward: 0, ..deciding.workers };
    deciding.coordinator = Coordinator::default();
    deciding.checkpoint = crate::sections::Checkpoint::default();
    deciding.security = Security::default();
    deciding.evaluation = Evaluation::default();
    deciding.telemetry = crate::telemetry::Telemetry::default();
    // The prompts are hashed by their contents where a run begins.
    deciding.data.prompts = None;
    deciding.reward.timeout_ms = 0;
    Digest::of(text(&deciding).as_bytes())
}

/// All values, credentials left out.
pub(crate) fn print(raw: &Raw) -> String {
    let mut shown = raw.clone();
    shown.run.store = shown.run.store.map(|url| without_credentials(&url));
    if let Some(http) = &mut shown.reward.http {
        http.url = without_credentials(&http.url);
    }
    text(&shown)
}

/// TOML with sections and keys in the order of their declaration.
fn text(raw: &Raw) -> String {
    // Numbers, texts and tables with text keys: there is no value here that TOML cannot hold.
    toml::to_string(raw).unwrap_or_default()
}
