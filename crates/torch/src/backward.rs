//! A backward pass that gives each gradient away as soon as it is complete.

use crate::ffi;
use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind};
use tch::{TchError, Tensor};

/// What takes gradients: a leaf's place in the list, and its gradient.
type Take<'a, E> = dyn FnMut(usize, Tensor) -> Result<(), E> + Send + 'a;

struct Taking<'a, E> {
    take: &'a mut Take<'a, E>,
    /// Why the pass was broken off.
    failure: Option<E>,
}

/// Back-propagates the scalar `loss`. As soon as the gradient of one of the `leaves` is complete, `take`
/// gets it, once, with the leaf's place in the list; the leaf itself keeps none, so that no more
/// gradients are held than are in hand. A leaf that the loss does not depend on is passed over.
///
/// `take` runs while the pass goes on: on the calling thread for tensors of the CPU, on a thread of
/// libtorch's for those of a GPU, never twice at a time. Gradients are off in it.
///
/// # Errors
/// What `take` gave, which ends the pass; or libtorch refuses.
pub fn backward<'a, E: From<TchError>>(
    loss: &Tensor,
    leaves: &[Tensor],
    take: &'a mut Take<'a, E>,
) -> Result<(), E> {
    let handles: Vec<ffi::DuetTensor> = leaves.iter().map(ffi::raw).collect();
    let mut taking = Taking { take, failure: None };
    // SAFETY: loss and leaves are live tensors; `ready` gets the `Taking` that it expects, which outlives
    // the call, and is called during the call only, by one thread at a time. What it holds may go to
    // another thread: `take` is `Send`, and the failure is written there and read here, after the end.
    let status = unsafe {
        ffi::duet_backward(
            ffi::raw(loss),
            handles.as_ptr(),
            handles.len(),
            ready::<E>,
            (&raw mut taking).cast(),
        )
    };
    match taking.failure {
        Some(failure) => Err(failure),
        None if status < 0 => Err(TchError::Torch(ffi::last_error()).into()),
        None => Ok(()),
    }
}

/// # Safety
/// `context` is the `Taking` of [`backward`], used by nobody else at this moment; `grad` is live.
unsafe extern "C" fn ready<E>(context: *mut c_void, index: usize, grad: ffi::DuetTensor) -> i32 {
    // SAFETY: as above.
    let taking = unsafe { &mut *context.cast::<Taking<'_, E>>() };
    let work = AssertUnwindSafe(|| {
        // SAFETY: a live `at::Tensor*`; the clone has a reference of its own.
        let grad = unsafe { Tensor::clone_from_ptr(grad.cast()) };
        // A node that had none for this leaf says so with an undefined tensor.
        if grad.defined() { (taking.take)(index, grad) } else { Ok(()) }
    });
    match catch_unwind(work) {
        Ok(Ok(())) => 0,
        Ok(Err(failure)) => {
            taking.failure.get_or_insert(failure);
            -1
        }
        Err(_) => -1,
    }
}
