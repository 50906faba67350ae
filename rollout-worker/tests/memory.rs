//! What `duet plan` says that a rollout worker holds, against what one holds: counted by libtorch's
//! allocator while an engine is loaded, thinks and draws with models large enough to count.

use duet_cli::plan::bytes::roles;
use duet_cli::plan::{Work, shapes::Shapes};
use duet_config::Config;
use duet_core::work::{Weights, Window};
use duet_core::{Digest, PolicyVersion, Seed};
use duet_models::dit::{Dit, DitConfig};
use duet_models::flow::FlowConfig;
use duet_models::lm::{Lm, LmConfig};
use duet_models::lora::LoraConfig;
use duet_models::pipeline::{Pipeline, VisionConfig, init_vision_tower};
use duet_models::render::RenderOptions;
use duet_models::sde::SdeKind;
use duet_models::tokenizer::Tokenizer;
use duet_models::vae::{Vae, VaeConfig};
use duet_rollout_worker::engine::{Adapters, Engine, Sampling};
use duet_torch::memory::Meter;
use std::collections::BTreeMap;
use std::path::Path;
use tch::{Device, Kind, Tensor};

/// Sizes of a case.
#[derive(Clone, Copy)]
struct Case {
    name: &'static str,
    layers: i64,
    blocks: i64,
    inner: i64,
    /// Tokens of the table beyond the tokenizer's.
    spare: i64,
    base: i64,
    traces: usize,
    answer: usize,
    leaves: usize,
    side: u32,
    rank: Option<u32>,
}

const HIDDEN: i64 = 128;
const DIT_WIDTH: i64 = 128;

