//! The language model of the small world: tokenizer, pre-training, light SFT.

use super::{Budget, Notice, Progress};
use crate::corpus::{Example, Library, examples, vocabulary};
use crate::error::Result;
use crate::learn::{Learner, Plan};
use crate::prompts::shuffle;
use duet_core::{Purpose, Seed};
use duet_models::embed::{PREFIX, SUFFIX};
use duet_models::lm::{Lm, LmConfig};
use duet_models::params::ParamSet;
use duet_models::template::ThinkTemplate;
use duet_models::tokenizer::{SPECIAL_TOKENS, Tokenizer};
use tch::{Kind, Tensor};

/// What stands before the raw prompt in the user's turn: nothing. The small model knows no other task.
pub const INSTRUCTION: &str = "";

/// Share of pre-training documents in a batch of SFT: they keep alive what the worked examples do not
/// speak of.
const REHEARSED: f64 = 0.3;

/// The tokenizer: every word of the world is one token.
///
/// # Errors
/// The `tokenizers` crate refuses.
pub fn tokenizer() -> Result<Tokenizer> {
    let plain = |text: &str| {
        let mut text = text.to_owned();
        for token in SPECIAL_TOKENS {
            text = text.replace(token, "");
        }
        text
    };
    let chat = ThinkTemplate::new(INSTRUCTION, None)?.render("")?;
    let extra = [plain(PREFIX), plain(SUFFIX), plain(&chat)];
    let extra: Vec<&str> = extra.iter().map(String::as_str).collect();
    Ok(Tokenizer::train(&vocabulary(&extra), 4096, None)?)
}

/// The architecture for a tokenizer.
pub fn config(tokenizer: &Tokenizer) -> LmConfig {
    LmConfig {
        vocab_size: tokenizer.size() as i64,
        hidden_size: 96,
        intermediate_size: 256,
        num_hidden_layers: 3,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        rms_norm_eps: 1e-6,
        rope_theta: 10_000.0,
        max_position_embeddings: 1024,
        mrope_section: vec![4, 4, 4],
        tie_word_embeddings: false,
        bos_token_id: tokenizer.end_of_text(),
        eos_token_id: tokenizer.im_end(),
    }
}

/// A fresh model. Large models start at a standard deviation of 0.02; at this width that would cost
/// hundreds of steps to grow out of, so linear layers start at 1 / sqrt(fan-in).
fn fresh(config: LmConfig, seed: &Seed) -> Result<Lm> {
    let lm = Lm::init(config, &seed.derive(Purpose::Weights, &[1]))?;
    let scaled: ParamSet = lm
        .params()
        .iter()
        .map(|(name, tensor)| {
            let factor = match tensor.dim() {
                2 if name.contains("embed_tokens") => 5.0,
                2 if name.starts_with("lm_head") => 1.0,
                2 => (tensor.size()[1] as f64).sqrt().recip() / 0.02,
                _ => 1.0,
            };
            (name.to_owned(), tensor * factor)
        })
        .collect();
    Ok(Lm::new(lm.config().clone(), scaled, "a new language model")?)
}

/// Pre-trains on the world's knowledge, then imitates the worked examples.
///
/// # Errors
/// A loss that is not finite, or libtorch refuses.
pub fn train(
    tokenizer: &Tokenizer,
    budget: &Budget,
    seed: &Seed,
    progress: &dyn Progress,
) -> Result<(Lm, Vec<Example>)> {
    let lm = fresh(config(tokenizer), seed)?;
    pretrain(&lm, tokenizer, (budget.pretrain, budget.formed), seed, progress)?;
    let examples = examples(&budget.teacher, seed, budget.examples);
    imitate(&lm, tokenizer, &examples, budget.sft, seed, progress)?;
    Ok((lm, examples))
}

/// Next-token prediction on what documents tell, one to a row.
fn pretrain(
    lm: &Lm,
    tokenizer: &Tokenizer,
    (plan, formed): (Plan, f64),
    seed: &Seed,
    progress: &dyn Progress,
) -> Result<()> {
    let mut reader = Reader::new(tokenizer, seed, formed)?;
    let mut learner = Learner::new(lm.params().to_map(), plan)?;
    for step in 0..plan.steps {
        let batch = (0..plan.batch).map(|_| reader.row()).collect::<Result<Vec<_>>>()?;
        let loss = learner.step(&answer_loss(lm, &batch, tokenizer.end_of_text()))?;
        progress.notice(Notice { phase: plan.phase, step: step + 1, steps: plan.steps, loss });
    }
    learner.finish();
    Ok(())
}

