//! The autoencoder, and the shapes of the parts that draw.

use super::{Budget, Notice, Progress};
use crate::digits::{Hand, Painter};
use crate::error::Result;
use crate::learn::Learner;
use duet_core::{Purpose, Seed};
use duet_models::dit::DitConfig;
use duet_models::flow::FlowConfig;
use duet_models::lm::Lm;
use duet_models::vae::{Vae, VaeConfig};
use duet_torch::normal_tensor;
use tch::Kind;

/// Latent channels.
const LATENT: i64 = 4;
/// Weight of the divergence from the unit Gaussian in the autoencoder's loss.
const KL: f64 = 1e-4;
/// Mean squared error of reconstructions is measured on this many images by unseen hands.
const CHECKED: usize = 128;

/// The autoencoder's architecture: 4 pixels to a latent.
pub fn vae_config() -> VaeConfig {
    VaeConfig {
        base_dim: 8,
        z_dim: LATENT,
        dim_mult: vec![1, 2, 2],
        num_res_blocks: 1,
        temperal_downsample: vec![false, true],
        input_channels: 3,
        latents_mean: vec![0.0; LATENT as usize],
        latents_std: vec![1.0; LATENT as usize],
    }
}

/// The transformer's architecture: 8 pixels to a token, 16 tokens to an image.
pub fn dit_config(lm: &Lm) -> DitConfig {
    DitConfig {
        patch_size: 2,
        in_channels: 4 * LATENT,
        out_channels: LATENT,
        num_layers: 3,
        attention_head_dim: 24,
        num_attention_heads: 4,
        joint_attention_dim: lm.config().hidden_size,
        axes_dims_rope: [4, 10, 10],
    }
}

/// The sampling schedule: Qwen-Image's own.
pub fn flow_config() -> FlowConfig {
    FlowConfig::default()
}

/// Trains the autoencoder and measures its latents. Also gives the mean squared error of a
/// reconstruction, pixels in [-1, 1].
///
/// # Errors
/// A loss that is not finite, or libtorch refuses.
pub fn autoencoder(budget: &Budget, seed: &Seed, progress: &dyn Progress) -> Result<(Vae, f64)> {
    let plan = budget.vae;
    let mut vae = Vae::init(vae_config(), &seed.derive(Purpose::Weights, &[5]))?;
    let mut painter = Painter::new(Hand::World, seed.derive(Purpose::Data, &[30]))?;
    let mut learner = Learner::new(vae.params().to_map(), plan)?;
    for step in 0..plan.steps {
        let (images, _) = painter.paint(plan.batch);
        let (mean, logvar) = vae.encode(&images)?;
        let eps = normal_tensor(&seed.derive(Purpose::Data, &[31, step as u64]), &mean.size());
        let drawn = vae.decode_unclamped(&(&mean + (&logvar * 0.5).exp() * eps));
        // Strokes cover a tenth of the image: without extra weight, black is a good answer.
        let weight = (&images + 1.0) * 2.0 + 1.0;
        let error = ((drawn - &images).square() * weight).mean(Kind::Float);
        let kl = (mean.square() + logvar.exp() - 1.0 - &logvar).mean(Kind::Float) * 0.5;
        let loss = learner.step(&(error + kl * KL))?;
        progress.notice(Notice { phase: plan.phase, step: step + 1, steps: plan.steps, loss });
    }
    learner.finish();
    measure(&mut vae, &mut painter)?;
    let (images, _) = Painter::new(Hand::Test, Seed::root(11))?.paint(CHECKED);
    let again = tch::no_grad(|| vae.encode(&images).map(|(mean, _)| vae.decode(&mean)))?;
    let error = (again - images).square().mean(Kind::Float).double_value(&[]);
    Ok((vae, error))
}

/// Mean and standard deviation of each latent channel.
fn measure(vae: &mut Vae, painter: &mut Painter) -> Result<()> {
    let (images, _) = painter.paint(256);
    let (mean, _) = tch::no_grad(|| vae.encode(&images))?;
    let channels = mean.transpose(0, 1).flatten(1, -1).to_kind(Kind::Double);
    let means: Vec<f64> = channels.mean_dim([1i64].as_slice(), false, Kind::Double).try_into()?;
    let stds: Vec<f64> = channels.std_dim([1i64].as_slice(), true, false).try_into()?;
    let stds: Vec<f64> = stds.into_iter().map(|std| std.max(1e-3)).collect();
    Ok(vae.set_latent_statistics(&means, &stds)?)
}
