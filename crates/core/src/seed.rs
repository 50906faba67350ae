//! Seeds: every random number of a run is a pure function of the run's seed and of what the number
//! is for, so that it does not matter which worker draws it, when, or how often.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};
use serde::{Deserialize, Serialize};

/// What random numbers are for. The discriminants are part of the on-disk meaning of a run's seed:
/// never renumber them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Purpose {
    /// The order in which prompts are visited.
    Prompts = 1,
    /// The tokens of a trace: one uniform per position.
    Tokens = 2,
    /// A leaf's initial latent.
    InitialNoise = 3,
    /// A leaf's noise in the SDE steps of the window.
    StepNoise = 4,
    /// The start of an iteration's window.
    Window = 5,
    /// Initial weights (bootstrap, LoRA).
    Weights = 6,
    /// Data made or shuffled by the small world.
    Data = 7,
    /// Faults of the simulator.
    Faults = 8,
    /// Evaluation samples.
    Evaluation = 9,
}

/// A 256-bit seed, derived and never consumed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Seed(pub [u8; 32]);

impl Seed {
    /// The seed of a run, from the number a person chose.
    pub fn root(run_seed: u64) -> Seed {
        let mut hasher = blake3::Hasher::new_derive_key("duet 2026 run seed");
        hasher.update(&run_seed.to_le_bytes());
        Seed(*hasher.finalize().as_bytes())
    }

    /// The seed for one purpose at one place (iteration, tree, trace, leaf, ... as far as it goes).
    pub fn derive(&self, purpose: Purpose, path: &[u64]) -> Seed {
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        hasher.update(&(purpose as u32).to_le_bytes());
        hasher.update(&(path.len() as u64).to_le_bytes());
        for part in path {
            hasher.update(&part.to_le_bytes());
        }
        Seed(*hasher.finalize().as_bytes())
    }

    /// The `index`-th uniform number of this seed, in [0, 1), with 53 random bits.
    ///
    /// Random access: token sampling asks for position t without drawing the ones before it.
    pub fn uniform(&self, index: u64) -> f64 {
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        hasher.update(&index.to_le_bytes());
        let hash = hasher.finalize();
        let bits = u64::from_le_bytes(hash.as_bytes()[..8].try_into().expect("eight bytes"));
        (bits >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// `count` standard normal numbers, in fp32.
    pub fn normals(&self, count: usize) -> Vec<f32> {
        let mut rng = self.rng();
        (0..count).map(|_| StandardNormal.sample(&mut rng)).collect()
    }

    /// A counter-based generator (ChaCha, 8 rounds) that starts at this seed.
    pub fn rng(&self) -> ChaCha8Rng {
        ChaCha8Rng::from_seed(self.0)
    }

    /// Sixty-four bits of this seed, for libraries that take a number.
    pub fn number(&self) -> u64 {
        u64::from_le_bytes(self.0[..8].try_into().expect("eight bytes"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_differ_by_purpose_and_by_path_and_repeat() {
        let root = Seed::root(1);
        let a = root.derive(Purpose::Tokens, &[1, 2]);
        assert_eq!(a, root.derive(Purpose::Tokens, &[1, 2]));
        assert_ne!(a, root.derive(Purpose::InitialNoise, &[1, 2]));
        assert_ne!(a, root.derive(Purpose::Tokens, &[2, 1]));
        assert_ne!(a, root.derive(Purpose::Tokens, &[1, 2, 0]));
        assert_ne!(a, Seed::root(2).derive(Purpose::Tokens, &[1, 2]));
    }

    #[test]
    fn uniforms_are_uniform_and_normals_are_normal() {
        let seed = Seed::root(7);
        let n = 20_000;
        let mean = (0..n).map(|i| seed.uniform(i)).sum::<f64>() / n as f64;
        assert!((mean - 0.5).abs() < 0.01, "{mean}");
        let z = seed.normals(n as usize);
        let mean = z.iter().map(|x| f64::from(*x)).sum::<f64>() / n as f64;
        let var = z.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / n as f64;
        assert!(mean.abs() < 0.03 && (var - 1.0).abs() < 0.05, "{mean} {var}");
    }
}
