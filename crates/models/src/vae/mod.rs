//! The Qwen-Image autoencoder (diffusers `AutoencoderKLQwenImage`) on single frames.

mod config;
mod layers;

pub use config::VaeConfig;

use crate::error::{ModelError, Result};
use crate::params::{ParamSet, ParamSpec};
use duet_core::Seed;
use layers::{ChannelNorm, Conv, Middle, Residual};
use tch::{Kind, Tensor};

/// A step of the encoder's flat list.
#[derive(Debug)]
enum Down {
    Residual(Residual),
    Half(Conv),
}

/// A stage of the decoder.
#[derive(Debug)]
struct Up {
    resnets: Vec<Residual>,
    double: Option<Conv>,
}

/// The autoencoder, ready to run.
#[derive(Debug)]
pub struct Vae {
    config: VaeConfig,
    params: ParamSet,
    conv_in: Conv,
    down: Vec<Down>,
    encoder_middle: Middle,
    encoder_norm: ChannelNorm,
    encoder_out: Conv,
    quant: Conv,
    post_quant: Conv,
    decoder_in: Conv,
    decoder_middle: Middle,
    up: Vec<Up>,
    decoder_norm: ChannelNorm,
    decoder_out: Conv,
    mean: Tensor,
    std: Tensor,
}

/// What comes at one index of the encoder's flat list of down blocks.
enum DownKind {
    Residual(i64, i64),
    Half { channels: i64, temporal: bool },
}

fn down_plan(config: &VaeConfig) -> Vec<DownKind> {
    let mut plan = Vec::new();
    let mut channels = config.base_dim;
    for (stage, mult) in config.dim_mult.iter().enumerate() {
        let out = config.base_dim * mult;
        for _ in 0..config.num_res_blocks {
            plan.push(DownKind::Residual(channels, out));
            channels = out;
        }
        if let Some(temporal) = config.temperal_downsample.get(stage) {
            plan.push(DownKind::Half { channels: out, temporal: *temporal });
        }
    }
    plan
}

/// Input channels, output channels and, where it doubles the resolution, whether time too.
fn up_plan(config: &VaeConfig) -> Vec<(i64, i64, Option<bool>)> {
    let stages = config.dim_mult.len();
    let mut plan = Vec::new();
    let mut channels = config.base_dim * config.dim_mult[stages - 1];
    for (index, mult) in config.dim_mult.iter().rev().enumerate() {
        let out = config.base_dim * mult;
        let double = config.temperal_downsample.iter().rev().nth(index).copied();
        plan.push((channels, out, double));
        channels = out / 2;
    }
    plan
}

impl Vae {
    /// Every parameter that `config` calls for.
    pub fn specs(config: &VaeConfig) -> Vec<ParamSpec> {
        let mut out = Vec::new();
        let top = config.base_dim * config.dim_mult[config.dim_mult.len() - 1];
        let z = config.z_dim;
        Conv::specs3(&mut out, "encoder.conv_in", (config.input_channels, config.base_dim), 3);
        for (index, step) in down_plan(config).into_iter().enumerate() {
            let name = format!("encoder.down_blocks.{index}");
            match step {
                DownKind::Residual(from, to) => Residual::specs(&mut out, &name, (from, to)),
                DownKind::Half { channels, temporal } => {
                    Conv::specs2(&mut out, &format!("{name}.resample.1"), (channels, channels), 3);
                    if temporal {
                        let time = format!("{name}.time_conv");
                        Conv::specs_time(&mut out, &time, (channels, channels));
                    }
                }
            }
        }
        Middle::specs(&mut out, "encoder.mid_block", top);
        ChannelNorm::specs(&mut out, "encoder.norm_out", top, true);
        Conv::specs3(&mut out, "encoder.conv_out", (top, 2 * z), 3);
        Conv::specs3(&mut out, "quant_conv", (2 * z, 2 * z), 1);
        Conv::specs3(&mut out, "post_quant_conv", (z, z), 1);
        Conv::specs3(&mut out, "decoder.conv_in", (z, top), 3);
        Middle::specs(&mut out, "decoder.mid_block", top);
        let mut last = top;
        for (index, (mut from, to, double)) in up_plan(config).into_iter().enumerate() {
            let name = format!("decoder.up_blocks.{index}");
            for resnet in 0..=config.num_res_blocks {
                Residual::specs(&mut out, &format!("{name}.resnets.{resnet}"), (from, to));
                from = to;
            }
            if let Some(temporal) = double {
                let name = format!("{name}.upsamplers.0");
                Conv::specs2(&mut out, &format!("{name}.resample.1"), (to, to / 2), 3);
                if temporal {
                    Conv::specs_time(&mut out, &format!("{name}.time_conv"), (to, 2 * to));
                }
            }
            last = to;
        }
        ChannelNorm::specs(&mut out, "decoder.norm_out", last, true);
        Conv::specs3(&mut out, "decoder.conv_out", (last, config.input_channels), 3);
        out
    }

