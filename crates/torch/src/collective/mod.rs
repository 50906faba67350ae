//! Sums and copies over the ranks of a trainer group.
//!
//! Each operation has a deadline; one that is missed, or a peer that is lost, is a
//! [`CollectiveError`] that names the ranks that did not arrive. After an error the group is
//! useless: drop it and form another.

mod error;
mod gloo;
mod solo;
mod store;

pub use error::{CollectiveError, Operation};
pub use gloo::{Gloo, GlooOptions};
pub use solo::Solo;
pub use store::Store;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tch::Tensor;

/// The operations of a trainer group. Every rank calls the same ones in the same order, with
/// tensors of the same shape and element type. Results are the same bits on all ranks, and the
/// same bits each time for a given world size and shape.
pub trait Collective {
    /// This rank.
    fn rank(&self) -> u32;

    /// How many ranks there are.
    fn world(&self) -> u32;

    /// Begins to replace `tensor` by its sum over all ranks; [`Pending::wait`] ends it. Operations
    /// may overlap, and run in the order they were begun.
    ///
    /// # Errors
    /// [`CollectiveError`].
    fn begin_all_reduce(&self, tensor: &Tensor) -> Result<Box<dyn Pending + '_>, CollectiveError>;

    /// Gives rank `r` the `r`-th of `world` equal parts (along the first dimension) of the sum of
    /// `input` over all ranks.
    ///
    /// # Errors
    /// [`CollectiveError`].
    fn reduce_scatter(&self, output: &Tensor, input: &Tensor) -> Result<(), CollectiveError>;

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
}

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
