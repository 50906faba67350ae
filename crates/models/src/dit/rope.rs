//! Rotary positions of the transformer (diffusers `QwenEmbedRope`, `scale_rope=True`): interleaved
//! pairs, three axes (frame, height, width), image positions centred on zero, text positions along
//! the diagonal from where the image ends.

use super::config::DitConfig;
use tch::{Device, Kind, Tensor};

/// Base of the frequencies.
const THETA: f64 = 10_000.0;

/// Angles `[T + S, head_dim / 2]` in fp32 of `text` text tokens followed by the image tokens of a
/// `grid` of (height, width), row by row.
pub fn joint_angles(config: &DitConfig, text: i64, grid: (i64, i64), device: Device) -> Tensor {
    let (height, width) = grid;
    let origin = (height / 2).max(width / 2);
    let range = |start: i64, end: i64| Tensor::arange_start(start, end, (Kind::Float, device));
    let text_at = range(origin, origin + text);
    let rows = range(-(height - height / 2), height / 2);
    let columns = range(-(width - width / 2), width / 2);
    let [frame_dim, height_dim, width_dim] = config.axes_dims_rope;

    let text_part = Tensor::cat(
        &[outer(&text_at, frame_dim), outer(&text_at, height_dim), outer(&text_at, width_dim)],
        1,
    );
    let frame = Tensor::zeros([height * width, frame_dim / 2], (Kind::Float, device));
    let vertical = outer(&rows, height_dim).unsqueeze(1).expand([-1, width, -1], false);
    let horizontal = outer(&columns, width_dim).unsqueeze(0).expand([height, -1, -1], false);
    let image_part = Tensor::cat(
        &[
            frame,
            vertical.reshape([height * width, height_dim / 2]),
            horizontal.reshape([height * width, width_dim / 2]),
        ],
        1,
    );
    Tensor::cat(&[text_part, image_part], 0)
}

/// `position * theta^(-2i / dim)` for the `dim / 2` pairs of one axis.
fn outer(positions: &Tensor, dim: i64) -> Tensor {
    let exponent = Tensor::arange_start_step(0, dim, 2, (Kind::Int64, positions.device()));
    let exponent = exponent.to_kind(Kind::Float) / dim as f64;
    let base = Tensor::from(THETA as f32).to_device(positions.device());
    positions.unsqueeze(1) * base.pow(&exponent).reciprocal().unsqueeze(0)
}

/// Unit complex numbers at `angles`, shaped `[1, N, 1, head_dim / 2]` for `[B, N, H, D]` inputs.
pub fn unit(angles: &Tensor) -> Tensor {
    Tensor::polar(&angles.ones_like(), angles).unsqueeze(0).unsqueeze(2)
}

/// Rotates pairs `(x[2i], x[2i+1])` of `[B, N, H, D]`, in fp32 whatever the dtype.
pub fn rotate(x: &Tensor, unit: &Tensor) -> Tensor {
    let shape = x.size();
    let pairs = [shape[0], shape[1], shape[2], shape[3] / 2, 2];
    let kind = x.kind();
    let rotated = x.to_kind(Kind::Float).view(pairs).view_as_complex() * unit;
    rotated.view_as_real().flatten(3, 4).to_kind(kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> DitConfig {
        DitConfig {
            patch_size: 2,
            in_channels: 64,
            out_channels: 16,
            num_layers: 1,
            attention_head_dim: 128,
            num_attention_heads: 1,
            joint_attention_dim: 16,
            axes_dims_rope: [16, 56, 56],
        }
    }

    /// Angles of Qwen-Image's own head split on a 32 x 32 grid, computed in float64.
    #[test]
    fn angles_match_the_published_formula() {
        let angles = joint_angles(&config(), 2, (32, 32), Device::Cpu);
        assert_eq!(angles.size(), [2 + 1024, 64]);
        let near = |row: i64, column: i64, want: f64| {
            let got = angles.double_value(&[row, column]);
            assert!((got - want).abs() < 1e-5, "({row}, {column}): {got} != {want}");
        };
        near(0, 0, 16.0);
        near(0, 1, 5.059644);
        near(0, 2, 1.6);
        near(0, 8, 16.0);
        near(0, 9, 11.514971);
        near(0, 10, 8.287159);
        near(2, 0, 0.0);
        near(2, 8, -16.0);
        near(2, 9, -11.514971);
        near(2, 36, -16.0);
    }
}