    /// Builds the model on parameters that it then owns.
    pub fn new(config: VaeConfig, params: ParamSet, origin: &str) -> Result<Vae> {
        config.validate(origin)?;
        params.check(&Vae::specs(&config), origin)?;
        let p = &params;
        let down = down_plan(&config).into_iter().enumerate().map(|(index, step)| {
            let name = format!("encoder.down_blocks.{index}");
            Ok(match step {
                DownKind::Residual(..) => Down::Residual(Residual::load(p, &name)?),
                DownKind::Half { .. } => {
                    Down::Half(Conv::load_strided(p, &format!("{name}.resample.1"))?)
                }
            })
        });
        let down = down.collect::<Result<_>>()?;
        let up = up_plan(&config).into_iter().enumerate().map(|(index, (_, _, double))| {
            let name = format!("decoder.up_blocks.{index}");
            let resnets = (0..=config.num_res_blocks)
                .map(|resnet| Residual::load(p, &format!("{name}.resnets.{resnet}")))
                .collect::<Result<_>>()?;
            let conv = format!("{name}.upsamplers.0.resample.1");
            let double = double.map(|_| Conv::load(p, &conv)).transpose()?;
            Ok(Up { resnets, double })
        });
        let up = up.collect::<Result<_>>()?;
        let device = p.iter().next().map_or(tch::Device::Cpu, |(_, tensor)| tensor.device());
        let channel = |values: &[f64]| {
            let values = Tensor::from_slice(values).to_kind(Kind::Float).to_device(device);
            values.view([1, config.z_dim, 1, 1])
        };
        Ok(Vae {
            conv_in: Conv::load(p, "encoder.conv_in")?,
            down,
            encoder_middle: Middle::load(p, "encoder.mid_block")?,
            encoder_norm: ChannelNorm::load(p, "encoder.norm_out")?,
            encoder_out: Conv::load(p, "encoder.conv_out")?,
            quant: Conv::load(p, "quant_conv")?,
            post_quant: Conv::load(p, "post_quant_conv")?,
            decoder_in: Conv::load(p, "decoder.conv_in")?,
            decoder_middle: Middle::load(p, "decoder.mid_block")?,
            up,
            decoder_norm: ChannelNorm::load(p, "decoder.norm_out")?,
            decoder_out: Conv::load(p, "decoder.conv_out")?,
            mean: channel(&config.latents_mean),
            std: channel(&config.latents_std),
            config,
            params,
        })
    }

    /// A model with random weights.
    pub fn init(config: VaeConfig, seed: &Seed) -> Result<Vae> {
        config.validate("a new autoencoder")?;
        let params = ParamSet::init(&Vae::specs(&config), seed);
        Vae::new(config, params, "a new autoencoder")
    }

    /// Its config.
    pub fn config(&self) -> &VaeConfig {
        &self.config
    }

    /// Its parameters, by checkpoint name.
    pub fn params(&self) -> &ParamSet {
        &self.params
    }

    /// The dtype it computes in.
    pub fn kind(&self) -> Kind {
        self.params.iter().next().map_or(Kind::Float, |(_, tensor)| tensor.kind())
    }

    /// Sets the statistics that latents are normalised with (per channel), as measured after
    /// training.
    pub fn set_latent_statistics(&mut self, mean: &[f64], std: &[f64]) -> Result<()> {
        let mut config = self.config.clone();
        (config.latents_mean, config.latents_std) = (mean.to_vec(), std.to_vec());
        config.validate("the measured latent statistics")?;
        let like = |values: &[f64]| {
            let values = Tensor::from_slice(values).to_kind(Kind::Float);
            values.view([1, config.z_dim, 1, 1]).to_device(self.mean.device())
        };
        (self.mean, self.std) = (like(mean), like(std));
        self.config = config;
        Ok(())
    }

