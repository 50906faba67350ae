//! One hash over many tensors: what bit-identity is measured by.

use crate::{Tensors, bytes};
use duet_core::Digest;
use tch::TchError;

/// BLAKE3 over every tensor in name order: name, element type, shape, elements. Lengths are
/// hashed before what they measure, so no two sets of tensors have the same text.
///
/// # Errors
/// When a tensor cannot be copied to the CPU.
pub fn digest_tensors(tensors: &Tensors) -> Result<Digest, TchError> {
    let mut hasher = blake3::Hasher::new_derive_key("duet 2026 tensors");
    for (name, tensor) in tensors {
        hasher.update(&(name.len() as u64).to_le_bytes());
        hasher.update(name.as_bytes());
        hasher.update(&[tensor.kind() as i32 as u8]);
        let shape = tensor.size();
        hasher.update(&(shape.len() as u64).to_le_bytes());
        for dim in shape {
            hasher.update(&dim.to_le_bytes());
        }
        bytes::read_bytes(tensor, |data| {
            hasher.update(data);
        })?;
    }
    Ok(Digest(*hasher.finalize().as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Tensor;

    fn digest(tensors: &[(&str, Tensor)]) -> Digest {
        let map = tensors.iter().map(|(name, t)| ((*name).to_owned(), t.shallow_clone())).collect();
        digest_tensors(&map).unwrap()
    }

    #[test]
    fn names_shapes_kinds_and_bits_all_count() {
        let base = Tensor::from_slice(&[1f32, 2.0, 3.0, 4.0]);
        let first = digest(&[("a", base.shallow_clone())]);
        assert_eq!(first, digest(&[("a", base.copy())]));
        assert_ne!(first, digest(&[("b", base.shallow_clone())]));
        assert_ne!(first, digest(&[("a", base.reshape([2, 2]))]));
        assert_ne!(first, digest(&[("a", base.view_dtype(tch::Kind::Int))]));
        let next_up = f32::from_bits(1f32.to_bits() + 1);
        assert_ne!(first, digest(&[("a", Tensor::from_slice(&[next_up, 2.0, 3.0, 4.0]))]));
        let two = digest(&[("a", base.shallow_clone()), ("b", base.shallow_clone())]);
        assert_eq!(two, digest(&[("b", base.shallow_clone()), ("a", base.shallow_clone())]));
    }
}
