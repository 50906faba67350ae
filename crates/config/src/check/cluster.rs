//! Run, model, processes and connections.

use crate::error::Problems;
use crate::raw::Raw;
use crate::sections::{Collective, Device};
use std::net::SocketAddr;

/// `[run]`
pub(super) fn run(raw: &Raw, problems: &mut Problems) {
    let name = &raw.run.name;
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let fine = !name.is_empty()
        && name.len() <= 64
        && name.chars().all(plain)
        && !name.starts_with(['.', '-']);
    problems.check(fine, "run.name", || {
        format!(
            "`{}` names a folder: use letters, digits, `-`, `_` and `.`, at most 64, the first a \
             letter or digit",
            name.chars().take(80).collect::<String>()
        )
    });
    problems.check(raw.run.iterations >= 1, "run.iterations", || {
        "is 0; there must be at least one iteration".to_owned()
    });
    problems.check(i64::try_from(raw.run.seed).is_ok(), "run.seed", || {
        "is too large; TOML's integers end at 9223372036854775807".to_owned()
    });
    problems.check(raw.run.store.as_deref() != Some(""), "run.store", || {
        "is empty; give a folder or a URL, or leave it out for `runs/<name>`".to_owned()
    });
    problems.check(raw.checkpoint.every >= 1, "checkpoint.every", || {
        "is 0; write one at least every `run.iterations` iterations".to_owned()
    });
    problems.check(raw.checkpoint.keep >= 1, "checkpoint.keep", || {
        "is 0; at least the newest checkpoint must be kept to resume from".to_owned()
    });
}

/// `[model]`, `[data]`, `[evaluation]`
pub(super) fn model(raw: &Raw, problems: &mut Problems) {
    let none = raw.model.bootstrap.is_none();
    problems.check(!(none && raw.model.path.is_none()), "model.path", || {
        "is missing: give a pipeline folder, or `model.bootstrap = \"demo\"` to make the small \
         world's base model"
            .to_owned()
    });
    problems.check(!(none && raw.data.prompts.is_none()), "data.prompts", || {
        "is missing: give a file with one JSON object a line, {\"prompt\": \"...\"}; only \
         `model.bootstrap` brings prompts of its own"
            .to_owned()
    });
    let empty = |path: &Option<std::path::PathBuf>| {
        path.as_ref().is_some_and(|path| path.as_os_str().is_empty())
    };
    for (key, path) in [
        ("model.path", &raw.model.path),
        ("data.prompts", &raw.data.prompts),
        ("evaluation.prompts", &raw.evaluation.prompts),
        ("rollout.instruction", &raw.rollout.instruction),
    ] {
        problems.check(!empty(path), key, || "is empty; give a path or leave it out".to_owned());
    }
    for (key, value) in [
        ("evaluation.images_per_prompt", raw.evaluation.images_per_prompt),
        ("evaluation.steps", raw.evaluation.steps),
    ] {
        problems.check(value >= 1, key, || "is 0; it must be at least 1".to_owned());
    }
}

/// `[trainer]`, `[workers]`
pub(super) fn trainer(raw: &Raw, problems: &mut Problems) {
    let (trainer, prompts) = (&raw.trainer, raw.rollout.prompts_per_iteration);
    problems.check(trainer.world_size >= 1, "trainer.world_size", || {
        "is 0; somebody must train".to_owned()
    });
    problems.check(trainer.world_size <= prompts.max(1), "trainer.world_size", || {
        format!(
            "is {}, but rollout.prompts_per_iteration is {prompts}: trees are not cut, so each rank \
             needs at least one; lower it or raise rollout.prompts_per_iteration",
            trainer.world_size
        )
    });
    if let Some(least) = trainer.min_world_size {
        problems.check((1..=trainer.world_size).contains(&least), "trainer.min_world_size", || {
            format!(
                "is {least}; use 1 to trainer.world_size, which is {}, or leave it out",
                trainer.world_size
            )
        });
    }
    problems.check(
        trainer.max_grad_norm.is_finite() && trainer.max_grad_norm > 0.0,
        "trainer.max_grad_norm",
        || format!("is {}; it must be above 0 (1e9 is as good as none)", trainer.max_grad_norm),
    );
    let updates = trainer.updates_per_rollout;
    problems.check((1..=64).contains(&updates), "trainer.updates_per_rollout", || {
        format!("is {updates}; use 1 to 64")
    });
    problems.check((0.0..1.0).contains(&trainer.ema), "trainer.ema", || {
        format!("is {}; use 0 (none) or a decay below 1, such as 0.9", trainer.ema)
    });
    problems.check(trainer.zero <= 2, "trainer.zero", || {
        format!(
            "is {}; use 0 (every rank holds all), 1 (the optimiser's state is shared out) or 2 \
             (gradients too)",
            trainer.zero
        )
    });
    let nccl = trainer.collective == Collective::Nccl;
    problems.check(!nccl || raw.workers.device == Device::Cuda, "trainer.collective", || {
        "is `nccl`, which needs GPUs, but workers.device is `cpu`; use `auto` or `gloo`".to_owned()
    });
    problems
        .check(trainer.bucket_mib >= 1, "trainer.bucket_mib", || "is 0; use at least 1".to_owned());
    for (key, count) in
        [("workers.rollout", raw.workers.rollout), ("workers.reward", raw.workers.reward)]
    {
        problems.check(count <= 256, key, || {
            format!("is {count}; at most 256 are started on one machine")
        });
    }
    problems.check((1..=1024).contains(&raw.workers.threads), "workers.threads", || {
        format!("is {}; use 1 to 1024", raw.workers.threads)
    });
}

