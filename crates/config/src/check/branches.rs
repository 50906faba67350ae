//! How each branch is trained.

use super::Trained;
use crate::error::Problems;
use crate::raw::{Raw, Train};
use crate::sections::{
    Branch, Dit, DitKl, DitObjective, Llm, LlmObjective, Lora, NftOld, Optimizer,
};

/// `[llm]`
pub(super) fn llm(raw: &Raw, trained: Trained, problems: &mut Problems) -> Llm {
    let b = &raw.llm;
    let optimizer =
        Optimizer { lr: b.lr, betas: b.betas, eps: b.eps, weight_decay: b.weight_decay };
    let lora = adapter("llm", b.train, b.lora.as_ref(), problems);
    self::optimizer("llm", &optimizer, trained.llm, problems);
    problems.check(b.clip_low > 0.0 && b.clip_low < 1.0, "llm.clip_low", || {
        format!(
            "is {}; ratios are clipped to 1 - clip_low, so use a number between 0 and 1",
            b.clip_low
        )
    });
    problems.check(b.clip_high.is_finite() && b.clip_high > 0.0, "llm.clip_high", || {
        format!("is {}; it must be above 0", b.clip_high)
    });
    problems.check(b.dual_clip == 0.0 || b.dual_clip > 1.0, "llm.dual_clip", || {
        format!("is {}; use 0 (off) or a number above 1, usually 3", b.dual_clip)
    });
    let dual = b.dual_clip == 0.0 || b.objective == LlmObjective::Ppo;
    problems.check(dual, "llm.dual_clip", || {
        "belongs to llm.objective = \"ppo\": set it to 0".to_owned()
    });
    problems.check(b.cispo_max.is_finite() && b.cispo_max > 0.0, "llm.cispo_max", || {
        format!("is {}; it must be above 0", b.cispo_max)
    });
    let cap = b.importance_cap;
    problems.check(cap == 0.0 || (cap.is_finite() && cap >= 1.0), "llm.importance_cap", || {
        format!("is {cap}; use 0 (off) or 1 and more, usually 2")
    });
    divergence("llm.kl", b.kl, problems);
    problems.check(b.kl > 0.0 || !b.kl_straight_through, "llm.kl_straight_through", || {
        "is set, but llm.kl is 0, so there is nothing to pass through: raise llm.kl or take it out"
            .to_owned()
    });
    let length =
        if b.aggregation_length == 0 { raw.rollout.max_new_tokens } else { b.aggregation_length };
    Llm {
        branch: Branch { optimizer, lora },
        objective: b.objective,
        clip_low: b.clip_low,
        clip_high: b.clip_high,
        dual_clip: (b.dual_clip > 0.0).then_some(b.dual_clip),
        cispo_max: b.cispo_max,
        aggregation: b.aggregation,
        aggregation_length: length,
        kl: b.kl,
        kl_estimator: b.kl_estimator,
        kl_straight_through: b.kl_straight_through,
        importance_cap: (cap > 0.0).then_some(cap),
    }
}

/// `[dit]`
pub(super) fn dit(raw: &Raw, trained: Trained, problems: &mut Problems) -> Dit {
    let b = &raw.dit;
    let optimizer =
        Optimizer { lr: b.lr, betas: b.betas, eps: b.eps, weight_decay: b.weight_decay };
    let lora = adapter("dit", b.train, b.lora.as_ref(), problems);
    self::optimizer("dit", &optimizer, trained.dit, problems);
    problems.check(b.clip_range > 0.0 && b.clip_range < 1.0, "dit.clip_range", || {
        format!("is {}; it must lie between 0 and 1 (1e-4 is usual: ratios are means over all latent dimensions)", b.clip_range)
    });
    let dppo =
        b.objective != DitObjective::Dppo || (b.dppo_limit.is_finite() && b.dppo_limit > 0.0);
    problems.check(dppo, "dit.dppo_limit", || {
        format!("is {}; it must be above 0 (1e-5 is usual)", b.dppo_limit)
    });
    problems.check(b.adv_clip.is_finite() && b.adv_clip > 0.0, "dit.adv_clip", || {
        format!("is {}; it must be above 0", b.adv_clip)
    });
    divergence("dit.kl", b.kl, problems);
    let nft_old = b.nft_old == NftOld::Trained || b.objective == DitObjective::Nft;
    problems.check(nft_old, "dit.nft_old", || {
        "belongs to dit.objective = \"nft\": set that or take it out".to_owned()
    });
    let steps = raw.rollout.steps;
    let nft_times = if b.nft_times == 0 { steps.saturating_sub(1).max(1) } else { b.nft_times };
    if b.objective == DitObjective::Nft {
        nft(raw, problems);
    }
    Dit {
        branch: Branch { optimizer, lora },
        objective: b.objective,
        clip_range: b.clip_range,
        dppo_limit: b.dppo_limit,
        nft_beta: b.nft_beta,
        nft_times,
        nft_old: b.nft_old,
        adv_clip: b.adv_clip,
        kl: b.kl,
        kl_kind: b.kl_kind,
    }
}

