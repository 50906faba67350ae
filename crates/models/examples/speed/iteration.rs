//! A whole Dual-GRPO iteration: 4 prompts, J = 4, K = 4, 10 steps, a window of 2, 64 x 64 pixels; all of
//! the language model and an adapter on the transformer are trained. Random models refine prompts to
//! noise, so the refined prompts are given; the reward is the brightness.
//!
//! The processors are used as a run of Duet uses them: each has a process of its own, a worker and a
//! trainer rank with its own copy of the models and one thread of libtorch. The ranks grow the prompts'
//! trees in turn, train on those that they have grown, and sum their gradients over Gloo.

use crate::Outcome;
use crate::work::{adapter, options};
use duet_core::advantage::{AdvantageSpec, advantages};
use duet_core::work::Window;
use duet_core::{Purpose, Seed};
use duet_models::decoder::Decoder;
use duet_models::embed::Embedder;
use duet_models::flow::FlowSchedule;
use duet_models::generate::{SampleOptions, generate};
use duet_models::logprob::token_log_probs;
use duet_models::lora::Lora;
use duet_models::loss::{
    Aggregation, DitBatch, DitLoss, DitObjective, LlmBatch, LlmLoss, LlmObjective, dit_loss,
    llm_loss, llm_totals,
};
use duet_models::pipeline::Pipeline;
use duet_models::render::{Condition, Rendered, Sampler, render, replay};
use duet_torch::Tensors;
use duet_torch::collective::{AbortHandle, Collective, Gloo, GroupOptions, Store};
use duet_torch::optim::{AdamW, AdamWOptions, clip_grad_norm};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;
use tch::{Kind, Tensor};

const PROMPTS: usize = 4;
const TRACES: usize = 4;
const IMAGES: usize = 4;
const TOKENS: usize = 64;
const WINDOW: Window = Window { start: 1, len: 2 };

/// Longer than a rank waits for another one here.
const PATIENCE: Duration = Duration::from_secs(120);

/// All ranks: processes that wait to be told to make an iteration.
pub struct Iteration {
    ranks: Vec<Process>,
    /// Where the ranks find each other, as long as they live.
    _store: Store,
}

struct Process {
    child: Child,
    go: ChildStdin,
    done: BufReader<ChildStdout>,
}

