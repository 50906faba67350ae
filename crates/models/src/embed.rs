//! Prompt embeddings for the transformer (diffusers `QwenImagePipeline._get_qwen_prompt_embeds`): the
//! refined prompt, alone in Qwen-Image's own template, through the language model; its last hidden
//! states without the first 34 positions.

use crate::error::{ModelError, Result};
use crate::lm::Lm;
use crate::tokenizer::Tokenizer;
use tch::Tensor;

/// What stands before the prompt.
pub const PREFIX: &str = "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n";
/// What stands after it: five tokens, which are kept.
pub const SUFFIX: &str = "<|im_end|>\n<|im_start|>assistant\n";
/// Positions dropped: the tokens of [`PREFIX`].
pub const DROPPED: usize = 34;
/// Most positions kept, as the published pipeline has it.
pub const MAX_LENGTH: usize = 512;

/// The encoder of one tokenizer and language model, checked to fit the template.
#[derive(Clone, Copy, Debug)]
pub struct Embedder<'a> {
    lm: &'a Lm,
    tokenizer: &'a Tokenizer,
}

impl<'a> Embedder<'a> {
    /// # Errors
    /// When the tokenizer does not make exactly 34 tokens of the template's prefix.
    pub fn new(lm: &'a Lm, tokenizer: &'a Tokenizer) -> Result<Self> {
        let tokens = tokenizer.encode(PREFIX)?.len();
        if tokens != DROPPED {
            return Err(ModelError::Tokenizer(format!(
                "the embedding template's prefix takes {tokens} tokens instead of {DROPPED}, so \
                 this tokenizer cannot condition a Qwen-Image transformer; every word of the \
                 template must be one token"
            )));
        }
        Ok(Embedder { lm, tokenizer })
    }

    /// Token ids of a prompt in the template, cut so that at most 512 positions are kept.
    pub fn tokens(&self, prompt: &str) -> Result<Vec<i64>> {
        let mut tokens = self.tokenizer.encode(&format!("{PREFIX}{prompt}{SUFFIX}"))?;
        tokens.truncate(DROPPED + MAX_LENGTH);
        Ok(tokens)
    }

    /// Embeddings of one prompt: `[T, D]`, T the prompt's tokens plus five. No gradient.
    pub fn embed(&self, prompt: &str) -> Result<Tensor> {
        let tokens = self.tokens(prompt)?;
        let length = tokens.len() as i64;
        let dropped = DROPPED as i64;
        tch::no_grad(|| {
            let ids = Tensor::from_slice(&tokens).to_device(self.lm.device()).unsqueeze(0);
            let hidden = self.lm.hidden(&ids, None).squeeze_dim(0);
            Ok(hidden.narrow(0, dropped, length - dropped).contiguous())
        })
    }

    /// Embeddings of several prompts, each without padding, from one pass over a padded batch.
    pub fn embed_many(&self, prompts: &[&str]) -> Result<Vec<Tensor>> {
        let rows = prompts.iter().map(|prompt| self.tokens(prompt)).collect::<Result<Vec<_>>>()?;
        if rows.is_empty() {
            return Ok(Vec::new());
        }
        let ids = pad_right(&rows, self.tokenizer.end_of_text()).to_device(self.lm.device());
        let hidden = tch::no_grad(|| self.lm.hidden(&ids, None));
        let cut = |(index, row): (usize, &Vec<i64>)| {
            let (start, length) = (DROPPED as i64, row.len() as i64);
            hidden.select(0, index as i64).narrow(0, start, length - start).contiguous()
        };
        Ok(rows.iter().enumerate().map(cut).collect())
    }
}

/// Token rows of different lengths as one `[B, T]` tensor.
pub(crate) fn pad_right(rows: &[Vec<i64>], padding: i64) -> Tensor {
    let length = rows.iter().map(Vec::len).max().unwrap_or(0);
    let mut flat = Vec::with_capacity(rows.len() * length);
    for row in rows {
        flat.extend_from_slice(row);
        flat.resize(flat.len() + length - row.len(), padding);
    }
    Tensor::from_slice(&flat).view([rows.len() as i64, length as i64])
}
