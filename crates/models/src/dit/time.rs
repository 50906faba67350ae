//! The path of the timestep, and the modulations that come of it.

use super::config::DitConfig;
use crate::error::Result;
use crate::nn::Linear;
use crate::params::{Init, ParamSet, ParamSpec};
use tch::{Kind, Tensor};

/// Width of the sinusoidal embedding.
const CHANNELS: i64 = 256;

/// Sinusoidal embedding `[N, 256]` of times in [0, 1] (diffusers `Timesteps` with
/// `flip_sin_to_cos`, `downscale_freq_shift = 0`, `scale = 1000`): cosines first, then sines.
///
/// The time is rounded to the model's dtype before, as diffusers does, and everything after that is
/// fp32.
pub fn sinusoid(times: &Tensor, kind: Kind) -> Tensor {
    let half = CHANNELS / 2;
    let index = Tensor::arange(half, (Kind::Float, times.device()));
    let frequencies = (index * (-(10_000f64.ln())) / half as f64).exp();
    let times = times.to_kind(kind).to_kind(Kind::Float);
    let angles = times.unsqueeze(1) * frequencies.unsqueeze(0) * 1000.0;
    Tensor::cat(&[angles.cos(), angles.sin()], 1)
}

/// Two-layer perceptron on the sinusoid.
#[derive(Debug)]
pub struct TimeEmbedding {
    pub(super) first: Linear,
    pub(super) second: Linear,
}

const NAME: &str = "time_text_embed.timestep_embedder";

impl TimeEmbedding {
    pub(super) fn specs(out: &mut Vec<ParamSpec>, config: &DitConfig) {
        let d = config.inner_dim();
        Linear::specs(out, &format!("{NAME}.linear_1"), (CHANNELS, d), true, Init::Normal(0.02));
        Linear::specs(out, &format!("{NAME}.linear_2"), (d, d), true, Init::Normal(0.02));
    }

    pub(super) fn load(params: &ParamSet) -> Result<Self> {
        Ok(TimeEmbedding {
            first: Linear::load(params, &format!("{NAME}.linear_1"))?,
            second: Linear::load(params, &format!("{NAME}.linear_2"))?,
        })
    }

    /// SiLU of the embedding of `times` `[N]` in [0, 1]: `[N, D]`. Every user of the embedding
    /// applies SiLU first, so it is done once here.
    pub(super) fn forward(&self, times: &Tensor) -> Tensor {
        let kind = self.first.weight.kind();
        let x = sinusoid(times, kind).to_kind(kind);
        self.second.forward(&self.first.forward(&x).silu()).silu()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sinusoid_matches_float64_values() {
        let e = sinusoid(&Tensor::from_slice(&[0.5f32]), Kind::Float);
        for (index, want) in [
            (0, -0.883849),
            (1, 0.945943),
            (127, 0.998557),
            (128, -0.467772),
            (129, 0.324334),
            (255, 0.053705),
        ] {
            let got = e.double_value(&[0, index]);
            assert!((got - want).abs() < 1e-4, "e[{index}] = {got}, not {want}");
        }
    }
}