impl Process {
    fn wait(&mut self) -> Outcome<()> {
        let mut line = String::new();
        self.done.read_line(&mut line)?;
        if line == "done\n" { Ok(()) } else { Err("a rank failed".into()) }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

impl Iteration {
    pub fn new(folder: &Path, ranks: u32) -> Outcome<Iteration> {
        let server = Store::serve("127.0.0.1", PATIENCE)?;
        let start = |rank: u32| -> Outcome<Process> {
            let mut command = Command::new(std::env::current_exe()?);
            command.arg("rank").arg(folder).arg(server.address());
            command.args([rank, ranks].map(|number| number.to_string()));
            let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
            let (go, done) = (child.stdin.take(), child.stdout.take());
            let (go, done) = go.zip(done).ok_or("a rank has no pipes")?;
            Ok(Process { child, go, done: BufReader::new(done) })
        };
        let ranks = (0..ranks).map(start).collect::<Outcome<Vec<_>>>()?;
        let mut all = Iteration { ranks, _store: server };
        all.ranks.iter_mut().try_for_each(Process::wait)?;
        Ok(all)
    }

    /// One iteration.
    pub fn run(&mut self) -> Outcome<()> {
        self.ranks.iter_mut().try_for_each(|rank| rank.go.write_all(b"go\n"))?;
        self.ranks.iter_mut().try_for_each(Process::wait)
    }
}

/// The process of one rank: an iteration for each line of its input.
pub fn rank(folder: &Path, address: &str, rank: u32, world: u32) -> Outcome<()> {
    duet_torch::init(1)?;
    let mut rank = Rank::new(folder, address, rank, world)?;
    println!("done");
    for line in std::io::stdin().lock().lines() {
        line?;
        rank.run()?;
        println!("done");
    }
    Ok(())
}

/// Models and optimisers of one rank.
struct Rank {
    pipeline: Pipeline,
    params: [Tensors; 2],
    optimisers: [AdamW; 2],
    count: u64,
    group: Gloo,
    rank: usize,
    world: usize,
}

struct Tree {
    prompt: Vec<i64>,
    answers: Vec<Vec<i64>>,
    old: Tensor,
    traces: Vec<(Tensor, Rendered)>,
}

impl Rank {
    fn new(folder: &Path, address: &str, rank: u32, world: u32) -> Outcome<Rank> {
        let store = Arc::new(Store::connect(address, PATIENCE)?);
        let (group, host) = ("iteration".to_owned(), "127.0.0.1".to_owned());
        let options = GroupOptions { rank, world, group, host, deadline: PATIENCE, threads: 1 };
        let group = Gloo::connect(store, options, AbortHandle::default())?;
        let mut pipeline = Pipeline::load(folder)?;
        let lora = Lora::attach(&mut pipeline.dit, adapter(), &Seed::root(3))?;
        lora.params().set_trainable(|_| true);
        pipeline.lm.params().set_trainable(|_| true);
        let params = [pipeline.lm.params().to_map(), lora.params().to_map()];
        let adam = |params: &Tensors| AdamW::new(AdamWOptions::default(), params);
        let optimisers = [adam(&params[0])?, adam(&params[1])?];
        let (rank, world) = (rank as usize, world as usize);
        Ok(Rank { pipeline, params, optimisers, count: 0, group, rank, world })
    }

    fn tree(
        &self,
        index: usize,
        seed: &Seed,
        (decoder, negative): (&Decoder<'_>, &Tensor),
    ) -> Outcome<Tree> {
        let Pipeline { lm, tokenizer, .. } = &self.pipeline;
        let prompt: Vec<i64> = (index as i64..index as i64 + 60).collect();
        let options =
            SampleOptions { traces: TRACES, max_new_tokens: TOKENS, temperature: 1.0, eos: vec![] };
        let sampled = generate(decoder, &prompt, seed, &options)?;
        let answers: Vec<Vec<i64>> = sampled.into_iter().map(|answer| answer.tokens).collect();
        let old = token_log_probs(lm, &prompt, &answers, 1.0, false)?.values;
        let embedder = Embedder::new(lm, tokenizer)?;
        let traces = (0..TRACES)
            .map(|trace| {
                let embeds =
                    embedder.embed(&format!("the object {index} of the background {trace}"))?;
                let condition = Condition { embeds: &embeds, negative: Some(negative) };
                let seed = seed.derive(Purpose::InitialNoise, &[trace as u64]);
                let leaves = render(
                    &self.pipeline,
                    condition,
                    IMAGES,
                    WINDOW,
                    &seed,
                    &crate::work::options(),
                )?;
                Ok((embeds, leaves))
            })
            .collect::<Outcome<Vec<_>>>()?;
        Ok(Tree { prompt, answers, old, traces })
    }

    /// Its share of an iteration.
    fn run(&mut self) -> Outcome<()> {
        self.count += 1;
        let seed = Seed::root(5).derive(Purpose::Prompts, &[self.count]);
        let (negative, trees) = tch::no_grad(|| {
            let negative =
                Embedder::new(&self.pipeline.lm, &self.pipeline.tokenizer)?.embed(" ")?;
            let decoder = Decoder::new(&self.pipeline.lm)?;
            let tree = |index: usize| {
                let seed = seed.derive(Purpose::Tokens, &[index as u64]);
                self.tree(index, &seed, (&decoder, &negative))
            };
            let trees =
                (self.rank..PROMPTS).step_by(self.world).map(tree).collect::<Outcome<Vec<_>>>()?;
            Ok::<_, Box<dyn std::error::Error>>((negative, trees))
        })?;
        let brightness = |tree: &Tree| -> Vec<Vec<Option<f64>>> {
            let of = |leaves: &Rendered| -> Vec<Option<f64>> {
                let mean = |k| leaves.images.get(k).to_kind(Kind::Float).mean(Kind::Float);
                (0..IMAGES as i64).map(|k| Some(mean(k).double_value(&[]))).collect()
            };
            tree.traces.iter().map(|(_, leaves)| of(leaves)).collect()
        };
        let rewards: Vec<Vec<Vec<Option<f64>>>> = trees.iter().map(brightness).collect();
        self.train_llm(&trees, &rewards)?;
        self.train_dit(&trees, &rewards, &negative)
    }

    fn train_llm(&mut self, trees: &[Tree], rewards: &[Vec<Vec<Option<f64>>>]) -> Outcome<()> {
        let mean =
            |leaves: &Vec<Option<f64>>| Some(leaves.iter().flatten().sum::<f64>() / IMAGES as f64);
        let groups: Vec<Vec<Option<f64>>> =
            rewards.iter().map(|tree| tree.iter().map(mean).collect()).collect();
        let totals = llm_totals(vec![TOKENS as u32; PROMPTS * TRACES]);
        let loss = LlmLoss {
            objective: LlmObjective::Ppo { clip_low: 0.2, clip_high: 0.28, dual: None },
            aggregation: Aggregation::TokenMean,
            kl: None,
            importance_cap: None,
        };
        for (tree, advantages) in trees.iter().zip(&advantages(&AdvantageSpec::default(), &groups))
        {
            let new = token_log_probs(&self.pipeline.lm, &tree.prompt, &tree.answers, 1.0, false)?;
            let batch =
                LlmBatch { new: &new, old: &tree.old, rollout: None, reference: None, advantages };
            llm_loss(&loss, &batch, totals)?.value.f_backward()?;
        }
        self.step(0)
    }

    fn train_dit(
        &mut self,
        trees: &[Tree],
        rewards: &[Vec<Vec<Option<f64>>>],
        negative: &Tensor,
    ) -> Outcome<()> {
        let groups: Vec<Vec<Option<f64>>> = rewards.iter().flatten().cloned().collect();
        let terms = (PROMPTS * TRACES * IMAGES) as f64 * f64::from(WINDOW.len);
        let loss = DitLoss {
            objective: DitObjective::Clip { range: 1e-4 },
            advantage_clip: 5.0,
            kl: None,
        };
        let options = options();
        let traces = trees.iter().flat_map(|tree| &tree.traces);
        for ((embeds, leaves), advantages) in
            traces.zip(&advantages(&AdvantageSpec::default(), &groups))
        {
            let schedule = FlowSchedule::new(&self.pipeline.flow, options.steps, 64)?;
            let condition = Condition { embeds, negative: Some(negative) };
            let size = (IMAGES as i64, (8, 8));
            let sampler =
                Sampler::new(&self.pipeline.dit, schedule, condition, size, WINDOW, &options)?;
            let new = replay(&sampler, &leaves.latents, 0..WINDOW.len)?;
            let batch = DitBatch {
                new: &new,
                old: &leaves.log_probs,
                old_means: None,
                reference_means: None,
                advantages,
            };
            dit_loss(&loss, &batch, terms)?.value.f_backward()?;
        }
        self.step(1)
    }

    /// Sums the gradients over ranks and takes a step.
    fn step(&mut self, which: usize) -> Outcome<()> {
        let params = &self.params[which];
        let grad = |param: &Tensor| match param.grad() {
            grad if grad.defined() => grad.detach(),
            _ => param.zeros_like(),
        };
        let parts: Vec<Tensor> = params.values().map(|param| grad(param).flatten(0, -1)).collect();
        let whole = Tensor::cat(&parts, 0);
        self.group.all_reduce(&whole)?;
        let sizes: Vec<i64> = parts.iter().map(|part| part.size()[0]).collect();
        let summed = whole.split_with_sizes(sizes.as_slice(), 0);
        let grads: Tensors = { params.iter().zip(summed) }
            .map(|((name, param), sum)| (name.clone(), sum.view(param.size().as_slice())))
            .collect();
        clip_grad_norm(&grads, 1.0)?;
        self.optimisers[which].step(1e-5, params, &grads)?;
        for param in params.values() {
            param.shallow_clone().zero_grad();
        }
        Ok(())
    }
}
