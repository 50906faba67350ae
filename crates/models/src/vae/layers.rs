//! Layers of the autoencoder, reduced to one frame.
//!
//! Every causal 3-D convolution pads time with zeros in front, so on a single frame only the last
//! temporal slice of its kernel acts: a plain 2-D convolution. The temporal convolutions of the
//! resamplers do not act at all. Weights keep their published five dimensions.

use crate::error::Result;
use crate::nn::fetch;
use crate::params::{Init, ParamSet, ParamSpec};
use tch::{Kind, Tensor};

/// A convolution, causal 3-D or plain 2-D on disk.
#[derive(Debug)]
pub(super) struct Conv {
    weight: Tensor,
    bias: Tensor,
    padding: i64,
    stride: i64,
}

impl Conv {
    /// Specs of a causal 3-D convolution with a cubic kernel.
    pub(super) fn specs3(out: &mut Vec<ParamSpec>, name: &str, io: (i64, i64), kernel: i64) {
        let shape = [io.1, io.0, kernel, kernel, kernel];
        out.push(ParamSpec::new(format!("{name}.weight"), &shape, Init::Xavier));
        out.push(ParamSpec::new(format!("{name}.bias"), &[io.1], Init::Zeros));
    }

    /// Specs of a 2-D convolution.
    pub(super) fn specs2(out: &mut Vec<ParamSpec>, name: &str, io: (i64, i64), kernel: i64) {
        let shape = [io.1, io.0, kernel, kernel];
        out.push(ParamSpec::new(format!("{name}.weight"), &shape, Init::Xavier));
        out.push(ParamSpec::new(format!("{name}.bias"), &[io.1], Init::Zeros));
    }

    /// Specs of a resampler's convolution over time, which never acts on one frame.
    pub(super) fn specs_time(out: &mut Vec<ParamSpec>, name: &str, io: (i64, i64)) {
        let shape = [io.1, io.0, 3, 1, 1];
        out.push(ParamSpec::new(format!("{name}.weight"), &shape, Init::Xavier));
        out.push(ParamSpec::new(format!("{name}.bias"), &[io.1], Init::Zeros));
    }

    pub(super) fn load(params: &ParamSet, name: &str) -> Result<Conv> {
        let weight = fetch(params, &format!("{name}.weight"))?;
        let padding = weight.size().last().copied().unwrap_or(1) / 2;
        Ok(Conv { weight, bias: fetch(params, &format!("{name}.bias"))?, padding, stride: 1 })
    }

    /// A convolution of stride 2, whose input is padded right and bottom beforehand.
    pub(super) fn load_strided(params: &ParamSet, name: &str) -> Result<Conv> {
        Ok(Conv { padding: 0, stride: 2, ..Conv::load(params, name)? })
    }

    pub(super) fn forward(&self, x: &Tensor) -> Tensor {
        let slice;
        let weight = match self.weight.dim() {
            5 => {
                slice = self.weight.select(2, -1);
                &slice
            }
            _ => &self.weight,
        };
        let (stride, padding) = ([self.stride; 2], [self.padding; 2]);
        x.conv2d(weight, Some(&self.bias), stride, padding, [1, 1], 1)
    }
}

/// `x / max(|x|, 1e-12) * sqrt(C) * gamma`, the norm over channels.
#[derive(Debug)]
pub(super) struct ChannelNorm {
    gamma: Tensor,
    channels: i64,
}

impl ChannelNorm {
    pub(super) fn specs(out: &mut Vec<ParamSpec>, name: &str, channels: i64, video: bool) {
        let shape = [channels, 1, 1, 1];
        let shape = if video { &shape[..] } else { &shape[..3] };
        out.push(ParamSpec::new(format!("{name}.gamma"), shape, Init::Ones));
    }

    pub(super) fn load(params: &ParamSet, name: &str) -> Result<ChannelNorm> {
        let gamma = fetch(params, &format!("{name}.gamma"))?;
        let channels = gamma.size()[0];
        Ok(ChannelNorm { gamma, channels })
    }

