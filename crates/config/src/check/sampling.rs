//! Rollout, window and schedule.

use super::Trained;
use crate::error::Problems;
use crate::raw::{Raw, ScheduleKind, Window, WindowKind};
use crate::sections::{DitObjective, Sampler};
use duet_core::advantage::GroupKey;
use duet_core::schedule::{CurvePoint, Schedule, WindowSpec};

/// `[rollout]`
pub(super) fn rollout(raw: &Raw, trained: Trained, problems: &mut Problems) {
    let r = &raw.rollout;
    let counts = [
        ("rollout.prompts_per_iteration", r.prompts_per_iteration, 65_536),
        ("rollout.traces", r.traces, 1_024),
        ("rollout.images_per_trace", r.images_per_trace, 1_024),
        ("rollout.steps", r.steps, 1_000),
        ("rollout.max_new_tokens", r.max_new_tokens, 131_072),
    ];
    for (key, value, most) in counts {
        problems.check((1..=most).contains(&value), key, || format!("is {value}; use 1 to {most}"));
    }
    groups(raw, trained, problems);
    for (key, pixels) in [("rollout.width", r.width), ("rollout.height", r.height)] {
        problems.check((16..=8192).contains(&pixels) && pixels % 16 == 0, key, || {
            let near = (pixels.clamp(16, 8192) / 16) * 16;
            format!("is {pixels}; images are cut into tokens of 16 pixels: use {near}, for example")
        });
    }
    problems.check(r.temperature.is_finite() && r.temperature > 0.0, "rollout.temperature", || {
        format!(
            "is {}; it must be above 0, since a policy that cannot vary cannot learn from comparison",
            r.temperature
        )
    });
    let guidance = r.guidance_scale;
    problems.check(guidance.is_finite() && guidance >= 1.0, "rollout.guidance_scale", || {
        format!("is {guidance}; use 1 (no guidance) or more")
    });
    problems.check(r.lag < raw.run.iterations.max(1), "rollout.lag", || {
        format!("is {}, but there are only {} iterations; lower it", r.lag, raw.run.iterations)
    });
    if trained.dit && raw.dit.objective != DitObjective::Nft {
        noise(raw, problems);
    }
    problems.check(r.extra_prompts <= 65_536, "rollout.extra_prompts", || {
        format!("is {}; use at most 65536", r.extra_prompts)
    });
}

/// Groups that have somebody to be compared with.
fn groups(raw: &Raw, trained: Trained, problems: &mut Problems) {
    let r = &raw.rollout;
    problems.check(!trained.llm || r.traces != 1, "rollout.traces", || {
        "is 1, but the schedule trains the LLM: a single trace has nothing to be compared with, so \
         its advantage is always zero; use 2 or more, or close the branch \
         (schedule.kind = \"weights\", llm_weight = 0)"
            .to_owned()
    });
    let alone = match raw.advantage.dit.group {
        GroupKey::Trace => r.images_per_trace == 1,
        GroupKey::Tree => r.images_per_trace == 1 && r.traces == 1,
    };
    problems.check(!(trained.dit && alone), "rollout.images_per_trace", || {
        "is 1, but the schedule trains the DiT: a single image has nothing to be compared with, so \
         its advantage is always zero; use 2 or more, compare over the whole tree \
         (advantage.dit.group = \"tree\"), or close the branch (schedule.kind = \"weights\", \
         dit_weight = 0)"
            .to_owned()
    });
}

fn noise(raw: &Raw, problems: &mut Problems) {
    let a = raw.rollout.noise_level;
    problems.check(a.is_finite() && a > 0.0, "rollout.noise_level", || {
        format!(
            "is {a}, but the schedule trains the DiT: without noise the window's steps have no \
             log-probability; use 1.2 for flow-grpo, 0.8 for cps, 0.3 for dance"
        )
    });
    let cps = raw.rollout.sampler == Sampler::Cps;
    problems.check(!(cps && a > 1.0), "rollout.noise_level", || {
        format!("is {a}; sampler cps takes the share of noise that is renewed: at most 1")
    });
}

