//! What `duet plan` says that a trainer rank holds, against what one holds: counted by libtorch's
//! allocator while an engine is loaded and takes a step with models large enough to count.

mod common;

use common::ranks;
use duet_cli::plan::bytes::{Role, roles};
use duet_cli::plan::{Work, shapes::Shapes};
use duet_config::Config;
use duet_core::work::{Gates, PromptRow, Step, TrainTrace, TrainTree, Window};
use duet_core::{ArtifactRef, Digest, Seed, TrainerEpoch, TreeId};
use duet_models::artifact::{RenderArtifact, ThinkArtifact};
use duet_models::dit::{Dit, DitConfig};
use duet_models::flow::FlowConfig;
use duet_models::lm::{Lm, LmConfig};
use duet_models::params::ParamSet;
use duet_models::pipeline::{Pipeline, VisionConfig, init_vision_tower};
use duet_models::tokenizer::Tokenizer;
use duet_models::vae::{Vae, VaeConfig};
use duet_torch::collective::{Collective, Solo};
use duet_torch::memory::Meter;
use duet_trainer::engine::Engine;
use duet_trainer::engine::batch::{StepInput, TraceFiles};
use duet_trainer::translate;
use std::collections::BTreeMap;
use std::path::Path;
use tch::{Device, Kind, Tensor};

/// Sizes of a case.
#[derive(Clone, Copy)]
struct Case {
    name: &'static str,
    hidden: i64,
    inner: i64,
    layers: i64,
    heads: (i64, i64),
    blocks: i64,
    dit_heads: i64,
    head: i64,
    traces: usize,
    answer: usize,
    leaves: usize,
    side: u32,
    window: u32,
    rank: Option<u32>,
    recompute: bool,
    half: bool,
    /// Tokens of the table beyond the tokenizer's.
    spare: i64,
    gates: Gates,
    /// Ranks, trees of each, and what the ranks share out.
    world: u32,
    trees: u32,
    zero: u32,
    reduce: &'static str,
}

const QUESTION: usize = 24;
const TEXT: i64 = 24;

fn case(name: &'static str) -> Case {
    Case {
        name,
        hidden: 128,
        inner: 320,
        layers: 3,
        heads: (8, 4),
        blocks: 3,
        dit_heads: 4,
        head: 32,
        traces: 4,
        answer: 72,
        leaves: 8,
        side: 64,
        window: 2,
        rank: None,
        recompute: false,
        half: false,
        spare: 0,
        gates: Gates { llm: 0.5, dit: 0.5 },
        world: 1,
        trees: 1,
        zero: 0,
        reduce: "update",
    }
}

fn pipeline(case: &Case) -> Pipeline {
    let seed = Seed::root(3);
    let corpus: Vec<String> = vec![
        "system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, \
         spatial relationships of the objects and background:\nuser\n \nassistant\n"
            .to_owned(),
    ];
    let tokenizer = Tokenizer::train(&corpus, 2000, None).unwrap();
    let head = case.hidden / case.heads.0;
    let lm = LmConfig {
        vocab_size: tokenizer.size() as i64 + case.spare,
        hidden_size: case.hidden,
        intermediate_size: case.inner,
        num_hidden_layers: case.layers,
        num_attention_heads: case.heads.0,
        num_key_value_heads: case.heads.1,
        rms_norm_eps: 1e-6,
        rope_theta: 1e4,
        max_position_embeddings: 512,
        mrope_section: vec![head / 8, head / 8, head / 2 - 2 * (head / 8)],
        tie_word_embeddings: true,
        bos_token_id: tokenizer.end_of_text(),
        eos_token_id: tokenizer.im_end(),
    };
    let dit = DitConfig {
        patch_size: 2,
        in_channels: 16,
        out_channels: 4,
        num_layers: case.blocks,
        attention_head_dim: case.head,
        num_attention_heads: case.dit_heads,
        joint_attention_dim: case.hidden,
        axes_dims_rope: [case.head / 4, 3 * case.head / 8, 3 * case.head / 8],
    };
    let vae = VaeConfig {
        base_dim: 8,
        z_dim: 4,
        dim_mult: vec![1, 2],
        num_res_blocks: 1,
        temperal_downsample: vec![false],
        input_channels: 3,
        latents_mean: vec![0.0; 4],
        latents_std: vec![1.0; 4],
    };
    let lm_params = ParamSet::init(&Lm::specs(&lm, Default::default()), &seed);
    let lm = Lm::new(lm, lm_params, "test").unwrap();
    let dit = Dit::init(dit, &seed).unwrap();
    // A fresh transformer predicts zero, which guidance cannot rescale.
    tch::no_grad(|| {
        dit.params().iter().for_each(|(_, t)| drop(t.shallow_clone().normal_(0.0, 0.1)))
    });
    let vae_params = ParamSet::init(&Vae::specs(&vae), &seed);
    let vae = Vae::new(vae, vae_params, "test").unwrap();
    let vision = VisionConfig::tiny(case.hidden);
    let tower = init_vision_tower(&vision, &seed);
    Pipeline::assemble(lm, dit, vae, tokenizer, FlowConfig::default(), (&vision, tower)).unwrap()
}

