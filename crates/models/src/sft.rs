//! Supervised fine-tuning: worked examples as tokens, several of them packed into one row, and the
//! cross-entropy of their answers (arXiv 2601.10332 section 3.1).
//!
//! ```text
//! row        [ prompt 1 | answer 1 ][ prompt 2 | answer 2 ][ ...
//! position     0 1 2 ...              0 1 2 ...
//! attention    within one example, causal
//! loss                    ^^^^^^^^              ^^^^^^^^     answers only, <|im_end|> included
//! ```
//! A packed row costs one pass where its examples would cost one each or be padded, and gives the
//! same loss: no example sees another.

use crate::embed::DROPPED;
use crate::error::{ModelError, Result};
use crate::lm::Lm;
use tch::{Kind, Reduction, Tensor};

/// A worked example as tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    tokens: Vec<i64>,
    answer: usize,
}

impl Example {
    /// A prompt and its answer, neither of them empty.
    ///
    /// # Errors
    /// One of them is empty.
    pub fn new(prompt: &[i64], answer: &[i64]) -> Result<Example> {
        if prompt.is_empty() || answer.is_empty() {
            let reason = "a worked example needs a prompt and an answer of at least one token";
            return Err(ModelError::BadInput(reason.to_owned()));
        }
        Ok(Example { tokens: [prompt, answer].concat(), answer: prompt.len() })
    }

    /// Tokens in all.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Never: there is a prompt and an answer.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Tokens that are learned.
    pub fn answer_len(&self) -> usize {
        self.tokens.len() - self.answer
    }
}

/// Distributes items of these lengths over rows of at most `capacity`, first fit in the order given;
/// an item that is longer has a row of its own. Rows hold indices.
pub fn pack(lengths: &[usize], capacity: usize) -> Vec<Vec<usize>> {
    let mut rows: Vec<(usize, Vec<usize>)> = Vec::new();
    for (index, length) in lengths.iter().enumerate() {
        match rows.iter_mut().find(|(used, _)| used + length <= capacity) {
            Some((used, row)) => {
                *used += length;
                row.push(index);
            }
            None => rows.push((*length, vec![index])),
        }
    }
    rows.into_iter().map(|(_, row)| row).collect()
}

/// What a row of examples comes to.
#[derive(Debug)]
pub struct RowLoss {
    /// Sum of the cross-entropies of all answer tokens, a scalar, with gradient where gradients are
    /// on: divide it by the answer tokens of the whole batch.
    pub sum: Tensor,
    /// Answer tokens that were the most probable ones, a scalar; no gradient.
    pub right: Tensor,
}

/// The loss of examples that share a row.
///
/// # Errors
/// There is no example, or a token outside the vocabulary.
pub fn row_loss(lm: &Lm, row: &[&Example]) -> Result<RowLoss> {
    let vocabulary = lm.config().vocab_size;
    let mut all = row.iter().flat_map(|example| &example.tokens);
    if let Some(token) = all.find(|token| !(0..vocabulary).contains(*token)) {
        let reason = format!("token {token} is outside the vocabulary of {vocabulary}");
        return Err(ModelError::BadInput(reason));
    }
    if row.is_empty() {
        return Err(ModelError::BadInput("a row of no examples has no loss".to_owned()));
    }
    let (mut fed, mut lengths) = (Vec::new(), Vec::new());
    let (mut places, mut targets) = (Vec::new(), Vec::new());
    for example in row {
        let start = fed.len() as i64;
        // The state at a token predicts the next one; the last predicts nothing.
        places.extend((example.answer - 1..example.len() - 1).map(|at| start + at as i64));
        targets.extend_from_slice(&example.tokens[example.answer..]);
        fed.extend_from_slice(&example.tokens[..example.len() - 1]);
        lengths.push(example.len() as i64 - 1);
    }
    let device = lm.device();
    let on_device = |list: &[i64]| Tensor::from_slice(list).to_device(device);
    let states = lm.hidden_packed(&on_device(&fed), &lengths);
    let logits = lm.logits(&states.index_select(0, &on_device(&places))).to_kind(Kind::Float);
    let targets = on_device(&targets);
    let right = tch::no_grad(|| logits.argmax(-1, false).eq_tensor(&targets).sum(Kind::Float));
    let sum = logits.cross_entropy_loss::<Tensor>(&targets, None, Reduction::Sum, -100, 0.0);
    Ok(RowLoss { sum, right })
}

/// Sum, over all kept positions of prompts in the embedding template, of the mean squared distance
/// between their states in `lm` and in `base`: a scalar, with gradient to `lm` where gradients are on.
/// Each prompt is given as [`Embedder::tokens`](crate::embed::Embedder::tokens) has it; divide by the
/// kept positions of the whole batch.
///
/// # Errors
/// There is no prompt, or one that is no longer than the template's prefix.
pub fn anchor_loss(lm: &Lm, base: &Lm, prompts: &[&[i64]]) -> Result<Tensor> {
    let kept = |prompt: &&[i64]| prompt.len().saturating_sub(DROPPED);
    if prompts.is_empty() || prompts.iter().any(|prompt| kept(prompt) == 0) {
        let reason = "an anchor needs prompts in the embedding template";
        return Err(ModelError::BadInput(reason.to_owned()));
    }
    let (mut fed, mut lengths, mut places) = (Vec::new(), Vec::new(), Vec::new());
    for prompt in prompts {
        let start = fed.len();
        places.extend((start + DROPPED..start + prompt.len()).map(|at| at as i64));
        fed.extend_from_slice(prompt);
        lengths.push(prompt.len() as i64);
    }
    let on_device = |list: &[i64]| Tensor::from_slice(list).to_device(lm.device());
    let (fed, places) = (on_device(&fed), on_device(&places));
    let states = |lm: &Lm| lm.hidden_packed(&fed, &lengths).index_select(0, &places);
    let wanted = tch::no_grad(|| states(base)).to_kind(Kind::Float);
    let apart = (states(lm).to_kind(Kind::Float) - wanted).square();
    Ok(apart.mean_dim([1i64].as_slice(), false, Kind::Float).sum(Kind::Float))
}