/// `[coordinator]`
pub(super) fn coordinator(raw: &Raw, problems: &mut Problems) {
    let c = &raw.coordinator;
    let times = [
        ("coordinator.heartbeat_ms", c.heartbeat_ms),
        ("coordinator.reconnect_ms", c.reconnect_ms),
        ("coordinator.poll_ms", c.poll_ms),
        ("coordinator.think_ms", c.think_ms),
        ("coordinator.render_ms", c.render_ms),
        ("coordinator.score_ms", c.score_ms),
        ("coordinator.step_ms", c.step_ms),
        ("coordinator.rendezvous_ms", c.rendezvous_ms),
        ("coordinator.backoff_ms", c.backoff_ms),
        ("coordinator.stop_ms", c.stop_ms),
        ("trainer.collective_timeout_ms", raw.trainer.collective_timeout_ms),
        ("reward.timeout_ms", raw.reward.timeout_ms),
    ];
    for (key, time) in times {
        problems.check((1..=604_800_000).contains(&time), key, || {
            format!("is {time}; use 1 to 604800000 (a week), in milliseconds")
        });
    }
    problems.check(
        c.heartbeat_timeout_ms >= c.heartbeat_ms.saturating_mul(3),
        "coordinator.heartbeat_timeout_ms",
        || {
            format!(
                "is {}, less than three heartbeats of {} ms: one lost message would lose a worker; \
                 raise it or lower coordinator.heartbeat_ms",
                c.heartbeat_timeout_ms, c.heartbeat_ms
            )
        },
    );
    problems.check(c.backoff_max_ms >= c.backoff_ms, "coordinator.backoff_max_ms", || {
        format!("is {}, less than coordinator.backoff_ms ({})", c.backoff_max_ms, c.backoff_ms)
    });
    problems.check(raw.reward.timeout_ms < c.score_ms, "reward.timeout_ms", || {
        format!(
            "is {}, not less than coordinator.score_ms ({}): the lease would end before the scorer \
             could be called late",
            raw.reward.timeout_ms, c.score_ms
        )
    });
    for (key, count) in [
        ("coordinator.requests_per_second", c.requests_per_second),
        ("coordinator.max_connections", c.max_connections),
    ] {
        problems.check((1..=1_000_000).contains(&count), key, || {
            format!("is {count}; use 1 to 1000000")
        });
    }
    problems.check(c.max_attempts >= 1, "coordinator.max_attempts", || {
        "is 0; every unit needs at least one try".to_owned()
    });
    problems.check(c.quarantine_after >= 1, "coordinator.quarantine_after", || {
        "is 0; no worker would ever get work".to_owned()
    });
    listen(raw, problems);
}

fn listen(raw: &Raw, problems: &mut Problems) {
    let listen = &raw.coordinator.listen;
    let Ok(address) = listen.parse::<SocketAddr>() else {
        let example = "127.0.0.1:7400";
        problems.add(
            "coordinator.listen",
            format!(
                "`{listen}` is no address and port; write one like `{example}` or `0.0.0.0:7400`"
            ),
        );
        return;
    };
    let safe = address.ip().is_loopback()
        || raw.security.tls("coordinator").is_some()
        || raw.security.allow_plaintext;
    problems.check(safe, "coordinator.listen", || {
        format!(
            "`{listen}` can be reached from other machines, but there is no TLS: set security.ca, \
             security.certificate and security.key (docs/security.md; `duet certs` makes them), listen on 127.0.0.1, \
             or set security.allow_plaintext = true on a network that you trust"
        )
    });
}

/// `[security]`
pub(super) fn security(raw: &Raw, problems: &mut Problems) {
    let s = &raw.security;
    let files = [("ca", &s.ca), ("certificate", &s.certificate), ("key", &s.key)];
    let given = files.iter().filter(|(_, file)| file.is_some()).count();
    if given == 0 || given == files.len() {
        return;
    }
    for (name, _) in files.iter().filter(|(_, file)| file.is_none()) {
        problems.add(
            format!("security.{name}"),
            "is missing: TLS needs security.ca, security.certificate and security.key together",
        );
    }
}
