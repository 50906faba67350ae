//! Bytes that a rollout worker holds besides the models while it samples.
//!
//! Its phases follow each other, so what counts is the largest of them: tokens are chosen one by one
//! (the KV cache), their log-probabilities are computed in one pass as the trainer does, images are
//! denoised, images are decoded. No gradients are kept, so a layer's tensors are all there is. A test of
//! the rollout worker holds the sum to what libtorch's allocator counts, on a CPU.

use super::Work;
use super::bytes::element;
use super::shapes::Shapes;
use duet_config::{Config, Device};

/// Positions that the KV cache grows by.
const CACHE_BLOCK: u64 = 64;
/// Transformers below so many parameters are sampled with a copy of the weights.
const COPY_BELOW: u64 = 300_000_000;
/// Columns of a panel.
const PANEL: u64 = 24;
/// Tokens of the embedding template before the prompt.
const TEMPLATE: u64 = 34;
/// Widths that a block of the transformer has in hand of the stream whose MLP it computes: the stream, it
/// normed, queries, keys, values, what attention gives and its part of it, the sum with that, the inner
/// layer before and after its activation (four each), what comes out, the new stream.
const MLP_STREAM: u64 = 18;
/// And of the other one: all that comes before the MLP.
const OTHER_STREAM: u64 = 7;
/// Maps of a residual block of the decoder: what comes in, the first convolution's output, the second
/// norm's, its activation, the second convolution's output.
const MAPS: u64 = 5;
/// On the CPU a convolution's input and output lie there once more, in oneDNN's order.
const REORDERED: u64 = 2;

/// Keys and values of the traces of a prompt.
pub fn cache(config: &Config, shapes: &Shapes, work: &Work) -> u64 {
    let prefix = work.sequence - work.new_tokens;
    let positions = prefix + work.new_tokens.div_ceil(CACHE_BLOCK) * CACHE_BLOCK;
    2 * work.traces * positions * shapes.lm.layers * shapes.lm.kv * element(config)
}

/// The copy of the transformer that images are sampled with outside the window: adapters folded into the
/// weights; on the CPU in fp32 always, laid out in panels.
fn copy(config: &Config, shapes: &Shapes) -> u64 {
    let dit = &shapes.dit;
    if dit.params() >= COPY_BELOW {
        return 0;
    }
    if config.workers.device == Device::Cpu && element(config) == 4 {
        let panels = |out: u64| out.div_ceil(PANEL) * PANEL;
        let d = dit.width;
        let stream = d * (panels(6 * d) + 4 * panels(d) + panels(4 * d)) + 4 * d * panels(d);
        return 4 * (dit.blocks * 2 * stream + 2 * d * panels(d));
    }
    if config.dit.branch.lora.is_some() { dit.params() * element(config) } else { 0 }
}

/// The largest of the other phases.
pub fn workspace(config: &Config, shapes: &Shapes, work: &Work) -> u64 {
    let phases = [
        log_probs(config, shapes, work),
        embeddings(config, shapes, work),
        copy(config, shapes) + denoise(config, shapes, work).max(decode(config, shapes, work)),
    ];
    phases.into_iter().max().unwrap_or(0)
}

/// A layer of the language model, a token: the stream, it with attention added, both normed or attended,
/// queries, keys and values; the gate before and after its activation, what it gates and the product.
fn lm_token(config: &Config, shapes: &Shapes) -> u64 {
    (5 * shapes.lm.hidden + 2 * shapes.lm.kv + 4 * shapes.lm.inner) * element(config)
}

/// The log-probabilities of a prompt's traces in one pass: a layer of it, or at its end the logits of all
/// tokens and their fp32 log-probabilities.
fn log_probs(config: &Config, shapes: &Shapes, work: &Work) -> u64 {
    let el = element(config);
    let prefix = work.sequence - work.new_tokens;
    let tokens = prefix + work.traces * work.new_tokens.saturating_sub(1);
    let predicted = work.traces * work.new_tokens;
    let states = tokens + predicted;
    let ends = states * shapes.lm.hidden * el + predicted * 2 * 4 * shapes.lm.vocab;
    ends.max(tokens * lm_token(config, shapes))
}

/// The embeddings of a tree's refined prompts, in one pass.
fn embeddings(config: &Config, shapes: &Shapes, work: &Work) -> u64 {
    work.traces * (TEMPLATE + work.text_tokens) * lm_token(config, shapes)
}

/// A block of the transformer while a sub-tree is denoised: one of its streams is at its MLP.
fn denoise(config: &Config, shapes: &Shapes, work: &Work) -> u64 {
    let (image, text) = (work.image_tokens, work.text_tokens);
    let image_last = MLP_STREAM * image + OTHER_STREAM * text;
    let text_last = OTHER_STREAM * image + MLP_STREAM * text;
    let rows = work.leaves * work.passes;
    rows * image_last.max(text_last) * shapes.dit.width * element(config)
}

/// The decoder's largest stage, in fp32: a residual block's maps, or the doubling of what comes from the
/// stage below: that, it doubled, and what the convolution makes of it.
fn decode(config: &Config, shapes: &Shapes, work: &Work) -> u64 {
    let vae = &shapes.vae;
    let maps = MAPS + if config.workers.device == Device::Cpu { REORDERED } else { 0 };
    let stage = |(depth, stage): (usize, &u64)| {
        let pixels = work.pixels >> (2 * depth);
        let below = vae.stages.get(depth + 1).map_or(0, |below| below * vae.base);
        let doubled = below / 4 + below + below / 2;
        pixels * (maps * stage * vae.base).max(doubled)
    };
    4 * work.leaves * vae.stages.iter().enumerate().map(stage).max().unwrap_or(0)
}