fn case(name: &'static str) -> Case {
    Case {
        name,
        layers: 3,
        blocks: 3,
        inner: 320,
        spare: 3000,
        base: 8,
        traces: 4,
        answer: 64,
        leaves: 4,
        side: 64,
        rank: None,
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
    let lm = LmConfig {
        vocab_size: tokenizer.size() as i64 + case.spare,
        hidden_size: HIDDEN,
        intermediate_size: case.inner,
        num_hidden_layers: case.layers,
        num_attention_heads: 8,
        num_key_value_heads: 4,
        rms_norm_eps: 1e-6,
        rope_theta: 1e4,
        max_position_embeddings: 512,
        mrope_section: vec![2, 2, 4],
        tie_word_embeddings: true,
        bos_token_id: tokenizer.end_of_text(),
        eos_token_id: tokenizer.im_end(),
    };
    let dit = DitConfig {
        patch_size: 2,
        in_channels: 16,
        out_channels: 4,
        num_layers: case.blocks,
        attention_head_dim: 32,
        num_attention_heads: DIT_WIDTH / 32,
        joint_attention_dim: HIDDEN,
        axes_dims_rope: [8, 12, 12],
    };
    let vae = VaeConfig {
        base_dim: case.base,
        z_dim: 4,
        dim_mult: vec![1, 2],
        num_res_blocks: 1,
        temperal_downsample: vec![false],
        input_channels: 3,
        latents_mean: vec![0.0; 4],
        latents_std: vec![1.0; 4],
    };
    let lm = Lm::init(lm, &seed).unwrap();
    let dit = Dit::init(dit, &seed).unwrap();
    // A fresh transformer predicts zero, which guidance cannot rescale.
    tch::no_grad(|| {
        dit.params().iter().for_each(|(_, t)| drop(t.shallow_clone().normal_(0.0, 0.1)))
    });
    let vae = Vae::init(vae, &seed).unwrap();
    let vision = VisionConfig::tiny(HIDDEN);
    let tower = init_vision_tower(&vision, &seed);
    Pipeline::assemble(lm, dit, vae, tokenizer, FlowConfig::default(), (&vision, tower)).unwrap()
}

fn config(case: &Case, model: &Path) -> Config {
    let Case { traces, leaves, side, answer, .. } = *case;
    let lora = case.rank.map_or(String::new(), |rank| {
        format!("[dit.lora]\nrank = {rank}\nalpha = 4.0\ntargets = [\"to_q\", \"to_v\"]\n")
    });
    let text = format!(
        "[run]\niterations = 1\n[model]\npath = \"{}\"\ndtype = \"float32\"\n[data]\nprompts = \"none\"\n\
         [rollout]\nprompts_per_iteration = 1\ntraces = {traces}\nimages_per_trace = {leaves}\n\
         max_new_tokens = {answer}\nwidth = {side}\nheight = {side}\nsteps = 4\n\
         [window]\nkind = \"fixed\"\nstart = 1\nlen = 2\n\
         [schedule]\nkind = \"weights\"\nllm_weight = 0.0\ndit_weight = 1.0\n[dit]\nkl = 0.0\n{lora}",
        model.display()
    );
    Config::from_text(case.name, &text, &BTreeMap::new(), &[]).unwrap_or_else(|e| panic!("{e}"))
}

/// The most that a worker held, and how long its question was.
fn measured(case: &Case, folder: &Path) -> (i64, usize) {
    let sampling = Sampling {
        instruction: "Draw.\n".to_owned(),
        temperature: 1.0,
        max_new_tokens: case.answer,
        render: RenderOptions {
            steps: 4,
            guidance: 4.0,
            sde: SdeKind::FlowGrpo,
            noise_level: 0.7,
            width: i64::from(case.side),
            height: i64::from(case.side),
        },
        keep_last: false,
    };
    let targets = vec!["to_q".to_owned(), "to_v".to_owned()];
    let dit = case.rank.map(|rank| LoraConfig { rank: i64::from(rank), alpha: 4.0, targets });
    let weights =
        Weights { version: PolicyVersion(0), llm: None, dit: None, digest: Digest::of(b"base") };
    let window = Window { start: 1, len: 2 };
    let meter = Meter::start().unwrap();
    let pipeline = Pipeline::load(folder).unwrap();
    let mut engine = Engine::new(pipeline, sampling, Adapters { llm: None, dit }, 1).unwrap();
    let loaded = meter.read();
    let question = engine.question("a red cube").unwrap().len();
    let seed = Seed::root(5);
    let thoughts = engine.think_lease(&weights, "a red cube", case.traces, &seed).unwrap();
    let lengths: Vec<u32> = thoughts.iter().map(|thought| thought.tokens).collect();
    assert_eq!(
        lengths,
        vec![case.answer as u32; case.traces],
        "the plan counts the longest traces"
    );
    let thought = meter.read();
    let embeds = Tensor::randn([question as i64, HIDDEN], (Kind::Float, Device::Cpu));
    engine.draw(&embeds, case.leaves, window, &seed).unwrap();
    let peak = meter.read().peak;
    println!("{}: loaded {}, thought {}, drawn {peak}", case.name, loaded.now, thought.peak);
    (peak, question)
}

#[test]
fn a_rollout_worker_holds_what_the_plan_says() {
    duet_torch::init(1).unwrap();
    let cases = [
        Case { traces: 8, ..case("log-probabilities of a large table") },
        Case { traces: 8, inner: 4096, ..case("a wide layer") },
        Case { leaves: 16, ..case("denoising") },
        Case { leaves: 16, rank: Some(4), ..case("denoising, an adapter") },
        Case { leaves: 8, side: 96, ..case("denoising large images") },
        Case { base: 64, leaves: 8, ..case("decoding") },
        case("a bit of everything"),
    ];
    let mut far = Vec::new();
    for case in &cases {
        let folder = tempfile::tempdir().unwrap();
        pipeline(case).save(folder.path()).unwrap();
        let (peak, question) = measured(case, folder.path());
        let config = config(case, folder.path());
        let shapes = Shapes::read(folder.path()).unwrap();
        let work = Work::new(&config, &shapes, question as u64).unwrap();
        let role = roles(&config, &shapes, &work).remove(0);
        for kind in &role.kinds {
            println!("   {:<24} {}", kind.name, kind.bytes);
        }
        let ratio = role.bytes as f64 / peak as f64;
        println!("   planned {} measured {peak}: {ratio:.3}", role.bytes);
        if !(0.9..=1.1).contains(&ratio) {
            far.push(format!("{}: {ratio:.3}", case.name));
        }
    }
    assert!(far.is_empty(), "{far:?}");
}
