//! A tiny random pipeline, and an iteration of rollouts from it.
#![allow(dead_code)]

use duet_core::work::{Gates, PromptRow, Step, TrainTrace, TrainTree, Window};
use duet_core::{ArtifactRef, Digest, Purpose, Seed, TrainerEpoch, TreeId};
use duet_models::artifact::{RenderArtifact, ThinkArtifact};
use duet_models::decoder::Decoder;
use duet_models::dit::{Dit, DitConfig};
use duet_models::embed::Embedder;
use duet_models::flow::FlowConfig;
use duet_models::generate::{SampleOptions, generate};
use duet_models::lm::{Lm, LmConfig};
use duet_models::logprob::token_log_probs;
use duet_models::lora::LoraConfig;
use duet_models::loss::{
    Aggregation, DitKl, DitLoss, DitObjective, Kl, KlEstimator, LlmLoss, LlmObjective,
};
use duet_models::params::{Init, ParamSet, ParamSpec};
use duet_models::pipeline::{LoadOptions, Pipeline, VisionConfig, init_vision_tower};
use duet_models::render::{Condition, RenderOptions, render};
use duet_models::sde::SdeKind;
use duet_models::tokenizer::Tokenizer;
use duet_models::vae::{Vae, VaeConfig};
use duet_torch::collective::{AbortHandle, Collective, Gloo, GroupOptions, Store};
use duet_torch::optim::AdamWOptions;
use duet_trainer::engine::batch::{StepInput, TraceFiles, share};
use duet_trainer::engine::gradient::Sharing;
use duet_trainer::engine::{BranchSettings, OldPolicy, Settings};
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

const CORPUS: [&str; 2] = [
    "system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial \
     relationships of the objects and background:\nuser\n \nassistant\n",
    "You are a helpful assistant. The number after three is four. Revised Prompt:\na red four",
];

fn lm(tokenizer: &Tokenizer) -> LmConfig {
    LmConfig {
        vocab_size: tokenizer.size() as i64,
        hidden_size: 32,
        intermediate_size: 48,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        rms_norm_eps: 1e-6,
        rope_theta: 1e4,
        max_position_embeddings: 512,
        mrope_section: vec![1, 1, 2],
        tie_word_embeddings: true,
        bos_token_id: tokenizer.end_of_text(),
        eos_token_id: tokenizer.im_end(),
    }
}

fn dit() -> DitConfig {
    DitConfig {
        patch_size: 2,
        in_channels: 16,
        out_channels: 4,
        num_layers: 2,
        attention_head_dim: 16,
        num_attention_heads: 2,
        joint_attention_dim: 32,
        axes_dims_rope: [4, 6, 6],
    }
}

fn vae() -> VaeConfig {
    VaeConfig {
        base_dim: 8,
        z_dim: 4,
        dim_mult: vec![1, 2, 2],
        num_res_blocks: 1,
        temperal_downsample: vec![false, true],
        input_channels: 3,
        latents_mean: vec![0.0; 4],
        latents_std: vec![1.0; 4],
    }
}

/// Random everywhere, also where training starts from zero, so that every path shows.
fn noisy(specs: &[ParamSpec], seed: &Seed) -> ParamSet {
    let params = ParamSet::init(specs, seed);
    let shaken = params.iter().map(|(name, tensor)| {
        let spec = ParamSpec::new(format!("shake.{name}"), &tensor.size(), Init::Normal(0.1));
        (name.to_owned(), tensor + spec.sample(seed))
    });
    shaken.collect()
}

/// The base model: the same bits at every call.
pub fn pipeline() -> Pipeline {
    duet_torch::init(1).unwrap();
    let seed = Seed::root(3);
    let corpus: Vec<String> = CORPUS.map(str::to_owned).to_vec();
    let tokenizer = Tokenizer::train(&corpus, 2000, None).unwrap();
    let (lm_config, dit_config, vae_config) = (lm(&tokenizer), dit(), vae());
    let params = noisy(&Lm::specs(&lm_config, Default::default()), &seed);
    let lm = Lm::new(lm_config, params, "test").unwrap();
    let params = noisy(&Dit::specs(&dit_config), &seed);
    let dit = Dit::new(dit_config, params, "test").unwrap();
    let params = noisy(&Vae::specs(&vae_config), &seed);
    let vae = Vae::new(vae_config, params, "test").unwrap();
    let vision = VisionConfig::tiny(32);
    let tower = init_vision_tower(&vision, &seed);
    Pipeline::assemble(lm, dit, vae, tokenizer, FlowConfig::default(), (&vision, tower)).unwrap()
}

