//! Sampling: the J traces of one prompt, in one batch.
//!
//! The prompt is run once and shared. Each token is chosen by one uniform number that depends on
//! the trace and the position only, by inverting the cumulative distribution in vocabulary order, so
//! a trace does not depend on what else is in the batch (beyond the last bit of the logits).

use crate::decoder::Decoder;
use crate::error::{ModelError, Result};
use duet_core::work::Finish;
use duet_core::{Purpose, Seed};
use tch::{Device, Kind, Tensor};

/// How to sample.
#[derive(Clone, Debug, PartialEq)]
pub struct SampleOptions {
    /// J.
    pub traces: usize,
    /// Most tokens of an answer.
    pub max_new_tokens: usize,
    /// Logits are divided by it; zero: greedy.
    pub temperature: f64,
    /// Tokens that end an answer; the one that did is part of it.
    pub eos: Vec<i64>,
}

/// One answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sampled {
    /// Its tokens, with the one that ended it.
    pub tokens: Vec<i64>,
    /// How it ended.
    pub finish: Finish,
}

/// Samples `options.traces` answers to `prompt`. Trace `j` takes its numbers from
/// `seed.derive(Tokens, [j])`.
///
/// # Errors
/// When the prompt is empty, a token is outside the vocabulary, the sequence would exceed the
/// model's positions, or the logits are not finite.
pub fn generate(
    decoder: &Decoder<'_>,
    prompt: &[i64],
    seed: &Seed,
    options: &SampleOptions,
) -> Result<Vec<Sampled>> {
    generate_watched(decoder, prompt, seed, options, &mut |_| ())
}

/// As [`generate`]; `watch` is told after each token how many the longest answer has.
///
/// # Errors
/// As [`generate`].
pub fn generate_watched(
    decoder: &Decoder<'_>,
    prompt: &[i64],
    seed: &Seed,
    options: &SampleOptions,
    watch: &mut dyn FnMut(usize),
) -> Result<Vec<Sampled>> {
    check(decoder, prompt, options)?;
    let seeds: Vec<Seed> =
        (0..options.traces as u64).map(|trace| seed.derive(Purpose::Tokens, &[trace])).collect();
    let mut answers: Vec<Vec<i64>> = vec![Vec::new(); options.traces];
    let mut finish = vec![Finish::Length; options.traces];
    // Which trace each row of the batch is, and whether it still runs.
    let mut rows: Vec<usize> = (0..options.traces).collect();
    let mut running = vec![true; options.traces];

    let device = decoder.lm().device();
    let ids = Tensor::from_slice(prompt).to_device(device).unsqueeze(0);
    let mut prefix = decoder.cache();
    let first = decoder.advance(&ids, &mut prefix)?;
    let mut logits = first.expand([rows.len() as i64, -1], false);
    let mut cache = prefix.fork(rows.len() as i64, options.max_new_tokens as i64);
    drop(prefix);

    for position in 0..options.max_new_tokens {
        let numbers: Vec<f64> =
            rows.iter().map(|trace| seeds[*trace].uniform(position as u64)).collect();
        let tokens = choose(&logits, &numbers, options.temperature)?;
        for (row, token) in rows.iter().zip(&tokens).filter(|(row, _)| running[**row]) {
            answers[*row].push(*token);
        }
        for (trace, token) in rows.iter().zip(&tokens) {
            if running[*trace] && options.eos.contains(token) {
                running[*trace] = false;
                finish[*trace] = Finish::Stop;
            }
        }
        watch(position + 1);
        let live = rows.iter().filter(|trace| running[**trace]).count();
        if live == 0 || position + 1 == options.max_new_tokens {
            break;
        }
        let mut next = tokens;
        // Copying the cache costs about as much as a few steps, so a row or two may idle.
        if live * 4 <= rows.len() * 3 {
            let kept: Vec<i64> =
                (0..rows.len()).filter(|row| running[rows[*row]]).map(|row| row as i64).collect();
            cache.keep(&Tensor::from_slice(&kept).to_device(device));
            next = kept.iter().map(|row| next[*row as usize]).collect();
            rows.retain(|trace| running[*trace]);
        }
        let fed = Tensor::from_slice(&next).to_device(device).unsqueeze(1);
        logits = decoder.advance(&fed, &mut cache)?;
    }
    let answers = answers.into_iter().zip(finish);
    Ok(answers.map(|(tokens, finish)| Sampled { tokens, finish }).collect())
}

/// The token of each row: the first whose cumulative probability exceeds the row's number.
fn choose(logits: &Tensor, numbers: &[f64], temperature: f64) -> Result<Vec<i64>> {
    let chosen = if temperature == 0.0 {
        logits.argmax(-1, false)
    } else if logits.device() == Device::Cpu {
        let found = duet_torch::decode::choose(logits, numbers, temperature)
            .map_err(|e| ModelError::BadInput(e.to_string()))?;
        return found
            .ok_or(ModelError::NotFinite { what: "a logit", place: " in sampling".into() });
    } else {
        let scaled = if temperature == 1.0 { logits.shallow_clone() } else { logits / temperature };
        let cumulative = scaled.softmax(-1, Kind::Float).cumsum(-1, Kind::Double);
        let vocabulary = cumulative.size()[1];
        let total = cumulative.narrow(1, vocabulary - 1, 1);
        if total.isfinite().all().int64_value(&[]) == 0 {
            return Err(ModelError::NotFinite { what: "a logit", place: " in sampling".into() });
        }
        let targets = Tensor::from_slice(numbers).to_device(logits.device()).unsqueeze(1) * total;
        let found = targets.searchsorted::<Tensor>(&cumulative, false, true, "right", None);
        found.clamp_max(vocabulary - 1).squeeze_dim(1)
    };
    Ok(Vec::<i64>::try_from(chosen)?)
}

fn check(decoder: &Decoder<'_>, prompt: &[i64], options: &SampleOptions) -> Result<()> {
    let config = decoder.lm().config();
    let bad = |reason: String| Err(ModelError::BadInput(reason));
    if prompt.is_empty() || options.traces == 0 || options.max_new_tokens == 0 {
        return bad("sampling needs a prompt, at least one trace and at least one token".to_owned());
    }
    if !options.temperature.is_finite() || options.temperature < 0.0 {
        return bad(format!("temperature {} is not zero or above", options.temperature));
    }
    if let Some(token) = prompt.iter().find(|token| !(0..config.vocab_size).contains(*token)) {
        return bad(format!("token {token} is outside the vocabulary of {}", config.vocab_size));
    }
    let length = prompt.len() + options.max_new_tokens;
    if length as i64 > config.max_position_embeddings {
        return bad(format!(
            "prompt and answer may take {length} positions, the model has {} \
             (max_position_embeddings); lower max_new_tokens",
            config.max_position_embeddings
        ));
    }
    Ok(())
}
