//! Scorers, mixes and what missing scores do.

use super::Trained;
use crate::error::{Problems, did_you_mean};
use crate::raw::{Failure, Overlong as RawOverlong, Raw};
use crate::sections::{COMPONENTS, Reward, Scorer};
use duet_core::reward::{FailurePolicy, Mix, Overlong, RewardSpec, TraceShape};
use std::collections::BTreeSet;

/// `[reward]`
pub(super) fn reward(raw: &Raw, trained: Trained, problems: &mut Problems) -> Option<Reward> {
    let r = &raw.reward;
    let known = components(raw, problems);
    let default = RewardSpec::default();
    let llm = r.llm.clone().unwrap_or(default.llm);
    let dit = r.dit.clone().unwrap_or(default.dit);
    for (branch, weights, trained) in [("llm", &llm, trained.llm), ("dit", &dit, trained.dit)] {
        mix(branch, weights, trained, &known, problems);
    }
    let failure = failure(raw, problems)?;
    Some(Reward {
        scorers: r.scorers.clone(),
        http: r.http.clone(),
        timeout_ms: r.timeout_ms,
        llm,
        dit,
        failure,
        shape: shape(raw, problems),
    })
}

/// What the form of an answer does.
fn shape(raw: &Raw, problems: &mut Problems) -> TraceShape {
    let (r, max) = (&raw.reward, raw.rollout.max_new_tokens);
    let penalty = r.overlong == RawOverlong::Penalty;
    for (key, given) in [
        ("reward.overlong_soft", r.overlong_soft.is_some()),
        ("reward.overlong_weight", r.overlong_weight.is_some()),
    ] {
        problems.check(!given || penalty, key, || {
            "belongs to reward.overlong = \"penalty\": take it out".to_owned()
        });
    }
    problems.check(!penalty || r.overlong_soft.is_some(), "reward.overlong_soft", || {
        "must be given for reward.overlong = \"penalty\"".to_owned()
    });
    let soft = r.overlong_soft.unwrap_or(1);
    problems.check((1..=max.max(1)).contains(&soft), "reward.overlong_soft", || {
        format!("is {soft}; rollout.max_new_tokens is {max}, so use 1 to {max}")
    });
    let weight = r.overlong_weight.unwrap_or(1.0);
    for (key, value) in
        [("reward.overlong_weight", weight), ("reward.format_penalty", r.format_penalty)]
    {
        problems.check(value.is_finite() && value >= 0.0, key, || {
            format!("is {value}; it must be 0 or more")
        });
    }
    let overlong = match r.overlong {
        RawOverlong::Keep => Overlong::Keep,
        RawOverlong::Mask => Overlong::Mask,
        RawOverlong::Penalty => Overlong::Penalty { soft, max, weight },
    };
    TraceShape { overlong, format_penalty: r.format_penalty }
}

/// What the scorers give.
fn components(raw: &Raw, problems: &mut Problems) -> BTreeSet<String> {
    let r = &raw.reward;
    problems.check(!r.scorers.is_empty(), "reward.scorers", || {
        "is empty; name at least one, such as \"miniworld\"".to_owned()
    });
    let distinct: BTreeSet<_> = r.scorers.iter().collect();
    problems.check(distinct.len() == r.scorers.len(), "reward.scorers", || {
        "names a scorer twice; name each once".to_owned()
    });
    let mut known = BTreeSet::new();
    if r.scorers.contains(&Scorer::Miniworld) {
        known.extend(COMPONENTS.map(str::to_owned));
    }
    let http = r.scorers.contains(&Scorer::Http);
    match &r.http {
        None => problems.check(!http, "reward.http", || {
            "is missing: scorer \"http\" needs reward.http.url and reward.http.components"
                .to_owned()
        }),
        Some(server) => {
            problems.check(http, "reward.http", || {
                "is given, but reward.scorers does not name \"http\": name it or take the table out"
                    .to_owned()
            });
            let web = server.url.starts_with("http://") || server.url.starts_with("https://");
            problems.check(web, "reward.http.url", || {
                "must begin with `http://` or `https://`".to_owned()
            });
            problems.check(!server.components.is_empty(), "reward.http.components", || {
                "is empty; name what the server gives for each image".to_owned()
            });
            for component in &server.refined {
                let given = server.components.contains(component);
                problems.check(given, "reward.http.refined", || {
                    format!("`{component}` is not one of reward.http.components: add it there")
                });
            }
            for component in &server.components {
                let new = known.insert(component.clone());
                problems.check(new, "reward.http.components", || {
                    format!("`{component}` comes from two scorers; rename one")
                });
            }
        }
    }
    known
}

fn mix(branch: &str, mix: &Mix, trained: bool, known: &BTreeSet<String>, problems: &mut Problems) {
    let section = format!("reward.{branch}");
    for (component, weight) in mix {
        let key = format!("{section}.{component}");
        problems.check(known.contains(component), &key, || {
            let hint = did_you_mean(component, known.iter().map(String::as_str));
            let list: Vec<&str> = known.iter().map(String::as_str).collect();
            format!("no scorer gives `{component}`{hint} (they give {})", list.join(", "))
        });
        problems.check(weight.is_finite(), &key, || format!("is {weight}; weights are finite"));
    }
    problems.check(!trained || mix.values().any(|weight| *weight != 0.0), &section, || {
        format!(
            "has no component with a weight other than 0, so every reward would be the same; give \
             one, such as semantic = 1.0, or close the branch (schedule.kind = \"weights\", \
             {branch}_weight = 0)"
        )
    });
}

fn failure(raw: &Raw, problems: &mut Problems) -> Option<FailurePolicy> {
    let (r, images) = (&raw.reward, raw.rollout.images_per_trace);
    match (r.failure, r.at_least) {
        (Failure::AtLeast, None) => {
            problems.add("reward.at_least", "must be given for reward.failure = \"at-least\"");
            None
        }
        (Failure::AtLeast, Some(n)) => {
            problems.check((1..=images.max(1)).contains(&n), "reward.at_least", || {
                format!("is {n}; a trace has {images} images, so use 1 to {images}")
            });
            Some(FailurePolicy::AtLeast(n))
        }
        (_, Some(_)) => {
            problems.add(
                "reward.at_least",
                "belongs to reward.failure = \"at-least\": set that or take it out",
            );
            None
        }
        (Failure::RequireAll, None) => Some(FailurePolicy::RequireAll),
        (Failure::DropTree, None) => Some(FailurePolicy::DropTree),
    }
}
