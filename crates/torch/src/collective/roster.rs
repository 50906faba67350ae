use super::{AbortHandle, CollectiveError, Operation, Store};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// How a group is formed.
#[derive(Clone, Debug)]
pub struct GroupOptions {
    /// This rank.
    pub rank: u32,
    /// How many ranks there are.
    pub world: u32,
    /// Name of this incarnation of the group; keys of different incarnations never meet.
    pub group: String,
    /// The address of this machine that the other ranks reach (Gloo).
    pub host: String,
    /// The deadline of each operation, and of finding each other.
    pub deadline: Duration,
    /// How many operations run at a time (Gloo).
    pub threads: u32,
}

/// How often a waiting rank looks for an abort.
pub(super) const ABORT_POLL: Duration = Duration::from_millis(20);
/// How often a waiting rank asks the store whether another rank gave up.
const FAILURE_POLL: Duration = Duration::from_millis(250);
/// How long a rank that failed waits for the others to say that they are alive.
const GRACE: Duration = Duration::from_millis(1500);

/// Who is there: what the ranks of a group tell each other through their store, beside the operations.
pub(super) struct Roster {
    pub(super) store: Arc<Store>,
    pub(super) options: GroupOptions,
    pub(super) abort: AbortHandle,
}

impl Roster {
    /// Waits until every rank has said that it is here, so that a rank that never comes is named.
    pub(super) fn announce(&self) -> Result<(), CollectiveError> {
        let (operation, rank) = (Operation::Rendezvous, self.options.rank);
        self.store.set(&self.key(&format!("here/{rank}")), b"1")?;
        let end = Instant::now() + self.options.deadline;
        let mut waiting: Vec<u32> = (0..self.options.world).collect();
        loop {
            let mut still = Vec::new();
            for rank in waiting {
                if !self.store.has(&self.key(&format!("here/{rank}")))? {
                    still.push(rank);
                }
            }
            waiting = still;
            if waiting.is_empty() {
                return Ok(());
            }
            self.alive(operation)?;
            if Instant::now() >= end {
                let (number, after, missing) = (0, self.options.deadline, waiting);
                return Err(CollectiveError::TimedOut { operation, number, rank, after, missing });
            }
            thread::sleep(ABORT_POLL);
        }
    }

    /// Ranks without the key `name/RANK`, after a while.
    pub(super) fn missing(&self, name: &str) -> Vec<u32> {
        let end = Instant::now() + GRACE;
        let said =
            |rank: &u32| self.store.has(&self.key(&format!("{name}/{rank}"))).unwrap_or(false);
        loop {
            let silent: Vec<u32> = (0..self.options.world)
                .filter(|rank| *rank != self.options.rank && !said(rank))
                .collect();
            if silent.is_empty() || Instant::now() >= end {
                return silent;
            }
            thread::sleep(ABORT_POLL);
        }
    }

    /// Fails where the group was aborted.
    pub(super) fn alive(&self, operation: Operation) -> Result<(), CollectiveError> {
        if self.abort.is_aborted() {
            return Err(CollectiveError::Aborted { operation, rank: self.options.rank });
        }
        Ok(())
    }

    /// Waits for the end of an operation. `poll` waits for no longer than it is told and says whether
    /// that is reached.
    pub(super) fn await_end(
        &self,
        (operation, number): (Operation, u64),
        deadline: Instant,
        mut poll: impl FnMut(Duration) -> Result<bool, String>,
    ) -> Result<(), CollectiveError> {
        let mut ask_at = Instant::now() + FAILURE_POLL;
        loop {
            match poll(ABORT_POLL) {
                Ok(true) => return Ok(()),
                Ok(false) => {}
                Err(reason) => return Err(self.failed(operation, number, reason)),
            }
            self.alive(operation)?;
            let now = Instant::now();
            if now >= deadline {
                let (rank, after) = (self.options.rank, self.options.deadline);
                let missing = self.post_mortem();
                return Err(CollectiveError::TimedOut { operation, number, rank, after, missing });
            }
            if now >= ask_at {
                ask_at = now + FAILURE_POLL;
                if self.somebody_failed() {
                    let reason = "another rank gave up".to_owned();
                    return Err(self.failed(operation, number, reason));
                }
            }
        }
    }

    pub(super) fn failed(
        &self,
        operation: Operation,
        number: u64,
        reason: String,
    ) -> CollectiveError {
        let missing = self.post_mortem();
        CollectiveError::Failed { operation, number, rank: self.options.rank, reason, missing }
    }

    /// Tells the others that this rank gave up, and lists those that do not answer.
    fn post_mortem(&self) -> Vec<u32> {
        // A store that cannot be reached is rank 0's: then everybody but this rank is unknown, and
        // rank 0 is what is missing.
        let said = self.store.set(&self.key("failed"), b"1").and_then(|()| {
            self.store.set(&self.key(&format!("stuck/{}", self.options.rank)), b"1")
        });
        match said {
            Ok(()) => self.missing("stuck"),
            Err(_) => vec![0],
        }
    }

    fn somebody_failed(&self) -> bool {
        self.store.has(&self.key("failed")).unwrap_or(true)
    }

    pub(super) fn key(&self, name: &str) -> String {
        format!("duet/{}/{name}", self.options.group)
    }
}
