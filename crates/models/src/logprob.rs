//! Log-probabilities of answers, teacher-forced: the one function for rollout and trainer.

use crate::embed::pad_right;
use crate::error::{ModelError, Result};
use crate::lm::{Layer, Lm, Rotation};
use crate::nn::{attention, rms_norm};
use duet_torch::recompute;
use tch::{Kind, Tensor};

/// Log-probabilities of the tokens of several answers.
#[derive(Debug)]
pub struct TokenLogProbs {
    /// All tokens, answer after answer: `[N]` fp32.
    pub values: Tensor,
    /// Entropy of each token's distribution, `[N]` fp32, when asked for; no gradient.
    pub entropy: Option<Tensor>,
    /// Tokens of each answer; they add up to N.
    pub lengths: Vec<i64>,
}

impl TokenLogProbs {
    /// The values of each answer.
    pub fn split(&self) -> Vec<Tensor> {
        self.values.split_with_sizes(self.lengths.as_slice(), 0)
    }
}

/// Log-probabilities of `answers` to one `prompt`, from logits divided by `temperature`, with
/// gradient where gradients are on.
///
/// The prompt is computed once and shared by the answers. With the same arguments the result is the
/// same bit for bit, so rollout and trainer agree when both give it a tree's traces together.
pub fn token_log_probs(
    lm: &Lm,
    prompt: &[i64],
    answers: &[Vec<i64>],
    temperature: f64,
    with_entropy: bool,
) -> Result<TokenLogProbs> {
    if prompt.is_empty() || answers.is_empty() || answers.iter().any(Vec::is_empty) {
        let reason = "log-probabilities need a prompt and answers of at least one token";
        return Err(ModelError::BadInput(reason.to_owned()));
    }
    let vocabulary = lm.config().vocab_size;
    let all = prompt.iter().chain(answers.iter().flatten());
    if let Some(token) = all.clone().find(|token| !(0..vocabulary).contains(*token)) {
        let reason = format!("token {token} is outside the vocabulary of {vocabulary}");
        return Err(ModelError::BadInput(reason));
    }
    if temperature <= 0.0 || !temperature.is_finite() {
        let reason = format!("log-probabilities at temperature {temperature} do not exist");
        return Err(ModelError::BadInput(reason));
    }
    let lengths: Vec<i64> = answers.iter().map(|answer| answer.len() as i64).collect();
    let hidden = shared_hidden(lm, prompt, answers)?;
    let targets: Vec<i64> = answers.iter().flatten().copied().collect();
    let targets = Tensor::from_slice(&targets).to_device(lm.device()).unsqueeze(1);
    let logits = lm.logits(&hidden).to_kind(Kind::Float);
    let logits = if temperature == 1.0 { logits } else { logits / temperature };
    let logs = logits.log_softmax(-1, Kind::Float);
    let entropy = with_entropy
        .then(|| tch::no_grad(|| -(logs.exp() * &logs).sum_dim_intlist(-1, false, None)));
    let values = logs.gather(1, &targets, false).squeeze_dim(1);
    Ok(TokenLogProbs { values, entropy, lengths })
}

