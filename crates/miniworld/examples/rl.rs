//! Dual-GRPO in one process, to choose hyper-parameters: the same functions as the workers call, with
//! nothing between them.
//!
//! `cargo run -p duet-miniworld --example rl -- MODEL_DIR [key=value]...`

use duet_core::advantage::{AdvantageSpec, advantages};
use duet_core::work::{PromptRow, Score, Window};
use duet_core::{Purpose, Seed};
use duet_miniworld::bootstrap::{GUIDANCE, INSTRUCTION, MAX_NEW_TOKENS, STEPS};
use duet_miniworld::judge::Judge;
use duet_miniworld::prompts::{Split, Target, named, names_target, rows};
use duet_miniworld::scorers::Scorers;
use duet_models::decoder::Decoder;
use duet_models::embed::Embedder;
use duet_models::flow::FlowSchedule;
use duet_models::generate::{SampleOptions, generate};
use duet_models::logprob::token_log_probs;
use duet_models::loss::{
    Aggregation, DitBatch, DitLoss, DitObjective, LlmBatch, LlmLoss, LlmObjective, dit_loss,
    llm_loss, llm_totals,
};
use duet_models::pipeline::Pipeline;
use duet_models::render::{Condition, RenderOptions, Rendered, Sampler, render, replay};
use duet_models::sde::SdeKind;
use duet_models::template::{ThinkTemplate, extract};
use duet_torch::Tensors;
use duet_torch::optim::{AdamW, AdamWOptions, clip_grad_norm};
use std::collections::BTreeMap;
use std::error::Error;
use std::path::Path;
use std::time::Instant;
use tch::Tensor;

type Outcome<T> = Result<T, Box<dyn Error>>;

/// What can be set from the command line.
struct Options(BTreeMap<String, f64>);

impl Options {
    fn get(&self, key: &str, default: f64) -> f64 {
        self.0.get(key).copied().unwrap_or(default)
    }
}

/// A trace with its leaves.
struct Trace {
    tokens: Vec<i64>,
    embeds: Tensor,
    leaves: Rendered,
    semantic: f64,
    rewards: Vec<f64>,
}

/// A prompt with its traces.
struct Tree {
    prompt: Vec<i64>,
    old: Tensor,
    traces: Vec<Trace>,
    right: usize,
}

struct World {
    pipeline: Pipeline,
    scorers: Scorers,
    judge: Judge,
    template: ThinkTemplate,
    render: RenderOptions,
    temperature: f64,
}

impl World {
    fn tree(
        &self,
        row: &PromptRow,
        (j, k): (usize, usize),
        window: Window,
        seed: &Seed,
    ) -> Outcome<Tree> {
        let Pipeline { lm, tokenizer, .. } = &self.pipeline;
        let prompt = tokenizer.encode(&self.template.render(&row.text)?)?;
        let options = SampleOptions {
            traces: j,
            max_new_tokens: MAX_NEW_TOKENS,
            temperature: self.temperature,
            eos: vec![tokenizer.im_end()],
        };
        let answers = generate(&Decoder::new(lm)?, &prompt, seed, &options)?;
        let tokens: Vec<Vec<i64>> = answers.into_iter().map(|answer| answer.tokens).collect();
        let old = tch::no_grad(|| token_log_probs(lm, &prompt, &tokens, 1.0, false))?.values;
        let embedder = Embedder::new(lm, tokenizer)?;
        let negative = embedder.embed(" ")?;
        let target: Target = serde_json::from_str(&row.meta)?;
        let mut traces = Vec::new();
        let mut right = 0;
        for (at, tokens) in (0u64..).zip(tokens) {
            let refined = extract(&tokenizer.decode(&tokens)?).refined;
            right += usize::from(names_target(&refined, &target));
            let embeds = embedder.embed(&refined)?;
            let condition = Condition { embeds: &embeds, negative: Some(&negative) };
            let seed = seed.derive(Purpose::Evaluation, &[at]);
            let leaves = render(&self.pipeline, condition, k, window, &seed, &self.render)?;
            let scores = self.scorers.score(&leaves.images, row, &refined)?;
            let number = |leaf: usize, name: &str| match scores[leaf].get(name) {
                Some(Score::Scored(value)) => *value,
                _ => 0.0,
            };
            let semantic = (0..k).map(|leaf| number(leaf, "semantic")).sum::<f64>() / k as f64;
            let rewards = (0..k)
                .map(|leaf| {
                    0.7 * number(leaf, "semantic")
                        + 0.1 * number(leaf, "aesthetic")
                        + 0.2 * number(leaf, "consistency")
                })
                .collect();
            traces.push(Trace { tokens, embeds, leaves, semantic, rewards });
        }
        Ok(Tree { prompt, old, traces, right })
    }

