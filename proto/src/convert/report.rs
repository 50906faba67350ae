//! What comes in from workers.

use super::DecodeError;
use super::assignment::MAX_TRACES;
use super::basic::{
    MAX_KEY, MAX_REASON, MAX_TEXT, clip_reason, decode_all, decode_digest, finite, list, name,
    required, text,
};
use crate::v1 as wire;
use duet_core::work::{
    Done, Finish, LeafScores, LeaseId, Outcome, Report, Score, ShardDone, StepDone, Trace, Unit,
};
use duet_core::{Millis, PolicyVersion, Rank, TrainerEpoch};
use std::collections::BTreeMap;

/// Most images of one trace.
pub const MAX_LEAVES: usize = 1024;
/// Most scorers of one image.
pub const MAX_COMPONENTS: usize = 256;
/// Most metrics of one step.
pub const MAX_METRICS: usize = 4096;
/// Most checkpoint shards of one rank.
pub const MAX_SHARDS: usize = 4096;

impl From<&Report> for wire::Report {
    fn from(from: &Report) -> Self {
        use wire::report::Kind;
        let kind = match from {
            Report::Lease { id, outcome } => Kind::Lease(wire::LeaseReport {
                id: Some((*id).into()),
                outcome: Some(encode_outcome(outcome)),
            }),
            Report::PublishAck { version } => {
                Kind::PublishAck(wire::PublishAck { version: version.0 })
            }
            Report::PublishFailed { version, reason } => Kind::PublishFailed(wire::PublishFailed {
                version: version.0,
                reason: clip_reason(reason),
            }),
            Report::StoreReady { epoch, address } => {
                Kind::StoreReady(wire::StoreReady { epoch: epoch.0, address: address.clone() })
            }
            Report::TrainerReady { epoch, rank, version, digest } => {
                Kind::TrainerReady(wire::TrainerReady {
                    epoch: epoch.0,
                    rank: rank.0,
                    version: version.0,
                    digest: digest.0.to_vec(),
                })
            }
            Report::StepDone(done) => Kind::StepDone(done.into()),
            Report::ShardDone(done) => Kind::ShardDone(wire::ShardDone {
                epoch: done.epoch.0,
                rank: done.rank.0,
                version: done.version.0,
                shards: done.shards.iter().map(Into::into).collect(),
            }),
            Report::TrainerFailed { epoch, rank, kind, reason } => {
                Kind::TrainerFailed(wire::TrainerFailed {
                    epoch: epoch.0,
                    rank: rank.0,
                    failure: Some(encode_failure(kind, reason)),
                })
            }
        };
        wire::Report { kind: Some(kind) }
    }
}

impl TryFrom<wire::Report> for Report {
    type Error = DecodeError;

    fn try_from(from: wire::Report) -> Result<Self, DecodeError> {
        use wire::report::Kind;
        Ok(match required("report.kind", from.kind)? {
            Kind::Lease(lease) => {
                let id = LeaseId::try_from(required("report.lease.id", lease.id)?)?;
                let outcome = required("report.lease.outcome", lease.outcome)?;
                Report::Lease { id, outcome: decode_outcome(id.unit, outcome)? }
            }
            Kind::PublishAck(ack) => Report::PublishAck { version: PolicyVersion(ack.version) },
            Kind::PublishFailed(failed) => Report::PublishFailed {
                version: PolicyVersion(failed.version),
                reason: text("publish_failed.reason", failed.reason, MAX_REASON)?,
            },
            Kind::StoreReady(ready) => Report::StoreReady {
                epoch: TrainerEpoch(ready.epoch),
                address: text("store_ready.address", ready.address, MAX_KEY)?,
            },
            Kind::TrainerReady(ready) => Report::TrainerReady {
                epoch: TrainerEpoch(ready.epoch),
                rank: Rank(ready.rank),
                version: PolicyVersion(ready.version),
                digest: decode_digest("trainer_ready.digest", &ready.digest)?,
            },
            Kind::StepDone(done) => Report::StepDone(done.try_into()?),
            Kind::ShardDone(done) => Report::ShardDone(ShardDone {
                epoch: TrainerEpoch(done.epoch),
                rank: Rank(done.rank),
                version: PolicyVersion(done.version),
                shards: decode_all("shard_done.shards", done.shards, MAX_SHARDS)?,
            }),
            Kind::TrainerFailed(failed) => {
                let failure = required("trainer_failed.failure", failed.failure)?;
                let (kind, reason) = decode_failure(failure)?;
                let (epoch, rank) = (TrainerEpoch(failed.epoch), Rank(failed.rank));
                Report::TrainerFailed { epoch, rank, kind, reason }
            }
        })
    }
}

