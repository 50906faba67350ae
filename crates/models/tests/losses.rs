//! Laws of the losses and of adapters.

mod common;

use duet_core::Seed;
use duet_models::logprob::TokenLogProbs;
use duet_models::lora::{Lora, LoraConfig};
use duet_models::loss::{
    Aggregation, Kl, KlEstimator, LlmBatch, LlmLoss, LlmObjective, NftBatch, NftLoss, llm_loss,
    llm_totals, nft_loss, nft_reward,
};
use tch::Tensor;

const PPO: LlmObjective = LlmObjective::Ppo { clip_low: 0.2, clip_high: 0.28, dual: Some(3.0) };

fn plain(objective: LlmObjective, aggregation: Aggregation) -> LlmLoss {
    LlmLoss { objective, aggregation, kl: None, importance_cap: None }
}

fn batch_of(values: &[f32], lengths: &[i64]) -> TokenLogProbs {
    let values = Tensor::from_slice(values).set_requires_grad(true);
    TokenLogProbs { values, entropy: None, lengths: lengths.to_vec() }
}

const NEW: [f32; 7] = [-1.0, -0.5, -2.0, -0.1, -3.0, -1.5, -0.7];
const OLD: [f32; 7] = [-1.3, -0.5, -1.5, -0.2, -1.0, -1.4, -1.7];
const LENGTHS: [i64; 3] = [3, 2, 2];

/// Value and gradient of a loss over all answers.
fn run(loss: &LlmLoss, advantages: &[Option<f64>]) -> (f64, Vec<f32>) {
    let new = batch_of(&NEW, &LENGTHS);
    let old = Tensor::from_slice(&OLD);
    let counted = advantages.iter().zip(LENGTHS).filter(|(a, _)| a.is_some());
    let totals = llm_totals(counted.map(|(_, length)| length as u32));
    let reference = Tensor::from_slice(&OLD) + 0.1;
    let batch = LlmBatch {
        new: &new,
        old: &old,
        rollout: Some(&reference),
        reference: Some(&reference),
        advantages,
    };
    let out = llm_loss(loss, &batch, totals).unwrap();
    out.value.backward();
    (out.value.double_value(&[]), Vec::try_from(new.values.grad()).unwrap())
}

/// The same loss by plain loops over float64.
fn by_hand(loss: &LlmLoss, advantages: &[f64]) -> f64 {
    let (mut sum, mut at) = (0.0, 0);
    let tokens: i64 = LENGTHS.iter().sum();
    for (length, advantage) in LENGTHS.iter().zip(advantages) {
        let deltas: Vec<f64> =
            (at..at + *length as usize).map(|i| f64::from(NEW[i]) - f64::from(OLD[i])).collect();
        for (offset, delta) in deltas.iter().enumerate() {
            let i = at + offset;
            let mut term = match loss.objective {
                LlmObjective::Ppo { clip_low, clip_high, dual } => {
                    let r = delta.exp();
                    let l =
                        (-advantage * r).max(-advantage * r.clamp(1.0 - clip_low, 1.0 + clip_high));
                    match dual {
                        Some(c) if *advantage < 0.0 => l.min(-advantage * c),
                        _ => l,
                    }
                }
                LlmObjective::Gspo { clip_low, clip_high } => {
                    let r = (deltas.iter().sum::<f64>() / *length as f64).exp();
                    (-advantage * r).max(-advantage * r.clamp(1.0 - clip_low, 1.0 + clip_high))
                }
                LlmObjective::Cispo { max } => {
                    -delta.exp().min(max) * advantage * f64::from(NEW[i])
                }
            };
            if let Some(cap) = loss.importance_cap {
                term *= (-0.1f64).exp().min(cap);
            }
            if let Some(kl) = loss.kl {
                let gap = delta - 0.1;
                term += kl.coefficient
                    * match kl.estimator {
                        KlEstimator::K1 => gap,
                        KlEstimator::K2 => gap * gap / 2.0,
                        KlEstimator::K3 => (-gap).exp() + gap - 1.0,
                    };
            }
            sum += term
                / match loss.aggregation {
                    Aggregation::TokenMean => tokens as f64,
                    Aggregation::SequenceMeanTokenMean => 3.0 * *length as f64,
                    Aggregation::Constant { length } => 3.0 * length,
                };
        }
        at += *length as usize;
    }
    sum
}

