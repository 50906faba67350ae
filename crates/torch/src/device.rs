//! One OS thread owns all tensors of a device; everybody else sends it closures.
//!
//! ```text
//! async code --call(closure)--> queue --> device thread: closure(&mut state) --answer--> async code
//! ```
//! The state (models, optimiser, process group) is made on the thread and never leaves it, so it
//! need not be `Send`. Async code never blocks on libtorch, and libtorch never runs on two threads.

use futures::channel::oneshot;
use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Once, mpsc};
use std::thread;

/// A call did not come back with a value.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// The closure panicked: libtorch refused an operation, or a bug of ours.
    #[error("device thread `{thread}`: {reason}")]
    Panicked {
        /// The thread's name.
        thread: String,
        /// First line of the panic's text.
        reason: String,
    },
    /// The thread has ended.
    #[error("device thread `{0}` has ended")]
    Gone(String),
    /// The thread could not be started.
    #[error("cannot start device thread `{thread}`: {reason}")]
    Spawn {
        /// The thread's name.
        thread: String,
        /// The system's words.
        reason: String,
    },
}

thread_local! {
    /// Whether this thread runs a closure whose panic becomes an error.
    static CAUGHT: Cell<bool> = const { Cell::new(false) };
}

/// A refusal of libtorch carries pages of C++ stack; where it becomes an error, printing them too
/// would hide that error.
fn quiet_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !CAUGHT.get() {
                before(info);
            }
        }));
    });
}

/// Runs `work`, taking a panic as an error.
fn caught<T>(thread: &str, work: impl FnOnce() -> T) -> Result<T, DeviceError> {
    CAUGHT.set(true);
    let value = catch_unwind(AssertUnwindSafe(work));
    CAUGHT.set(false);
    value.map_err(|panic| panicked(thread, &*panic))
}

type Job<S> = Box<dyn FnOnce(&mut S) + Send>;

/// A handle on the thread; clones share it. The thread ends when the last handle is dropped.
pub struct DeviceThread<S> {
    name: String,
    // Unbounded, but each caller waits for its answer: as many jobs as there are callers.
    jobs: mpsc::Sender<Job<S>>,
}

impl<S> Clone for DeviceThread<S> {
    fn clone(&self) -> Self {
        DeviceThread { name: self.name.clone(), jobs: self.jobs.clone() }
    }
}

impl<S: 'static> DeviceThread<S> {
    /// Starts a thread called `name` whose state `make` builds, on that thread; returns when it is
    /// built. Blocks meanwhile: in async code use it before the runtime is busy.
    ///
    /// # Errors
    /// [`DeviceError`] when the thread cannot start or `make` panics; `make`'s own error otherwise.
    pub fn spawn<E>(
        name: &str,
        make: impl FnOnce() -> Result<S, E> + Send + 'static,
    ) -> Result<Self, E>
    where
        E: From<DeviceError> + Send + 'static,
    {
        quiet_panics();
        let (jobs, queue) = mpsc::channel::<Job<S>>();
        let (ready, made) = mpsc::channel();
        let thread = name.to_owned();
        let label = thread.clone();
        thread::Builder::new()
            .name(thread.clone())
            .spawn(move || {
                let mut state = match caught(&label, make) {
                    Ok(Ok(state)) => {
                        let _ = ready.send(Ok(()));
                        state
                    }
                    Ok(Err(error)) => {
                        let _ = ready.send(Err(error));
                        return;
                    }
                    Err(panic) => {
                        let _ = ready.send(Err(panic.into()));
                        return;
                    }
                };
                for job in queue {
                    job(&mut state);
                }
            })
            .map_err(|e| DeviceError::Spawn { thread: thread.clone(), reason: e.to_string() })?;
        made.recv().map_err(|_| DeviceError::Gone(thread.clone()))??;
        Ok(DeviceThread { name: thread, jobs })
    }

    /// Runs `work` on the thread, after what was asked before, and waits for its value.
    ///
    /// Dropping the returned future does not stop `work`.
    ///
    /// # Errors
    /// [`DeviceError`] when `work` panics or the thread is gone.
    pub async fn call<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut S) -> T + Send + 'static,
    ) -> Result<T, DeviceError> {
        let (answer, wait) = oneshot::channel();
        self.submit(work, move |value| drop(answer.send(value)))?;
        wait.await.map_err(|_| self.gone())?
    }

    /// As [`call`](Self::call), blocking. Never use it inside async code.
    ///
    /// # Errors
    /// As [`call`](Self::call).
    pub fn call_blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut S) -> T + Send + 'static,
    ) -> Result<T, DeviceError> {
        let (answer, wait) = mpsc::sync_channel(1);
        self.submit(work, move |value| drop(answer.send(value)))?;
        wait.recv().map_err(|_| self.gone())?
    }

    fn submit<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut S) -> T + Send + 'static,
        answer: impl FnOnce(Result<T, DeviceError>) + Send + 'static,
    ) -> Result<(), DeviceError> {
        let name = self.name.clone();
        let job: Job<S> = Box::new(move |state| answer(caught(&name, || work(state))));
        self.jobs.send(job).map_err(|_| self.gone())
    }

    fn gone(&self) -> DeviceError {
        DeviceError::Gone(self.name.clone())
    }
}

fn panicked(thread: &str, panic: &(dyn Any + Send)) -> DeviceError {
    let text = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("panicked without a text");
    // A libtorch refusal carries a C++ stack after its first line.
    let reason = text.lines().next().unwrap_or_default().replace("\\n", "\n");
    let reason = reason.lines().next().unwrap_or_default().to_owned();
    DeviceError::Panicked { thread: thread.to_owned(), reason }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::rc::Rc;
    use tch::Tensor;

    fn spawn() -> DeviceThread<Rc<Tensor>> {
        // `Rc`: the state need not be `Send`.
        DeviceThread::spawn("device-test", || {
            Ok::<_, DeviceError>(Rc::new(Tensor::from_slice(&[1i64, 2])))
        })
        .unwrap()
    }

    #[tokio::test]
    async fn calls_run_in_order_on_the_state() {
        let device = spawn();
        device.call(|state| *state = Rc::new(state.as_ref() + 1)).await.unwrap();
        let sum = device.call(|s| s.sum(tch::Kind::Int64).int64_value(&[])).await;
        assert_eq!(sum, Ok(5));
    }

    #[test]
    fn a_refusal_of_libtorch_is_an_error_and_the_thread_lives_on() {
        let device = spawn();
        let error = device.call_blocking(|s| s.reshape([7]).size()).unwrap_err();
        assert!(error.to_string().contains("shape '[7]' is invalid"), "{error}");
        assert_eq!(device.call_blocking(|s| s.size()), Ok(vec![2]));
    }

    #[test]
    fn a_state_that_cannot_be_made_says_why() {
        let made = DeviceThread::<()>::spawn("broken", || -> Result<(), DeviceError> {
            panic!("no model")
        });
        assert_eq!(made.err().unwrap().to_string(), "device thread `broken`: no model");
    }
}
