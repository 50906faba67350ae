//! `[sft]`: supervised fine-tuning of the LLM on worked examples, before reinforcement learning.

use crate::error::Problems;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// `[sft]`. The model, the seed, the ranks, threads, dtype, gradient clipping and checkpoints are those
/// of the other sections.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Sft {
    /// Worked examples, `.jsonl` or `.parquet`: a raw `prompt` with `reasoning` and `refined`, or with
    /// the whole `response`. *Required* without `model.bootstrap`, which brings its own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data: Option<PathBuf>,
    /// Passes over the examples. Default 3.
    pub epochs: u32,
    /// Examples of an optimiser step, over all ranks. Default 32 (arXiv 2601.10332 section 4.1).
    pub batch: u32,
    /// Highest learning rate. Default 5e-6 (the same).
    pub lr: f64,
    /// Share of the steps over which the learning rate rises from zero. Default 0.03.
    pub warmup: f64,
    /// Share of `lr` that the cosine ends at. Default 0.
    pub lr_end: f64,
    /// Decay of AdamW's moments. Default `[0.9, 0.999]`.
    pub betas: [f64; 2],
    /// AdamW's eps. Default 1e-8.
    pub eps: f64,
    /// AdamW's decoupled weight decay. Default 0.
    pub weight_decay: f64,
    /// Weight of the mean squared distance between the states that condition the image of each refined
    /// prompt and those of the base model: keeps a transformer that is not trained here able to read
    /// them. 0: none, as published (there the learning rate alone keeps them near). Default 0.
    pub anchor: f64,
    /// Examples with more tokens, prompt and answer, are left out and counted. Default 2048.
    pub max_tokens: u32,
    /// Examples share rows of so many tokens; 0: each has its own. Changes the speed, not the loss.
    /// Default 2048.
    pub pack_tokens: u32,
    /// A checkpoint every so many steps, and at the end. Default 50.
    pub checkpoint_every: u32,
}

impl Default for Sft {
    fn default() -> Self {
        Sft {
            data: None,
            epochs: 3,
            batch: 32,
            lr: 5e-6,
            warmup: 0.03,
            lr_end: 0.0,
            betas: [0.9, 0.999],
            eps: 1e-8,
            weight_decay: 0.0,
            anchor: 0.0,
            max_tokens: 2048,
            pack_tokens: 2048,
            checkpoint_every: 50,
        }
    }
}

impl Sft {
    /// The learning rate of step `step` of `steps`, both from zero: a linear rise over `warmup` of the
    /// steps, then half a cosine down to `lr_end`.
    pub fn lr_at(&self, step: u64, steps: u64) -> f64 {
        let (step, steps) = (step as f64, steps.max(1) as f64);
        let warm = (self.warmup * steps).ceil();
        if step < warm {
            return self.lr * (step + 1.0) / warm;
        }
        let done = (step - warm) / (steps - warm).max(1.0);
        let cosine = 0.5 * (1.0 + (std::f64::consts::PI * done).cos());
        self.lr * (self.lr_end + (1.0 - self.lr_end) * cosine)
    }

    pub(crate) fn check(&self, bootstrapped: bool, world: u32, problems: &mut Problems) {
        problems.check(bootstrapped || self.data.is_some(), "sft.data", || {
            "is missing: give a .jsonl or .parquet file of worked examples; only \
             `model.bootstrap` brings its own"
                .to_owned()
        });
        let named = self.data.as_ref().is_none_or(|path| !path.as_os_str().is_empty());
        problems.check(named, "sft.data", || "is empty; give a file".to_owned());
        for (key, value) in [
            ("sft.epochs", self.epochs),
            ("sft.batch", self.batch),
            ("sft.checkpoint_every", self.checkpoint_every),
        ] {
            problems.check(value >= 1, key, || "is 0; it must be at least 1".to_owned());
        }
        problems.check(world <= self.batch, "sft.batch", || {
            format!(
                "is {}, but trainer.world_size is {world}: each rank needs at least one example",
                self.batch
            )
        });
        problems.check(self.max_tokens >= 2, "sft.max_tokens", || {
            format!("is {}; a prompt and an answer take at least 2", self.max_tokens)
        });
        problems.check(self.lr.is_finite() && self.lr > 0.0, "sft.lr", || {
            format!("is {}; it must be above 0", self.lr)
        });
        for (key, value) in [("sft.warmup", self.warmup), ("sft.lr_end", self.lr_end)] {
            problems.check((0.0..=1.0).contains(&value), key, || {
                format!("is {value}; it is a share, from 0 to 1")
            });
        }
        problems.check(self.betas.iter().all(|b| (0.0..1.0).contains(b)), "sft.betas", || {
            format!("are {:?}; each must be in 0..1, 1 excluded", self.betas)
        });
        let positive = [
            ("sft.eps", self.eps),
            ("sft.weight_decay", self.weight_decay),
            ("sft.anchor", self.anchor),
        ];
        for (key, value) in positive {
            problems.check(value.is_finite() && value >= 0.0, key, || {
                format!("is {value}; it must be 0 or more")
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_learning_rate_rises_then_falls_along_a_cosine() {
        let sft = Sft { lr: 1.0, warmup: 0.1, lr_end: 0.1, ..Sft::default() };
        let rates: Vec<f64> = (0..100).map(|step| sft.lr_at(step, 100)).collect();
        assert!((rates[0] - 0.1).abs() < 1e-12 && (rates[9] - 1.0).abs() < 1e-12);
        assert!((rates[10] - 1.0).abs() < 1e-12);
        assert!(rates[10..].windows(2).all(|pair| pair[1] < pair[0]));
        assert!((rates[55] - 0.55).abs() < 1e-12, "half-way: {}", rates[55]);
        assert!(rates[99] > 0.1 && rates[99] < 0.101);
        // Short runs have their warm-up and their end too.
        let flat = Sft { warmup: 0.0, ..sft.clone() };
        assert_eq!(flat.lr_at(0, 1), 1.0);
        assert_eq!(Sft { warmup: 1.0, ..sft }.lr_at(3, 4), 1.0);
    }
}