fn config(case: &Case, model: &Path) -> Config {
    let Case { traces, leaves, side, window, recompute, answer, world, zero, reduce, .. } = *case;
    let prompts = world * case.trees;
    let lora = match case.rank {
        Some(rank) => format!(
            "[llm.lora]\nrank = {rank}\nalpha = 4.0\ntargets = [\"q_proj\", \"v_proj\"]\n\
             [dit.lora]\nrank = {rank}\nalpha = 4.0\ntargets = [\"to_q\", \"to_k\", \"to_v\"]\n"
        ),
        None => String::new(),
    };
    let (llm, dit) = (case.gates.llm, case.gates.dit);
    let dtype = if case.half { "bfloat16" } else { "float32" };
    let text = format!(
        "[run]\niterations = 1\n[model]\npath = \"{}\"\ndtype = \"{dtype}\"\n\
         [data]\nprompts = \"none\"\n[rollout]\nprompts_per_iteration = {prompts}\ntraces = {traces}\nimages_per_trace = {leaves}\n\
         max_new_tokens = {answer}\nwidth = {side}\nheight = {side}\nsteps = 6\n\
         [window]\nkind = \"fixed\"\nstart = 1\nlen = {window}\n\
         [schedule]\nkind = \"weights\"\nllm_weight = {llm:?}\ndit_weight = {dit:?}\n\
         [llm]\nkl = 0.0\n[dit]\nkl = 0.0\n[trainer]\nworld_size = {world}\nzero = {zero}\nreduce = \"{reduce}\"\n\
         bucket_mib = 1\nrecompute = {recompute}\n{lora}",
        model.display()
    );
    Config::from_text(case.name, &text, &BTreeMap::new(), &[]).unwrap_or_else(|e| panic!("{e}"))
}

/// Trees that might have been sampled, all alike.
fn input(case: &Case, pipeline: &Pipeline) -> StepInput {
    let float = |shape: &[i64]| Tensor::randn(shape, (Kind::Float, Device::Cpu));
    let (width, leaves) = (case.hidden, case.leaves as i64);
    let tokens = {
        let (height, width) = pipeline.grid(i64::from(case.side), i64::from(case.side)).unwrap();
        height * width
    };
    let (steps, side) = (i64::from(case.window), i64::from(case.side));
    let vocabulary = pipeline.lm.config().vocab_size;
    let question = Tensor::arange(QUESTION as i64, (Kind::Int64, Device::Cpu));
    let mut traces = Vec::new();
    let mut files = Vec::new();
    for trace in 0..case.traces as u32 {
        let answer = Tensor::randint(vocabulary, [case.answer as i64], (Kind::Int64, Device::Cpu));
        let think = ThinkArtifact {
            tokens: Tensor::cat(&[&question, &answer], 0),
            prompt_len: QUESTION,
            log_probs: Tensor::full([case.answer as i64], -3.0, (Kind::Float, Device::Cpu)),
            embeds: float(&[TEXT, width]),
            negative_embeds: float(&[TEXT, width]),
        };
        let render = RenderArtifact {
            latents: float(&[leaves, steps + 1, tokens, 16]),
            // Above any that the policy gives: ratios far below one are finite.
            log_probs: Tensor::full([leaves, steps], 50.0, (Kind::Float, Device::Cpu)),
            images: Tensor::zeros([leaves, side, side, 3], (Kind::Uint8, Device::Cpu)),
            last: None,
            window_start: 1,
        };
        let (think, render) = (think.encode().unwrap(), render.encode().unwrap());
        let of = |key: &str, bytes: &[u8]| ArtifactRef {
            key: key.to_owned(),
            digest: Digest::of(bytes),
            bytes: bytes.len() as u64,
        };
        traces.push(TrainTrace {
            trace,
            artifact: of("think", &think),
            advantage: Some(if trace % 2 == 0 { 1.0 } else { -1.0 }),
            render: Some(of("render", &render)),
            leaf_advantages: (0..leaves)
                .map(|k| Some(if k % 2 == 0 { 1.0 } else { -1.0 }))
                .collect(),
        });
        files.push(TraceFiles { think, render: Some(render) });
    }
    let prompt = PromptRow { row: 0, text: String::new(), meta: String::new() };
    let step = Step {
        epoch: TrainerEpoch(1),
        iteration: 0,
        gates: case.gates,
        window: Window { start: 1, len: case.window },
        trees: (0..case.world * case.trees)
            .map(|index| TrainTree {
                id: TreeId { iteration: 0, index },
                prompt: prompt.clone(),
                traces: traces.clone(),
            })
            .collect(),
        update: true,
        publish: false,
        checkpoint: false,
    };
    StepInput { step, files: vec![files; case.trees as usize] }
}

