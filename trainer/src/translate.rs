//! The configuration in the engine's words.

use crate::engine::gradient::Sharing;
use crate::engine::{BranchSettings, Nft, OldPolicy, Settings};
use duet_config::{
    Aggregation, Branch, Collective, Config, DitKl, DitObjective, Dtype, KlEstimator, LlmObjective,
    NftOld, Reduce, Sampler, Trainer,
};
use duet_core::Seed;
use duet_models::lora::LoraConfig;
use duet_models::loss;
use duet_models::pipeline::LoadOptions;
use duet_models::render::RenderOptions;
use duet_models::sde::SdeKind;
use duet_service::place::{Place, PlaceError};
use duet_torch::optim::AdamWOptions;
use tch::Kind;

/// What the engine needs to know of a run.
pub fn settings(config: &Config, device: tch::Device) -> Settings {
    let (llm_trained, dit_trained) = config.schedule.trains();
    let (llm_frozen, dit_frozen) = (!llm_trained, !dit_trained);
    let trainer = &config.trainer;
    Settings {
        model: config.model_path(),
        load: load(config, device),
        seed: Seed::root(config.run.seed),
        temperature: config.rollout.temperature,
        render: render(config),
        llm: branch(&config.llm.branch, trainer.ema, OldPolicy::Trained, llm_frozen),
        llm_loss: llm_loss(config),
        dit: branch(&config.dit.branch, trainer.ema, old(config.dit.nft_old), dit_frozen),
        dit_loss: dit_loss(config),
        nft: nft(config),
        max_grad_norm: trainer.max_grad_norm,
        updates: trainer.updates_per_rollout,
        recompute: trainer.recompute,
        sharing: sharing(trainer),
        nccl: nccl(trainer.collective, device),
    }
}

/// The processor, or which of the `gpus` is this process's.
///
/// # Errors
/// [`PlaceError`] when the configuration wants a GPU and there is none, or not this process's.
pub fn device(config: &Config, gpus: u32, place: Place) -> Result<tch::Device, PlaceError> {
    let gpu = place.device(config.workers.device, gpus)?;
    Ok(gpu.map_or(tch::Device::Cpu, |gpu| tch::Device::Cuda(gpu as usize)))
}

/// Where and as what the models are loaded.
pub(crate) fn load(config: &Config, device: tch::Device) -> LoadOptions {
    let kind = match config.model.dtype {
        Dtype::Float32 => Kind::Float,
        Dtype::Bfloat16 => Kind::BFloat16,
    };
    LoadOptions { device, lm: kind, dit: kind, vae: Kind::Float }
}

/// How gradients are summed over ranks.
pub(crate) fn sharing(trainer: &Trainer) -> Sharing {
    Sharing {
        zero: trainer.zero,
        each_micro_batch: trainer.reduce == Reduce::MicroBatch,
        overlap: trainer.overlap,
        bucket_bytes: (trainer.bucket_mib as usize) << 20,
    }
}

/// The CUDA device on which this rank talks through NCCL; `None`: through Gloo.
fn nccl(collective: Collective, device: tch::Device) -> Option<usize> {
    match (collective, device) {
        (Collective::Auto | Collective::Nccl, tch::Device::Cuda(device)) => Some(device),
        _ => None,
    }
}

fn render(config: &Config) -> RenderOptions {
    let rollout = &config.rollout;
    RenderOptions {
        steps: rollout.steps as usize,
        guidance: rollout.guidance_scale,
        sde: match rollout.sampler {
            Sampler::FlowGrpo => SdeKind::FlowGrpo,
            Sampler::Cps => SdeKind::Cps,
            Sampler::Dance => SdeKind::Dance,
        },
        noise_level: rollout.noise_level,
        width: i64::from(rollout.width),
        height: i64::from(rollout.height),
    }
}

fn old(old: NftOld) -> OldPolicy {
    match old {
        NftOld::Trained => OldPolicy::Trained,
        NftOld::Rising => OldPolicy::Rising,
        NftOld::Late => OldPolicy::Late,
    }
}

fn branch(branch: &Branch, ema: f64, old: OldPolicy, frozen: bool) -> BranchSettings {
    let optimizer = &branch.optimizer;
    let lora = branch.lora.as_ref().map(|lora| LoraConfig {
        rank: i64::from(lora.rank),
        alpha: lora.alpha,
        targets: lora.targets.clone(),
    });
    let [beta1, beta2] = optimizer.betas;
    let adamw =
        AdamWOptions { beta1, beta2, eps: optimizer.eps, weight_decay: optimizer.weight_decay };
    BranchSettings { lr: optimizer.lr, adamw, lora, ema, old, frozen }
}

