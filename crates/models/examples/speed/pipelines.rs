//! Pipelines of random weights: `medium` of about ten million parameters, `small` with a language
//! model of about one, and `large.safetensors` of 1 GiB.

use crate::Outcome;
use duet_core::Seed;
use duet_models::dit::{Dit, DitConfig};
use duet_models::flow::FlowConfig;
use duet_models::lm::{Lm, LmConfig};
use duet_models::params::{Init, ParamSet, ParamSpec};
use duet_models::pipeline::{Pipeline, VisionConfig, init_vision_tower};
use duet_models::tokenizer::Tokenizer;
use duet_models::vae::{Vae, VaeConfig};
use std::path::Path;
use tch::{Device, Kind, Tensor};

const TEXT: &str = "system\nDescribe the image by detailing the color, shape, size, texture, \
    quantity, text, spatial relationships of the objects and background:\nuser\n \nassistant\n";

/// Language model: hidden size, inner size, layers, heads; transformer: layers, heads.
fn pipeline(
    (hidden, inner, layers, heads): (i64, i64, i64, i64),
    dit: (i64, i64),
) -> Outcome<Pipeline> {
    let seed = Seed::root(1);
    let tokenizer = Tokenizer::train(&[TEXT.to_owned()], 2000, None)?;
    let lm = LmConfig {
        vocab_size: 2000,
        hidden_size: hidden,
        intermediate_size: inner,
        num_hidden_layers: layers,
        num_attention_heads: heads,
        num_key_value_heads: heads / 2,
        rms_norm_eps: 1e-6,
        rope_theta: 1e6,
        max_position_embeddings: 1024,
        mrope_section: vec![4, 6, 6],
        tie_word_embeddings: true,
        bos_token_id: tokenizer.end_of_text(),
        eos_token_id: tokenizer.im_end(),
    };
    let dit = DitConfig {
        patch_size: 2,
        in_channels: 16,
        out_channels: 4,
        num_layers: dit.0,
        attention_head_dim: 32,
        num_attention_heads: dit.1,
        joint_attention_dim: hidden,
        axes_dims_rope: [8, 12, 12],
    };
    let vae = VaeConfig {
        base_dim: 32,
        z_dim: 4,
        dim_mult: vec![1, 2, 2],
        num_res_blocks: 1,
        temperal_downsample: vec![false, true],
        input_channels: 3,
        latents_mean: vec![0.0; 4],
        latents_std: vec![1.0; 4],
    };
    let vision = VisionConfig::tiny(hidden);
    let tower = init_vision_tower(&vision, &seed);
    let (lm, vae) = (Lm::init(lm, &seed)?, Vae::init(vae, &seed)?);
    // A fresh transformer predicts zero, and a guided zero has no direction.
    let params: ParamSet = ParamSet::init(&Dit::specs(&dit), &seed)
        .iter()
        .map(|(name, tensor)| {
            let noise = ParamSpec::new(name, &tensor.size(), Init::Normal(0.02)).sample(&seed);
            (name.to_owned(), tensor + noise)
        })
        .collect();
    let dit = Dit::new(dit, params, "a random transformer")?;
    let count = lm.params().numel() + dit.params().numel() + vae.params().numel();
    println!("parameters: {count}, {} of them the language model's", lm.params().numel());
    Ok(Pipeline::assemble(lm, dit, vae, tokenizer, FlowConfig::default(), (&vision, tower))?)
}

/// Writes everything into `folder`.
pub fn make(folder: &Path) -> Outcome<()> {
    pipeline((256, 704, 7, 8), (4, 6))?.save(&folder.join("medium"))?;
    pipeline((128, 352, 4, 4), (1, 2))?.save(&folder.join("small"))?;
    let part = || Tensor::rand([2048, 2048], (Kind::Float, Device::Cpu));
    let parts: Vec<(String, Tensor)> = (0..64).map(|i| (format!("part.{i}"), part())).collect();
    Ok(Tensor::write_safetensors(&parts, folder.join("large.safetensors"))?)
}
