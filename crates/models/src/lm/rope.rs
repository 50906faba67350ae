//! Rotary position tables of the language model.

use super::config::LmConfig;
use super::layer::Rotation;
use tch::{Device, Kind, Tensor};

/// Rows computed ahead; longer sequences compute theirs when they come.
const ROWS: i64 = 2048;

/// Cosines and sines by position. The sine's first half is negated, so that the half-rotation
/// `cat(-x2, x1) * sin` is `roll(x, D/2) * sin`.
#[derive(Debug)]
pub(super) struct RopeTable {
    inverse: Tensor,
    kind: Kind,
    cos: Tensor,
    sin: Tensor,
}

impl RopeTable {
    pub(super) fn new(config: &LmConfig, device: Device, kind: Kind) -> Self {
        let dim = config.head_dim();
        let exponent = Tensor::arange_start_step(0, dim, 2, (Kind::Int64, device));
        let exponent = exponent.to_kind(Kind::Float) / dim as f64;
        let inverse = Tensor::from(config.rope_theta as f32).to_device(device).pow(&exponent);
        let inverse = inverse.reciprocal();
        let rows = Tensor::arange(ROWS, (Kind::Int64, device));
        let (cos, sin) = angles(&inverse, &rows, kind);
        RopeTable { inverse, kind, cos, sin }
    }

    /// Rotations of `start..start + len`, each `[len, D]`, shared by batch and heads.
    pub(super) fn range(&self, start: i64, len: i64) -> Rotation {
        if start + len <= ROWS {
            let (cos, sin) = (self.cos.narrow(0, start, len), self.sin.narrow(0, start, len));
            return Rotation { cos, sin };
        }
        let rows = Tensor::arange_start(start, start + len, (Kind::Int64, self.cos.device()));
        let (cos, sin) = angles(&self.inverse, &rows, self.kind);
        Rotation { cos, sin }
    }

    /// Rotations at `positions` `[B, T]`, each `[B, 1, T, D]`.
    pub(super) fn at(&self, positions: &Tensor) -> Rotation {
        let (cos, sin) = angles(&self.inverse, positions, self.kind);
        Rotation { cos: cos.unsqueeze(1), sin: sin.unsqueeze(1) }
    }
}

/// Angles in fp32, cosines and sines cast to the model's dtype, as transformers does.
fn angles(inverse: &Tensor, positions: &Tensor, kind: Kind) -> (Tensor, Tensor) {
    let half = positions.to_kind(Kind::Float).unsqueeze(-1) * inverse;
    let (cos, sin) = (half.cos().to_kind(kind), half.sin().to_kind(kind));
    (Tensor::cat(&[&cos, &cos], -1), Tensor::cat(&[&-&sin, &sin], -1))
}