#[test]
fn language_losses_are_their_formulas() {
    let advantages = [0.7, -1.2, 0.4];
    let some = advantages.map(Some);
    let aggregations = [
        Aggregation::TokenMean,
        Aggregation::SequenceMeanTokenMean,
        Aggregation::Constant { length: 16.0 },
    ];
    let objectives = [
        PPO,
        LlmObjective::Ppo { clip_low: 0.2, clip_high: 0.2, dual: None },
        LlmObjective::Gspo { clip_low: 3e-4, clip_high: 4e-4 },
        LlmObjective::Cispo { max: 1.5 },
    ];
    for aggregation in aggregations {
        for objective in objectives {
            for estimator in [KlEstimator::K1, KlEstimator::K2, KlEstimator::K3] {
                for straight_through in [false, true] {
                    let kl = Kl { coefficient: 0.3, estimator, straight_through };
                    let mut loss = plain(objective, aggregation);
                    (loss.kl, loss.importance_cap) = (Some(kl), Some(0.95));
                    let (got, want) = (run(&loss, &some).0, by_hand(&loss, &advantages));
                    assert!((got - want).abs() < 1e-5, "{loss:?}: {got} != {want}");
                }
            }
        }
    }
}

/// Straight-through estimators have K2's gradient whatever their value.
#[test]
fn straight_through_has_the_gradient_of_k2() {
    let with = |estimator, straight_through| {
        let mut loss = plain(PPO, Aggregation::TokenMean);
        loss.kl = Some(Kl { coefficient: 0.5, estimator, straight_through });
        run(&loss, &[Some(0.5), Some(-0.5), Some(1.0)]).1
    };
    let want = with(KlEstimator::K2, false);
    for estimator in [KlEstimator::K1, KlEstimator::K2, KlEstimator::K3] {
        for (got, want) in with(estimator, true).iter().zip(&want) {
            assert!((got - want).abs() < 1e-6);
        }
    }
    assert_ne!(with(KlEstimator::K1, false), want);
}

/// Law: how a batch is cut changes no loss; an answer that is not trained on changes nothing.
#[test]
fn cutting_the_batch_changes_nothing() {
    let loss = plain(PPO, Aggregation::SequenceMeanTokenMean);
    let advantages = [Some(0.7), None, Some(0.4)];
    let (whole, gradient) = run(&loss, &advantages);
    assert_eq!(&gradient[3..5], [0.0, 0.0]);
    let totals = llm_totals([3, 2]);
    let mut sum = 0.0;
    for (start, length, advantage) in [(0, 3, advantages[0]), (5, 2, advantages[2])] {
        let new = batch_of(&NEW[start..start + length], &[length as i64]);
        let old = Tensor::from_slice(&OLD[start..start + length]);
        let batch = LlmBatch {
            new: &new,
            old: &old,
            rollout: None,
            reference: None,
            advantages: &[advantage],
        };
        sum += llm_loss(&loss, &batch, totals).unwrap().value.double_value(&[]);
    }
    assert!((whole - sum).abs() < 1e-6);
}

#[test]
fn zero_advantages_have_zero_gradient() {
    for objective in [
        PPO,
        LlmObjective::Gspo { clip_low: 0.1, clip_high: 0.1 },
        LlmObjective::Cispo { max: 2.0 },
    ] {
        let (value, gradient) = run(&plain(objective, Aggregation::TokenMean), &[Some(0.0); 3]);
        assert_eq!((value, gradient), (0.0, vec![0.0; 7]));
    }
}

#[test]
fn equal_velocities_have_equal_nft_errors() {
    let seed = Seed::root(1);
    let noise = |index| {
        let seed = seed.derive(duet_core::Purpose::Data, &[index]);
        Tensor::from_slice(&seed.normals(24)).view([2, 3, 4])
    };
    let (clean, noised, velocity) = (noise(0), noise(1), noise(2));
    let batch = NftBatch {
        clean: &clean,
        noised: &noised,
        time: 0.4,
        new: &velocity,
        old: &velocity,
        reference: Some(&velocity),
        advantages: &[1.0, -2.0],
    };
    let loss = NftLoss { beta: 0.1, advantage_clip: 5.0, kl: 1e-4 };
    let out = nft_loss(&loss, &batch, 2.0).unwrap();
    let (plus, minus) = (out.metrics["nft/positive"], out.metrics["nft/negative"]);
    assert!((plus - minus).abs() < 1e-6 * plus);
    assert_eq!(out.metrics["kl"], 0.0);
    assert_eq!(
        [nft_reward(9.0, 5.0), nft_reward(0.0, 5.0), nft_reward(-9.0, 5.0)],
        [1.0, 0.5, 0.0]
    );
}

