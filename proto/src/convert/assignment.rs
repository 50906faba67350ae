//! What goes out to workers.

use super::DecodeError;
use super::basic::{
    MAX_KEY, MAX_REASON, MAX_TEXT, clip_reason, decode_all, decode_digest, decode_seed, finite,
    list, required, text,
};
use super::report::MAX_LEAVES;
use crate::v1 as wire;
use duet_core::work::{
    Assignment, Held, Lease, LeaseId, RenderWork, Rendezvous, ScoreWork, Step, ThinkWork,
    TrainTrace, TrainTree, Unit, Work,
};
use duet_core::{ArtifactRef, Millis, PolicyVersion, Rank, TrainerEpoch};

/// Most trees in one step.
pub const MAX_TREES: usize = 16 * 1024;
/// Most traces in one tree.
pub const MAX_TRACES: usize = 1024;

impl From<&Assignment> for wire::Assignment {
    fn from(from: &Assignment) -> Self {
        use wire::assignment::Kind;
        let kind = match from {
            Assignment::Lease(lease) => Kind::Lease(lease.into()),
            Assignment::Publish(weights) => Kind::Publish(weights.into()),
            Assignment::Rendezvous(rendezvous) => Kind::Rendezvous(rendezvous.into()),
            Assignment::Step(step) => Kind::Step(step.into()),
            Assignment::Leave { reason } => {
                Kind::Leave(wire::Dismissal { reason: clip_reason(reason) })
            }
        };
        wire::Assignment { kind: Some(kind) }
    }
}

impl TryFrom<wire::Assignment> for Assignment {
    type Error = DecodeError;

    fn try_from(from: wire::Assignment) -> Result<Self, DecodeError> {
        use wire::assignment::Kind;
        Ok(match required("assignment.kind", from.kind)? {
            Kind::Lease(lease) => Assignment::Lease(lease.try_into()?),
            Kind::Publish(weights) => Assignment::Publish(weights.try_into()?),
            Kind::Rendezvous(rendezvous) => Assignment::Rendezvous(rendezvous.try_into()?),
            Kind::Step(step) => Assignment::Step(step.try_into()?),
            Kind::Leave(leave) => {
                Assignment::Leave { reason: text("leave.reason", leave.reason, MAX_REASON)? }
            }
        })
    }
}

impl From<&Lease> for wire::Lease {
    fn from(from: &Lease) -> Self {
        use wire::lease::Work as Kind;
        let work = match &from.work {
            Work::Think(work) => Kind::Think(wire::ThinkWork {
                weights: Some((&work.weights).into()),
                prompt: Some((&work.prompt).into()),
                traces: work.traces,
                seed: work.seed.0.to_vec(),
            }),
            Work::Render(work) => Kind::Render(wire::RenderWork {
                weights: Some((&work.weights).into()),
                trace: Some((&work.trace).into()),
                leaves: work.leaves,
                window: Some(work.window.into()),
                seed: work.seed.0.to_vec(),
            }),
            Work::Score(work) => Kind::Score(wire::ScoreWork {
                prompt: Some((&work.prompt).into()),
                refined_prompt: work.refined_prompt.clone(),
                render: Some((&work.render).into()),
                leaves: work.leaves,
            }),
        };
        wire::Lease { id: Some(from.id.into()), expires_in_ms: from.expires_in.0, work: Some(work) }
    }
}

impl TryFrom<wire::Lease> for Lease {
    type Error = DecodeError;

    fn try_from(from: wire::Lease) -> Result<Self, DecodeError> {
        use wire::lease::Work as Kind;
        let id = LeaseId::try_from(required("lease.id", from.id)?)?;
        let work = match (id.unit, required("lease.work", from.work)?) {
            (Unit::Think(_), Kind::Think(work)) => Work::Think(work.try_into()?),
            (Unit::Render(_), Kind::Render(work)) => Work::Render(work.try_into()?),
            (Unit::Score(_), Kind::Score(work)) => Work::Score(work.try_into()?),
            _ => {
                let why = "the work is not of the lease's stage";
                return Err(DecodeError::Contradiction { field: "lease.work", why });
            }
        };
        Ok(Lease { id, expires_in: Millis(from.expires_in_ms), work })
    }
}

/// A number of traces or leaves: from one to `bound`.
fn count(field: &'static str, value: u32, bound: usize) -> Result<u32, DecodeError> {
    match value as usize {
        0 => Err(DecodeError::Missing(field)),
        count if count > bound => Err(DecodeError::TooMany { field, count, bound }),
        _ => Ok(value),
    }
}

impl TryFrom<wire::ThinkWork> for ThinkWork {
    type Error = DecodeError;

    fn try_from(from: wire::ThinkWork) -> Result<Self, DecodeError> {
        Ok(ThinkWork {
            weights: required("think.weights", from.weights)?.try_into()?,
            prompt: required("think.prompt", from.prompt)?.try_into()?,
            traces: count("think.traces", from.traces, MAX_TRACES)?,
            seed: decode_seed("think.seed", &from.seed)?,
        })
    }
}

impl TryFrom<wire::RenderWork> for RenderWork {
    type Error = DecodeError;

