//! How good a model is: the small world's three accuracies, and the smaller questions behind them.

use crate::bootstrap::{GUIDANCE, INSTRUCTION, MAX_NEW_TOKENS, STEPS};
use crate::digits::SIDE;
use crate::error::Result;
use crate::facts::{COLOURS, NUMBERS, PLACES};
use crate::judge::Judge;
use crate::prompts::{Prompt, caption, names_target};
use duet_core::work::Window;
use duet_core::{Purpose, Seed};
use duet_models::decoder::Decoder;
use duet_models::embed::Embedder;
use duet_models::generate::{SampleOptions, generate};
use duet_models::pipeline::Pipeline;
use duet_models::render::{Condition, RenderOptions, render};
use duet_models::sde::SdeKind;
use duet_models::template::{ThinkTemplate, extract};

/// How images are sampled for measuring: without noise.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Denoising steps.
    pub steps: usize,
    /// True classifier-free guidance.
    pub guidance: f64,
}

impl Default for Sampling {
    fn default() -> Self {
        Sampling { steps: STEPS, guidance: GUIDANCE }
    }
}

impl Sampling {
    fn options(&self) -> RenderOptions {
        let side = SIDE as i64;
        RenderOptions {
            steps: self.steps,
            guidance: self.guidance,
            sde: SdeKind::FlowGrpo,
            noise_level: 0.0,
            width: side,
            height: side,
        }
    }
}

/// What became of some traces.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Traces {
    /// Share whose refined prompt names the right digit and colour.
    pub right: f64,
    /// Share that recalled what they know.
    pub careful: f64,
    /// Share of the careful ones that are right.
    pub careful_right: f64,
    /// Share of the others that are right.
    pub hasty_right: f64,
    /// Share that has the form `... Revised Prompt: ...`.
    pub well_formed: f64,
    /// A few answers, for reading.
    pub samples: Vec<String>,
}

/// Samples `each` traces to every prompt at temperature 1.
///
/// # Errors
/// The model refuses.
pub fn trace_accuracy(
    pipeline: &Pipeline,
    prompts: &[Prompt],
    each: usize,
    seed: &Seed,
) -> Result<Traces> {
    let template = ThinkTemplate::new(INSTRUCTION, pipeline.tokenizer.chat_template())?;
    let decoder = Decoder::new(&pipeline.lm)?;
    let options = SampleOptions {
        traces: each,
        max_new_tokens: MAX_NEW_TOKENS,
        temperature: 1.0,
        eos: vec![pipeline.tokenizer.im_end()],
    };
    let (mut right, mut formed) = ([0f64; 2], 0f64);
    let mut count = [0f64; 2];
    let mut samples = Vec::new();
    for (index, prompt) in (0u64..).zip(prompts) {
        let tokens = pipeline.tokenizer.encode(&template.render(&prompt.text())?)?;
        let seed = seed.derive(Purpose::Evaluation, &[1, index]);
        for trace in generate(&decoder, &tokens, &seed, &options)? {
            let text = pipeline.tokenizer.decode(&trace.tokens)?;
            let answer = extract(&text);
            let mode = usize::from(text.starts_with("recall"));
            count[mode] += 1.0;
            right[mode] += f64::from(u8::from(names_target(&answer.refined, &prompt.target())));
            formed += f64::from(u8::from(answer.well_formed));
            if samples.len() < 8 {
                samples.push(format!("{} => {text}", prompt.text()));
            }
        }
    }
    let all = (count[0] + count[1]).max(1.0);
    Ok(Traces {
        right: (right[0] + right[1]) / all,
        careful: count[1] / all,
        careful_right: right[1] / count[1].max(1.0),
        hasty_right: right[0] / count[0].max(1.0),
        well_formed: formed / all,
        samples,
    })
}

/// Share of `captions` random captions' images in which the judge sees the caption's digit and colour
/// (one image each).
///
/// # Errors
/// The model refuses.
pub fn render_accuracy(
    pipeline: &Pipeline,
    judge: &Judge,
    captions: usize,
    seed: &Seed,
    sampling: &Sampling,
) -> Result<f64> {
    let embedder = Embedder::new(&pipeline.lm, &pipeline.tokenizer)?;
    let negative = embedder.embed(" ")?;
    let mut right = 0usize;
    for index in 0..captions {
        let digit = index % NUMBERS.len();
        let colour = (index / NUMBERS.len() + index) % COLOURS.len();
        let place = (index * 7 + index / 4) % PLACES.len();
        let embeds = embedder.embed(&caption(digit as u8, colour as u8, place as u8))?;
        let condition = Condition { embeds: &embeds, negative: Some(&negative) };
        let seed = seed.derive(Purpose::Evaluation, &[2, index as u64]);
        let none = Window { start: 0, len: 0 };
        let made = render(pipeline, condition, 1, none, &seed, &sampling.options())?;
        right += judge
            .see(&made.images)?
            .iter()
            .filter(|seen| **seen == (digit as u8, colour as u8))
            .count();
    }
    Ok(right as f64 / captions.max(1) as f64)
}
