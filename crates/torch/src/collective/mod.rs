//! Sums and copies over the ranks of a trainer group.
//!
//! Each operation has a deadline; one that is missed, or a peer that is lost, is a
//! [`CollectiveError`] that names the ranks that did not arrive. After an error the group is
//! useless: drop it and form another.

mod error;
mod gloo;
mod nccl;
mod roster;
mod solo;
mod store;

pub use error::{CollectiveError, Operation};
pub use gloo::Gloo;
pub use nccl::Nccl;
pub use roster::GroupOptions;
pub use solo::Solo;
pub use store::Store;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tch::Tensor;

/// The operations of a trainer group. Every rank calls the same ones in the same order, with
/// tensors of the same shape and element type. Results are the same bits on all ranks, and the
/// same bits each time for a given world size and shape.
pub trait Collective: Send + Sync {
    /// This rank.
    fn rank(&self) -> u32;

    /// How many ranks there are.
    fn world(&self) -> u32;

    /// Begins to replace `tensor` by its sum over all ranks; [`Pending::wait`] ends it. Operations
    /// may overlap, and run in the order they were begun.
    ///
    /// # Errors
    /// [`CollectiveError`].
    fn begin_all_reduce(&self, tensor: &Tensor) -> Result<Begun<'_>, CollectiveError>;

    /// Begins to sum `flat` over all ranks, each of which gets its part: afterwards the `r`-th of
    /// `world` equal parts of rank `r`'s `flat` holds the sum, and the rest is anything.
    ///
    /// # Errors
    /// [`CollectiveError`].
    fn begin_reduce_scatter(&self, flat: &Tensor) -> Result<Begun<'_>, CollectiveError>;

    /// Puts every rank's `input` into `output`, in rank order along the first dimension.
    ///
    /// # Errors
    /// [`CollectiveError`].
    fn all_gather(&self, output: &Tensor, input: &Tensor) -> Result<(), CollectiveError>;

    /// Replaces `tensor` by rank `root`'s.
    ///
    /// # Errors
    /// [`CollectiveError`].
    fn broadcast(&self, tensor: &Tensor, root: u32) -> Result<(), CollectiveError>;

    /// Returns when every rank has called it.
    ///
    /// # Errors
    /// [`CollectiveError`].
    fn barrier(&self) -> Result<(), CollectiveError>;

    /// A handle with which another thread ends what this group waits for.
    fn abort_handle(&self) -> AbortHandle;

    /// Replaces `tensor` by its sum over all ranks.
    ///
    /// # Errors
    /// [`CollectiveError`].
    fn all_reduce(&self, tensor: &Tensor) -> Result<(), CollectiveError> {
        self.begin_all_reduce(tensor)?.wait()
    }

    /// Gives rank `r` the `r`-th of `world` equal parts (along the first dimension) of the sum of
    /// `input` over all ranks; `input` stays as it is.
    ///
    /// # Errors
    /// [`CollectiveError`].
    fn reduce_scatter(&self, output: &Tensor, input: &Tensor) -> Result<(), CollectiveError> {
        let operation = Operation::ReduceScatter;
        parts(operation, input, output, self.world())?;
        let refused =
            |e: tch::TchError| CollectiveError::Argument { operation, expected: e.to_string() };
        let copy = || input.f_detach()?.f_contiguous()?.f_view(-1).map(|flat| flat.copy());
        let scratch = copy().map_err(refused)?;
        self.begin_reduce_scatter(&scratch)?.wait()?;
        let len = output.numel() as i64;
        let part = scratch.f_narrow(0, i64::from(self.rank()) * len, len);
        let part = part.and_then(|part| part.f_view(output.size().as_slice())).map_err(refused)?;
        output.detach().f_copy_(&part).map_err(refused)
    }
}

/// Checks that a whole has the type and the size that fit its part.
fn parts(
    operation: Operation,
    whole: &Tensor,
    part: &Tensor,
    world: u32,
) -> Result<(), CollectiveError> {
    let fits = whole.numel() == part.numel() * world as usize && whole.kind() == part.kind();
    if fits {
        return Ok(());
    }
    let expected = format!("a whole that is {world} times as large as its part");
    Err(CollectiveError::Argument { operation, expected })
}

/// An operation that has begun, on whatever thread.
pub type Begun<'a> = Box<dyn Pending + Send + 'a>;

/// An operation that has begun.
pub trait Pending {
    /// Waits for its end.
    ///
    /// # Errors
    /// [`CollectiveError`] on failure, abort or when its deadline is over.
    fn wait(self: Box<Self>) -> Result<(), CollectiveError>;
}

/// Ends a group from another thread: what waits, and all that comes after, fails with
/// [`CollectiveError::Aborted`] within a fraction of a second.
#[derive(Clone, Debug, Default)]
pub struct AbortHandle(Arc<AtomicBool>);

impl AbortHandle {
    /// Aborts. Cannot be undone.
    pub fn abort(&self) {
        self.0.store(true, Ordering::Release);
    }

    /// Whether it was aborted.
    pub fn is_aborted(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}