fn encode_failure(kind: &str, reason: &str) -> wire::Failure {
    wire::Failure { kind: kind.to_owned(), reason: clip_reason(reason) }
}

fn decode_failure(from: wire::Failure) -> Result<(String, String), DecodeError> {
    Ok((name("failure.kind", from.kind)?, text("failure.reason", from.reason, MAX_REASON)?))
}

fn encode_outcome(from: &Outcome) -> wire::lease_report::Outcome {
    use wire::lease_report::Outcome as Kind;
    match from {
        Outcome::Done { result, took } => {
            let result = Some(encode_result(result));
            Kind::Done(wire::Done { took_ms: took.0, result })
        }
        Outcome::Failed { kind, reason } => Kind::Failed(encode_failure(kind, reason)),
        Outcome::HandedBack => Kind::HandedBack(wire::HandedBack {}),
    }
}

fn encode_result(from: &Done) -> wire::done::Result {
    use wire::done::Result as Kind;
    match from {
        Done::Think(traces) => {
            Kind::Traces(wire::Traces { traces: traces.iter().map(Into::into).collect() })
        }
        Done::Render(artifact) => Kind::Render(artifact.into()),
        Done::Score(leaves) => {
            Kind::Scores(wire::Scores { leaves: leaves.iter().map(encode_leaf).collect() })
        }
    }
}

fn decode_outcome(unit: Unit, from: wire::lease_report::Outcome) -> Result<Outcome, DecodeError> {
    use wire::lease_report::Outcome as Kind;
    Ok(match from {
        Kind::Done(done) => Outcome::Done {
            result: decode_result(unit, required("done.result", done.result)?)?,
            took: Millis(done.took_ms),
        },
        Kind::Failed(failure) => {
            let (kind, reason) = decode_failure(failure)?;
            Outcome::Failed { kind, reason }
        }
        Kind::HandedBack(wire::HandedBack {}) => Outcome::HandedBack,
    })
}

fn decode_result(unit: Unit, from: wire::done::Result) -> Result<Done, DecodeError> {
    use wire::done::Result as Kind;
    Ok(match (unit, from) {
        (Unit::Think(_), Kind::Traces(traces)) => {
            Done::Think(decode_all("done.traces", traces.traces, MAX_TRACES)?)
        }
        (Unit::Render(_), Kind::Render(artifact)) => Done::Render(artifact.try_into()?),
        (Unit::Score(_), Kind::Scores(scores)) => {
            let leaves = list("done.scores", scores.leaves, MAX_LEAVES)?;
            Done::Score(leaves.into_iter().map(decode_leaf).collect::<Result<_, _>>()?)
        }
        _ => {
            let why = "the result is not of the lease's stage";
            return Err(DecodeError::Contradiction { field: "done.result", why });
        }
    })
}

impl From<&Trace> for wire::Trace {
    fn from(from: &Trace) -> Self {
        let finish = match from.finish {
            Finish::Stop => wire::Finish::Stop,
            Finish::Length => wire::Finish::Length,
        };
        wire::Trace {
            artifact: Some((&from.artifact).into()),
            text: from.text.clone(),
            refined_prompt: from.refined_prompt.clone(),
            well_formed: from.well_formed,
            tokens: from.tokens,
            finish: finish.into(),
        }
    }
}