    /// (semantic, trace, render) accuracy on held-out prompts, one trace and one image each.
    fn measure(&self, split: Split, seed: &Seed, greedy: bool) -> Outcome<[f64; 3]> {
        let Pipeline { lm, tokenizer, .. } = &self.pipeline;
        let decoder = Decoder::new(lm)?;
        let embedder = Embedder::new(lm, tokenizer)?;
        let negative = embedder.embed(" ")?;
        let rows = rows(split);
        let mut sums = [0f64; 3];
        for row in &rows {
            let prompt = tokenizer.encode(&self.template.render(&row.text)?)?;
            let options = SampleOptions {
                traces: 1,
                max_new_tokens: MAX_NEW_TOKENS,
                temperature: if greedy { 0.0 } else { 1.0 },
                eos: vec![tokenizer.im_end()],
            };
            let seed = seed.derive(Purpose::Evaluation, &[3, row.row]);
            let answer = generate(&decoder, &prompt, &seed, &options)?.remove(0);
            let refined = extract(&tokenizer.decode(&answer.tokens)?).refined;
            let target: Target = serde_json::from_str(&row.meta)?;
            let embeds = embedder.embed(&refined)?;
            let condition = Condition { embeds: &embeds, negative: Some(&negative) };
            let none = Window { start: 0, len: 0 };
            let made = render(&self.pipeline, condition, 1, none, &seed, &self.render)?;
            let seen = self.judge.see(&made.images)?[0];
            let (digit, colour, _) = named(&refined);
            let colour_name = duet_miniworld::facts::COLOURS[usize::from(seen.1)];
            sums[0] += f64::from(u8::from(seen.0 == target.digit && colour_name == target.colour));
            sums[1] += f64::from(u8::from(names_target(&refined, &target)));
            sums[2] += f64::from(u8::from((digit, colour) == (Some(seen.0), Some(seen.1))));
        }
        Ok(sums.map(|sum| sum / rows.len() as f64))
    }
}

fn step(adam: &mut AdamW, params: &Tensors, lr: f64) -> Outcome<f64> {
    let grads: Tensors = params
        .iter()
        .map(|(name, param)| {
            let grad = param.grad();
            let grad = if grad.defined() { grad.detach() } else { param.zeros_like() };
            (name.clone(), grad)
        })
        .collect();
    let norm = clip_grad_norm(&grads, 1.0)?;
    adam.step(lr, params, &grads)?;
    for param in params.values() {
        param.shallow_clone().zero_grad();
    }
    Ok(norm)
}