fn llm_loss(config: &Config) -> loss::LlmLoss {
    let llm = &config.llm;
    let (clip_low, clip_high) = (llm.clip_low, llm.clip_high);
    let estimator = match llm.kl_estimator {
        KlEstimator::K1 => loss::KlEstimator::K1,
        KlEstimator::K2 => loss::KlEstimator::K2,
        KlEstimator::K3 => loss::KlEstimator::K3,
    };
    let kl = loss::Kl { coefficient: llm.kl, estimator, straight_through: llm.kl_straight_through };
    loss::LlmLoss {
        objective: match llm.objective {
            LlmObjective::Ppo => {
                loss::LlmObjective::Ppo { clip_low, clip_high, dual: llm.dual_clip }
            }
            LlmObjective::Gspo => loss::LlmObjective::Gspo { clip_low, clip_high },
            LlmObjective::Cispo => loss::LlmObjective::Cispo { max: llm.cispo_max },
        },
        aggregation: match llm.aggregation {
            Aggregation::TokenMean => loss::Aggregation::TokenMean,
            Aggregation::SequenceMean => loss::Aggregation::SequenceMeanTokenMean,
            Aggregation::Constant => {
                loss::Aggregation::Constant { length: f64::from(llm.aggregation_length) }
            }
        },
        kl: (llm.kl != 0.0).then_some(kl),
        importance_cap: llm.importance_cap,
    }
}

fn dit_loss(config: &Config) -> loss::DitLoss {
    let dit = &config.dit;
    let (range, coefficient) = (dit.clip_range, dit.kl);
    let kl = match dit.kl_kind {
        DitKl::Exact => loss::DitKl::Exact { coefficient },
        DitKl::FlowGrpo => loss::DitKl::FlowGrpo { coefficient },
    };
    loss::DitLoss {
        objective: match dit.objective {
            DitObjective::Clip => loss::DitObjective::Clip { range },
            DitObjective::Guard => loss::DitObjective::Guard { range },
            DitObjective::Dppo => loss::DitObjective::Dppo { limit: dit.dppo_limit },
            // Has no window for a loss of its own; see `nft`.
            DitObjective::Nft => loss::DitObjective::Clip { range },
        },
        advantage_clip: dit.adv_clip,
        kl: (coefficient != 0.0).then_some(kl),
    }
}

fn nft(config: &Config) -> Option<Nft> {
    let dit = &config.dit;
    let loss = loss::NftLoss { beta: dit.nft_beta, advantage_clip: dit.adv_clip, kl: dit.kl };
    (dit.objective == DitObjective::Nft).then_some(Nft { loss, times: dit.nft_times })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn read(text: &str) -> Settings {
        read_for(tch::Device::Cpu, text)
    }

    fn read_for(device: tch::Device, text: &str) -> Settings {
        let config = Config::from_text("test", text, &BTreeMap::new(), &[]).unwrap();
        settings(&config, device)
    }

    #[test]
    fn a_weights_schedule_freezes_the_branch_it_closes() {
        let text = "[model]\nbootstrap = \"test\"\n[schedule]\nkind = \"weights\"\nllm_weight = 1.0\ndit_weight = 0.0\n";
        let settings = read(text);
        assert!(!settings.llm.frozen && settings.dit.frozen);
    }

    #[test]
    fn ranks_talk_through_nccl_where_models_run_on_gpus_unless_told_otherwise() {
        let with = |device: tch::Device, collective: &str| {
            let name = if device == tch::Device::Cpu { "cpu" } else { "cuda" };
            let text = format!(
                "[model]\nbootstrap = \"test\"\n[workers]\ndevice = \"{name}\"\n[trainer]\n\
                 collective = \"{collective}\"\n"
            );
            read_for(device, &text).nccl
        };
        let cuda = tch::Device::Cuda(3);
        assert_eq!(with(tch::Device::Cpu, "auto"), None);
        assert_eq!(with(cuda, "auto"), Some(3));
        assert_eq!(with(cuda, "nccl"), Some(3));
        assert_eq!(with(cuda, "gloo"), None);
    }

    #[test]
    fn penalties_are_absent_at_zero() {
        let text = "[model]\nbootstrap = \"test\"\n[llm]\nkl = 0.001\nlr = 3e-6\n[dit]\nkl = 0.0\n";
        let settings = read(text);
        assert_eq!(settings.llm_loss.kl.map(|kl| kl.coefficient), Some(0.001));
        assert!(settings.dit_loss.kl.is_none());
        assert_eq!(settings.llm.lr, 3e-6);
    }
}
