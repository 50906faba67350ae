//! The transformer that draws, by flow matching on captioned images.

use super::{Notice, Progress, one_thread};
use crate::digits::{Hand, Label, Painter, SIDE};
use crate::error::{Result, WorldError};
use crate::facts::{COLOURS, NUMBERS, PLACES};
use crate::learn::{Learner, Plan, forget, gradients};
use crate::prompts::caption;
use duet_core::{Purpose, Seed};
use duet_models::dit::{Dit, DitConfig, Positions};
use duet_models::embed::Embedder;
use duet_models::lm::Lm;
use duet_models::tokenizer::Tokenizer;
use duet_models::vae::{Vae, pack};
use duet_torch::{Tensors, normal_tensor, uniform_tensor};
use std::sync::mpsc;
use tch::{Kind, Tensor};

/// Share of captions that are dropped, so that guidance has something to push away from.
const DROPPED: f64 = 0.1;
/// Images that the transformer is trained on, encoded once.
const POOL: usize = 4096;

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

/// Images, encoded, and the rows of their captions.
struct Lessons {
    captions: Captions,
    latents: Tensor,
    rows: Tensor,
}

/// A batch or a part of one: noised latents and the velocity they should have, times, captions.
struct Batch {
    mixed: Tensor,
    velocity: Tensor,
    times: Tensor,
    embeds: Tensor,
    mask: Tensor,
}

impl Lessons {
    /// `x_t = (1 - t) x_0 + t eps`; the velocity is `eps - x_0`; t is the logistic of a normal number.
    fn draw(&self, seed: &Seed, batch: usize) -> Batch {
        let part = |what: u64| seed.derive(Purpose::Data, &[what]);
        let count = batch as i64;
        let picked = uniform_tensor(&part(0), &[count]) * self.latents.size()[0] as f64;
        let picked = picked.to_kind(Kind::Int64);
        let x0 = self.latents.index_select(0, &picked);
        let shown = uniform_tensor(&part(1), &[count]).ge(DROPPED);
        let rows = self.rows.index_select(0, &picked);
        let rows = rows.where_self(&shown, &rows.full_like(self.captions.empty()));
        let eps = normal_tensor(&part(2), &x0.size());
        let times = normal_tensor(&part(3), &[count]).sigmoid();
        let t = times.view([count, 1, 1]);
        Batch {
            mixed: &x0 * (1.0 - &t) + &eps * &t,
            velocity: eps - x0,
            times,
            embeds: self.captions.embeds.index_select(0, &rows),
            mask: self.captions.mask.index_select(0, &rows),
        }
    }
}

impl Batch {
    /// Its two halves.
    fn halves(&self) -> [Batch; 2] {
        let len = self.times.size()[0] / 2;
        [0, len].map(|start| {
            let of = |tensor: &Tensor| tensor.narrow(0, start, len);
            Batch {
                mixed: of(&self.mixed),
                velocity: of(&self.velocity),
                times: of(&self.times),
                embeds: of(&self.embeds),
                mask: of(&self.mask),
            }
        })
    }
}

/// Mean squared error of the velocity, and its gradients.
fn learn(dit: &Dit, positions: &Positions, batch: &Batch) -> Result<(f64, Tensors)> {
    let text = dit.text(&batch.embeds, Some(&batch.mask))?;
    let mods = dit.modulations(&batch.times);
    let velocity = dit.forward(&batch.mixed, &text, positions, &mods, None)?;
    let loss = (velocity - &batch.velocity).square().mean(Kind::Float);
    let value = loss.double_value(&[]);
    let params = dit.params().to_map();
    // Gradients add up, and they are not copied: clear before, not after.
    forget(&params);
    loss.f_backward()?;
    Ok((value, gradients(&params)))
}

/// Flow matching (arXiv 2210.02747): the velocity from data to noise is regressed. Two copies, each
/// on a thread of its own with a half of every batch: the number of copies is part of the recipe,
/// whatever the machine's cores, because the sum of the gradients depends on it.
///
/// # Errors
/// A loss that is not finite, or libtorch refuses.
pub fn transformer(
    parts: (&Lm, &Tokenizer, &Vae),
    config: DitConfig,
    plan: Plan,
    seed: &Seed,
    progress: &dyn Progress,
) -> Result<Dit> {
    let (lm, tokenizer, vae) = parts;
    let weights = seed.derive(Purpose::Weights, &[6]);
    let (dit, copy) = (Dit::init(config.clone(), &weights)?, Dit::init(config, &weights)?);
    let captions = Captions::new(lm, tokenizer)?;
    let (latents, rows) = pool(vae, &seed.derive(Purpose::Data, &[40]))?;
    let side = SIDE as i64 / (vae.config().scale_factor() * 2);
    let text = captions.embeds.size()[1];
    let lessons = Lessons { captions, latents, rows };
    std::thread::scope(|scope| {
        let (give, given) = mpsc::channel::<(Tensors, Batch)>();
        let (answer, answers) = mpsc::channel();
        scope.spawn(move || {
            one_thread();
            let positions = copy.positions(text, (side, side));
            let mine = copy.params().to_map();
            copy.params().set_trainable(|_| true);
            for (weights, batch) in given {
                follow(&mine, &weights);
                if answer.send(learn(&copy, &positions, &batch)).is_err() {
                    break;
                }
            }
        });
        let positions = dit.positions(text, (side, side));
        let mut learner = Learner::new(dit.params().to_map(), plan)?;
        let stopped = || WorldError::Stopped("the transformer's second thread");
        for step in 0..plan.steps {
            let seed = seed.derive(Purpose::Data, &[41, step as u64]);
            let [first, second] = lessons.draw(&seed, plan.batch).halves();
            give.send((dit.params().to_map(), second)).map_err(|_| stopped())?;
            let (loss, mut grads) = learn(&dit, &positions, &first)?;
            let (other, others) = answers.recv().map_err(|_| stopped())??;
            for (name, grad) in &mut grads {
                *grad = (&*grad + &others[name]) * 0.5;
            }
            let loss = learner.apply((loss + other) * 0.5, &grads)?;
            progress.notice(Notice { phase: plan.phase, step: step + 1, steps: plan.steps, loss });
        }
        learner.finish();
        Ok(())
    })
    .map(|()| dit)
}

/// Gives `mine` the values of `weights`.
fn follow(mine: &Tensors, weights: &Tensors) {
    tch::no_grad(|| {
        for (name, tensor) in mine {
            tensor.shallow_clone().copy_(&weights[name]);
        }
    });
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
