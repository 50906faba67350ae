//! A tiny random pipeline, and an engine on it.
#![allow(dead_code)]

use duet_core::work::Weights;
use duet_core::{Digest, PolicyVersion, Seed};
use duet_models::dit::{Dit, DitConfig};
use duet_models::flow::FlowConfig;
use duet_models::lm::{Lm, LmConfig};
use duet_models::params::{Init, ParamSet, ParamSpec};
use duet_models::pipeline::{Pipeline, VisionConfig, init_vision_tower};
use duet_models::render::RenderOptions;
use duet_models::sde::SdeKind;
use duet_models::tokenizer::Tokenizer;
use duet_models::vae::{Vae, VaeConfig};
use duet_rollout_worker::engine::{Adapters, Engine, Sampling};

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

/// The pipeline: the same bits at every call.
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

/// How the tests sample.
pub fn sampling() -> Sampling {
    Sampling {
        instruction: "Draw.\n".to_owned(),
        temperature: 1.0,
        max_new_tokens: 24,
        render: RenderOptions {
            steps: 4,
            guidance: 3.0,
            sde: SdeKind::FlowGrpo,
            noise_level: 0.7,
            width: 32,
            height: 24,
        },
        keep_last: false,
    }
}

/// An engine on the base model.
pub fn engine(adapters: Adapters) -> Engine {
    Engine::new(pipeline(), sampling(), adapters, 2).unwrap()
}

/// The base model as a policy.
pub fn base() -> Weights {
    Weights { version: PolicyVersion(0), llm: None, dit: None, digest: Digest::of(b"base") }
}