/// Documents as tokens.
struct Reader<'a> {
    library: Library,
    tokenizer: &'a Tokenizer,
    template: ThinkTemplate,
}

impl<'a> Reader<'a> {
    fn new(tokenizer: &'a Tokenizer, seed: &Seed, formed: f64) -> Result<Reader<'a>> {
        let template = ThinkTemplate::new(INSTRUCTION, tokenizer.chat_template())?;
        Ok(Reader { library: Library::new(seed, formed), tokenizer, template })
    }

    fn row(&mut self) -> Result<Row> {
        let document = self.library.document();
        let (given, end) = match document.chat {
            true => (self.template.render(&document.given)?, self.tokenizer.im_end()),
            false => (document.given, self.tokenizer.end_of_text()),
        };
        let mut tokens = self.tokenizer.encode(&given)?;
        let start = tokens.len().max(1);
        tokens.extend(self.tokenizer.encode(&document.told)?);
        tokens.push(end);
        Ok((tokens, start))
    }
}

/// Tokens, and where that begins which is learned.
type Row = (Vec<i64>, usize);

/// A worked example as tokens, and where its answer begins.
fn tokens_of(tokenizer: &Tokenizer, template: &ThinkTemplate, example: &Example) -> Result<Row> {
    let mut tokens = tokenizer.encode(&template.render(&example.prompt)?)?;
    let start = tokens.len();
    tokens.extend(tokenizer.encode(&example.response())?);
    tokens.push(tokenizer.im_end());
    Ok((tokens, start))
}

/// Cross-entropy on the answers, `<|im_end|>` included (arXiv 2601.10332 section 3.1).
fn imitate(
    lm: &Lm,
    tokenizer: &Tokenizer,
    examples: &[Example],
    plan: Plan,
    seed: &Seed,
    progress: &dyn Progress,
) -> Result<()> {
    let template = ThinkTemplate::new(INSTRUCTION, tokenizer.chat_template())?;
    let rows = examples
        .iter()
        .map(|example| tokens_of(tokenizer, &template, example))
        .collect::<Result<Vec<_>>>()?;
    let mut reader = Reader::new(tokenizer, &seed.derive(Purpose::Data, &[14]), 0.0)?;
    let rehearsed = (plan.batch as f64 * REHEARSED) as usize;
    let mut learner = Learner::new(lm.params().to_map(), plan)?;
    let mut order: Vec<usize> = Vec::new();
    let mut epoch = 0;
    for step in 0..plan.steps {
        if order.len() < plan.batch - rehearsed {
            order = (0..rows.len()).collect();
            shuffle(&mut order, &seed.derive(Purpose::Data, &[12, epoch]));
            epoch += 1;
        }
        let fresh = plan.batch - rehearsed;
        let mut batch: Vec<Row> = order.drain(..fresh).map(|at| rows[at].clone()).collect();
        for _ in 0..rehearsed {
            batch.push(reader.row()?);
        }
        let loss = learner.step(&answer_loss(lm, &batch, tokenizer.end_of_text()))?;
        progress.notice(Notice { phase: plan.phase, step: step + 1, steps: plan.steps, loss });
    }
    learner.finish();
    Ok(())
}

/// Mean cross-entropy over all answer tokens of right-padded rows. Only the states that predict one
/// go through the output layer.
fn answer_loss(lm: &Lm, batch: &[Row], padding: i64) -> Tensor {
    let longest = batch.iter().map(|(row, _)| row.len()).max().unwrap_or(1) - 1;
    let (mut inputs, mut targets, mut places) = (Vec::new(), Vec::new(), Vec::new());
    for (row, start) in batch {
        for at in 0..longest {
            if let Some(target) = row.get(at + 1).filter(|_| at + 1 >= *start) {
                places.push(inputs.len() as i64);
                targets.push(*target);
            }
            inputs.push(row.get(at).copied().unwrap_or(padding));
        }
    }
    let inputs = Tensor::from_slice(&inputs).view([batch.len() as i64, longest as i64]);
    let states = lm.hidden(&inputs, None).flatten(0, 1);
    let states = states.index_select(0, &Tensor::from_slice(&places));
    let logits = lm.logits(&states).to_kind(Kind::Float);
    logits.cross_entropy_for_logits(&Tensor::from_slice(&targets))
}
