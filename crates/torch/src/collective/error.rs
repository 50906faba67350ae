use std::fmt;
use std::time::Duration;

/// What a group was doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Finding the other ranks.
    Rendezvous,
    /// Sum over ranks.
    AllReduce,
    /// Sum over ranks, a part for each.
    ReduceScatter,
    /// Concatenation over ranks.
    AllGather,
    /// Copy from one rank.
    Broadcast,
    /// Waiting for every rank.
    Barrier,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Operation::Rendezvous => "rendezvous",
            Operation::AllReduce => "all-reduce",
            Operation::ReduceScatter => "reduce-scatter",
            Operation::AllGather => "all-gather",
            Operation::Broadcast => "broadcast",
            Operation::Barrier => "barrier",
        })
    }
}

/// A collective operation did not come to its end.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CollectiveError {
    /// The deadline is over.
    #[error(
        "{operation} {number} of rank {rank} did not end within {after:?}; {}",
        missing_text(missing)
    )]
    TimedOut {
        /// What was done.
        operation: Operation,
        /// Which operation of this group, from one.
        number: u64,
        /// This rank.
        rank: u32,
        /// The deadline.
        after: Duration,
        /// Ranks that did not say that they are stuck too.
        missing: Vec<u32>,
    },
    /// A peer is lost, or libtorch refused.
    #[error("{operation} {number} of rank {rank} failed: {reason}; {}", missing_text(missing))]
    Failed {
        /// What was done.
        operation: Operation,
        /// Which operation of this group, from one.
        number: u64,
        /// This rank.
        rank: u32,
        /// Gloo's words.
        reason: String,
        /// Ranks that did not say that they are stuck too.
        missing: Vec<u32>,
    },
    /// Another thread ended it.
    #[error("{operation} of rank {rank} was aborted")]
    Aborted {
        /// What was done.
        operation: Operation,
        /// This rank.
        rank: u32,
    },
    /// The store through which ranks find each other cannot be opened or reached.
    #[error("rank store at {address}: {reason}")]
    Store {
        /// `host:port`.
        address: String,
        /// libtorch's words.
        reason: String,
    },
    /// Something this group cannot do with these arguments.
    #[error("{operation} takes {expected}")]
    Argument {
        /// What was done.
        operation: Operation,
        /// What it wants.
        expected: String,
    },
    /// An engine that cannot be loaded on this machine.
    #[error("collectives by {engine} cannot be used here: {reason}; {fix}")]
    Unavailable {
        /// The engine.
        engine: &'static str,
        /// What is missing.
        reason: String,
        /// What to do.
        fix: &'static str,
    },
}

fn missing_text(missing: &[u32]) -> String {
    match missing {
        [] => "every rank is alive".to_owned(),
        [one] => format!("rank {one} is missing"),
        many => {
            let names: Vec<String> = many.iter().map(u32::to_string).collect();
            format!("ranks {} are missing", names.join(", "))
        }
    }
}
