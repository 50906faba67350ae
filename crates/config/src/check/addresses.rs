//! URLs of the configuration: none may hold a secret, since configurations are printed, hashed, kept
//! with runs and shared.

use crate::error::Problems;
use crate::raw::Raw;
use duet_core::url::without_credentials;
use std::path::Path;

/// Checks every key that can be a URL.
pub(super) fn check(raw: &Raw, problems: &mut Problems) {
    let path = |path: Option<&Path>| path.map(|path| path.to_string_lossy().into_owned());
    let plain = [
        ("run.store", raw.run.store.clone()),
        ("model.path", path(raw.model.path.as_deref())),
        ("data.prompts", path(raw.data.prompts.as_deref())),
        ("sft.data", path(raw.sft.as_ref().and_then(|sft| sft.data.as_deref()))),
        ("telemetry.otlp", raw.telemetry.otlp.clone()),
    ];
    for (key, url) in plain {
        let Some(url) = url else { continue };
        let shown = without_credentials(&url);
        problems.check(shown == url, key, || {
            format!(
                "holds credentials or options: write `{shown}`, and give credentials in the \
                 environment"
            )
        });
    }
    let scorer = raw.reward.http.as_ref().map(|server| server.url.as_str()).unwrap_or_default();
    // A query may say which model scores; it is left out wherever the address is shown.
    problems.check(!authority(scorer).contains('@'), "reward.http.url", || {
        "holds credentials: name the environment variable of a token in reward.http.token_env"
            .to_owned()
    });
}

fn authority(url: &str) -> &str {
    let rest = url.split_once("://").map_or("", |(_, rest)| rest);
    rest.split(['/', '?', '#']).next().unwrap_or_default()
}
