//! Blows against a run under `duet launch`, which starts again what dies.

use super::{Scenario, Skip, World, failures, segments, status};
use crate::signals::{self, Kind};
use crate::wait_until;
use serde_json::Value;
use std::collections::BTreeSet;
use std::process::Child;
use std::time::Duration;

/// How often a moment is looked for that does not last.
const MOMENT: Duration = Duration::from_millis(1);

fn always(_: &Value) -> bool {
    true
}

fn regrouped(audit: &Value) -> bool {
    audit["trainer_groups"].as_u64() >= Some(2)
}

fn taken_over(audit: &Value) -> bool {
    audit["coordinators"].as_u64() >= Some(2)
}

pub(super) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "kill-rollout",
        what: "SIGKILL of a rollout worker",
        attack: |world| kill(world, "rollout-0"),
        felt: always,
    },
    Scenario {
        name: "kill-reward",
        what: "SIGKILL of the reward worker",
        attack: |world| kill(world, "reward-0"),
        felt: always,
    },
    Scenario {
        name: "kill-rank-0",
        what: "SIGKILL of trainer rank 0",
        attack: |world| kill(world, "trainer-0"),
        felt: regrouped,
    },
    Scenario {
        name: "kill-rank-1",
        what: "SIGKILL of trainer rank 1",
        attack: |world| kill(world, "trainer-1"),
        felt: regrouped,
    },
    Scenario {
        name: "kill-two",
        what: "SIGKILL of a rollout worker and the reward worker at once",
        attack: |world| kill_at_once(world, &["rollout-0", "reward-0"]),
        felt: always,
    },
    Scenario {
        name: "kill-rank-and-rollout",
        what: "SIGKILL of trainer rank 0 and a rollout worker at once",
        attack: |world| kill_at_once(world, &["trainer-0", "rollout-1"]),
        felt: regrouped,
    },
    Scenario {
        name: "kill-coordinator",
        what: "SIGKILL of the coordinator",
        attack: |world| kill(world, "coordinator"),
        felt: taken_over,
    },
    Scenario {
        name: "kill-coordinator-twice",
        what: "SIGKILL of the coordinator, and of its successor",
        attack: kill_twice,
        felt: |audit| audit["coordinators"].as_u64() >= Some(3),
    },
    Scenario {
        name: "kill-in-checkpoint",
        what: "SIGKILL of the coordinator between a checkpoint's shards and its manifest",
        attack: kill_in_checkpoint,
        felt: taken_over,
    },
    Scenario {
        name: "kill-all",
        what: "SIGKILL of the whole job, then --resume",
        attack: kill_all,
        felt: taken_over,
    },
    Scenario {
        name: "freeze-rollout",
        what: "SIGSTOP of a rollout worker until it is given up, then SIGCONT",
        attack: |world| freeze(world, "rollout-1"),
        felt: always,
    },
    Scenario {
        name: "freeze-rank",
        what: "SIGSTOP of a trainer rank until it is given up, then SIGCONT",
        attack: |world| freeze(world, "trainer-1"),
        felt: regrouped,
    },
    Scenario {
        name: "term-rollout",
        what: "SIGTERM of a rollout worker: it leaves in order, the other goes on",
        attack: term_rollout,
        felt: |audit| audit["lost"] == 0,
    },
    Scenario {
        name: "term-coordinator",
        what: "SIGTERM of the coordinator: checkpoint, exit 0; then --resume",
        attack: term_coordinator,
        felt: taken_over,
    },
    Scenario {
        name: "stop-then-kill",
        what: "`duet stop`, SIGKILL of the coordinator: its successor stops; then --resume",
        attack: stop_then_kill,
        felt: |audit| audit["coordinators"].as_u64() >= Some(3),
    },
];

fn kill(world: &World, name: &str) -> Result<String, Skip> {
    kill_at_once(world, &[name])
}

fn kill_at_once(world: &World, names: &[&str]) -> Result<String, Skip> {
    let mut launcher = world.run.start();
    let at = ready(world, &mut launcher, names);
    for name in names {
        signals::send(&world.run.store, name, Kind::SIGKILL);
    }
    world.finish(launcher);
    Ok(format!("at segment {at}"))
}

/// Waits until these have something to lose: a trainer its group, a worker a lease.
fn ready(world: &World, launcher: &mut Child, names: &[&str]) -> u64 {
    let mut at = world.wait(launcher, 0);
    if names.iter().any(|name| name.starts_with("trainer")) {
        at = world.wait_for_group(launcher);
    }
    if let Some(name) = names.iter().find(|name| name.starts_with("r")) {
        at = world.wait_for_lease(launcher, name);
    }
    at
}