fn forward(pipeline: &duet_models::pipeline::Pipeline) -> (Tensor, Tensor) {
    let seed = Seed::root(4);
    let latents = Tensor::from_slice(&seed.normals(2 * 12 * 16)).view([2, 12, 16]);
    let embeds = Tensor::from_slice(&Seed::root(5).normals(2 * 5 * 32)).view([2, 5, 32]);
    let dit = &pipeline.dit;
    let text = dit.text(&embeds, None).unwrap();
    let mods = dit.modulations(&Tensor::from_slice(&[0.7f32]));
    let image = dit.forward(&latents, &text, &dit.positions(5, (3, 4)), &mods, Some(0)).unwrap();
    let ids = Tensor::from_slice(&[1i64, 5, 9, 300]).unsqueeze(0);
    (image, pipeline.lm.hidden(&ids, None))
}

/// A new adapter changes nothing; a trained one does, is switched off, merged, taken out, written and
/// read back.
#[test]
fn adapters_come_and_go() {
    common::one_thread();
    let mut pipeline = common::pipeline(8);
    let (image, text) = forward(&pipeline);
    let seed = Seed::root(2);
    let config = LoraConfig { rank: 3, alpha: 6.0, targets: LoraConfig::dit_targets() };
    let dit = Lora::attach(&mut pipeline.dit, config, &seed).unwrap();
    let targets = vec!["q_proj".to_owned(), "v_proj".to_owned()];
    let config = LoraConfig { rank: 2, alpha: 4.0, targets };
    let lm = Lora::attach(&mut pipeline.lm, config.clone(), &seed).unwrap();
    assert_eq!(dit.params().len(), 2 * 2 * 12);
    let name = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight";
    assert_eq!(lm.params().get(name).unwrap().size(), [2, 32]);
    assert_eq!(forward(&pipeline), (image.copy(), text.copy()));

    for (name, tensor) in dit.params().iter().chain(lm.params().iter()) {
        if name.contains("lora_B") {
            let _ = tensor.shallow_clone().fill_(0.05);
        }
    }
    let (tuned_image, tuned_text) = forward(&pipeline);
    assert!(!tuned_image.allclose(&image, 1e-4, 1e-4, false));
    assert!(!tuned_text.allclose(&text, 1e-4, 1e-4, false));
    let plain = dit.without(|| lm.without(|| forward(&pipeline)));
    assert_eq!(plain, (image.copy(), text.copy()));

    dit.merge(&mut pipeline.dit);
    lm.merge(&mut pipeline.lm);
    let (a, b) = forward(&pipeline);
    assert!(a.allclose(&tuned_image, 1e-4, 1e-5, false));
    assert!(b.allclose(&tuned_text, 1e-4, 1e-5, false));
    dit.unmerge(&mut pipeline.dit);
    lm.unmerge(&mut pipeline.lm);

    let folder = tempfile::tempdir().unwrap();
    let kept = std::env::var_os("DUET_PARITY_ADAPTERS").map(std::path::PathBuf::from);
    let folder = kept.as_deref().unwrap_or(folder.path());
    dit.save(&folder.join("dit")).unwrap();
    lm.save(&folder.join("lm")).unwrap();
    drop(dit.detach(&mut pipeline.dit));
    drop(lm.detach(&mut pipeline.lm));
    let (a, b) = forward(&pipeline);
    assert!(a.allclose(&image, 1e-4, 1e-5, false) && b.allclose(&text, 1e-4, 1e-5, false));
    Lora::load(&mut pipeline.dit, &folder.join("dit")).unwrap();
    Lora::load(&mut pipeline.lm, &folder.join("lm")).unwrap();
    let (a, b) = forward(&pipeline);
    assert!(a.allclose(&tuned_image, 1e-4, 1e-5, false));
    assert!(b.allclose(&tuned_text, 1e-4, 1e-5, false));

    assert!(Lora::load(&mut pipeline.lm, &folder.join("lm")).is_err());
    let typo = LoraConfig { targets: vec!["q_prj".to_owned()], ..config };
    assert!(Lora::attach(&mut pipeline.dit, typo, &seed).is_err());
}
