//! Decoding a token at a time on the CPU, in fp32, and choosing the next: fused kernels for what is
//! hundreds of tiny operations otherwise.
//!
//! Every sequence is computed in one order whatever the others are, so it does not depend on its
//! batch, to the last bit.

use crate::ffi;
use std::ptr::null_mut;
use tch::{Kind, Tensor};

/// libtorch or a kernel refused; its words.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("decoding: {0}")]
pub struct DecodeError(String);

/// Weights of one decoder layer, each `[out, in]`.
#[derive(Debug)]
pub struct LayerWeights {
    /// `[D]`.
    pub input_norm: Tensor,
    /// Queries, keys and values, in this order: `[(heads + 2 kv_heads) head, D]`.
    pub qkv: Tensor,
    /// The same rows.
    pub qkv_bias: Option<Tensor>,
    /// `[D, heads head]`.
    pub out: Tensor,
    /// `[D]`.
    pub post_norm: Tensor,
    /// `[F, D]`.
    pub gate: Tensor,
    /// `[F, D]`.
    pub up: Tensor,
    /// `[D, F]`.
    pub down: Tensor,
}

/// Weights around the layers, and how the heads are laid out.
#[derive(Debug)]
pub struct Frame<'a> {
    /// Embeddings `[V, D]`.
    pub table: &'a Tensor,
    /// The last norm's weight `[D]`.
    pub norm: &'a Tensor,
    /// The output layer `[V, D]`.
    pub head: &'a Tensor,
    /// Query heads.
    pub heads: i64,
    /// Key and value heads.
    pub kv_heads: i64,
    /// Epsilon of the norms.
    pub eps: f64,
}

/// A pre-norm decoder with grouped queries, half rotations, SwiGLU and RMS norms (Qwen2.5), its
/// weights copied.
pub struct StepDecoder {
    raw: *mut ffi::DuetDecoder,
    vocabulary: i64,
}

impl std::fmt::Debug for StepDecoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StepDecoder").field("vocabulary", &self.vocabulary).finish()
    }
}

/// Where a step reads and writes.
#[derive(Debug)]
pub struct StepCache<'a> {
    /// Keys of each layer, `[n, kv_heads, capacity, head]`, contiguous.
    pub keys: Vec<&'a Tensor>,
    /// Values of each layer.
    pub values: Vec<&'a Tensor>,
    /// Positions filled.
    pub length: i64,
}

impl StepDecoder {
    /// Copies the weights.
    ///
    /// # Errors
    /// [`DecodeError`] when they do not fit each other, are not on the CPU, or a head's width is
    /// not a multiple of eight.
    pub fn new(layers: &[LayerWeights], frame: &Frame<'_>) -> Result<StepDecoder, DecodeError> {
        let raw = ffi::raw;
        let layers: Vec<ffi::DuetDecodeLayer> = layers
            .iter()
            .map(|layer| ffi::DuetDecodeLayer {
                input_norm: raw(&layer.input_norm),
                qkv: raw(&layer.qkv),
                qkv_bias: layer.qkv_bias.as_ref().map_or(null_mut(), raw),
                out: raw(&layer.out),
                post_norm: raw(&layer.post_norm),
                gate: raw(&layer.gate),
                up: raw(&layer.up),
                down: raw(&layer.down),
            })
            .collect();
        // SAFETY: all tensors live until the call returns, which keeps copies only.
        let raw = unsafe {
            ffi::duet_decoder_new(
                layers.as_ptr(),
                layers.len(),
                raw(frame.table),
                raw(frame.norm),
                raw(frame.head),
                frame.heads,
                frame.kv_heads,
                frame.eps,
            )
        };
        if raw.is_null() {
            return Err(DecodeError(ffi::last_error()));
        }
        Ok(StepDecoder { raw, vocabulary: frame.head.size()[0] })
    }

    /// Feeds one token to each sequence of `cache` and gives the logits after it, `[n, V]`; `cos`
    /// and `sin` `[head]` rotate this position, the sine's first half negated. The new keys and
    /// values are in the cache at `cache.length` afterwards.
    ///
    /// # Errors
    /// [`DecodeError`] when shapes do not fit or a token is outside the vocabulary.
    pub fn step(
        &self,
        tokens: &[i64],
        cache: &StepCache<'_>,
        (cos, sin): (&Tensor, &Tensor),
    ) -> Result<Tensor, DecodeError> {
        if cache.keys.len() != cache.values.len() {
            return Err(DecodeError("as many keys as values are expected".to_owned()));
        }
        let pointers = |tensors: &[&Tensor]| tensors.iter().map(|t| ffi::raw(t)).collect();
        let (keys, values): (Vec<_>, Vec<_>) = (pointers(&cache.keys), pointers(&cache.values));
        let size = [tokens.len() as i64, self.vocabulary];
        let logits = Tensor::empty(size, (Kind::Float, tch::Device::Cpu));
        // SAFETY: the decoder is alive; lists are as long as said; the shim checks every shape.
        let done = unsafe {
            ffi::duet_decoder_step(
                self.raw,
                tokens.as_ptr(),
                tokens.len(),
                cache.length,
                keys.as_ptr(),
                values.as_ptr(),
                keys.len(),
                ffi::raw(cos),
                ffi::raw(sin),
                ffi::raw(&logits),
            )
        };
        if done < 0 { Err(DecodeError(ffi::last_error())) } else { Ok(logits) }
    }
}

impl Drop for StepDecoder {
    fn drop(&mut self) {
        // SAFETY: made by `duet_decoder_new`, freed once.
        unsafe { ffi::duet_decoder_free(self.raw) }
    }
}

/// The token of each row of fp32 `logits` `[n, V]` on the CPU, from one uniform number in [0, 1) per
/// row: the first token whose cumulative probability, in vocabulary order, exceeds it.
/// Probabilities are the softmax of the logits divided by `temperature`, which is above zero. `None`
/// when a logit is not finite.
///
/// # Errors
/// [`DecodeError`] when the logits do not fit.
pub fn choose(
    logits: &Tensor,
    numbers: &[f64],
    temperature: f64,
) -> Result<Option<Vec<i64>>, DecodeError> {
    let mut tokens = vec![0i64; numbers.len()];
    // SAFETY: both lists have the length that is said; the shim checks the logits.
    let done = unsafe {
        let (n, out) = (numbers.len(), tokens.as_mut_ptr());
        ffi::duet_choose(ffi::raw(logits), numbers.as_ptr(), n, temperature, out)
    };
    match done {
        0 => Ok(Some(tokens)),
        1 => Ok(None),
        _ => Err(DecodeError(ffi::last_error())),
    }
}