    fn try_from(from: wire::RenderWork) -> Result<Self, DecodeError> {
        Ok(RenderWork {
            weights: required("render.weights", from.weights)?.try_into()?,
            trace: required("render.trace", from.trace)?.try_into()?,
            leaves: count("render.leaves", from.leaves, MAX_LEAVES)?,
            window: required("render.window", from.window)?.try_into()?,
            seed: decode_seed("render.seed", &from.seed)?,
        })
    }
}

impl TryFrom<wire::ScoreWork> for ScoreWork {
    type Error = DecodeError;

    fn try_from(from: wire::ScoreWork) -> Result<Self, DecodeError> {
        Ok(ScoreWork {
            prompt: required("score.prompt", from.prompt)?.try_into()?,
            refined_prompt: text("score.refined_prompt", from.refined_prompt, MAX_TEXT)?,
            render: required("score.render", from.render)?.try_into()?,
            leaves: count("score.leaves", from.leaves, MAX_LEAVES)?,
        })
    }
}

impl From<&Rendezvous> for wire::Rendezvous {
    fn from(from: &Rendezvous) -> Self {
        wire::Rendezvous {
            epoch: from.epoch.0,
            rank: from.rank.0,
            world: from.world,
            store: from.store.clone(),
            restore: from.restore.as_ref().map(Into::into),
            newest: from
                .newest
                .map(|held| wire::Held { version: held.version.0, digest: held.digest.0.to_vec() }),
        }
    }
}

impl TryFrom<wire::Rendezvous> for Rendezvous {
    type Error = DecodeError;

    fn try_from(from: wire::Rendezvous) -> Result<Self, DecodeError> {
        if from.rank >= from.world {
            let why = "ranks run from zero to world - 1";
            return Err(DecodeError::Contradiction { field: "rendezvous.rank", why });
        }
        let store = from.store.map(|store| text("rendezvous.store", store, MAX_KEY));
        let held = |held: wire::Held| {
            let digest = decode_digest("rendezvous.newest.digest", &held.digest)?;
            Ok::<_, DecodeError>(Held { version: PolicyVersion(held.version), digest })
        };
        Ok(Rendezvous {
            epoch: TrainerEpoch(from.epoch),
            rank: Rank(from.rank),
            world: from.world,
            store: store.transpose()?,
            restore: from.restore.map(ArtifactRef::try_from).transpose()?,
            newest: from.newest.map(held).transpose()?,
        })
    }
}

impl From<&Step> for wire::Step {
    fn from(from: &Step) -> Self {
        wire::Step {
            epoch: from.epoch.0,
            iteration: from.iteration,
            gates: Some(from.gates.into()),
            window: Some(from.window.into()),
            trees: from.trees.iter().map(Into::into).collect(),
            publish: from.publish,
            checkpoint: from.checkpoint,
            update: from.update,
        }
    }
}

impl TryFrom<wire::Step> for Step {
    type Error = DecodeError;

    fn try_from(from: wire::Step) -> Result<Self, DecodeError> {
        Ok(Step {
            epoch: TrainerEpoch(from.epoch),
            iteration: from.iteration,
            gates: required("step.gates", from.gates)?.try_into()?,
            window: required("step.window", from.window)?.try_into()?,
            trees: decode_all("step.trees", from.trees, MAX_TREES)?,
            update: from.update,
            publish: from.publish,
            checkpoint: from.checkpoint,
        })
    }
}

impl From<&TrainTree> for wire::TrainTree {
    fn from(from: &TrainTree) -> Self {
        wire::TrainTree {
            id: Some(from.id.into()),
            prompt: Some((&from.prompt).into()),
            traces: from.traces.iter().map(Into::into).collect(),
        }
    }
}

impl TryFrom<wire::TrainTree> for TrainTree {
    type Error = DecodeError;

    fn try_from(from: wire::TrainTree) -> Result<Self, DecodeError> {
        Ok(TrainTree {
            id: required("tree.id", from.id)?.into(),
            prompt: required("tree.prompt", from.prompt)?.try_into()?,
            traces: decode_all("tree.traces", from.traces, MAX_TRACES)?,
        })
    }
}

impl From<&TrainTrace> for wire::TrainTrace {
    fn from(from: &TrainTrace) -> Self {
        let leaf = |value: &Option<f64>| wire::Advantage { value: *value };
        wire::TrainTrace {
            trace: from.trace,
            artifact: Some((&from.artifact).into()),
            advantage: from.advantage,
            render: from.render.as_ref().map(Into::into),
            leaf_advantages: from.leaf_advantages.iter().map(leaf).collect(),
        }
    }
}

impl TryFrom<wire::TrainTrace> for TrainTrace {
    type Error = DecodeError;

    fn try_from(from: wire::TrainTrace) -> Result<Self, DecodeError> {
        let advantage = |value: Option<f64>| value.map(|v| finite("advantage", v)).transpose();
        let leaves = list("trace.leaf_advantages", from.leaf_advantages, MAX_LEAVES)?;
        Ok(TrainTrace {
            trace: from.trace,
            artifact: required("trace.artifact", from.artifact)?.try_into()?,
            advantage: advantage(from.advantage)?,
            render: from.render.map(ArtifactRef::try_from).transpose()?,
            leaf_advantages: leaves
                .into_iter()
                .map(|leaf| advantage(leaf.value))
                .collect::<Result<_, _>>()?,
        })
    }
}
