//! GELU in one pass on the CPU.

use crate::ffi;
use tch::Tensor;

/// GELU with the tanh formula (`0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))`, arXiv 1606.08415),
/// with gradient where gradients are on. On the CPU in fp32 one pass over memory each way, the same bits
/// for any number of threads and any batch; elsewhere libtorch's own.
pub fn gelu(x: &Tensor) -> Tensor {
    // SAFETY: a live tensor; what comes back is owned.
    let made = unsafe { ffi::duet_gelu(ffi::raw(x)) };
    if made.is_null() {
        // It refuses for want of memory alone, which libtorch's own then says as it always does.
        return x.gelu("tanh");
    }
    // SAFETY: a new `at::Tensor*`.
    unsafe { Tensor::from_ptr(made.cast()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    fn near(found: &Tensor, exact: &Tensor) {
        let far = (found.to_kind(Kind::Double) - exact).abs().max().double_value(&[]);
        let scale = exact.abs().max().double_value(&[]);
        assert!(far < 1e-6 * scale, "{far} of {scale}");
    }

    #[test]
    fn it_is_the_formula_in_double_precision_forward_and_backward() {
        crate::init(1).unwrap();
        for shape in [vec![5], vec![8], vec![3, 1027], vec![64, 4096]] {
            let x = Tensor::randn(shape.as_slice(), (Kind::Float, Device::Cpu)) * 4.0;
            let weight = Tensor::randn(shape.as_slice(), (Kind::Float, Device::Cpu));
            let both = [x.detach(), x.to_kind(Kind::Double)].map(|x| x.set_requires_grad(true));
            let found = gelu(&both[0]);
            let exact = both[1].gelu("tanh");
            near(&found.detach(), &exact.detach());
            (found * &weight).sum(Kind::Float).backward();
            (exact * weight.to_kind(Kind::Double)).sum(Kind::Double).backward();
            let grads = both.map(|x| x.grad());
            near(&grads[0], &grads[1]);
            assert_eq!(tch::no_grad(|| gelu(&x)), gelu(&x.detach()));
        }
    }

    #[test]
    fn ends_and_other_layouts_and_kinds() {
        crate::init(1).unwrap();
        let x = Tensor::from_slice(&[f32::INFINITY, 100.0, 0.0, 30.0, -100.0]);
        let y = Vec::<f32>::try_from(gelu(&x)).unwrap();
        assert_eq!(y[..4], [f32::INFINITY, 100.0, 0.0, 30.0]);
        assert!(y[4].abs() < 1e-30, "{}", y[4]);
        assert!(gelu(&Tensor::from(f32::NAN)).double_value(&[]).is_nan());
        let x = Tensor::randn([6, 8], (Kind::Float, Device::Cpu));
        assert!((gelu(&x.tr()) - gelu(&x).tr()).abs().max().double_value(&[]) < 1e-6);
        let half = x.to_kind(Kind::BFloat16);
        assert_eq!(gelu(&half), half.gelu("tanh"));
    }
}
