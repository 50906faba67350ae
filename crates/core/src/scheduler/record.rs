//! What the journal holds: the decisions from which the durable state can be rebuilt (DU-11).

use crate::work::{Done, LeaseId, Weights};
use crate::{
    ArtifactRef, Digest, Generation, Millis, PolicyVersion, TrainerEpoch, TreeId, WorkerId,
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// How a tree ended: exactly one of these (DU-2).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fate {
    /// It contributed to a committed step.
    Trained,
    /// None of its groups had any spread, so there was nothing to learn from it.
    ZeroSpread,
    /// It was given up.
    Failed(String),
}

/// A decision. Records are applied by one function, live and on restore alike.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Record {
    /// A coordinator took the journal over.
    Opened {
        /// Its generation.
        generation: Generation,
    },
    /// The trees of an iteration exist from now on.
    Admitted {
        /// Which iteration.
        iteration: u32,
    },
    /// More trees of an iteration whose trees taught too little (dynamic sampling).
    Extended {
        /// Which iteration.
        iteration: u32,
        /// How many.
        trees: u32,
    },
    /// A unit was given to a worker. Attempts never repeat, because this is durable first.
    Leased {
        /// Unit and attempt.
        id: LeaseId,
        /// To whom.
        worker: WorkerId,
        /// To which process of that name.
        session: u64,
    },
    /// A unit is done.
    Completed {
        /// Unit and attempt.
        id: LeaseId,
        /// By whom.
        worker: WorkerId,
        /// What came out.
        result: Done,
        /// Time spent at the worker.
        took: Millis,
    },
    /// An attempt came to nothing.
    AttemptFailed {
        /// Unit and attempt.
        id: LeaseId,
        /// Whose.
        worker: WorkerId,
        /// The class of failure.
        kind: String,
        /// What happened.
        reason: String,
        /// The worker was lost or too slow; nothing says that the unit is to blame.
        lost: bool,
    },
    /// A tree was given up.
    GivenUp {
        /// Which.
        tree: TreeId,
        /// Why: names unit, attempt and last failure.
        reason: String,
    },
    /// A trainer group was formed.
    EpochStarted {
        /// Its number.
        epoch: TrainerEpoch,
        /// Its ranks; 0 in journals that do not say.
        #[serde(default)]
        world: u32,
    },
    /// An optimiser step is part of the run (DU-4).
    StepCommitted {
        /// Which iteration.
        iteration: u32,
        /// The policy after it.
        weights: Weights,
        /// Losses, ratios, norms.
        #[serde(with = "crate::exact::numbers")]
        metrics: BTreeMap<String, f64>,
    },
    /// A group of another size repeated a step: what the ranks hold differs in rounding from what was
    /// committed and samples, and they go on from it.
    Retaken {
        /// Which iteration.
        iteration: u32,
        /// Hash over what the ranks hold after it.
        digest: Digest,
    },
    /// A checkpoint is complete.
    Checkpointed {
        /// The version it holds.
        version: PolicyVersion,
        /// Its manifest.
        manifest: ArtifactRef,
    },
    /// The run was paused or goes on.
    Paused(bool),
    /// An operator wants the run to end, or that has been done and everybody sent home: a coordinator
    /// that takes over in between goes on with the ending.
    Stopping(bool),
}

/// A durable batch and what may be done once it is durable (RULE 7).
#[derive(Clone, Debug, Default)]
pub struct Output {
    /// To be made durable first.
    pub records: Vec<Record>,
    /// To be carried out after that.
    pub effects: Vec<super::Effect>,
}
