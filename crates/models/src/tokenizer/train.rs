//! A tokenizer of one's own, of Qwen's kind.

use super::{Tokenizer, description, from_description};
use crate::error::{ModelError, Result};
use serde_json::{Value, json};
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

/// Qwen2.5-VL's special tokens, in its order.
pub const SPECIAL_TOKENS: [&str; 14] = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
];

impl Tokenizer {
    /// Learns merges from `corpus` until the vocabulary has `vocab_size` tokens (special ones not
    /// counted) or every word of the corpus is one token, and appends Qwen's special tokens. A
    /// function of its arguments alone.
    ///
    /// To condition a transformer, the words of the embedding template must each become one token:
    /// put the template into the corpus.
    pub fn train(
        corpus: &[String],
        vocab_size: usize,
        chat_template: Option<String>,
    ) -> Result<Tokenizer> {
        let fail = |error: tokenizers::Error| ModelError::Tokenizer(error.to_string());
        let origin = "a new tokenizer";
        let empty = description(json!({}), json!([]), json!([]));
        let blank = from_description(&empty, origin)?;
        let mut trainer = BpeTrainer::builder()
            .show_progress(false)
            .vocab_size(vocab_size)
            .min_frequency(1)
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .build();
        let mut learner = tokenizers::TokenizerImpl::<
            BPE,
            tokenizers::NormalizerWrapper,
            tokenizers::PreTokenizerWrapper,
            tokenizers::PostProcessorWrapper,
            tokenizers::DecoderWrapper,
        >::new(BPE::default());
        learner.with_normalizer(blank.get_normalizer().cloned()).map_err(fail)?;
        learner.with_pre_tokenizer(blank.get_pre_tokenizer().cloned());
        learner.train(&mut trainer, corpus.iter().map(String::as_str)).map_err(fail)?;
        let learned = serde_json::to_value(learner.get_model())
            .map_err(|error| ModelError::Tokenizer(error.to_string()))?;
        let vocab = learned.get("vocab").cloned().unwrap_or_default();
        let merges = learned.get("merges").cloned().unwrap_or_default();
        let first = vocab.as_object().map_or(0, |vocab| vocab.len());
        let added: Vec<Value> = SPECIAL_TOKENS
            .iter()
            .enumerate()
            .map(|(index, content)| {
                json!({"id": first + index, "content": content, "single_word": false,
                       "lstrip": false, "rstrip": false, "normalized": false, "special": true})
            })
            .collect();
        let inner = from_description(&description(vocab, merges, json!(added)), origin)?;
        Tokenizer::build(inner, json!({}), chat_template, origin)
    }
}
