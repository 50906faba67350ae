//! Linear layers laid out for the product beforehand, for sampling on the CPU.

use crate::ffi;
use std::ptr::null_mut;
use tch::{Kind, TchError, Tensor};

/// Columns of a panel.
const WIDTH: i64 = 24;

/// A weight `[out, in]` as panels of 24 columns, fp32 on the CPU. What libtorch's product copies and sorts
/// at every call is done once, and every row of a result is the same bits whatever the other rows are.
#[derive(Debug)]
pub struct Panels {
    /// `[ceil(out / 24), in, 24]`.
    panels: Tensor,
    bias: Option<Tensor>,
    out: i64,
}

impl Panels {
    /// Copies a weight `[out, in]` and its bias `[out]`.
    ///
    /// # Errors
    /// libtorch refuses.
    pub fn new(weight: &Tensor, bias: Option<&Tensor>) -> Result<Panels, TchError> {
        tch::no_grad(|| {
            let weight = weight.detach().f_to_kind(Kind::Float)?;
            let (out, into) = weight.size2()?;
            let count = out.div_euclid(WIDTH) + i64::from(out % WIDTH != 0);
            let padded = weight.f_constant_pad_nd([0, 0, 0, count * WIDTH - out])?;
            let panels = padded.f_view([count, WIDTH, into])?.f_transpose(1, 2)?.f_contiguous()?;
            let bias = bias.map(|bias| bias.detach().f_to_kind(Kind::Float)?.f_contiguous());
            Ok(Panels { panels, bias: bias.transpose()?, out })
        })
    }

    /// Handles to the same panels.
    pub fn share(&self) -> Panels {
        let bias = self.bias.as_ref().map(Tensor::shallow_clone);
        Panels { panels: self.panels.shallow_clone(), bias, out: self.out }
    }

    /// `x W' + b` over the last dimension. No gradient.
    ///
    /// # Errors
    /// `x` `[.., in]` is not fp32 on the CPU or does not fit.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor, TchError> {
        let bias = self.bias.as_ref().map_or(null_mut(), ffi::raw);
        // SAFETY: live tensors; the shim checks their shapes; what comes back is owned.
        let made =
            unsafe { ffi::duet_panels_linear(ffi::raw(x), ffi::raw(&self.panels), bias, self.out) };
        if made.is_null() {
            return Err(TchError::Torch(ffi::last_error()));
        }
        // SAFETY: a new `at::Tensor*`.
        Ok(unsafe { Tensor::from_ptr(made.cast()) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    #[test]
    fn panels_are_the_layer_and_a_row_does_not_depend_on_the_others() {
        crate::init(1).unwrap();
        let random = |shape: &[i64]| Tensor::randn(shape, (Kind::Float, Device::Cpu));
        for (rows, into, out) in [(1, 3, 1), (67, 40, 24), (130, 33, 50), (5, 768, 192)] {
            let (weight, bias) = (random(&[out, into]), random(&[out]));
            let x = random(&[2, rows, into]);
            for bias in [None, Some(&bias)] {
                let panels = Panels::new(&weight, bias).unwrap();
                let found = panels.apply(&x).unwrap();
                let exact = x.linear(&weight, bias);
                assert_eq!(found.size(), exact.size());
                let far = (&found - &exact).abs().max().double_value(&[]);
                assert!(far < 1e-5 * exact.abs().max().double_value(&[]).max(1.0), "{far}");
                let last = x.narrow(0, 1, 1).narrow(1, rows - 1, 1);
                assert_eq!(
                    panels.apply(&last).unwrap(),
                    found.narrow(0, 1, 1).narrow(1, rows - 1, 1)
                );
            }
        }
        let panels = Panels::new(&random(&[4, 3]), None).unwrap();
        let error = panels.apply(&random(&[2, 4])).unwrap_err().to_string();
        assert!(error.contains("do not take"), "{error}");
    }
}
