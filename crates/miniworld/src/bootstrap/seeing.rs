//! Trains the networks that look at images: recogniser and critic (the rewards), and the judge.

use super::{Budget, Notice, Progress};
use crate::digits::{Hand, Label, Painter, column};
use crate::error::Result;
use crate::judge::{self, Judge};
use crate::learn::{Learner, Plan};
use crate::nets::{Build, Net};
use crate::scorers::{CRITIC, RECOGNISER, Scorers};
use duet_core::{Purpose, Seed};
use duet_torch::{normal_tensor, uniform_tensor};
use tch::{Kind, Tensor};

/// Images and their labels in a batch of the check after training.
const CHECKED: usize = 500;

/// Trains the scorers on the world's own hand. Also says how often the recogniser gets digit and
/// colour of unseen hands right, and how often the critic tells spoilt from real.
///
/// # Errors
/// A loss that is not finite, or libtorch refuses.
pub fn scorers(
    budget: &Budget,
    seed: &Seed,
    progress: &dyn Progress,
) -> Result<(Scorers, f64, f64)> {
    let recogniser = Net::init(Build::Deep, &RECOGNISER, &seed.derive(Purpose::Weights, &[2]));
    recognise(
        &recogniser,
        Hand::World,
        budget.recogniser,
        &seed.derive(Purpose::Data, &[20]),
        progress,
    )?;
    let critic = Net::init(Build::Deep, &CRITIC, &seed.derive(Purpose::Weights, &[3]));
    criticise(&critic, budget.critic, &seed.derive(Purpose::Data, &[21]), progress)?;
    let right = accuracy(&recogniser)?;
    let told = critic_accuracy(&critic)?;
    Ok((Scorers::new(recogniser, critic), right, told))
}

/// Trains the judge on other people's hands; also says how often it is right about a third group's.
///
/// # Errors
/// As [`scorers`].
pub fn judge(budget: &Budget, seed: &Seed, progress: &dyn Progress) -> Result<(Judge, f64)> {
    let net = Net::init(Build::Wide, &judge::HEADS, &seed.derive(Purpose::Weights, &[4]));
    recognise(&net, Hand::Judge, budget.judge, &seed.derive(Purpose::Data, &[22]), progress)?;
    let right = accuracy(&net)?;
    Ok((Judge::new(net), right))
}

/// Cross-entropy over all of a network's heads, on images with some blur and noise: generated images
/// are never as clean as painted ones.
fn recognise(
    net: &Net,
    hand: Hand,
    plan: Plan,
    seed: &Seed,
    progress: &dyn Progress,
) -> Result<()> {
    let mut painter = Painter::new(hand, seed.derive(Purpose::Data, &[0]))?;
    let mut learner = Learner::new(net.params().to_map(), plan)?;
    for step in 0..plan.steps {
        let (images, labels) = painter.paint(plan.batch);
        let images = roughen(&images, &seed.derive(Purpose::Data, &[1, step as u64]));
        let loss = learner.step(&recognition_loss(net, &images, &labels))?;
        progress.notice(Notice { phase: plan.phase, step: step + 1, steps: plan.steps, loss });
    }
    learner.finish();
    Ok(())
}

fn recognition_loss(net: &Net, images: &Tensor, labels: &[Label]) -> Tensor {
    let targets = [
        column(labels, |label| label.digit),
        column(labels, |label| label.colour),
        column(labels, |label| label.place),
    ];
    let losses = net.forward(images).into_iter().zip(&targets);
    losses
        .map(|(logits, target)| logits.cross_entropy_for_logits(target))
        .fold(Tensor::from(0f32), |sum, loss| sum + loss)
}

/// Blends each image with its own blur and adds noise, both by a random amount.
fn roughen(images: &Tensor, seed: &Seed) -> Tensor {
    let batch = images.size()[0];
    let amount = |part: u64, most: f64| {
        uniform_tensor(&seed.derive(Purpose::Data, &[part]), &[batch, 1, 1, 1]) * most
    };
    let blur = amount(0, 0.7);
    let noise = normal_tensor(&seed.derive(Purpose::Data, &[1]), &images.size());
    let mixed = images + (blurred(images) - images) * blur + noise * amount(2, 0.2);
    mixed.clamp(-1.0, 1.0)
}

