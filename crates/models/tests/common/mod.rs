//! Small models for tests.
#![allow(dead_code)]

use duet_core::Seed;
use duet_models::dit::{Dit, DitConfig};
use duet_models::flow::FlowConfig;
use duet_models::lm::{Lm, LmConfig};
use duet_models::params::{Init, ParamSet, ParamSpec};
use duet_models::pipeline::{Pipeline, VisionConfig, init_vision_tower};
use duet_models::tokenizer::Tokenizer;
use duet_models::vae::{Vae, VaeConfig};

/// The sentence that Qwen-Image's embedding template is made of.
pub const SENTENCE: &str = "system\nDescribe the image by detailing the color, shape, size, texture, \
    quantity, text, spatial relationships of the objects and background:\nuser\n \nassistant\n";

pub fn one_thread() {
    tch::set_num_threads(1);
}

pub fn tokenizer() -> Tokenizer {
    let corpus = vec![
        SENTENCE.to_owned(),
        "You are a helpful assistant. The number after three is four. Revised Prompt:\na red four"
            .to_owned(),
    ];
    Tokenizer::train(&corpus, 2000, None).unwrap()
}

pub fn lm_config(vocab: i64) -> LmConfig {
    LmConfig {
        vocab_size: vocab,
        hidden_size: 32,
        intermediate_size: 48,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        rms_norm_eps: 1e-6,
        rope_theta: 1e6,
        max_position_embeddings: 512,
        mrope_section: vec![1, 1, 2],
        tie_word_embeddings: true,
        bos_token_id: 0,
        eos_token_id: 2,
    }
}

pub fn dit_config() -> DitConfig {
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

pub fn vae_config() -> VaeConfig {
    VaeConfig {
        base_dim: 8,
        z_dim: 4,
        dim_mult: vec![1, 2, 2],
        num_res_blocks: 1,
        temperal_downsample: vec![false, true],
        input_channels: 3,
        latents_mean: vec![0.1, -0.2, 0.3, 0.0],
        latents_std: vec![1.5, 0.7, 1.1, 2.0],
    }
}

/// Random everywhere, also where training starts from zero, so that every path shows.
pub fn noisy(specs: &[ParamSpec], seed: &Seed) -> ParamSet {
    let params = ParamSet::init(specs, seed);
    let shaken = params.iter().map(|(name, tensor)| {
        let spec = ParamSpec::new(format!("shake.{name}"), &tensor.size(), Init::Normal(0.1));
        (name.to_owned(), tensor + spec.sample(seed))
    });
    shaken.collect()
}

pub fn pipeline(seed: u64) -> Pipeline {
    let seed = Seed::root(seed);
    let tokenizer = tokenizer();
    let mut config = lm_config(tokenizer.size() as i64 + 3);
    config.bos_token_id = tokenizer.end_of_text();
    config.eos_token_id = tokenizer.im_end();
    let specs = Lm::specs(&config, Default::default());
    let lm = Lm::new(config, noisy(&specs, &seed), "test").unwrap();
    let dit = Dit::new(dit_config(), noisy(&Dit::specs(&dit_config()), &seed), "test").unwrap();
    let vae = Vae::new(vae_config(), noisy(&Vae::specs(&vae_config()), &seed), "test").unwrap();
    let vision = VisionConfig::tiny(32);
    let tower = init_vision_tower(&vision, &seed);
    Pipeline::assemble(lm, dit, vae, tokenizer, FlowConfig::default(), (&vision, tower)).unwrap()
}
