//! The lines that workers keep open, so that their end is seen when a process dies.

use crate::driver::Handle;
use duet_core::WorkerId;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

type Open = Arc<Mutex<BTreeMap<(WorkerId, u64), u32>>>;

/// How many lines each process has open. A worker that connects again may have a new line before the
/// end of its old one is noticed: only the end of the last one counts.
#[derive(Clone, Default)]
pub(super) struct Lines {
    open: Open,
}

/// An open line; tells the driver when it was the last of its process.
pub(super) struct Line {
    open: Open,
    handle: Handle,
    process: (WorkerId, u64),
}

impl Lines {
    pub(super) fn open(&self, handle: Handle, worker: WorkerId, session: u64) -> Line {
        let (open, process) = (self.open.clone(), (worker, session));
        *open.lock().unwrap_or_else(PoisonError::into_inner).entry(process.clone()).or_default() +=
            1;
        Line { open, handle, process }
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let left = open.get_mut(&self.process).map_or(0, |count| {
            *count = count.saturating_sub(1);
            *count
        });
        if left == 0 {
            open.remove(&self.process);
            let (worker, session) = self.process.clone();
            self.handle.disconnected(worker, session);
        }
    }
}
