//! Noise from seeds. libtorch's own generators are never used: their streams depend on device and
//! version.

use duet_core::Seed;
use tch::{Kind, Tensor};

/// Standard normal noise of `shape`, fp32, on the CPU: a function of the seed alone.
pub fn normal_tensor(seed: &Seed, shape: &[i64]) -> Tensor {
    let count = shape.iter().product::<i64>().max(0);
    Tensor::from_slice(&seed.normals(count as usize)).reshape(shape)
}

/// Uniform numbers in [0, 1) of `shape`, fp32, on the CPU: element `i` in row-major order is
/// `seed.uniform(i)`, rounded towards zero so that it stays below one.
pub fn uniform_tensor(seed: &Seed, shape: &[i64]) -> Tensor {
    let count = shape.iter().product::<i64>().max(0);
    let values: Vec<f64> = (0..count as u64).map(|i| seed.uniform(i)).collect();
    let below_one = f64::from(f32::from_bits(1f32.to_bits() - 1));
    Tensor::from_slice(&values).clamp_max(below_one).to_kind(Kind::Float).reshape(shape)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noise_is_a_function_of_the_seed() {
        let seed = Seed::root(5);
        let a = normal_tensor(&seed, &[3, 4]);
        assert_eq!(a.size(), [3, 4]);
        assert_eq!(a.kind(), Kind::Float);
        assert_eq!(a, normal_tensor(&seed, &[3, 4]));
        assert_ne!(a, normal_tensor(&Seed::root(6), &[3, 4]));
        let u = uniform_tensor(&seed, &[1000]);
        assert!(u.max().double_value(&[]) < 1.0 && u.min().double_value(&[]) >= 0.0);
        assert_eq!(normal_tensor(&seed, &[0, 2]).size(), [0, 2]);
    }
}
