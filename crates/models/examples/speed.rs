//! How long the main pieces of work take on this machine, for a pipeline of about 10 M parameters:
//! `cargo run -p duet-models --example speed [rounds]`. Medians, one
//! thread.

use duet_core::Seed;
use duet_core::work::Window;
use duet_models::decoder::Decoder;
use duet_models::dit::{Dit, DitConfig};
use duet_models::flow::{FlowConfig, FlowSchedule};
use duet_models::generate::{SampleOptions, generate};
use duet_models::lm::{Lm, LmConfig};
use duet_models::logprob::token_log_probs;
use duet_models::lora::{Lora, LoraConfig};
use duet_models::render::{Condition, RenderOptions, Sampler, replay};
use duet_models::sde::{SdeKind, step};
use duet_models::vae::{Vae, VaeConfig};
use std::time::Instant;
use tch::{Kind, Tensor};

fn lm_config() -> LmConfig {
    LmConfig {
        vocab_size: 2000,
        hidden_size: 256,
        intermediate_size: 704,
        num_hidden_layers: 8,
        num_attention_heads: 8,
        num_key_value_heads: 4,
        rms_norm_eps: 1e-6,
        rope_theta: 1e6,
        max_position_embeddings: 1024,
        mrope_section: vec![4, 6, 6],
        tie_word_embeddings: true,
        bos_token_id: 0,
        eos_token_id: 1,
    }
}

fn dit_config() -> DitConfig {
    DitConfig {
        patch_size: 2,
        in_channels: 16,
        out_channels: 4,
        num_layers: 8,
        attention_head_dim: 32,
        num_attention_heads: 6,
        joint_attention_dim: 256,
        axes_dims_rope: [8, 12, 12],
    }
}

fn vae_config() -> VaeConfig {
    VaeConfig {
        base_dim: 32,
        z_dim: 4,
        dim_mult: vec![1, 2, 2],
        num_res_blocks: 1,
        temperal_downsample: vec![false, true],
        input_channels: 3,
        latents_mean: vec![0.0; 4],
        latents_std: vec![1.0; 4],
    }
}

fn time(name: &str, rounds: usize, mut work: impl FnMut()) {
    work();
    let mut took: Vec<f64> = (0..rounds)
        .map(|_| {
            let start = Instant::now();
            work();
            start.elapsed().as_secs_f64() * 1e3
        })
        .collect();
    took.sort_by(f64::total_cmp);
    println!("{name:40} {:10.2} ms", took[rounds / 2]);
}

fn main() -> Result<(), duet_models::ModelError> {
    tch::set_num_threads(1);
    let rounds = std::env::args().nth(1).and_then(|n| n.parse().ok()).unwrap_or(5);
    let seed = Seed::root(1);
    let lm = Lm::init(lm_config(), &seed)?;
    let mut dit = Dit::init(dit_config(), &seed)?;
    let vae = Vae::init(vae_config(), &seed)?;
    println!(
        "parameters: lm {} dit {} vae {}",
        lm.params().numel(),
        dit.params().numel(),
        vae.params().numel()
    );
    let prompt: Vec<i64> = (0..60).collect();
    for tokens in [32, 128] {
        let options =
            SampleOptions { traces: 16, max_new_tokens: tokens, temperature: 1.0, eos: vec![] };
        time(&format!("sample 16 x {tokens} tokens"), rounds, || {
            let decoder = Decoder::new(&lm);
            let _ = generate(&decoder, &prompt, &seed, &options);
        });
    }
    let answers: Vec<Vec<i64>> = (0..16).map(|i| (i..i + 128).collect()).collect();
    time("log-probs 16 x 128 tokens", rounds, || {
        tch::no_grad(|| drop(token_log_probs(&lm, &prompt, &answers, 1.0, false)));
    });
    lm.params().set_trainable(|_| true);
    time("log-probs and gradient 16 x 128 tokens", rounds, || {
        if let Ok(out) = token_log_probs(&lm, &prompt, &answers, 1.0, false) {
            out.values.mean(Kind::Float).backward();
        }
    });
    lm.params().set_trainable(|_| false);

    let noise = |shape: &[i64]| {
        let count = shape.iter().product::<i64>() as usize;
        Tensor::from_slice(&seed.normals(count)).view(shape)
    };
    let (embeds, negative) = (noise(&[20, 256]), noise(&[6, 256]));
    let condition = Condition { embeds: &embeds, negative: Some(&negative) };
    let options = RenderOptions {
        steps: 10,
        guidance: 4.0,
        sde: SdeKind::FlowGrpo,
        noise_level: 0.8,
        width: 64,
        height: 64,
    };
    let schedule = FlowSchedule::new(&FlowConfig::default(), 10, 64)?;
    let window = Window { start: 1, len: 2 };
    let size = (16, (8, 8));
    let start = noise(&[16, 64, 16]);
    time("denoise 16 images, 10 steps, cfg", rounds, || {
        tch::no_grad(|| {
            let sampler = Sampler::new(&dit, schedule.clone(), condition, size, window, &options);
            let Ok(sampler) = sampler else { return };
            let mut x = start.shallow_clone();
            for index in 0..10 {
                let Ok(velocity) = sampler.velocity(&x, index) else { return };
                x = step(&sampler.coefficients(index), &x, &velocity, Some(&start)).next;
            }
        });
    });
    let latents = noise(&[16, 4, 16, 16]);
    time("decode 16 images", rounds, || tch::no_grad(|| drop(vae.decode(&latents))));

    let config = LoraConfig { rank: 16, alpha: 32.0, targets: LoraConfig::dit_targets() };
    let lora = Lora::attach(&mut dit, config, &seed)?;
    lora.params().set_trainable(|_| true);
    let kept = noise(&[16, 3, 64, 16]);
    time("replay and gradient, 2 steps, cfg, lora", rounds, || {
        let sampler = Sampler::new(&dit, schedule.clone(), condition, size, window, &options);
        let Ok(sampler) = sampler else { return };
        if let Ok(out) = replay(&sampler, &kept, 0..2) {
            out.log_probs.mean(Kind::Float).backward();
        }
    });
    Ok(())
}
