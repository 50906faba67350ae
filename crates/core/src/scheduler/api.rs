//! What goes into the scheduler and what comes out of it.

use super::lineage::IterationLineage;
use super::state::State;
use crate::work::{Assignment, Report, Weights};
use crate::{ArtifactRef, PolicyVersion, Role, TrainerEpoch, WorkerId};

/// Something that happened.
#[derive(Clone, Debug)]
pub enum Event {
    /// A worker process introduced itself; `session` names the process.
    Registered {
        /// Its name.
        worker: WorkerId,
        /// What it can do.
        role: Role,
        /// A number drawn at its start; another number under the same name is another process.
        session: u64,
    },
    /// It asks for work.
    Polled {
        /// Who.
        worker: WorkerId,
        /// Which process.
        session: u64,
    },
    /// Nobody waits for the answer to its poll any more.
    PollExpired {
        /// Who.
        worker: WorkerId,
        /// Which process.
        session: u64,
    },
    /// It is alive.
    Heartbeat {
        /// Who.
        worker: WorkerId,
        /// Which process.
        session: u64,
    },
    /// The connection that it keeps open for this has closed: its process died, or the network did.
    Disconnected {
        /// Who.
        worker: WorkerId,
        /// Which process.
        session: u64,
    },
    /// It tells something.
    Reported {
        /// Who.
        worker: WorkerId,
        /// Which process.
        session: u64,
        /// What.
        report: Report,
    },
    /// It went away in order.
    Left {
        /// Who.
        worker: WorkerId,
        /// Which process.
        session: u64,
        /// Why.
        reason: String,
    },
    /// A checkpoint manifest was created.
    CheckpointWritten {
        /// The version it holds.
        version: PolicyVersion,
        /// Where.
        manifest: ArtifactRef,
    },
    /// It could not be.
    CheckpointFailed {
        /// The version.
        version: PolicyVersion,
        /// Why.
        reason: String,
    },
    /// An operator wants something.
    Control(Command),
}

/// What an operator can want.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Give out no new leases and steps.
    Pause,
    /// Go on.
    Resume,
    /// Write a checkpoint, send everybody home, finish.
    Stop,
    /// The same, but because the coordinator's process has to go: if it does not get that far, the
    /// next one goes on with the run.
    Suspend,
    /// Send one worker home once it has finished what it holds.
    Drain(WorkerId),
}

/// The answer to an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It counted.
    Accepted,
    /// It had counted before.
    Duplicate,
    /// It belongs to an old attempt, epoch or process, and changed nothing (DU-6).
    Stale,
    /// Nobody by that name and session is registered: register again.
    Unknown,
    /// It cannot be, and why.
    Refused(String),
}

/// Why a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// All iterations are committed and checkpointed.
    Completed,
    /// An operator stopped it; it can be resumed.
    Stopped,
    /// It cannot go on.
    Failed(String),
}

/// A failure with a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// A class that is counted.
    pub kind: String,
    /// Worker, unit, attempt and what happened.
    pub text: String,
}

/// Something the driver must do, after the records of the same output are durable.
#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant)]
pub enum Effect {
    /// Answer a waiting poll.
    Assign {
        /// Whose.
        worker: WorkerId,
        /// Which process's.
        session: u64,
        /// With what.
        assignment: Assignment,
    },
    /// Tell these trainers, with their next heartbeat, that the group is over.
    AbortTrainers {
        /// The group.
        epoch: TrainerEpoch,
        /// Who.
        workers: Vec<WorkerId>,
        /// Why.
        reason: String,
    },
    /// Create a checkpoint manifest and answer with `CheckpointWritten` or `CheckpointFailed`.
    WriteCheckpoint {
        /// The version it holds.
        version: PolicyVersion,
        /// The ranks' shards, rank by rank.
        shards: Vec<Vec<ArtifactRef>>,
        /// The policy.
        weights: Weights,
        /// The scheduler's durable state.
        snapshot: Box<State>,
    },
    /// Write an iteration's rows. Idempotent; may come again after a restart.
    WriteLineage(Box<IterationLineage>),
    /// Delete these: no committed checkpoint, step or tree needs them any more.
    Collect(Vec<ArtifactRef>),
    /// Show and count a failure.
    Failed(Failure),
    /// The run is over.
    Finished(FinishReason),
}