fn main() -> Outcome<()> {
    duet_torch::init(1)?;
    let mut arguments = std::env::args().skip(1);
    let folder = arguments.next().ok_or("name a model folder")?;
    let folder = Path::new(&folder);
    let options = Options(
        arguments
            .filter_map(|text| {
                let (key, value) = text.split_once('=')?;
                Some((key.to_owned(), value.parse().ok()?))
            })
            .collect(),
    );
    let seed = Seed::root(options.get("seed", 1.0) as u64);
    let (p, j, k) = (
        options.get("p", 8.0) as usize,
        options.get("j", 4.0) as usize,
        options.get("k", 4.0) as usize,
    );
    let pipeline = Pipeline::load(folder)?;
    let mut world = World {
        template: ThinkTemplate::new(INSTRUCTION, pipeline.tokenizer.chat_template())?,
        pipeline,
        scorers: Scorers::load(folder)?,
        judge: Judge::load(folder)?,
        temperature: 1.0,
        render: RenderOptions {
            steps: options.get("steps", STEPS as f64) as usize,
            guidance: options.get("guidance", GUIDANCE),
            sde: SdeKind::FlowGrpo,
            noise_level: options.get("noise", 0.8),
            width: 32,
            height: 32,
        },
    };
    let _ = &mut world;
    let show = |world: &World, what: &str| -> Outcome<()> {
        for greedy in [false, true] {
            let [semantic, trace, render] = world.measure(Split::Test, &Seed::root(77), greedy)?;
            println!(
                "{what} greedy={greedy}: semantic {semantic:.3} trace {trace:.3} render {render:.3}"
            );
        }
        Ok(())
    };
    show(&world, "before")?;
    world.pipeline.lm.params().set_trainable(|_| true);
    world.pipeline.dit.params().set_trainable(|_| true);
    let (llm, dit) = (world.pipeline.lm.params().to_map(), world.pipeline.dit.params().to_map());
    let adam = AdamWOptions { weight_decay: 0.0, ..AdamWOptions::default() };
    let (mut llm_adam, mut dit_adam) = (AdamW::new(adam, &llm)?, AdamW::new(adam, &dit)?);
    let all = rows(Split::Train);
    let iterations = options.get("iterations", 100.0) as usize;
    let (low, high) = (options.get("low", 0.0) as u32, options.get("high", 4.0) as u32);
    let width = options.get("window", 2.0) as u32;
    let clip = options.get("clip", 1e-3);
    let spec =
        AdvantageSpec { scale: duet_core::advantage::Scale::Group, ..AdvantageSpec::default() };
    let dit_spec =
        AdvantageSpec { scale: duet_core::advantage::Scale::Batch, ..AdvantageSpec::default() };
    let llm_objective = LlmLoss {
        objective: LlmObjective::Ppo { clip_low: 0.2, clip_high: 0.28, dual: None },
        aggregation: Aggregation::TokenMean,
        kl: None,
        importance_cap: None,
    };
    let dit_objective =
        DitLoss { objective: DitObjective::Clip { range: clip }, advantage_clip: 5.0, kl: None };
    let start = Instant::now();
    let (mut spent_sampling, mut spent_training) = (0.0, 0.0);
    for iteration in 0..iterations {
        let clock = Instant::now();
        let here = seed.derive(Purpose::Prompts, &[iteration as u64]);
        let starts = u64::from(high.saturating_sub(width).saturating_sub(low)) + 1;
        let window = Window { start: low + (here.uniform(99) * starts as f64) as u32, len: width };
        let mut trees = Vec::new();
        for tree in 0..p {
            let row = &all[(iteration * p + tree) % all.len()];
            let seed = here.derive(Purpose::Tokens, &[tree as u64]);
            trees.push(world.tree(row, (j, k), window, &seed)?);
        }
        spent_sampling += clock.elapsed().as_secs_f64();
        let clock = Instant::now();
        let groups: Vec<Vec<Option<f64>>> = trees
            .iter()
            .map(|tree| tree.traces.iter().map(|trace| Some(trace.semantic)).collect())
            .collect();
        let llm_advantages = advantages(&spec, &groups);
        let leaf_groups: Vec<Vec<Option<f64>>> = trees
            .iter()
            .flat_map(|tree| {
                tree.traces.iter().map(|trace| trace.rewards.iter().map(|r| Some(*r)).collect())
            })
            .collect();
        let dit_advantages = advantages(&dit_spec, &leaf_groups);
        let lengths = trees.iter().zip(&llm_advantages).flat_map(|(tree, advantages)| {
            tree.traces
                .iter()
                .zip(advantages)
                .filter(|(_, a)| a.is_some())
                .map(|(t, _)| t.tokens.len() as u32)
        });
        let totals = llm_totals(lengths.collect::<Vec<_>>());
        if options.get("llm_lr", 2e-4) > 0.0 && totals.tokens > 0.0 {
            for (tree, advantages) in trees.iter().zip(&llm_advantages) {
                if advantages.iter().all(Option::is_none) {
                    continue;
                }
                let answers: Vec<Vec<i64>> = tree.traces.iter().map(|t| t.tokens.clone()).collect();
                let new = token_log_probs(&world.pipeline.lm, &tree.prompt, &answers, 1.0, false)?;
                let batch = LlmBatch {
                    new: &new,
                    old: &tree.old,
                    rollout: None,
                    reference: None,
                    advantages,
                };
                llm_loss(&llm_objective, &batch, totals)?.value.backward();
            }
            step(&mut llm_adam, &llm, options.get("llm_lr", 2e-4))?;
        }
        let terms = dit_advantages.iter().flatten().flatten().count() as f64 * f64::from(width);
        if options.get("dit_lr", 1e-4) > 0.0 && terms > 0.0 {
            let negative =
                Embedder::new(&world.pipeline.lm, &world.pipeline.tokenizer)?.embed(" ")?;
            let subtrees = trees.iter().flat_map(|tree| &tree.traces);
            for (trace, advantages) in subtrees.zip(&dit_advantages) {
                if advantages.iter().all(Option::is_none) {
                    continue;
                }
                let schedule = FlowSchedule::new(&world.pipeline.flow, world.render.steps, 16)?;
                let condition = Condition { embeds: &trace.embeds, negative: Some(&negative) };
                let size = (k as i64, (4, 4));
                let sampler = Sampler::new(
                    &world.pipeline.dit,
                    schedule,
                    condition,
                    size,
                    window,
                    &world.render,
                )?;
                let new = replay(&sampler, &trace.leaves.latents, 0..width)?;
                let batch = DitBatch {
                    new: &new,
                    old: &trace.leaves.log_probs,
                    old_means: None,
                    reference_means: None,
                    advantages,
                };
                dit_loss(&dit_objective, &batch, terms)?.value.backward();
            }
            step(&mut dit_adam, &dit, options.get("dit_lr", 1e-4))?;
        }
        spent_training += clock.elapsed().as_secs_f64();
        if (iteration + 1) % 10 == 0 {
            let traces = (p * j) as f64;
            let semantic =
                trees.iter().flat_map(|t| &t.traces).map(|t| t.semantic).sum::<f64>() / traces;
            let reward = trees.iter().flat_map(|t| &t.traces).flat_map(|t| &t.rewards).sum::<f64>()
                / (traces * k as f64);
            let right = trees.iter().map(|t| t.right).sum::<usize>() as f64 / traces;
            println!(
                "{} {:.1}s semantic {semantic:.3} reward {reward:.3} trace {right:.3} (sampling {spent_sampling:.1}s training {spent_training:.1}s)",
                iteration + 1,
                start.elapsed().as_secs_f64()
            );
        }
        let every = options.get("measure", 1e9) as usize;
        if (iteration + 1) % every == 0 {
            show(&world, "during")?;
        }
    }
    show(&world, "after")
}
