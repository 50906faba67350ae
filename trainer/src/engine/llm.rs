//! The language model's part of an update: one micro-batch for each tree.

use super::batch::{Batch, LocalTree};
use super::gradient::Reduction;
use super::tally::Tally;
use super::{Before, Engine};
use crate::error::TrainError;
use duet_models::lm::Lm;
use duet_models::logprob::{TokenLogProbs, token_log_probs};
use duet_models::loss::{LlmBatch, LlmTotals, llm_loss, llm_totals};
use tch::Tensor;

/// Counts of this rank's trained answers; add them up over ranks.
pub fn local_totals(batch: &Batch) -> LlmTotals {
    let traces = batch.trees.iter().flat_map(|tree| &tree.traces);
    let trained = traces.filter(|trace| trace.advantage.is_some());
    llm_totals(trained.map(|trace| trace.think.log_probs.numel() as u32))
}

/// Adds the gradients and metrics of this rank's trees.
///
/// # Errors
/// [`TrainError`]; the gradient is then incomplete.
pub fn accumulate(
    engine: &mut Engine,
    batch: &Batch,
    totals: LlmTotals,
    before: &mut Before,
    (sums, tally): (&mut Reduction<'_>, &mut Tally),
) -> Result<(), TrainError> {
    for (t, tree) in batch.trees.iter().enumerate() {
        if tree.traces.iter().all(|trace| trace.advantage.is_none()) {
            continue;
        }
        let (prompt, answers) = tokens(tree)?;
        let temperature = engine.settings.temperature;
        let new = token_log_probs(&engine.pipeline.lm, &prompt, &answers, temperature, true)?;
        let reference = engine
            .llm_reference(|lm| token_log_probs(lm, &prompt, &answers, temperature, false))?;
        let sampled: Vec<&Tensor> =
            tree.traces.iter().map(|trace| &trace.think.log_probs).collect();
        let sampled = Tensor::cat(&sampled, 0);
        // With importance sampling the ratio is measured from the policy that is trained, and the
        // policy that sampled, which may be older, enters as a weight.
        let corrected = engine.settings.llm_loss.importance_cap.is_some();
        let old = match corrected {
            true => before.llm.entry(t).or_insert_with(|| new.values.detach()).shallow_clone(),
            false => sampled.shallow_clone(),
        };
        let advantages: Vec<Option<f64>> = tree.traces.iter().map(|t| t.advantage).collect();
        let inputs = LlmBatch {
            new: &new,
            old: &old,
            rollout: corrected.then_some(&sampled),
            reference: reference.as_ref().map(|r: &TokenLogProbs| &r.values),
            advantages: &advantages,
        };
        let loss = llm_loss(&engine.settings.llm_loss, &inputs, totals)?;
        let value = loss.value.double_value(&[]);
        tally.add("llm/loss", value);
        for (name, share) in &loss.metrics {
            tally.add(&format!("llm/{name}"), *share);
        }
        if !value.is_finite() {
            tally.bad(format!("llm loss of tree {}", tree.id));
            continue;
        }
        engine.llm.backward(&(loss.value * batch.gates.llm), sums)?;
    }
    Ok(())
}

/// The prompt of a tree and its answers.
fn tokens(tree: &LocalTree) -> Result<(Vec<i64>, Vec<Vec<i64>>), TrainError> {
    let mut prompt = Vec::new();
    let mut answers = Vec::new();
    for trace in &tree.traces {
        let mut all = Vec::<i64>::try_from(&trace.think.tokens)?;
        let answer = all.split_off(trace.think.prompt_len.min(all.len()));
        prompt = all;
        answers.push(answer);
    }
    Ok((prompt, answers))
}

/// A second language model with its own copy of the weights: the policy that a penalty measures
/// from, where all weights are trained.
///
/// # Errors
/// libtorch refuses.
pub fn copy(lm: &Lm) -> Result<Lm, TrainError> {
    let params = lm.params().iter().map(|(name, t)| (name.to_owned(), t.detach().copy()));
    Ok(Lm::new(lm.config().clone(), params.collect(), "the reference language model")?)
}