    /// Moments of the posterior: images `[B, 3, H, W]` in [-1, 1] to mean and log-variance, each
    /// `[B, z, H/f, W/f]`, the log-variance clamped to [-30, 20].
    pub fn encode(&self, images: &Tensor) -> Result<(Tensor, Tensor)> {
        let (size, factor) = (images.size(), self.config.scale_factor());
        if size.len() != 4 || size[2] % factor != 0 || size[3] % factor != 0 {
            return Err(ModelError::BadInput(format!(
                "images of shape {size:?} cannot be encoded; [B, {}, H, W] with sides that \
                 {factor} divides expected",
                self.config.input_channels
            )));
        }
        let mut x = self.conv_in.forward(images);
        for step in &self.down {
            x = match step {
                Down::Residual(block) => block.forward(&x),
                Down::Half(conv) => conv.forward(&x.constant_pad_nd([0, 1, 0, 1])),
            };
        }
        x = self.encoder_middle.forward(&x);
        x = self.encoder_out.forward(&self.encoder_norm.forward(&x).silu());
        let moments = self.quant.forward(&x);
        let z = self.config.z_dim;
        Ok((moments.narrow(1, 0, z), moments.narrow(1, z, z).clamp(-30.0, 20.0)))
    }

    /// Raw latents `[B, z, h, w]` to images `[B, 3, f h, f w]`, not yet clamped to [-1, 1] (a loss
    /// wants the gradient outside; [`Vae::decode`] clamps).
    pub fn decode_unclamped(&self, latents: &Tensor) -> Tensor {
        let mut x = self.decoder_in.forward(&self.post_quant.forward(latents));
        x = self.decoder_middle.forward(&x);
        for stage in &self.up {
            for resnet in &stage.resnets {
                x = resnet.forward(&x);
            }
            if let Some(conv) = &stage.double {
                let (height, width) = (x.size()[2], x.size()[3]);
                let doubled = [2 * height, 2 * width];
                x = conv.forward(&x.internal_upsample_nearest_exact2d(doubled, 2.0, 2.0));
            }
        }
        self.decoder_out.forward(&self.decoder_norm.forward(&x).silu())
    }

    /// Raw latents to images in [-1, 1].
    pub fn decode(&self, latents: &Tensor) -> Tensor {
        self.decode_unclamped(latents).clamp(-1.0, 1.0)
    }

    /// `(z - mean) / std` per channel, fp32.
    pub fn normalize(&self, latents: &Tensor) -> Tensor {
        (latents.to_kind(Kind::Float) - &self.mean) / &self.std
    }

    /// `z * std + mean` per channel, fp32.
    pub fn denormalize(&self, latents: &Tensor) -> Tensor {
        latents.to_kind(Kind::Float) * &self.std + &self.mean
    }
}

/// Images in [-1, 1] `[B, 3, H, W]` to `[B, H, W, 3]` u8: `round((x / 2 + 0.5) * 255)`.
pub fn to_bytes(images: &Tensor) -> Tensor {
    let pixels = (images.to_kind(Kind::Float) / 2.0 + 0.5).clamp(0.0, 1.0) * 255.0;
    pixels.round().to_kind(Kind::Uint8).permute([0, 2, 3, 1]).contiguous()
}

/// `[B, H, W, 3]` u8 to images in [-1, 1] `[B, 3, H, W]`.
pub fn from_bytes(images: &Tensor) -> Tensor {
    (images.permute([0, 3, 1, 2]).to_kind(Kind::Float) / 127.5 - 1.0).contiguous()
}

/// Latents `[B, c, 2h, 2w]` to tokens `[B, h w, 4 c]`, channel `c * 4 + dy * 2 + dx`.
pub fn pack(latents: &Tensor) -> Tensor {
    let size = latents.size();
    let (batch, channels, height, width) = (size[0], size[1], size[2] / 2, size[3] / 2);
    let split = latents.reshape([batch, channels, height, 2, width, 2]);
    split.permute([0, 2, 4, 1, 3, 5]).reshape([batch, height * width, channels * 4])
}

/// Tokens `[B, h w, 4 c]` to latents `[B, c, 2h, 2w]`; the inverse of [`pack`].
pub fn unpack(tokens: &Tensor, grid: (i64, i64)) -> Tensor {
    let size = tokens.size();
    let (batch, channels) = (size[0], size[2] / 4);
    let split = tokens.reshape([batch, grid.0, grid.1, channels, 2, 2]);
    split.permute([0, 3, 1, 4, 2, 5]).reshape([batch, channels, 2 * grid.0, 2 * grid.1])
}
