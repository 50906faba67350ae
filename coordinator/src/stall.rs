//! Sees it when the coordinator's thread is held up.
//!
//! The thread that serves, decides and syncs the journal waits for a disk of this machine itself, and no
//! deadline of a task on it can end that. A disk that hangs holds it for good, so another thread looks
//! whether it still moves.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;
use tokio::task::JoinHandle;

/// How often it is looked within the limit. Looks are counted instead of time: a whole process that was
/// stopped for a while is not held up.
const LOOKS: u32 = 8;

/// Watches the runtime that it was made on until it is dropped.
pub struct Stall(JoinHandle<()>);

impl Stall {
    /// Calls `late`, on a thread of its own and once, when the runtime's tasks do not move for `limit`.
    ///
    /// # Errors
    /// The system gives no thread.
    ///
    /// # Panics
    /// Outside a tokio runtime, as `tokio::spawn` does.
    pub fn watch(limit: Duration, late: impl FnOnce() + Send + 'static) -> io::Result<Stall> {
        let (watching, ended) = mpsc::channel::<()>();
        let beats = Arc::new(AtomicU64::new(0));
        let (seen, every) = (beats.clone(), limit / LOOKS);
        std::thread::Builder::new().name("stall".to_owned()).spawn(move || {
            let (mut last, mut missed) = (0, 0);
            while ended.recv_timeout(every) == Err(RecvTimeoutError::Timeout) {
                let now = seen.load(Ordering::Relaxed);
                missed = if now == last { missed + 1 } else { 0 };
                last = now;
                if missed >= LOOKS {
                    return late();
                }
            }
        })?;
        Ok(Stall(tokio::spawn(async move {
            let _watching = watching;
            loop {
                tokio::time::sleep(every / 2).await;
                beats.fetch_add(1, Ordering::Relaxed);
            }
        })))
    }
}

impl Drop for Stall {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(1);
    const DEADLINE: Duration = Duration::from_secs(30);

    #[tokio::test]
    async fn a_thread_that_does_not_move_is_told_of_once() {
        let (tell, told) = mpsc::channel();
        let _stall = Stall::watch(LIMIT, move || tell.send(()).unwrap()).unwrap();
        // Holds this runtime's only thread.
        told.recv_timeout(DEADLINE).unwrap();
        assert_eq!(told.recv_timeout(DEADLINE), Err(RecvTimeoutError::Disconnected));
    }

    #[tokio::test]
    async fn one_that_moves_is_not_and_the_watch_ends_with_its_owner() {
        let (tell, mut told) = tokio::sync::mpsc::channel(1);
        let stall = Stall::watch(LIMIT, move || tell.try_send(()).unwrap()).unwrap();
        let quiet = tokio::time::timeout(LIMIT + LIMIT / 2, told.recv()).await;
        assert!(quiet.is_err(), "told although tasks move");
        drop(stall);
        assert_eq!(tokio::time::timeout(DEADLINE, told.recv()).await, Ok(None));
    }
}
