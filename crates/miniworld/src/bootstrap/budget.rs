//! How long each part is trained.

use crate::corpus::Teacher;
use crate::learn::Plan;
use serde::{Deserialize, Serialize};

/// How much work the bootstrap does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Profile {
    /// A base model that reinforcement learning makes good in minutes.
    Demo,
    /// The same parts, trained for seconds: for tests.
    Test,
}

/// What a profile spends.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Budget {
    /// Language-model pre-training; its batch counts documents.
    pub pretrain: Plan,
    /// Share of the pre-training answers that end with a refined prompt, as some of what a published
    /// instruction model has read does.
    pub formed: f64,
    /// Supervised fine-tuning.
    pub sft: Plan,
    /// Worked examples for it.
    pub examples: usize,
    /// Who made them.
    pub teacher: Teacher,
    /// The autoencoder.
    pub vae: Plan,
    /// The transformer.
    pub dit: Plan,
    /// The network behind the semantic and the consistency reward.
    pub recogniser: Plan,
    /// The network behind the aesthetic reward.
    pub critic: Plan,
    /// The judge.
    pub judge: Plan,
}

impl Profile {
    /// Its name in files.
    pub fn name(self) -> &'static str {
        match self {
            Profile::Demo => "demo",
            Profile::Test => "test",
        }
    }

    /// Its budget.
    pub fn budget(self) -> Budget {
        let plan = |phase, demo: usize, test: usize, batch, lr| Plan {
            phase,
            steps: if self == Profile::Demo { demo } else { test },
            batch,
            lr,
        };
        Budget {
            pretrain: plan("language model", 1500, 30, 24, 5e-3),
            formed: 0.0,
            sft: plan("sft", 200, 10, 24, 1.5e-3),
            examples: 1024,
            teacher: Teacher { hasty: 0.5, digit_skill: 0.3, colour_skill: 0.5 },
            vae: plan("autoencoder", 800, 30, 16, 5e-3),
            dit: plan("transformer", 2400, 20, 48, 4e-3),
            recogniser: plan("recogniser", 2500, 250, 32, 2e-3),
            critic: plan("critic", 800, 30, 32, 2e-3),
            judge: plan("judge", 1500, 150, 32, 3e-3),
        }
    }
}