fn blurred(images: &Tensor) -> Tensor {
    images.avg_pool2d([3, 3], [1, 1], [1, 1], false, false, 9)
}

/// Tells drawn images from spoilt ones, half and half.
fn criticise(net: &Net, plan: Plan, seed: &Seed, progress: &dyn Progress) -> Result<()> {
    let mut painter = Painter::new(Hand::World, seed.derive(Purpose::Data, &[0]))?;
    let mut learner = Learner::new(net.params().to_map(), plan)?;
    for step in 0..plan.steps {
        let (images, target) =
            spoil_half(&mut painter, plan.batch, &seed.derive(Purpose::Data, &[1, step as u64]));
        let logits = &net.forward(&images)[0];
        let loss = learner.step(&logits.cross_entropy_for_logits(&target))?;
        progress.notice(Notice { phase: plan.phase, step: step + 1, steps: plan.steps, loss });
    }
    learner.finish();
    Ok(())
}

/// Drawn images, then as many spoilt ones: two digits over one another, smeared, speckled or torn.
/// Both carry a little noise, so that noise alone tells nothing.
fn spoil_half(painter: &mut Painter, batch: usize, seed: &Seed) -> (Tensor, Tensor) {
    let half = batch / 2;
    let (real, _) = painter.paint(half);
    let (first, _) = painter.paint(half);
    let (second, _) = painter.paint(half);
    let fakes: Vec<Tensor> = (0..half as i64)
        .map(|row| {
            let image = first.narrow(0, row, 1);
            let seed = seed.derive(Purpose::Data, &[row as u64]);
            match row % 4 {
                0 => image.maximum(&second.narrow(0, row, 1)),
                1 => blurred(&blurred(&blurred(&image))),
                2 => &image + normal_tensor(&seed, &image.size()) * 0.4,
                _ => torn(&image, &seed),
            }
        })
        .collect();
    let all = Tensor::cat(&[real, Tensor::cat(&fakes, 0)], 0);
    let noise = normal_tensor(&seed.derive(Purpose::Data, &[1 << 20]), &all.size());
    let all = (all + noise * 0.04).clamp(-1.0, 1.0);
    let target: Vec<i64> = (0..2 * half).map(|row| i64::from(row < half)).collect();
    (all, Tensor::from_slice(&target))
}

/// Blocks of 4 x 4 pixels, each black with probability one half.
fn torn(image: &Tensor, seed: &Seed) -> Tensor {
    let kept = uniform_tensor(seed, &[1, 1, 8, 8]).ge(0.5).to_kind(Kind::Float);
    let kept = kept.repeat_interleave_self_int(4, 2, None).repeat_interleave_self_int(4, 3, None);
    (image + 1.0) * kept - 1.0
}

/// How often digit and colour of clean images by unseen hands are both right.
fn accuracy(net: &Net) -> Result<f64> {
    let (images, labels) = Painter::new(Hand::Test, Seed::root(9))?.paint(CHECKED);
    let logits = tch::no_grad(|| net.forward(&images));
    let right = |head: usize, target: Tensor| logits[head].argmax(-1, false).eq_tensor(&target);
    let both = right(0, column(&labels, |label| label.digit))
        .logical_and(&right(1, column(&labels, |label| label.colour)));
    Ok(both.to_kind(Kind::Float).mean(Kind::Float).double_value(&[]))
}

fn critic_accuracy(net: &Net) -> Result<f64> {
    let seed = Seed::root(10);
    let mut painter = Painter::new(Hand::Test, seed)?;
    let (images, target) = spoil_half(&mut painter, CHECKED, &seed);
    let logits = tch::no_grad(|| net.forward(&images));
    let right = logits[0].argmax(-1, false).eq_tensor(&target);
    Ok(right.to_kind(Kind::Float).mean(Kind::Float).double_value(&[]))
}
