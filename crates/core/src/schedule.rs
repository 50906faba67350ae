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
    /// The LLM alone until its mean reward stops rising, then the DiT alone. The switch is part of the
    /// run's durable state: it happens at the first iteration that cannot have been admitted yet.
    Plateau {
        /// Committed iterations without a new best after which the LLM phase ends.
        patience: u32,
        /// A best must be better than the last by more than this.
        min_delta: f64,
        /// The mean reward is averaged exponentially with weight 2 / (smooth + 1).
        smooth: u32,
        /// First iteration of the DiT phase at the latest.
        at_most: u32,
    },
    /// Loss weights as a function of the iteration: straight lines between points, constant before
    /// the first and after the last.
    Curve {
        /// At least one, iterations ascending.
        points: Vec<CurvePoint>,
    },
    /// Fixed loss weights; zero closes a branch.
    Weights {
        /// Loss weight of the LLM branch.
        llm: f64,
        /// Loss weight of the DiT branch.
        dit: f64,
    },
}

/// A point of [`Schedule::Curve`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct CurvePoint {
    /// At which iteration.
    pub iteration: u32,
    /// Loss weight of the LLM branch there.
    pub llm: f64,
    /// Loss weight of the DiT branch there.
    pub dit: f64,
}

/// What a plateau schedule remembers of the rewards so far.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plateau {
    #[serde(with = "crate::exact::number")]
    average: f64,
    #[serde(with = "crate::exact::number")]
    best: f64,
    since: u32,
}

impl Plateau {
    /// What is remembered after one more iteration of that mean reward.
    pub fn after(before: Option<&Plateau>, reward: f64, min_delta: f64, smooth: u32) -> Plateau {
        let Some(before) = before else {
            return Plateau { average: reward, best: reward, since: 0 };
        };
        let weight = 2.0 / (f64::from(smooth.max(1)) + 1.0);
        let average = before.average + weight * (reward - before.average);
        if average > before.best + min_delta {
            Plateau { average, best: average, since: 0 }
        } else {
            Plateau { average, best: before.best, since: before.since + 1 }
        }
    }

    /// Iterations since the last best.
    pub fn since(&self) -> u32 {
        self.since
    }
}

impl Schedule {
    /// Which branches (LLM, DiT) it ever trains.
    pub fn trains(&self) -> (bool, bool) {
        match self {
            Schedule::Weights { llm, dit } => (*llm > 0.0, *dit > 0.0),
            Schedule::Curve { points } => {
                (points.iter().any(|p| p.llm > 0.0), points.iter().any(|p| p.dit > 0.0))
            }
            Schedule::Balanced
            | Schedule::Staged { .. }
            | Schedule::Plateau { .. }
            | Schedule::Alternating { .. } => (true, true),
        }
    }

    /// The gates of an iteration. `switched` is the first iteration of a plateau schedule's DiT phase,
    /// once that is known.
    pub fn gates(&self, iteration: u32, switched: Option<u32>) -> Gates {
        let llm_only = Gates { llm: 1.0, dit: 0.0 };
        let dit_only = Gates { llm: 0.0, dit: 1.0 };
        match *self {
            Schedule::Plateau { at_most, .. } => {
                let end = switched.map_or(at_most, |at| at.min(at_most));
                if iteration < end { llm_only } else { dit_only }
            }
            Schedule::Curve { ref points } => curve(points, iteration),
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

fn curve(points: &[CurvePoint], iteration: u32) -> Gates {
    let gates = |point: &CurvePoint| Gates { llm: point.llm, dit: point.dit };
    let next = points.iter().position(|point| point.iteration > iteration);
    match next {
        Some(0) => gates(&points[0]),
        Some(next) => {
            let (a, b) = (points[next - 1], points[next]);
            let share = f64::from(iteration - a.iteration) / f64::from(b.iteration - a.iteration);
            let at = |a: f64, b: f64| a + share * (b - a);
            Gates { llm: at(a.llm, b.llm), dit: at(a.dit, b.dit) }
        }
        None => points.last().map_or(Gates { llm: 0.0, dit: 0.0 }, gates),
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
        assert_eq!(staged.gates(2, None), Gates { llm: 1.0, dit: 0.0 });
        assert_eq!(staged.gates(3, None), Gates { llm: 0.0, dit: 1.0 });
        assert_eq!(Schedule::Balanced.gates(9, None), Gates { llm: 0.5, dit: 0.5 });
        let turns = Schedule::Alternating { llm: 2, dit: 1 };
        let llm: Vec<f64> = (0..6).map(|i| turns.gates(i, None).llm).collect();
        assert_eq!(llm, [1.0, 1.0, 0.0, 1.0, 1.0, 0.0]);
    }

    #[test]
    fn a_curve_is_straight_between_its_points() {
        let point = |iteration, llm, dit| CurvePoint { iteration, llm, dit };
        let curve = Schedule::Curve { points: vec![point(2, 1.0, 0.0), point(6, 0.0, 2.0)] };
        let found: Vec<f64> = (0..9).map(|i| curve.gates(i, None).llm).collect();
        assert_eq!(found, [1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0]);
        assert_eq!(curve.gates(4, None).dit, 1.0);
    }

    #[test]
    fn a_plateau_is_as_many_iterations_without_a_new_best() {
        let rewards = [0.1, 0.3, 0.5, 0.5, 0.49, 0.5];
        let since: Vec<u32> = rewards
            .iter()
            .scan(None, |seen: &mut Option<Plateau>, reward| {
                *seen = Some(Plateau::after(seen.as_ref(), *reward, 0.01, 1));
                seen.as_ref().map(Plateau::since)
            })
            .collect();
        assert_eq!(since, [0, 0, 0, 1, 2, 3]);
        let plateau = Schedule::Plateau { patience: 3, min_delta: 0.01, smooth: 1, at_most: 9 };
        assert_eq!(plateau.gates(8, None), Gates { llm: 1.0, dit: 0.0 });
        assert_eq!(plateau.gates(9, None), Gates { llm: 0.0, dit: 1.0 });
        assert_eq!(plateau.gates(6, Some(6)), Gates { llm: 0.0, dit: 1.0 });
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