/// What `dit.objective = "nft"` asks of other sections.
fn nft(raw: &Raw, problems: &mut Problems) {
    let (b, r) = (&raw.dit, &raw.rollout);
    problems.check(b.nft_beta.is_finite() && b.nft_beta > 0.0, "dit.nft_beta", || {
        format!("is {}; it must be above 0 (1 and 0.1 are usual)", b.nft_beta)
    });
    problems.check(b.nft_times <= r.steps, "dit.nft_times", || {
        format!("is {}, but rollout.steps is {}; lower it", b.nft_times, r.steps)
    });
    problems.check(r.guidance_scale == 1.0, "rollout.guidance_scale", || {
        format!(
            "is {}; dit.objective = \"nft\" regresses the velocity itself, so use 1 (no guidance)",
            r.guidance_scale
        )
    });
    problems.check(r.lag == 0, "rollout.lag", || {
        format!(
            "is {}; dit.objective = \"nft\" measures from the policy that sampled, which must be the \
             one that is trained: use 0",
            r.lag
        )
    });
    problems.check(b.kl_kind == DitKl::Exact, "dit.kl_kind", || {
        "belongs to objectives with a window; dit.objective = \"nft\" has a penalty of its own: take \
         it out"
            .to_owned()
    });
}

fn divergence(key: &str, weight: f64, problems: &mut Problems) {
    problems.check(weight.is_finite() && weight >= 0.0, key, || {
        format!("is {weight}; it must be 0 (off) or more")
    });
}

fn optimizer(branch: &str, o: &Optimizer, trained: bool, problems: &mut Problems) {
    let key = |name: &str| format!("{branch}.{name}");
    problems.check(!trained || (o.lr.is_finite() && o.lr > 0.0), &key("lr"), || {
        format!(
            "is {}; it must be above 0 (close the branch with schedule.kind = \"weights\", \
             {branch}_weight = 0 instead)",
            o.lr
        )
    });
    problems.check(o.betas.iter().all(|beta| (0.0..1.0).contains(beta)), &key("betas"), || {
        format!("are {:?}; each must be 0 or more and below 1", o.betas)
    });
    problems.check(o.eps.is_finite() && o.eps > 0.0, &key("eps"), || {
        format!("is {}; it must be above 0", o.eps)
    });
    problems.check(
        o.weight_decay.is_finite() && o.weight_decay >= 0.0,
        &key("weight_decay"),
        || format!("is {}; it must be 0 or more", o.weight_decay),
    );
}

/// The adapter that is trained, if one is.
fn adapter(
    branch: &str,
    train: Option<Train>,
    lora: Option<&Lora>,
    problems: &mut Problems,
) -> Option<Lora> {
    let section = format!("{branch}.lora");
    let Some(lora) = lora else {
        problems.check(train != Some(Train::Lora), &section, || {
            format!("is missing: {branch}.train = \"lora\" needs rank, alpha and targets")
        });
        return None;
    };
    problems.check((1..=4096).contains(&lora.rank), &format!("{section}.rank"), || {
        format!("is {}; use 1 to 4096", lora.rank)
    });
    problems.check(lora.alpha.is_finite() && lora.alpha > 0.0, &format!("{section}.alpha"), || {
        format!("is {}; it must be above 0 (twice the rank is usual)", lora.alpha)
    });
    let named = !lora.targets.is_empty() && lora.targets.iter().all(|target| !target.is_empty());
    problems.check(named, &format!("{section}.targets"), || {
        "must name at least one layer, such as \"attn.to_q\"".to_owned()
    });
    (train != Some(Train::Full)).then(|| lora.clone())
}
