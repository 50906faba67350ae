//! Operations that libtorch puts together from several passes over memory on the CPU, in one pass
//! each, with their gradients (first order only). For the backward pass they keep their inputs.
//!
//! Where [`fits`] says no, libtorch's own operations are to be used: other devices have such kernels.

use crate::ffi;
use tch::{Device, Kind, TchError, Tensor};

/// Whether these operations take `x`: fp32 on the CPU.
pub fn fits(x: &Tensor) -> bool {
    x.device() == Device::Cpu && x.kind() == Kind::Float
}

/// RMS norm over the last dimension: `x rsqrt(mean(x^2) + eps) weight`.
///
/// # Errors
/// When shapes or kinds do not fit.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor, TchError> {
    // SAFETY: both tensors live during the call.
    owned(unsafe { ffi::duet_rms_norm(ffi::raw(x), ffi::raw(weight), eps) })
}

/// RMS norms of parts `[B, N, H, D]` over D, each with its weight `[D]`, laid one behind the other,
/// `[B, sum of N, H, D]`; then every pair `(x[2i], x[2i+1])` rotated by the unit complex numbers
/// `units` `[sum of N, D / 2]` (dimensions of one do not matter).
///
/// # Errors
/// When shapes or kinds do not fit.
pub fn norm_rotate(
    parts: &[(&Tensor, &Tensor)],
    units: &Tensor,
    eps: f64,
) -> Result<Tensor, TchError> {
    let (parts, weights): (Vec<_>, Vec<_>) =
        parts.iter().map(|(part, weight)| (ffi::raw(part), ffi::raw(weight))).unzip();
    let count = parts.len();
    // SAFETY: all tensors live during the call; both lists are `count` long.
    owned(unsafe {
        ffi::duet_norm_rotate(parts.as_ptr(), weights.as_ptr(), count, ffi::raw(units), eps)
    })
}

/// GELU in its tanh form.
///
/// # Errors
/// When `x` does not fit.
pub fn gelu(x: &Tensor) -> Result<Tensor, TchError> {
    // SAFETY: the tensor lives during the call.
    owned(unsafe { ffi::duet_gelu(ffi::raw(x)) })
}

fn owned(tensor: ffi::DuetTensor) -> Result<Tensor, TchError> {
    if tensor.is_null() {
        return Err(TchError::Torch(ffi::last_error()));
    }
    // SAFETY: a new `at::Tensor` that nobody else holds; `Tensor` frees it.
    Ok(unsafe { Tensor::from_ptr(tensor.cast()) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use duet_core::Seed;

    fn noise(shape: &[i64], seed: u64) -> Tensor {
        crate::normal_tensor(&Seed::root(seed), shape).set_requires_grad(true)
    }

    /// Values and gradients of `got` are those of `want`, both functions of `inputs`.
    fn same(inputs: &[&Tensor], got: impl Fn() -> Tensor, want: impl Fn() -> Tensor) {
        let run = |f: &dyn Fn() -> Tensor| {
            let out = f();
            let factor = crate::normal_tensor(&Seed::root(99), &out.size());
            (&out * factor).sum(Kind::Float).backward();
            let grads: Vec<Tensor> = inputs.iter().map(|x| x.grad().copy()).collect();
            inputs.iter().for_each(|x| x.shallow_clone().zero_grad());
            let plain = tch::no_grad(f);
            assert_eq!(plain, out.detach(), "with and without gradients");
            std::iter::once(out.detach()).chain(grads).collect::<Vec<_>>()
        };
        for (got, want) in run(&got).iter().zip(run(&want)) {
            let far = (got - &want).abs().max().double_value(&[]);
            let scale = want.abs().max().double_value(&[]).max(1.0);
            assert!(far <= 3e-6 * scale, "{far} of {scale}");
        }
    }

    #[test]
    fn norms_and_gelu_are_libtorchs_with_their_gradients() {
        for shape in [vec![3, 5, 32], vec![150, 7], vec![1, 1, 1]] {
            let (x, weight) = (noise(&shape, 1), noise(&shape[shape.len() - 1..], 2));
            let size = weight.size();
            same(
                &[&x, &weight],
                || rms_norm(&x, &weight, 1e-6).unwrap(),
                || x.rms_norm(size.as_slice(), Some(&weight), 1e-6),
            );
            same(&[&x], || gelu(&(&x * 3.0)).unwrap(), || (&x * 3.0).gelu("tanh"));
        }
    }

    #[test]
    fn rotated_norms_of_parts_are_libtorchs_with_their_gradients() {
        let (b, heads, d) = (3, 2, 12);
        let angles = noise(&[13, d / 2], 3).detach();
        let units = Tensor::polar(&angles.ones_like(), &angles);
        let (text, image) = (noise(&[b, 4, heads, d], 4), noise(&[b, 9, heads, d], 5));
        let (w, v) = (noise(&[d], 6), noise(&[d], 7));
        let whole = || {
            let norm = |x: &Tensor, w: &Tensor| x.rms_norm([d], Some(w), 1e-6);
            let joint = Tensor::cat(&[norm(&text, &w), norm(&image, &v)], 1);
            let pairs = joint.view([b, 13, heads, d / 2, 2]).view_as_complex();
            let turned = pairs * units.view([1, 13, 1, d / 2]);
            turned.view_as_real().flatten(3, 4)
        };
        let fused = || norm_rotate(&[(&text, &w), (&image, &v)], &units, 1e-6).unwrap();
        same(&[&text, &image, &w, &v], fused, whole);
        assert!(norm_rotate(&[(&text, &w)], &units, 1e-6).is_err());
        assert!(rms_norm(&text, &angles, 1e-6).is_err());
        assert!(gelu(&text.to_kind(Kind::Double)).is_err());
    }
}
