//! Activation recomputation: less memory for more arithmetic.

use crate::ffi;
use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind};
use tch::{TchError, Tensor};

/// A function of tensors that can be run again.
type Body = dyn Fn(&[Tensor]) -> Vec<Tensor>;

/// Runs `body` on `inputs` and keeps only the inputs for the backward pass, which runs it again
/// (arXiv 1604.06174). Gradients reach the inputs and the `leaves`, the parameters that `body`
/// holds, and nothing else; they are the bits that a plain call gives, as long as `body` computes the
/// same both times: what it depends on must not change until the backward pass is over.
///
/// Where gradients are off this is a plain call.
///
/// # Errors
/// libtorch refuses, or `body` panics (in the backward pass: the error of that pass).
pub fn recompute(
    inputs: &[&Tensor],
    leaves: &[&Tensor],
    body: impl Fn(&[Tensor]) -> Vec<Tensor> + 'static,
) -> Result<Vec<Tensor>, TchError> {
    let boxed: Box<Box<Body>> = Box::new(Box::new(body));
    let context = Box::into_raw(boxed).cast();
    let raw = |tensors: &[&Tensor]| -> Vec<ffi::DuetTensor> {
        tensors.iter().map(|tensor| ffi::raw(tensor)).collect()
    };
    let (handles, leaves) = (raw(inputs), raw(leaves));
    let mut outputs: Vec<Tensor> = Vec::new();
    // SAFETY: inputs and leaves are live tensors; `context` is what `call` and `release` expect and is handed
    // over; `outputs` outlives the call, which is the only time that `take` is called.
    let status = unsafe {
        ffi::duet_recompute(
            call,
            release,
            context,
            handles.as_ptr(),
            handles.len(),
            leaves.as_ptr(),
            leaves.len(),
            (&raw mut outputs).cast(),
            take,
        )
    };
    if status < 0 {
        return Err(TchError::Torch(ffi::last_error()));
    }
    Ok(outputs)
}

/// # Safety
/// `context` is a `Box<Box<Body>>` that [`recompute`] handed over and that is not released yet,
/// `inputs` are `count` live tensors, `list` is the shim's list.
unsafe extern "C" fn call(
    context: *mut c_void,
    inputs: *const ffi::DuetTensor,
    count: usize,
    list: *mut c_void,
) -> i32 {
    let work = AssertUnwindSafe(|| {
        // SAFETY: as above.
        let body = unsafe { &*context.cast::<Box<Body>>() };
        let handles = match count {
            0 => &[],
            // SAFETY: as above.
            _ => unsafe { std::slice::from_raw_parts(inputs, count) },
        };
        let inputs: Vec<Tensor> = handles
            .iter()
            // SAFETY: each is a live `at::Tensor*`; the clone has a reference of its own.
            .map(|handle| unsafe { Tensor::clone_from_ptr(handle.cast()) })
            .collect();
        body(&inputs)
            .iter()
            // SAFETY: the list copies the reference while the tensor lives.
            .all(|output| unsafe { ffi::duet_list_push(list, ffi::raw(output)) } == 0)
    });
    match catch_unwind(work) {
        Ok(true) => 0,
        Ok(false) | Err(_) => -1,
    }
}

/// # Safety
/// `context` is what [`recompute`] handed over; called once.
unsafe extern "C" fn release(context: *mut c_void) {
    // SAFETY: as above.
    let body = unsafe { Box::from_raw(context.cast::<Box<Body>>()) };
    // A panic of a destructor must not cross into C++.
    let _ = catch_unwind(AssertUnwindSafe(|| drop(body)));
}

/// # Safety
/// `outputs` is the vector of [`recompute`], `tensor` is live.
unsafe extern "C" fn take(outputs: *mut c_void, tensor: ffi::DuetTensor) {
    // SAFETY: as above.
    unsafe { (*outputs.cast::<Vec<Tensor>>()).push(Tensor::clone_from_ptr(tensor.cast())) }
}