/// The most that this rank held.
fn peak(case: &Case, config: &Config, input: StepInput, group: &dyn Collective) -> i64 {
    duet_torch::init(1).unwrap();
    tch::set_num_threads(1);
    let meter = Meter::start().unwrap();
    let mut engine = Engine::load(translate::settings(config, tch::Device::Cpu)).unwrap();
    let loaded = meter.read();
    engine.step(input, group).unwrap();
    let peak = meter.read().peak;
    println!("{}: loaded {} (peak {}), step {peak}", case.name, loaded.now, loaded.peak);
    peak
}

/// What the plan says of a trainer rank, and the most that one held.
fn compare(case: &Case) -> (Role, i64) {
    duet_torch::init(1).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let pipeline = pipeline(case);
    pipeline.save(folder.path()).unwrap();
    let config = config(case, folder.path());
    let shapes = Shapes::read(folder.path()).unwrap();
    let work = Work::new(&config, &shapes, QUESTION as u64).unwrap();
    let input = input(case, &pipeline);
    drop(pipeline);
    let peak = match case.world {
        1 => peak(case, &config, input, &Solo::new()),
        world => {
            let (case, config) = (*case, config.clone());
            let peaks = ranks(world, move |group| peak(&case, &config, input.clone(), group));
            peaks.into_iter().max().unwrap()
        }
    };
    let role = roles(&config, &shapes, &work).pop().unwrap();
    for kind in &role.kinds {
        println!("   {:<24} {}", kind.name, kind.bytes);
    }
    (role, peak)
}

#[test]
fn a_trainer_rank_holds_what_the_plan_says() {
    let llm = Gates { llm: 1.0, dit: 0.0 };
    let dit = Gates { llm: 0.0, dit: 1.0 };
    let cases = [
        Case { gates: llm, ..case("language model") },
        Case { gates: llm, recompute: true, ..case("language model, recomputed") },
        Case { gates: llm, rank: Some(4), ..case("language model, adapter") },
        Case { gates: llm, traces: 8, answer: 32, ..case("language model, short answers") },
        Case { gates: llm, hidden: 64, inner: 512, heads: (4, 4), ..case("language model, wide") },
        Case { gates: dit, ..case("transformer") },
        Case { gates: dit, recompute: true, ..case("transformer, recomputed") },
        Case { gates: dit, rank: Some(4), ..case("transformer, adapter") },
        Case { gates: dit, rank: Some(4), recompute: true, ..case("transformer, both") },
        Case { gates: dit, window: 3, leaves: 4, ..case("transformer, window of three") },
        Case { gates: dit, side: 32, leaves: 16, ..case("transformer, small images") },
        Case { gates: llm, spare: 4000, ..case("language model, large table") },
        Case { gates: llm, half: true, ..case("language model, bfloat16") },
        Case { gates: dit, half: true, leaves: 4, ..case("transformer, bfloat16") },
        Case { gates: dit, half: true, rank: Some(4), ..case("transformer, bfloat16, adapter") },
        case("both models"),
        Case { rank: Some(4), recompute: true, ..case("both models, adapters, recomputed") },
    ];
    hold(&cases);
}

/// Sizes at which what is shared out counts.
fn shared(name: &'static str, world: u32, zero: u32, reduce: &'static str) -> Case {
    let gates = Gates { llm: 1.0, dit: 0.0 };
    let (hidden, inner, layers) = (256, 1024, 4);
    Case { gates, hidden, inner, layers, answer: 24, world, trees: 2, zero, reduce, ..case(name) }
}

#[test]
fn ranks_that_share_out_their_state_hold_what_the_plan_says() {
    hold(&[
        shared("two ranks", 2, 0, "update"),
        shared("two ranks, optimiser shared", 2, 1, "update"),
        shared("two ranks, gradients shared", 2, 2, "update"),
        shared("two ranks, gradients shared at once", 2, 2, "micro-batch"),
        shared("three ranks, optimiser shared", 3, 1, "update"),
        shared("three ranks, gradients shared at once", 3, 2, "micro-batch"),
        Case { half: true, ..shared("two ranks, bfloat16, optimiser shared", 2, 1, "update") },
    ]);
}

fn hold(cases: &[Case]) {
    let mut far = Vec::new();
    for case in cases {
        let (role, peak) = compare(case);
        let ratio = role.bytes as f64 / peak as f64;
        println!("   planned {} measured {peak}: {ratio:.3}", role.bytes);
        if !(0.9..=1.1).contains(&ratio) {
            far.push(format!("{}: {ratio:.3}", case.name));
        }
    }
    assert!(far.is_empty(), "{far:?}");
}