impl TryFrom<wire::Trace> for Trace {
    type Error = DecodeError;

    fn try_from(from: wire::Trace) -> Result<Self, DecodeError> {
        let finish = match wire::Finish::try_from(from.finish) {
            Ok(wire::Finish::Stop) => Finish::Stop,
            Ok(wire::Finish::Length) => Finish::Length,
            Ok(wire::Finish::Unspecified) | Err(_) => {
                return Err(DecodeError::Unknown { field: "trace.finish", value: from.finish });
            }
        };
        Ok(Trace {
            artifact: required("trace.artifact", from.artifact)?.try_into()?,
            text: text("trace.text", from.text, MAX_TEXT)?,
            refined_prompt: text("trace.refined_prompt", from.refined_prompt, MAX_TEXT)?,
            well_formed: from.well_formed,
            tokens: from.tokens,
            finish,
        })
    }
}

fn encode_leaf(from: &LeafScores) -> wire::LeafScores {
    use wire::score::Outcome as Kind;
    let score = |(component, score): (&String, &Score)| {
        let outcome = match score {
            Score::Scored(value) => Kind::Scored(*value),
            Score::Failed(reason) => Kind::Failed(clip_reason(reason)),
            Score::TimedOut(after) => Kind::TimedOutMs(after.0),
        };
        wire::Score { component: component.clone(), outcome: Some(outcome) }
    };
    wire::LeafScores { scores: from.iter().map(score).collect() }
}

fn decode_leaf(from: wire::LeafScores) -> Result<LeafScores, DecodeError> {
    use wire::score::Outcome as Kind;
    let scores = list("leaf.scores", from.scores, MAX_COMPONENTS)?.into_iter().map(|score| {
        let outcome = match required("score.outcome", score.outcome)? {
            Kind::Scored(value) => Score::Scored(finite("score.scored", value)?),
            Kind::Failed(reason) => Score::Failed(text("score.failed", reason, MAX_REASON)?),
            Kind::TimedOutMs(after) => Score::TimedOut(Millis(after)),
        };
        Ok((name("score.component", score.component)?, outcome))
    });
    collect_named("leaf.scores", scores)
}

/// A map from a list in which no name may stand twice.
fn collect_named<V>(
    field: &'static str,
    pairs: impl Iterator<Item = Result<(String, V), DecodeError>>,
) -> Result<BTreeMap<String, V>, DecodeError> {
    let mut map = BTreeMap::new();
    for pair in pairs {
        let (name, value) = pair?;
        if map.contains_key(&name) {
            return Err(DecodeError::Twice { field, name });
        }
        map.insert(name, value);
    }
    Ok(map)
}

impl From<&StepDone> for wire::StepDone {
    fn from(from: &StepDone) -> Self {
        let metric =
            |(name, value): (&String, &f64)| wire::Metric { name: name.clone(), value: *value };
        wire::StepDone {
            epoch: from.epoch.0,
            rank: from.rank.0,
            iteration: from.iteration,
            weights: Some((&from.weights).into()),
            metrics: from.metrics.iter().map(metric).collect(),
        }
    }
}

impl TryFrom<wire::StepDone> for StepDone {
    type Error = DecodeError;

    fn try_from(from: wire::StepDone) -> Result<Self, DecodeError> {
        let metrics = list("step_done.metrics", from.metrics, MAX_METRICS)?;
        let metrics = metrics.into_iter().map(|metric| {
            let value = finite("step_done.metrics.value", metric.value)?;
            Ok((name("step_done.metrics.name", metric.name)?, value))
        });
        Ok(StepDone {
            epoch: TrainerEpoch(from.epoch),
            rank: Rank(from.rank),
            iteration: from.iteration,
            weights: required("step_done.weights", from.weights)?.try_into()?,
            metrics: collect_named("step_done.metrics", metrics)?,
        })
    }
}