/// `[schedule]`
pub(super) fn schedule(raw: &Raw, problems: &mut Problems) -> Option<Schedule> {
    let s = &raw.schedule;
    let keys = [
        ("switch_at", s.switch_at.is_some(), ScheduleKind::Staged),
        ("llm_iterations", s.llm_iterations.is_some(), ScheduleKind::Alternating),
        ("dit_iterations", s.dit_iterations.is_some(), ScheduleKind::Alternating),
        ("llm_weight", s.llm_weight.is_some(), ScheduleKind::Weights),
        ("dit_weight", s.dit_weight.is_some(), ScheduleKind::Weights),
        ("patience", s.patience.is_some(), ScheduleKind::Plateau),
        ("at_most", s.at_most.is_some(), ScheduleKind::Plateau),
        ("points", s.points.is_some(), ScheduleKind::Curve),
        ("min_delta", s.min_delta.is_some(), ScheduleKind::Plateau),
        ("smooth", s.smooth.is_some(), ScheduleKind::Plateau),
    ];
    let mut complete = true;
    for (key, given, kind) in keys {
        let optional = matches!(key, "min_delta" | "smooth");
        let key = format!("schedule.{key}");
        problems.check(!given || kind == s.kind, &key, || {
            let (own, mine) = (kind.as_str(), s.kind.as_str());
            format!("belongs to schedule.kind = \"{own}\", but the kind is \"{mine}\": take it out")
        });
        let given = given || optional;
        problems.check(given || kind != s.kind, &key, || {
            format!("must be given for schedule.kind = \"{}\"", kind.as_str())
        });
        complete &= given || kind != s.kind;
    }
    if !complete {
        return None;
    }
    match s.kind {
        ScheduleKind::Balanced => Some(Schedule::Balanced),
        ScheduleKind::Staged => {
            let (switch_at, last) = (s.switch_at?, raw.run.iterations);
            problems.check((1..last.max(2)).contains(&switch_at), "schedule.switch_at", || {
                format!(
                    "is {switch_at}, but there are {last} iterations: one of the two phases would \
                     never come; use 1 to {}",
                    last.saturating_sub(1).max(1)
                )
            });
            Some(Schedule::Staged { switch_at })
        }
        ScheduleKind::Plateau => Some(plateau(raw, problems)?),
        ScheduleKind::Curve => Some(curve(s.points.as_deref()?, problems)),
        ScheduleKind::Alternating => {
            let (llm, dit) = (s.llm_iterations?, s.dit_iterations?);
            for (key, turn) in [("llm_iterations", llm), ("dit_iterations", dit)] {
                problems.check((1..=1_000_000).contains(&turn), &format!("schedule.{key}"), || {
                    format!("is {turn}; a turn has 1 to 1000000 iterations")
                });
            }
            Some(Schedule::Alternating { llm, dit })
        }
        ScheduleKind::Weights => {
            let (llm, dit) = (s.llm_weight?, s.dit_weight?);
            for (key, weight) in [("llm_weight", llm), ("dit_weight", dit)] {
                problems.check(
                    weight.is_finite() && weight >= 0.0,
                    &format!("schedule.{key}"),
                    || format!("is {weight}; it must be 0 (closed) or more"),
                );
            }
            problems.check(llm > 0.0 || dit > 0.0, "schedule.llm_weight", || {
                "and schedule.dit_weight are both 0: nothing would be trained; open one".to_owned()
            });
            Some(Schedule::Weights { llm, dit })
        }
    }
}

fn plateau(raw: &Raw, problems: &mut Problems) -> Option<Schedule> {
    let (s, last) = (&raw.schedule, raw.run.iterations);
    let (patience, at_most) = (s.patience?, s.at_most?);
    let (min_delta, smooth) = (s.min_delta.unwrap_or(0.0), s.smooth.unwrap_or(5));
    for (key, value) in [("schedule.patience", patience), ("schedule.smooth", smooth)] {
        problems.check(value >= 1, key, || "is 0; use 1 or more".to_owned());
    }
    problems.check(min_delta.is_finite() && min_delta >= 0.0, "schedule.min_delta", || {
        format!("is {min_delta}; it must be 0 or more")
    });
    problems.check((1..last.max(2)).contains(&at_most), "schedule.at_most", || {
        let most = last.saturating_sub(1).max(1);
        format!(
            "is {at_most}, but there are {last} iterations: the DiT phase might never come; use 1 to \
             {most}"
        )
    });
    Some(Schedule::Plateau { patience, min_delta, smooth, at_most })
}

