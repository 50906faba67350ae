//! What handlers ask of the driver.

use super::status::RunStatus;
use duet_core::scheduler::{Event, Verdict};
use duet_core::work::{Assignment, Report};
use duet_core::{TrainerEpoch, WorkerId};
use tokio::sync::oneshot;

/// The answer to a poll.
#[derive(Clone, Debug, PartialEq)]
pub enum Polled {
    /// Do this.
    Assigned(Box<Assignment>),
    /// Nothing yet: ask again.
    Nothing,
    /// The session is not known: register.
    Unknown,
}

/// The answer to a heartbeat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Beat {
    /// Whether the session is known.
    pub known: bool,
    /// The newest trainer group that is over.
    pub aborted: Option<TrainerEpoch>,
}

/// A question to the driver. Each answer is sent when what led to it is durable.
pub(super) enum Request {
    /// Something happened.
    Event { event: Event, reply: oneshot::Sender<Verdict> },
    /// A worker asks for work; `ticket` names this poll.
    Poll { worker: WorkerId, session: u64, ticket: u64, reply: oneshot::Sender<Polled> },
    /// A worker reports and asks for work; it waits for that only if the report is not refused.
    Exchange {
        worker: WorkerId,
        session: u64,
        report: Report,
        ticket: u64,
        verdict: oneshot::Sender<Verdict>,
        next: oneshot::Sender<Polled>,
    },
    /// Nobody waits for that poll's answer any more.
    PollOver { worker: WorkerId, session: u64, ticket: u64 },
    /// A worker lives.
    Heartbeat { worker: WorkerId, session: u64, reply: oneshot::Sender<Beat> },
    /// What is the run doing?
    Status { reply: oneshot::Sender<Box<RunStatus>> },
}