pub const TRACES: usize = 3;
pub const LEAVES: usize = 4;
pub const WINDOW: Window = Window { start: 1, len: 2 };

/// How the tests sample.
pub fn render_options() -> RenderOptions {
    RenderOptions {
        steps: 4,
        guidance: 3.0,
        sde: SdeKind::FlowGrpo,
        noise_level: 0.7,
        width: 32,
        height: 24,
    }
}

/// How the tests train, with the base model in `model`.
pub fn settings(model: &Path) -> Settings {
    let adamw = AdamWOptions { weight_decay: 1e-4, ..AdamWOptions::default() };
    let old = OldPolicy::Trained;
    Settings {
        model: model.to_path_buf(),
        load: LoadOptions::default(),
        seed: Seed::root(7),
        temperature: 1.0,
        render: render_options(),
        llm: BranchSettings { lr: 1e-3, adamw, lora: None, ema: 0.0, old, frozen: false },
        llm_loss: LlmLoss {
            objective: LlmObjective::Ppo { clip_low: 0.2, clip_high: 0.28, dual: None },
            aggregation: Aggregation::TokenMean,
            kl: None,
            importance_cap: None,
        },
        dit: BranchSettings { lr: 1e-3, adamw, lora: None, ema: 0.0, old, frozen: false },
        dit_loss: DitLoss {
            objective: DitObjective::Clip { range: 1e-4 },
            advantage_clip: 5.0,
            kl: None,
        },
        nft: None,
        max_grad_norm: 1.0,
        updates: 1,
        recompute: false,
        sharing: Sharing {
            zero: 0,
            each_micro_batch: false,
            overlap: true,
            bucket_bytes: 16 << 10,
        },
        nccl: None,
    }
}

/// The same, with an adapter on the transformer and penalties on both branches.
pub fn settings_with_adapter(model: &Path) -> Settings {
    let mut settings = settings(model);
    let targets = LoraConfig::dit_targets();
    settings.dit.lora = Some(LoraConfig { rank: 2, alpha: 4.0, targets });
    settings.dit_loss.kl = Some(DitKl::Exact { coefficient: 0.01 });
    let estimator = KlEstimator::K3;
    settings.llm_loss.kl = Some(Kl { coefficient: 0.01, estimator, straight_through: false });
    settings
}

/// One tree's rollout: what the step says of it, and its files.
fn tree(pipeline: &Pipeline, index: u32) -> (TrainTree, Vec<TraceFiles>) {
    let seed = Seed::root(100 + u64::from(index));
    let tokenizer = &pipeline.tokenizer;
    let question = tokenizer.encode(&format!("the number after {index}")).unwrap();
    let eos = vec![tokenizer.im_end(), tokenizer.end_of_text()];
    let options = SampleOptions { traces: TRACES, max_new_tokens: 12, temperature: 1.0, eos };
    let sampled =
        generate(&Decoder::new(&pipeline.lm).unwrap(), &question, &seed, &options).unwrap();
    let answers: Vec<Vec<i64>> = sampled.into_iter().map(|answer| answer.tokens).collect();
    let run = || token_log_probs(&pipeline.lm, &question, &answers, 1.0, false).unwrap();
    let log_probs = tch::no_grad(run).split();
    let embedder = Embedder::new(&pipeline.lm, tokenizer).unwrap();
    let negative = embedder.embed(" ").unwrap();
    let id = TreeId { iteration: 0, index };
    let (mut traces, mut files) = (Vec::new(), Vec::new());
    for (j, (answer, log_probs)) in answers.iter().zip(log_probs).enumerate() {
        let embeds = embedder.embed(&format!("a red {j}")).unwrap();
        let seed = seed.derive(Purpose::InitialNoise, &[j as u64]);
        let condition = Condition { embeds: &embeds, negative: Some(&negative) };
        let made = render(pipeline, condition, LEAVES, WINDOW, &seed, &render_options()).unwrap();
        let think = ThinkArtifact {
            tokens: tch::Tensor::from_slice(&[question.as_slice(), answer.as_slice()].concat()),
            prompt_len: question.len(),
            log_probs,
            embeds,
            negative_embeds: negative.shallow_clone(),
        };
        let render = RenderArtifact {
            latents: made.latents,
            log_probs: made.log_probs,
            images: made.images,
            last: None,
            window_start: WINDOW.start,
        };
        let (think, render) = (think.encode().unwrap(), render.encode().unwrap());
        traces.push(TrainTrace {
            trace: j as u32,
            artifact: reference(&format!("{id}/think-{j}"), &think),
            // The last tree has no spread among its traces.
            advantage: (index != 3).then_some([1.1, -0.3, -0.8][j]),
            render: Some(reference(&format!("{id}/render-{j}"), &render)),
            leaf_advantages: vec![Some(0.9), Some(-1.3), None, Some(0.4)],
        });
        files.push(TraceFiles { think, render: Some(render) });
    }
    let prompt = PromptRow { row: u64::from(index), text: String::new(), meta: String::new() };
    (TrainTree { id, prompt, traces }, files)
}