fn curve(points: &[(u32, f64, f64)], problems: &mut Problems) -> Schedule {
    let key = "schedule.points";
    problems.check(!points.is_empty(), key, || {
        "is empty; give at least one point, such as [0, 0.5, 0.5]".to_owned()
    });
    problems.check(points.windows(2).all(|pair| pair[0].0 < pair[1].0), key, || {
        "must have ascending iterations".to_owned()
    });
    let good = |weight: f64| weight.is_finite() && weight >= 0.0;
    problems.check(points.iter().all(|(_, llm, dit)| good(*llm) && good(*dit)), key, || {
        "must have weights of 0 (closed) or more".to_owned()
    });
    problems.check(points.iter().any(|(_, llm, dit)| llm + dit > 0.0), key, || {
        "are all 0: nothing would be trained; open a branch".to_owned()
    });
    let point = |(iteration, llm, dit): &(u32, f64, f64)| CurvePoint {
        iteration: *iteration,
        llm: *llm,
        dit: *dit,
    };
    Schedule::Curve { points: points.iter().map(point).collect() }
}

/// `[window]`
pub(super) fn window(raw: &Raw, trained: Trained, problems: &mut Problems) -> Option<WindowSpec> {
    let (w, steps) = (&raw.window, raw.rollout.steps);
    if raw.dit.objective == DitObjective::Nft {
        problems.check(*w == Window::default(), "window", || {
            "has no meaning for dit.objective = \"nft\", which samples by the plain ODE: take the \
             table out"
                .to_owned()
        });
        return Some(WindowSpec::Fixed { start: 0, len: 0 });
    }
    let keys = [
        ("len", w.len.is_some(), w.kind != WindowKind::All),
        ("start", w.start.is_some(), w.kind == WindowKind::Fixed),
        ("low", w.low.is_some(), w.kind == WindowKind::Random),
        ("high", w.high.is_some(), w.kind == WindowKind::Random),
        ("every", w.every.is_some(), w.kind == WindowKind::Progressive),
        ("stride", w.stride.is_some(), w.kind == WindowKind::Progressive),
    ];
    for (key, given, used) in keys {
        problems.check(!given || used, &format!("window.{key}"), || {
            format!("has no meaning for window.kind = \"{}\": take it out", w.kind.as_str())
        });
    }
    let len = w.len.unwrap_or(2);
    let (start, low) = (w.start.unwrap_or(0), w.low.unwrap_or(0));
    let high = w.high.unwrap_or_else(|| (steps / 2).max(low.saturating_add(len)).min(steps));
    let (every, stride) = (w.every.unwrap_or(25), w.stride.unwrap_or(1));
    let spec = match w.kind {
        WindowKind::Fixed => WindowSpec::Fixed { start, len },
        WindowKind::Random => WindowSpec::Random { len, low, high },
        WindowKind::Progressive => WindowSpec::Progressive { len, every, stride },
        WindowKind::All => WindowSpec::All,
    };
    if !trained.dit {
        return Some(spec);
    }
    problems.check(len >= 1, "window.len", || {
        "is 0, but the schedule trains the DiT: it needs at least one step".to_owned()
    });
    let (end, key) = match w.kind {
        WindowKind::Fixed => (start.saturating_add(len), "window.start"),
        WindowKind::Random => (high, "window.high"),
        WindowKind::Progressive => (len.saturating_add(1), "window.len"),
        WindowKind::All => (steps.saturating_sub(1), "window.kind"),
    };
    problems.check(len <= steps, "window.len", || {
        format!("is {len}, longer than the {steps} steps of rollout.steps; shorten it")
    });
    problems.check(end <= steps, key, || {
        format!("lets the window end at step {end}, but rollout.steps is {steps}; lower it")
    });
    problems.check(w.kind != WindowKind::All || steps >= 2, "window.kind", || {
        "\"all\" leaves out the last step, and rollout.steps is 1: nothing is left; use 2 steps or \
         more"
            .to_owned()
    });
    problems.check(
        w.kind != WindowKind::Random || low.saturating_add(len) <= high,
        "window.high",
        || format!("is {high}, but {len} steps from {low} on do not fit below it; raise it or shorten window.len"),
    );
    for (key, value) in [("window.every", every), ("window.stride", stride)] {
        problems.check(value >= 1, key, || "is 0; use 1 or more".to_owned());
    }
    let last = matches!(w.kind, WindowKind::Fixed | WindowKind::Random) && end >= steps;
    problems.check(!(raw.rollout.sampler == Sampler::Cps && last), key, || {
        format!(
            "lets the window hold the last step, which sampler cps takes without noise and so \
             without log-probability; end it at step {}",
            steps.saturating_sub(1)
        )
    });
    Some(spec)
}