    pub(super) fn forward(&self, x: &Tensor) -> Tensor {
        let kind = x.kind();
        let wide = x.to_kind(Kind::Float);
        let norm = wide.norm_scalaropt_dim(2.0, [1], true).clamp_min(1e-12);
        let gamma = self.gamma.view([self.channels, 1, 1]) * (self.channels as f64).sqrt();
        (wide / norm).to_kind(kind) * gamma
    }
}

/// Norm, SiLU, convolution, twice, plus a shortcut.
#[derive(Debug)]
pub(super) struct Residual {
    norm1: ChannelNorm,
    conv1: Conv,
    norm2: ChannelNorm,
    conv2: Conv,
    shortcut: Option<Conv>,
}

impl Residual {
    pub(super) fn specs(out: &mut Vec<ParamSpec>, name: &str, io: (i64, i64)) {
        ChannelNorm::specs(out, &format!("{name}.norm1"), io.0, true);
        Conv::specs3(out, &format!("{name}.conv1"), io, 3);
        ChannelNorm::specs(out, &format!("{name}.norm2"), io.1, true);
        Conv::specs3(out, &format!("{name}.conv2"), (io.1, io.1), 3);
        if io.0 != io.1 {
            Conv::specs3(out, &format!("{name}.conv_shortcut"), io, 1);
        }
    }

    pub(super) fn load(params: &ParamSet, name: &str) -> Result<Residual> {
        let shortcut = format!("{name}.conv_shortcut");
        let has = params.contains(&format!("{shortcut}.weight"));
        Ok(Residual {
            norm1: ChannelNorm::load(params, &format!("{name}.norm1"))?,
            conv1: Conv::load(params, &format!("{name}.conv1"))?,
            norm2: ChannelNorm::load(params, &format!("{name}.norm2"))?,
            conv2: Conv::load(params, &format!("{name}.conv2"))?,
            shortcut: has.then(|| Conv::load(params, &shortcut)).transpose()?,
        })
    }

    pub(super) fn forward(&self, x: &Tensor) -> Tensor {
        let inner = self.conv1.forward(&self.norm1.forward(x).silu());
        let inner = self.conv2.forward(&self.norm2.forward(&inner).silu());
        match &self.shortcut {
            Some(shortcut) => inner + shortcut.forward(x),
            None => inner + x,
        }
    }
}

/// Residual block, single-head attention over all positions, residual block.
#[derive(Debug)]
pub(super) struct Middle {
    before: Residual,
    norm: ChannelNorm,
    qkv: Conv,
    proj: Conv,
    after: Residual,
}

impl Middle {
    pub(super) fn specs(out: &mut Vec<ParamSpec>, name: &str, channels: i64) {
        Residual::specs(out, &format!("{name}.resnets.0"), (channels, channels));
        ChannelNorm::specs(out, &format!("{name}.attentions.0.norm"), channels, false);
        Conv::specs2(out, &format!("{name}.attentions.0.to_qkv"), (channels, 3 * channels), 1);
        Conv::specs2(out, &format!("{name}.attentions.0.proj"), (channels, channels), 1);
        Residual::specs(out, &format!("{name}.resnets.1"), (channels, channels));
    }

    pub(super) fn load(params: &ParamSet, name: &str) -> Result<Middle> {
        Ok(Middle {
            before: Residual::load(params, &format!("{name}.resnets.0"))?,
            norm: ChannelNorm::load(params, &format!("{name}.attentions.0.norm"))?,
            qkv: Conv::load(params, &format!("{name}.attentions.0.to_qkv"))?,
            proj: Conv::load(params, &format!("{name}.attentions.0.proj"))?,
            after: Residual::load(params, &format!("{name}.resnets.1"))?,
        })
    }

    pub(super) fn forward(&self, x: &Tensor) -> Tensor {
        let x = self.before.forward(x);
        let size = x.size();
        let qkv = self.qkv.forward(&self.norm.forward(&x));
        let qkv = qkv.flatten(2, 3).transpose(1, 2).unsqueeze(1).contiguous();
        let part = |index: i64| qkv.narrow(3, index * size[1], size[1]);
        let out = crate::nn::attention(&part(0), &part(1), &part(2), None, false);
        let out = out.squeeze_dim(1).transpose(1, 2).reshape(size.as_slice());
        self.after.forward(&(x + self.proj.forward(&out)))
    }
}