fn reference(key: &str, bytes: &[u8]) -> ArtifactRef {
    ArtifactRef { key: key.to_owned(), digest: Digest::of(bytes), bytes: bytes.len() as u64 }
}

/// An iteration of `trees` trees, sampled with the base model.
pub struct Rollouts {
    step: Step,
    files: Vec<Vec<TraceFiles>>,
}

/// Samples `trees` trees.
pub fn rollouts(trees: u32) -> Rollouts {
    let pipeline = pipeline();
    let (trees, files) = (0..trees).map(|index| tree(&pipeline, index)).unzip();
    let step = Step {
        epoch: TrainerEpoch(1),
        iteration: 0,
        gates: Gates { llm: 0.5, dit: 0.5 },
        window: WINDOW,
        trees,
        update: true,
        publish: false,
        checkpoint: false,
    };
    Rollouts { step, files }
}

impl Rollouts {
    /// What rank `rank` of `world` gets, as iteration `iteration`.
    pub fn input(&self, iteration: u32, (rank, world): (u32, u32)) -> StepInput {
        let step = Step { iteration, ..self.step.clone() };
        let mine: Vec<_> = share(&step.trees, rank, world).map(|tree| tree.id.index).collect();
        let files = mine.into_iter().map(|index| self.files[index as usize].clone()).collect();
        StepInput { step, files }
    }

    /// As if the images had been sampled by the plain ODE, with their last latents stored.
    pub fn end_without_window(&mut self) {
        self.step.window = Window::default();
        for (tree, files) in self.step.trees.iter_mut().zip(&mut self.files) {
            for (trace, file) in tree.traces.iter_mut().zip(files) {
                let Some(bytes) = file.render.take() else { continue };
                let old = RenderArtifact::decode("render", bytes, tch::Device::Cpu).unwrap();
                let bytes = RenderArtifact {
                    last: Some(old.latents.select(1, i64::from(WINDOW.len)).contiguous()),
                    latents: old.latents.narrow(1, 0, 0).contiguous(),
                    log_probs: old.log_probs.narrow(1, 0, 0).contiguous(),
                    images: old.images,
                    window_start: 0,
                };
                let bytes = bytes.encode().unwrap();
                trace.render = Some(reference(&format!("{}/nft", tree.id), &bytes));
                file.render = Some(bytes);
            }
        }
    }

    /// The same with other gates.
    pub fn gated(mut self, gates: Gates) -> Rollouts {
        self.step.gates = gates;
        self
    }
}

/// Runs `world` ranks, each on a thread of its own.
pub fn ranks<T: Send + 'static>(
    world: u32,
    body: impl Fn(&dyn Collective) -> T + Send + Sync + 'static,
) -> Vec<T> {
    let patient = Duration::from_secs(120);
    let server = Store::serve("127.0.0.1", patient).unwrap();
    let (address, body) = (server.address().to_owned(), Arc::new(body));
    let start = |rank| {
        let (body, address) = (body.clone(), address.clone());
        thread::spawn(move || {
            let store = Arc::new(Store::connect(&address, patient).unwrap());
            let (group, host) = ("ddp".to_owned(), "127.0.0.1".to_owned());
            let options = GroupOptions { rank, world, group, host, deadline: patient, threads: 1 };
            body(&Gloo::connect(store, options, AbortHandle::default()).unwrap())
        })
    };
    let threads: Vec<_> = (0..world).map(start).collect();
    threads.into_iter().map(|thread| thread.join().unwrap()).collect()
}