/// Hidden states that predict each token of each answer, `[N, D]`: the prompt is run once, the
/// answers attend to it and to themselves.
fn shared_hidden(lm: &Lm, prompt: &[i64], answers: &[Vec<i64>]) -> Result<Tensor> {
    let device = lm.device();
    let prefix = prompt.len() as i64;
    // The last token of an answer predicts nothing that is asked for.
    let fed: Vec<Vec<i64>> =
        answers.iter().map(|answer| answer[..answer.len() - 1].to_vec()).collect();
    let batch = answers.len() as i64;
    let length = fed.iter().map(Vec::len).max().unwrap_or(0) as i64;
    let first = Tensor::from_slice(prompt);
    let ids = Tensor::cat(&[first, pad_right(&fed, 0).flatten(0, 1).to_kind(Kind::Int64)], 0);
    let ids = ids.to_device(device).unsqueeze(0);
    let mut x = lm.embed(&ids);
    let shape = Shape { prefix, batch, length };
    let rotation = shape.rotation(lm);
    let allowed = shape.allowed(device);
    for layer in lm.layers() {
        x = match lm.recomputes() {
            false => shape.through(layer, &x, &rotation, allowed.as_ref()),
            true => {
                let leaves: Vec<&Tensor> = layer.tensors().collect();
                let (layer, rotation) = (layer.share(), rotation.share());
                let allowed = allowed.as_ref().map(Tensor::shallow_clone);
                let body = move |inputs: &[Tensor]| {
                    vec![shape.through(&layer, &inputs[0], &rotation, allowed.as_ref())]
                };
                recompute(&[&x], &leaves, body)?.remove(0)
            }
        };
    }
    let states = x.squeeze_dim(0).index_select(0, &shape.predictors(answers).to_device(device));
    Ok(rms_norm(&states, lm.final_norm(), lm.config().rms_norm_eps))
}

/// A prompt of `prefix` tokens followed, in one row, by `batch` answers of `length` tokens.
#[derive(Clone, Copy)]
struct Shape {
    prefix: i64,
    batch: i64,
    length: i64,
}

impl Shape {
    /// Every answer starts at the position where the prompt ends.
    fn rotation(&self, lm: &Lm) -> Rotation {
        let whole = lm.rotation(0, self.prefix + self.length);
        let lay = |table: &Tensor| {
            let answer = table.narrow(0, self.prefix, self.length);
            let answers = answer.repeat([self.batch, 1]);
            Tensor::cat(&[table.narrow(0, 0, self.prefix), answers], 0)
        };
        Rotation { cos: lay(&whole.cos), sin: lay(&whole.sin) }
    }

    /// What an answer's tokens see: the whole prompt, and themselves up to here.
    fn allowed(&self, device: tch::Device) -> Option<Tensor> {
        if self.length == 0 {
            return None;
        }
        let square = [self.length, self.prefix + self.length];
        Some(Tensor::ones(square, (Kind::Bool, device)).tril(self.prefix))
    }

    /// One decoder layer over the whole row.
    fn through(
        &self,
        layer: &Layer,
        x: &Tensor,
        rotation: &Rotation,
        allowed: Option<&Tensor>,
    ) -> Tensor {
        let (q, k, v) = layer.project(x, rotation);
        layer.finish(x, &self.attend(&q, &k, &v, allowed))
    }

    /// `[1, H, prefix + batch * length, D]` each to the same, attended.
    fn attend(&self, q: &Tensor, k: &Tensor, v: &Tensor, allowed: Option<&Tensor>) -> Tensor {
        let head = |x: &Tensor| x.narrow(2, 0, self.prefix);
        let prompt = attention(&head(q), &head(k), &head(v), None, true);
        let Some(allowed) = allowed else {
            return prompt;
        };
        let total = self.batch * self.length;
        let tail = |x: &Tensor| {
            let size = x.size();
            let split = [size[1], self.batch, self.length, size[3]];
            x.narrow(2, self.prefix, total).squeeze_dim(0).reshape(split).transpose(0, 1)
        };
        let joined = |x: &Tensor| {
            let prompt = head(x).expand([self.batch, -1, -1, -1], false);
            Tensor::cat(&[prompt, tail(x)], 2)
        };
        let answers = attention(&tail(q), &joined(k), &joined(v), Some(allowed), false);
        let answers = answers.transpose(0, 1).flatten(1, 2).unsqueeze(0);
        Tensor::cat(&[prompt, answers], 2)
    }

    /// Rows whose state predicts the answers' tokens, answer after answer.
    fn predictors(&self, answers: &[Vec<i64>]) -> Tensor {
        let mut rows = Vec::new();
        for (index, answer) in answers.iter().enumerate() {
            let start = self.prefix + index as i64 * self.length;
            rows.push(self.prefix - 1);
            rows.extend(start..start + answer.len() as i64 - 1);
        }
        Tensor::from_slice(&rows)
    }
}
