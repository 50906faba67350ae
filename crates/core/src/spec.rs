//! Everything about a run that the scheduler needs to know. Fixed for the life of the run.

use crate::advantage::AdvantageSpec;
use crate::reward::RewardSpec;
use crate::schedule::{Schedule, WindowSpec};
use crate::{Millis, Seed};
use serde::{Deserialize, Serialize};

/// A run, as the scheduler sees it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunSpec {
    /// The number a person chose.
    pub seed: u64,
    /// Optimiser steps to commit.
    pub iterations: u32,
    /// P: trees in an iteration.
    pub prompts_per_iteration: u32,
    /// J: traces of a tree.
    pub traces: u32,
    /// K: leaves of a trace.
    pub leaves: u32,
    /// L: trees of iteration i are sampled with version i - L exactly.
    pub lag: u32,
    /// Denoising steps of a rollout.
    pub steps: u32,
    /// Which of them are sampled by the SDE and trained.
    pub window: WindowSpec,
    /// Which branches are trained when.
    pub schedule: Schedule,
    /// How scores become rewards.
    pub reward: RewardSpec,
    /// Advantages of the LLM branch.
    pub llm_advantage: AdvantageSpec,
    /// Advantages of the DiT branch.
    pub dit_advantage: AdvantageSpec,
    /// Dynamic sampling: an iteration with fewer than P trees to train on gets more prompts, at most
    /// so many beyond P; 0: none (DAPO, arXiv 2503.14476 section 3.2).
    #[serde(default)]
    pub extra_prompts: u32,
    /// Trainer ranks.
    pub world: u32,
    /// Ranks that go on when others stay away; 0: all must be there.
    #[serde(default)]
    pub min_world: u32,
    /// A checkpoint every so many iterations, and at the end.
    pub checkpoint_every: u32,
    /// Tries of a unit before its tree is given up.
    pub max_attempts: u32,
    /// Failures in a row after which a worker gets no more work.
    pub quarantine_after: u32,
    /// Deadlines.
    pub timing: Timing,
}

/// Deadlines: every wait has one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timing {
    /// A worker not heard of for so long is lost.
    pub heartbeat_timeout: Millis,
    /// A worker whose connection closed, as it does when its process dies, is lost unless it is
    /// heard of again within this.
    pub reconnect: Millis,
    /// For a think lease.
    pub think: Millis,
    /// For a render lease.
    pub render: Millis,
    /// For a score lease.
    pub score: Millis,
    /// For an optimiser step, from the first assignment to the last report.
    pub step: Millis,
    /// For forming a trainer group and restoring its state.
    pub rendezvous: Millis,
    /// Wait before the second try of a unit; doubles with each further one.
    pub backoff: Millis,
    /// Longest such wait.
    pub backoff_max: Millis,
}

impl Default for Timing {
    fn default() -> Self {
        Timing {
            heartbeat_timeout: Millis(15_000),
            reconnect: Millis(1_000),
            think: Millis(300_000),
            render: Millis(300_000),
            score: Millis(120_000),
            step: Millis(1_800_000),
            rendezvous: Millis(600_000),
            backoff: Millis(500),
            backoff_max: Millis(30_000),
        }
    }
}

/// A specification that cannot be run.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{key}: {problem}")]
pub struct SpecError {
    /// The field.
    pub key: &'static str,
    /// What is wrong with it, and what would be right.
    pub problem: String,
}

impl RunSpec {
    /// The seed everything else is derived from.
    pub fn root(&self) -> Seed {
        Seed::root(self.seed)
    }

    /// Refuses what could never be scheduled.
    pub fn check(&self, prompts: usize) -> Result<(), SpecError> {
        let positive = [
            ("iterations", self.iterations),
            ("prompts_per_iteration", self.prompts_per_iteration),
            ("traces", self.traces),
            ("images_per_trace", self.leaves),
            ("steps", self.steps),
            ("world_size", self.world),
            ("checkpoint_every", self.checkpoint_every),
            ("max_attempts", self.max_attempts),
        ];
        for (key, value) in positive {
            if value == 0 {
                return Err(SpecError { key, problem: "is 0; it must be at least 1".to_owned() });
            }
        }
        let timing = &self.timing;
        let spans = [
            ("heartbeat_timeout_ms", timing.heartbeat_timeout),
            ("reconnect_ms", timing.reconnect),
            ("think_lease_ms", timing.think),
            ("render_lease_ms", timing.render),
            ("score_lease_ms", timing.score),
            ("step_ms", timing.step),
            ("rendezvous_ms", timing.rendezvous),
        ];
        for (key, span) in spans {
            if span.0 == 0 {
                let problem = "is 0 ms; every wait needs a deadline above that".to_owned();
                return Err(SpecError { key, problem });
            }
        }
        for (key, advantage) in
            [("advantage.llm", &self.llm_advantage), ("advantage.dit", &self.dit_advantage)]
        {
            let usable = advantage.eps.is_finite() && advantage.eps >= 0.0 && advantage.ddof <= 1;
            if !usable || advantage.clip.is_nan() {
                let problem = "eps must be a finite number >= 0, ddof 0 or 1, clip a number";
                return Err(SpecError { key, problem: problem.to_owned() });
            }
        }
        if prompts < self.prompts_per_iteration as usize {
            return Err(SpecError {
                key: "prompts_per_iteration",
                problem: format!(
                    "is {}, but the data set has only {prompts} prompts; lower it or bring more prompts",
                    self.prompts_per_iteration
                ),
            });
        }
        Ok(())
    }
}
