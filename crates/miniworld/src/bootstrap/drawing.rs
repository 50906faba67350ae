//! The parts that draw: autoencoder and transformer.

use super::{Budget, Notice, Progress};
use crate::digits::{Hand, Label, Painter, SIDE};
use crate::error::Result;
use crate::facts::{COLOURS, NUMBERS, PLACES};
use crate::learn::{Learner, Plan};
use crate::prompts::caption;
use duet_core::{Purpose, Seed};
use duet_models::dit::{Dit, DitConfig};
use duet_models::embed::Embedder;
use duet_models::flow::FlowConfig;
use duet_models::lm::Lm;
use duet_models::tokenizer::Tokenizer;
use duet_models::vae::{Vae, VaeConfig, pack};
use duet_torch::{normal_tensor, uniform_tensor};
use tch::{Kind, Tensor};

/// Latent channels.
const LATENT: i64 = 4;
/// Weight of the divergence from the unit Gaussian in the autoencoder's loss.
const KL: f64 = 1e-4;
/// Share of captions that are dropped, so that guidance has something to push away from.
const DROPPED: f64 = 0.1;
/// Images that the transformer is trained on, encoded once.
const POOL: usize = 4096;

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

/// Embeddings of every caption there is, and of the empty one: `[241, T, D]` with a mask `[241, T]`.
struct Captions {
    embeds: Tensor,
    mask: Tensor,
}

impl Captions {
    fn new(lm: &Lm, tokenizer: &Tokenizer) -> Result<Captions> {
        let mut texts = Vec::new();
        for digit in 0..NUMBERS.len() as u8 {
            for colour in 0..COLOURS.len() as u8 {
                for place in 0..PLACES.len() as u8 {
                    texts.push(caption(digit, colour, place));
                }
            }
        }
        texts.push(" ".to_owned());
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        let rows = Embedder::new(lm, tokenizer)?.embed_many(&texts)?;
        let longest = rows.iter().map(|row| row.size()[0]).max().unwrap_or(0);
        let pad = |row: &Tensor| row.constant_pad_nd([0, 0, 0, longest - row.size()[0]]);
        let lengths: Vec<i64> = rows.iter().map(|row| row.size()[0]).collect();
        let positions = Tensor::arange(longest, (Kind::Int64, tch::Device::Cpu));
        let mask = positions.unsqueeze(0).lt_tensor(&Tensor::from_slice(&lengths).unsqueeze(1));
        let rows: Vec<Tensor> = rows.iter().map(pad).collect();
        Ok(Captions { embeds: Tensor::stack(&rows, 0), mask })
    }

    fn row(label: &Label) -> i64 {
        let (digit, colour, place) = (label.digit, label.colour, label.place);
        ((i64::from(digit) * COLOURS.len() as i64) + i64::from(colour)) * PLACES.len() as i64
            + i64::from(place)
    }

    fn empty(&self) -> i64 {
        self.mask.size()[0] - 1
    }
}

/// Flow matching (arXiv 2210.02747) on captioned images: `x_t = (1 - t) x_0 + t eps`, the velocity
/// `eps - x_0` is regressed; t is the logistic of a normal number.
///
/// # Errors
/// As [`autoencoder`].
pub fn transformer(
    parts: (&Lm, &Tokenizer, &Vae),
    config: DitConfig,
    plan: Plan,
    seed: &Seed,
    progress: &dyn Progress,
) -> Result<Dit> {
    let (lm, tokenizer, vae) = parts;
    let dit = Dit::init(config, &seed.derive(Purpose::Weights, &[6]))?;
    let captions = Captions::new(lm, tokenizer)?;
    let (latents, rows) = pool(vae, &seed.derive(Purpose::Data, &[40]))?;
    let side = SIDE as i64 / (vae.config().scale_factor() * 2);
    let positions = dit.positions(captions.embeds.size()[1], (side, side));
    let mut learner = Learner::new(dit.params().to_map(), plan)?;
    let batch = plan.batch as i64;
    for step in 0..plan.steps {
        let seed = seed.derive(Purpose::Data, &[41, step as u64]);
        let part = |what: u64| seed.derive(Purpose::Data, &[what]);
        let picked =
            (uniform_tensor(&part(0), &[batch]) * latents.size()[0] as f64).to_kind(Kind::Int64);
        let x0 = latents.index_select(0, &picked);
        let shown = uniform_tensor(&part(1), &[batch]).ge(DROPPED);
        let rows = rows.index_select(0, &picked);
        let rows = rows.where_self(&shown, &rows.full_like(captions.empty()));
        let eps = normal_tensor(&part(2), &x0.size());
        let time = normal_tensor(&part(3), &[batch]).sigmoid();
        let t = time.view([batch, 1, 1]);
        let mixed = &x0 * (1.0 - &t) + &eps * &t;
        let embeds = captions.embeds.index_select(0, &rows);
        let mask = captions.mask.index_select(0, &rows);
        let text = dit.text(&embeds, Some(&mask))?;
        let velocity = dit.forward(&mixed, &text, &positions, &dit.modulations(&time), None)?;
        let loss = learner.step(&(velocity - (eps - x0)).square().mean(Kind::Float))?;
        progress.notice(Notice { phase: plan.phase, step: step + 1, steps: plan.steps, loss });
    }
    learner.finish();
    Ok(dit)
}

/// Packed, normalised latents of painted images, and the row of each one's caption.
fn pool(vae: &Vae, seed: &Seed) -> Result<(Tensor, Tensor)> {
    let mut painter = Painter::new(Hand::World, *seed)?;
    let (mut latents, mut rows) = (Vec::new(), Vec::new());
    for _ in 0..POOL / 256 {
        let (images, labels) = painter.paint(256);
        let (mean, _) = tch::no_grad(|| vae.encode(&images))?;
        latents.push(pack(&vae.normalize(&mean)));
        rows.extend(labels.iter().map(Captions::row));
    }
    Ok((Tensor::cat(&latents, 0), Tensor::from_slice(&rows)))
}
