//! Which branches an iteration trains, and which denoising steps.

use crate::seed::{Purpose, Seed};
use crate::work::{Gates, Window};
use rand::Rng;
use serde::{Deserialize, Serialize};

/// The reward scheduler beta1(tau), beta2(tau) of arXiv 2601.10332 section 3.3.
///
/// In the published advantage a constant beta cancels (it scales reward and standard deviation
/// alike), so here it is what it can be: a gate, and a weight of the branch's loss.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "kind")]
pub enum Schedule {
    /// Both branches at every iteration, weight 0.5 each.
    Balanced,
    /// The LLM alone before iteration `switch_at`, the DiT alone from it on.
    Staged {
        /// First iteration of the DiT phase.
        switch_at: u32,
    },
    /// `llm` iterations of the LLM alone, then `dit` of the DiT alone, and again.
    Alternating {
        /// Iterations of an LLM turn.
        llm: u32,
        /// Iterations of a DiT turn.
        dit: u32,
    },
    /// Fixed loss weights; zero closes a branch.
    Weights {
        /// Loss weight of the LLM branch.
        llm: f64,
        /// Loss weight of the DiT branch.
        dit: f64,
    },
}

impl Schedule {
    /// The gates of an iteration.
    pub fn gates(&self, iteration: u32) -> Gates {
        let llm_only = Gates { llm: 1.0, dit: 0.0 };
        let dit_only = Gates { llm: 0.0, dit: 1.0 };
        match *self {
            Schedule::Balanced => Gates { llm: 0.5, dit: 0.5 },
            Schedule::Staged { switch_at } if iteration < switch_at => llm_only,
            Schedule::Staged { .. } => dit_only,
            Schedule::Alternating { llm, dit } => {
                if iteration % (llm + dit).max(1) < llm {
                    llm_only
                } else {
                    dit_only
                }
            }
            Schedule::Weights { llm, dit } => Gates { llm, dit },
        }
    }
}

/// Where the SDE window lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "kind")]
pub enum WindowSpec {
    /// Always the same steps.
    Fixed {
        /// First step.
        start: u32,
        /// Number of steps.
        len: u32,
    },
    /// One window an iteration, shared by all its leaves, its start uniform in
    /// `low ..= high - len` (Flow-GRPO-Fast).
    Random {
        /// Number of steps.
        len: u32,
        /// First step it may hold.
        low: u32,
        /// One past the last step it may hold.
        high: u32,
    },
    /// Moves by `stride` every `every` iterations and starts over at the end (MixGRPO). The window
    /// keeps its length at the end of the range.
    Progressive {
        /// Number of steps.
        len: u32,
        /// Iterations at one place.
        every: u32,
        /// Steps moved.
        stride: u32,
    },
    /// All steps but the last, whose Gaussian is too sharp to train (Flow-GRPO).
    All,
}

impl WindowSpec {
    /// The window of an iteration of a sampler with `steps` steps. Never reaches past the last.
    pub fn window(&self, run: &Seed, iteration: u32, steps: u32) -> Window {
        let window = |start: u32, len: u32| {
            let start = start.min(steps.saturating_sub(1));
            Window { start, len: len.min(steps - start) }
        };
        match *self {
            WindowSpec::Fixed { start, len } => window(start, len),
            WindowSpec::Random { len, low, high } => {
                let last = high.min(steps).saturating_sub(len).max(low);
                let seed = run.derive(Purpose::Window, &[u64::from(iteration)]);
                let places = u64::from(last - low) + 1;
                window(low + (seed.rng().next_u64() % places) as u32, len)
            }
            WindowSpec::Progressive { len, every, stride } => {
                let places = steps.saturating_sub(1).saturating_sub(len) / stride.max(1) + 1;
                window((iteration / every.max(1) % places) * stride, len)
            }
            WindowSpec::All => window(0, steps.saturating_sub(1)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gates_follow_the_schedule() {
        let staged = Schedule::Staged { switch_at: 3 };
        assert_eq!(staged.gates(2), Gates { llm: 1.0, dit: 0.0 });
        assert_eq!(staged.gates(3), Gates { llm: 0.0, dit: 1.0 });
        assert_eq!(Schedule::Balanced.gates(9), Gates { llm: 0.5, dit: 0.5 });
        let turns = Schedule::Alternating { llm: 2, dit: 1 };
        let llm: Vec<f64> = (0..6).map(|i| turns.gates(i).llm).collect();
        assert_eq!(llm, [1.0, 1.0, 0.0, 1.0, 1.0, 0.0]);
    }

    #[test]
    fn windows_stay_inside_and_random_ones_visit_every_place() {
        let seed = Seed::root(3);
        let random = WindowSpec::Random { len: 2, low: 0, high: 5 };
        let mut seen = [0; 10];
        for i in 0..200 {
            let w = random.window(&seed, i, 10);
            assert_eq!(w, random.window(&seed, i, 10));
            seen[w.start as usize] += 1;
        }
        assert!(seen[..4].iter().all(|n| *n > 20) && seen[4..].iter().all(|n| *n == 0), "{seen:?}");
        let moving = WindowSpec::Progressive { len: 4, every: 25, stride: 1 };
        for i in 0..2000 {
            let w = moving.window(&seed, i, 10);
            assert_eq!(w.len, 4);
            assert!(w.start + w.len <= 9);
        }
        assert_eq!(WindowSpec::All.window(&seed, 0, 10), Window { start: 0, len: 9 });
    }
}
