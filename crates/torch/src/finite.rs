//! Not-a-number and infinity are errors, never training data.

use crate::Tensors;
use tch::Tensor;

/// A tensor holds a number that is not finite.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{name}` has {count} numbers that are not finite")]
pub struct NonFinite {
    /// Which tensor.
    pub name: String,
    /// How many of its numbers.
    pub count: i64,
}

/// Whether every number of every tensor is finite.
pub fn all_finite<'a>(tensors: impl IntoIterator<Item = &'a Tensor>) -> bool {
    tensors.into_iter().all(|tensor| non_finite(tensor) == 0)
}

/// Names the first tensor, in name order, with a number that is not finite.
///
/// # Errors
/// [`NonFinite`] when there is one.
pub fn require_finite(tensors: &Tensors) -> Result<(), NonFinite> {
    for (name, tensor) in tensors {
        let count = non_finite(tensor);
        if count != 0 {
            return Err(NonFinite { name: name.clone(), count });
        }
    }
    Ok(())
}

fn non_finite(tensor: &Tensor) -> i64 {
    tensor.detach().isfinite().logical_not().sum(tch::Kind::Int64).int64_value(&[])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nan_and_infinity_are_found_and_named() {
        let good = Tensor::from_slice(&[1f32, 2.0]);
        let bad = Tensor::from_slice(&[f32::NAN, 2.0, f32::INFINITY]);
        assert!(all_finite([&good, &good]));
        assert!(!all_finite([&good, &bad]));
        let set = [("a".to_owned(), good), ("b".to_owned(), bad)].into();
        assert_eq!(
            require_finite(&set).unwrap_err().to_string(),
            "`b` has 2 numbers that are not finite"
        );
    }
}