/// The coordinator is stopped whenever a checkpoint is seen, and killed if that has no manifest yet.
fn kill_in_checkpoint(world: &World) -> Result<String, Skip> {
    let mut launcher = world.run.start();
    world.wait_for_segment(&mut launcher, 1);
    let mut seen = BTreeSet::new();
    let folder = world.run.store.join("checkpoints");
    let step = loop {
        assert!(launcher.try_wait().expect("a status").is_none(), "{}", world.run.log());
        let steps = std::fs::read_dir(&folder).into_iter().flatten().flatten();
        let Some(step) = steps.map(|s| s.path()).find(|step| !seen.contains(step)) else {
            std::thread::sleep(MOMENT);
            continue;
        };
        let pid = signals::send(&world.run.store, "coordinator", Kind::SIGSTOP);
        if !step.join("manifest.json").exists() {
            signals::send_to(pid as u32, Kind::SIGKILL);
            break step;
        }
        signals::send_to(pid as u32, Kind::SIGCONT);
        seen.insert(step);
    };
    world.finish(launcher);
    Ok(format!("in {}", step.file_name().unwrap_or_default().to_string_lossy()))
}

fn kill_twice(world: &World) -> Result<String, Skip> {
    let mut launcher = world.run.start();
    let first = world.wait(&mut launcher, 0);
    let pid = signals::send(&world.run.store, "coordinator", Kind::SIGKILL);
    wait_until("a successor", || {
        signals::find(&world.run.store, "coordinator").is_some_and(|now| now != pid)
    });
    let second = world.wait(&mut launcher, 1);
    signals::send(&world.run.store, "coordinator", Kind::SIGKILL);
    world.finish(launcher);
    Ok(format!("at segments {first} and {second}"))
}

fn kill_all(world: &World) -> Result<String, Skip> {
    let mut launcher = world.run.start();
    let at = world.wait(&mut launcher, 0);
    for name in crate::fleet::WORKERS.iter().chain(&["coordinator"]) {
        signals::send(&world.run.store, name, Kind::SIGKILL);
    }
    launcher.kill().expect("SIGKILL");
    launcher.wait().expect("its end");
    world.finish(world.run.begin(true));
    Ok(format!("at segment {at}"))
}

fn freeze(world: &World, name: &str) -> Result<String, Skip> {
    let mut launcher = world.run.start();
    let at = ready(world, &mut launcher, &[name]);
    let pid = signals::send(&world.run.store, name, Kind::SIGSTOP);
    wait_until(&format!("{name} to be given up"), || {
        assert!(launcher.try_wait().expect("a status").is_none(), "{}", world.run.log());
        failures(status(&world.place()), "worker-lost") > 0
    });
    let until = segments(&world.run);
    signals::send_to(pid as u32, Kind::SIGCONT);
    world.finish(launcher);
    Ok(format!("segments {at} to {until}"))
}

fn term_rollout(world: &World) -> Result<String, Skip> {
    let mut launcher = world.run.start();
    let at = world.wait(&mut launcher, 0);
    signals::send(&world.run.store, "rollout-0", Kind::SIGTERM);
    world.finish(launcher);
    let again = world.run.log().contains("starting it again");
    assert!(!again, "it did not leave with exit code 0: {}", world.run.log());
    Ok(format!("at segment {at}"))
}

fn term_coordinator(world: &World) -> Result<String, Skip> {
    let mut launcher = world.run.start();
    let at = world.wait(&mut launcher, 0);
    signals::send(&world.run.store, "coordinator", Kind::SIGTERM);
    world.finish(launcher);
    let audit = super::audit(&world.run);
    let (version, saved) = (audit["version"].as_u64(), world.run.newest_checkpoint());
    assert!(saved == version || version == Some(0), "version {version:?}, checkpoint {saved:?}");
    world.finish(world.run.begin(true));
    Ok(format!("at segment {at}; checkpoint of version {}", saved.unwrap_or(0)))
}

fn stop_then_kill(world: &World) -> Result<String, Skip> {
    let mut launcher = world.run.start();
    let at = world.wait(&mut launcher, 0);
    let told = world.run.program("duet").arg("stop").arg(&world.run.store).output();
    assert!(told.expect("duet starts").status.success());
    signals::send(&world.run.store, "coordinator", Kind::SIGKILL);
    world.finish(launcher);
    let stopped_at = super::audit(&world.run)["version"].as_u64();
    world.finish(world.run.begin(true));
    Ok(format!("at segment {at}; stopped at version {}", stopped_at.unwrap_or(0)))
}
