//! What an iteration computes: two operations a multiply-add, matrix products and attention only. A
//! backward pass costs two forward passes, one where only adapters are trained.

use super::Work;
use super::shapes::Shapes;
use duet_config::{Branch, Config};
use serde::Serialize;

/// Floating-point operations of an iteration, by what they are for.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Flops {
    /// Sampling traces.
    pub think: f64,
    /// Denoising.
    pub render: f64,
    /// The language model's update.
    pub train_llm: f64,
    /// The transformer's update.
    pub train_dit: f64,
}

impl Flops {
    /// Names and values.
    pub fn rows(&self) -> [(&'static str, f64); 4] {
        [
            ("thinking", self.think),
            ("drawing", self.render),
            ("training llm", self.train_llm),
            ("training dit", self.train_dit),
        ]
    }
}

/// The operations of an iteration.
pub fn of(config: &Config, shapes: &Shapes, work: &Work) -> Flops {
    let traces = (work.prompts * work.traces) as f64;
    let leaves = traces * work.leaves as f64;
    let (answer, image) = (trace(shapes, work), image(shapes, work));
    let updates = f64::from(config.trainer.updates_per_rollout);
    let [llm, dit] = super::bytes::trained(config, shapes).map(|params| params > 0);
    let times = |branch: &Branch, trains: bool| match (trains, &branch.lora) {
        (false, _) => 0.0,
        (true, lora) => {
            let passes = if lora.is_some() { 2.0 } else { 3.0 };
            updates * (passes + f64::from(u8::from(config.trainer.recompute)))
        }
    };
    Flops {
        think: traces * answer,
        render: leaves * work.steps as f64 * image,
        train_llm: traces * answer * times(&config.llm.branch, llm),
        train_dit: leaves * work.window as f64 * image * times(&config.dit.branch, dit),
    }
}

/// A question with its answer, once through the language model.
fn trace(shapes: &Shapes, work: &Work) -> f64 {
    let lm = &shapes.lm;
    let tokens = work.sequence as f64;
    let weights = (lm.layers * lm.layer()) as f64 * tokens
        + (lm.vocab * lm.hidden) as f64 * work.new_tokens as f64;
    // Each token looks at those before it: half of all pairs, queries and values.
    let attention = lm.layers as f64 * tokens * tokens * lm.hidden as f64;
    2.0 * (weights + attention)
}

/// An image through the transformer at one step, with guidance twice.
fn image(shapes: &Shapes, work: &Work) -> f64 {
    let dit = &shapes.dit;
    let (width, tokens) = (dit.width as f64, work.dit_tokens() as f64);
    let block = 12.0 * width * width * tokens + 2.0 * tokens * tokens * width;
    2.0 * work.passes as f64 * dit.blocks as f64 * block
}
