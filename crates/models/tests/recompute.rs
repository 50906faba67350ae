//! Activation recomputation: the bits of a plain backward pass, for both models, full and LoRA.

use duet_core::Seed;
use duet_core::work::Window;
use duet_models::dit::{Dit, DitConfig};
use duet_models::flow::{FlowConfig, FlowSchedule};
use duet_models::lm::{Lm, LmConfig};
use duet_models::logprob::token_log_probs;
use duet_models::lora::{Lora, LoraConfig};
use duet_models::render::{Condition, RenderOptions, Sampler, replay};
use duet_models::sde::SdeKind;
use duet_torch::{Tensors, normal_tensor};
use tch::Kind;

type Outcome = Result<(), Box<dyn std::error::Error>>;

/// Libtorch counts its threads for each calling thread; sums over two may differ in the last bit.
fn one_thread() -> Outcome {
    duet_torch::init(1)?;
    tch::set_num_threads(1);
    Ok(())
}

fn seed() -> Seed {
    Seed::root(3)
}

fn dit() -> Result<Dit, duet_models::ModelError> {
    let config = DitConfig {
        patch_size: 2,
        in_channels: 16,
        out_channels: 4,
        num_layers: 3,
        attention_head_dim: 16,
        num_attention_heads: 2,
        joint_attention_dim: 24,
        axes_dims_rope: [4, 6, 6],
    };
    let dit = Dit::init(config, &seed())?;
    // A fresh transformer predicts zero; noise everywhere makes every gradient matter.
    tch::no_grad(|| {
        for (index, param) in dit.params().to_map().values().enumerate() {
            let noise = normal_tensor(
                &seed().derive(duet_core::Purpose::Data, &[index as u64]),
                &param.size(),
            );
            param.shallow_clone().copy_(&(param + noise * 0.1));
        }
    });
    Ok(dit)
}

fn lm() -> Result<Lm, duet_models::ModelError> {
    let config = LmConfig {
        vocab_size: 50,
        hidden_size: 32,
        intermediate_size: 48,
        num_hidden_layers: 3,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        rms_norm_eps: 1e-6,
        rope_theta: 1e6,
        max_position_embeddings: 128,
        mrope_section: vec![2, 1, 1],
        tie_word_embeddings: true,
        bos_token_id: 0,
        eos_token_id: 1,
    };
    Lm::init(config, &seed())
}

/// Gradients of trained parameters, cleared afterwards.
fn take(params: &Tensors) -> Tensors {
    // What nothing reads, such as the last block's text stream, has no gradient.
    let grads = params
        .iter()
        .filter(|(_, param)| param.grad().defined())
        .map(|(name, param)| (name.clone(), param.grad().copy()))
        .collect();
    for param in params.values() {
        param.shallow_clone().zero_grad();
    }
    grads
}

fn update_dit(dit: &Dit) -> Outcome {
    let embeds = normal_tensor(&Seed::root(8), &[7, 24]);
    let negative = normal_tensor(&Seed::root(9), &[3, 24]);
    let options = RenderOptions {
        steps: 6,
        guidance: 4.0,
        sde: SdeKind::FlowGrpo,
        noise_level: 0.8,
        width: 32,
        height: 32,
    };
    let condition = Condition { embeds: &embeds, negative: Some(&negative) };
    let window = Window { start: 1, len: 2 };
    let kept = normal_tensor(&Seed::root(10), &[3, 3, 16, 16]);
    let schedule = FlowSchedule::new(&FlowConfig::default(), 6, 16)?;
    let sampler = Sampler::new(dit, schedule, condition, (3, (4, 4)), window, &options)?;
    // Four contributions to each gradient: two steps, each with two branches.
    replay(&sampler, &kept, 0..2)?.log_probs.mean(Kind::Float).backward();
    Ok(())
}

fn same(plain: &Tensors, again: &Tensors) {
    assert!(plain.values().any(|grad| grad.abs().max().double_value(&[]) > 0.0));
    assert_eq!(plain.len(), again.len());
    for (name, grad) in plain {
        assert_eq!(grad, &again[name], "{name}");
    }
}

#[test]
fn the_transformers_gradients_do_not_change() -> Outcome {
    one_thread()?;
    let mut dit = dit()?;
    dit.params().set_trainable(|_| true);
    let params = dit.params().to_map();
    update_dit(&dit)?;
    let plain = take(&params);
    dit.set_recompute(true);
    update_dit(&dit)?;
    same(&plain, &take(&params));
    Ok(())
}

#[test]
fn the_adapters_gradients_do_not_change() -> Outcome {
    one_thread()?;
    let mut dit = dit()?;
    let config = LoraConfig { rank: 4, alpha: 8.0, targets: LoraConfig::dit_targets() };
    let lora = Lora::attach(&mut dit, config, &seed())?;
    lora.params().set_trainable(|_| true);
    let params = lora.params().to_map();
    update_dit(&dit)?;
    let plain = take(&params);
    dit.set_recompute(true);
    update_dit(&dit)?;
    same(&plain, &take(&params));
    Ok(())
}

#[test]
fn the_language_models_gradients_do_not_change() -> Outcome {
    one_thread()?;
    let mut lm = lm()?;
    lm.params().set_trainable(|_| true);
    let params = lm.params().to_map();
    let prompt: Vec<i64> = (2..20).collect();
    let answers = vec![vec![5, 6, 7, 8, 1], vec![9, 1], vec![10, 11, 12]];
    let update = |lm: &Lm| -> Result<Tensors, duet_models::ModelError> {
        let out = token_log_probs(lm, &prompt, &answers, 1.0, false)?;
        out.values.mean(Kind::Float).backward();
        Ok(take(&params))
    };
    let plain = update(&lm)?;
    lm.set_recompute(true);
    same(&plain, &update(&lm)?);
    Ok(())
}
