//! The configuration as a whole: what each value may be, and what cannot go together.

mod addresses;
mod branches;
mod cluster;
mod reward;
mod sampling;

use crate::error::Problems;
use crate::raw::{DitAdvantage, LlmAdvantage, Raw};
use crate::spec::Config;
use duet_core::advantage::{AdvantageSpec, GroupKey};
use duet_core::schedule::Schedule;

/// Which branches are ever trained.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Trained {
    pub llm: bool,
    pub dit: bool,
}

impl Trained {
    fn of(schedule: &Schedule) -> Trained {
        let (llm, dit) = schedule.trains();
        Trained { llm, dit }
    }
}

/// Checks everything. `None` only with problems.
pub(crate) fn config(raw: Raw, problems: &mut Problems) -> Option<Config> {
    addresses::check(&raw, problems);
    cluster::run(&raw, problems);
    cluster::model(&raw, problems);
    let schedule = sampling::schedule(&raw, problems);
    let trained = schedule.as_ref().map_or(Trained { llm: true, dit: true }, Trained::of);
    sampling::rollout(&raw, trained, problems);
    let window = sampling::window(&raw, trained, problems);
    let reward = reward::reward(&raw, trained, problems);
    let (llm_advantage, dit_advantage) = advantages(&raw, trained, problems);
    let llm = branches::llm(&raw, trained, problems);
    let dit = branches::dit(&raw, trained, problems);
    cluster::trainer(&raw, problems);
    cluster::coordinator(&raw, problems);
    cluster::security(&raw, problems);
    if let Some(sft) = &raw.sft {
        sft.check(raw.model.bootstrap.is_some(), raw.trainer.world_size, problems);
    }
    crate::telemetry::check(&raw, problems);
    Some(Config {
        run: raw.run.clone(),
        model: raw.model.clone(),
        data: raw.data.clone(),
        rollout: raw.rollout.clone(),
        window: window?,
        schedule: schedule?,
        reward: reward?,
        llm_advantage,
        dit_advantage,
        llm,
        dit,
        trainer: raw.trainer.clone(),
        workers: raw.workers.clone(),
        coordinator: raw.coordinator.clone(),
        checkpoint: raw.checkpoint.clone(),
        security: raw.security.clone(),
        evaluation: raw.evaluation.clone(),
        sft: raw.sft.clone(),
        telemetry: raw.telemetry.clone(),
        raw,
    })
}

fn advantages(
    raw: &Raw,
    trained: Trained,
    problems: &mut Problems,
) -> (AdvantageSpec, AdvantageSpec) {
    let LlmAdvantage { center, scale, ddof, eps, clip, min_group, combine } = raw.advantage.llm;
    let group = GroupKey::Tree;
    let llm = AdvantageSpec { center, scale, ddof, eps, clip, min_group, group, combine };
    let DitAdvantage { center, scale, ddof, eps, clip, min_group, combine, group } =
        raw.advantage.dit;
    let dit = AdvantageSpec { center, scale, ddof, eps, clip, min_group, group, combine };
    let images = match group {
        GroupKey::Trace => raw.rollout.images_per_trace,
        GroupKey::Tree => raw.rollout.images_per_trace.saturating_mul(raw.rollout.traces),
    };
    if trained.llm {
        advantage("llm", &llm, raw.rollout.traces, "rollout.traces", problems);
    }
    if trained.dit {
        advantage("dit", &dit, images, "rollout.images_per_trace", problems);
    }
    (llm, dit)
}

fn advantage(
    branch: &str,
    spec: &AdvantageSpec,
    members: u32,
    source: &str,
    problems: &mut Problems,
) {
    let key = |name: &str| format!("advantage.{branch}.{name}");
    problems.check(spec.ddof <= 1, &key("ddof"), || {
        format!("is {}; use 0 (population) or 1 (sample)", spec.ddof)
    });
    problems.check(spec.eps.is_finite() && spec.eps >= 0.0, &key("eps"), || {
        format!("is {}; it must be 0 or more", spec.eps)
    });
    problems.check(spec.clip.is_finite() && spec.clip >= 0.0, &key("clip"), || {
        format!("is {}; it must be 0 (off) or more", spec.clip)
    });
    problems.check(spec.min_group >= 2, &key("min_group"), || {
        format!("is {}; a group of one has advantage zero, so use 2 or more", spec.min_group)
    });
    problems.check(members < 2 || spec.min_group <= members, &key("min_group"), || {
        format!(
            "is {}, but groups have only {members} members, so nothing would ever be trained on: \
             lower it or raise {source}",
            spec.min_group
        )
    });
}
