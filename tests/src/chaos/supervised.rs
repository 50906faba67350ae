//! Blows against a run whose processes the harness supervises, with a proxy or a network namespace
//! between workers and coordinator.

use super::{Scenario, Skip, World, failures, newest, segments, status};
use crate::fleet::{Fleet, WORKERS};
use crate::proxy::Proxy;
use crate::signals::{self, Kind};
use crate::wait_until;
use duet_store::journal::segment_bytes;
use serde_json::Value;
use std::process::Command;
use std::time::Duration;

const ANY_PORT: &str = "127.0.0.1:0";

pub(super) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "coordinator-moves",
        what: "SIGKILL of the coordinator; another takes over at another address",
        attack: coordinator_moves,
        felt: |audit| audit["coordinators"].as_u64() >= Some(2),
    },
    Scenario {
        name: "torn-record",
        what: "SIGKILL of the coordinator while it writes: half a journal record is left",
        attack: torn_record,
        felt: |audit| audit["coordinators"].as_u64() >= Some(2),
    },
    Scenario {
        name: "torn-tables",
        what: "SIGKILL of the coordinator; of its newest tables remain half, zeros and nothing",
        attack: torn_tables,
        felt: |audit| audit["coordinators"].as_u64() >= Some(2),
    },
    Scenario {
        name: "network-cut",
        what: "no worker can reach the coordinator until all are given up",
        attack: network_cut,
        felt: |audit| audit["trainer_groups"].as_u64() >= Some(2),
    },
    Scenario {
        name: "network-slow",
        what: "every message takes 40 ms longer",
        attack: network_slow,
        felt: |_| true,
    },
    Scenario {
        name: "namespace-cut",
        what: "a rollout worker's network namespace is cut off until it is given up",
        attack: namespace_cut,
        felt: |_| true,
    },
    Scenario {
        name: "term-rank",
        what: "SIGTERM of trainer rank 1: it leaves with exit 0; another takes its place",
        attack: term_rank,
        felt: |audit| audit["trainer_groups"].as_u64() >= Some(2),
    },
    Scenario {
        name: "term-reward",
        what: "SIGTERM of the reward worker: it leaves with exit 0; another takes its place",
        attack: term_reward,
        felt: |audit| audit["lost"] == 0,
    },
];

fn reach(world: &World, blow: u64) -> u64 {
    let moment = world.moment(blow);
    wait_until(&format!("journal segment {moment}"), || segments(&world.run) >= moment);
    moment
}

pub(super) fn done(fleet: &mut Fleet) {
    let status = fleet.ended();
    assert!(status.success(), "{status}: {}", fleet.log("coordinator"));
}

fn coordinator_moves(world: &World) -> Result<String, Skip> {
    let mut fleet = Fleet::new(&world.run);
    let first = fleet.coordinator(ANY_PORT, false);
    let proxy = Proxy::start(first);
    WORKERS.iter().for_each(|name| fleet.worker(name, &proxy.url()));
    let at = reach(world, 0);
    fleet.kill_coordinator();
    // The old port is still taken for a moment: another one is sure to be free.
    let second = fleet.coordinator(ANY_PORT, true);
    proxy.lead_to(second);
    done(&mut fleet);
    Ok(format!("at segment {at}"))
}

/// A local write is whole or absent unless the power goes, so what that leaves is put there by hand.
fn torn_record(world: &World) -> Result<String, Skip> {
    let mut fleet = Fleet::new(&world.run);
    let first = fleet.coordinator(ANY_PORT, false);
    let proxy = Proxy::start(first);
    WORKERS.iter().for_each(|name| fleet.worker(name, &proxy.url()));
    reach(world, 0);
    fleet.kill_coordinator();
    let (path, mut bytes, last) = newest(&world.run).expect("a journal");
    // Zeros follow the last segment, into which the next one is written; half of its sectors came.
    let end = bytes.iter().rposition(|byte| *byte != 0).expect("a segment") + 1;
    let whole = segment_bytes(1, last + 1, &[vec![b'x'; 4000]]);
    let half = (end + whole.len() / 2) / 512 * 512 - end;
    bytes.resize(bytes.len().max(end + whole.len()), 0);
    bytes[end..end + half].copy_from_slice(&whole[..half]);
    std::fs::write(path, &bytes).expect("half a record");
    proxy.lead_to(fleet.coordinator(ANY_PORT, true));
    done(&mut fleet);
    Ok(format!("after segment {last}"))
}

/// Tables are synced before the next checkpoint, here the last one; what a loss of power leaves of them is
/// put there by hand.
fn torn_tables(world: &World) -> Result<String, Skip> {
    let run = world.run.with("checkpoint.every=100");
    let mut fleet = Fleet::new(&run);
    let first = fleet.coordinator(ANY_PORT, false);
    let proxy = Proxy::start(first);
    WORKERS.iter().for_each(|name| fleet.worker(name, &proxy.url()));
    let table =
        |name: &str| run.store.join("lineage").join(name).join("iteration=000000/part-0.parquet");
    wait_until("the first tables", || table("updates").is_file());
    fleet.kill_coordinator();
    let read = |name: &str| std::fs::read(table(name)).expect("a table");
    let (traces, rewards) = (read("traces"), read("rewards"));
    let left = [
        ("traces", traces[..traces.len() / 2].to_vec()),
        ("rewards", vec![0; rewards.len()]),
        ("updates", Vec::new()),
    ];
    for (name, bytes) in left {
        std::fs::write(table(name), bytes).expect("a torn table");
    }
    proxy.lead_to(fleet.coordinator(ANY_PORT, true));
    done(&mut fleet);
    assert_eq!((read("traces"), read("rewards")), (traces, rewards), "written again");
    Ok("those of iteration 0".to_owned())
}

fn network_cut(world: &World) -> Result<String, Skip> {
    let mut fleet = Fleet::new(&world.run);
    let coordinator = fleet.coordinator(ANY_PORT, false);
    let proxy = Proxy::start(coordinator);
    WORKERS.iter().for_each(|name| fleet.worker(name, &proxy.url()));
    let at = reach(world, 0);
    proxy.cut(true);
    let address = format!("http://{coordinator}");
    wait_until("all workers to be given up", || {
        failures(status(&address), "worker-lost") >= WORKERS.len() as u64
    });
    proxy.cut(false);
    done(&mut fleet);
    Ok(format!("at segment {at}"))
}

fn network_slow(world: &World) -> Result<String, Skip> {
    let mut fleet = Fleet::new(&world.run);
    let proxy = Proxy::start(fleet.coordinator(ANY_PORT, false));
    proxy.slow(Duration::from_millis(40));
    WORKERS.iter().for_each(|name| fleet.worker(name, &proxy.url()));
    done(&mut fleet);
    Ok(format!("{} KiB went through", proxy.bytes() >> 10))
}

fn term_rank(world: &World) -> Result<String, Skip> {
    leave_and_replace(world, "trainer-1")
}

fn term_reward(world: &World) -> Result<String, Skip> {
    leave_and_replace(world, "reward-0")
}

fn leave_and_replace(world: &World, name: &str) -> Result<String, Skip> {
    let mut fleet = Fleet::new(&world.run);
    let address = format!("http://{}", fleet.coordinator(ANY_PORT, false));
    WORKERS.iter().for_each(|name| fleet.worker(name, &address));
    let mut at = reach(world, 0);
    if name.starts_with("trainer") {
        // Before that it may not even have begun to listen to signals.
        at = world.wait_for_record(1, &["\"epoch-started\""], || fleet.goes_on());
    }
    signals::send(&world.run.store, name, Kind::SIGTERM);
    let status = fleet.left(name);
    assert!(status.success(), "{name} left with {status}: {}", fleet.log(name));
    fleet.worker(name, &address);
    done(&mut fleet);
    Ok(format!("at segment {at}"))
}

/// A network namespace with one cable to this one.
struct Namespace {
    name: String,
    near: String,
}

impl Namespace {
    fn new() -> Result<Namespace, Skip> {
        let number = std::process::id() % 0xffff;
        let (name, near) = (format!("duet-{number}"), format!("duet{number}a"));
        let far = format!("duet{number}b");
        let made = Namespace { name: name.clone(), near: near.clone() };
        let steps = [
            format!("netns add {name}"),
            format!("link add {near} type veth peer name {far} netns {name}"),
            format!("addr add 10.213.17.1/30 dev {near}"),
            format!("link set {near} up"),
            format!("-n {name} addr add 10.213.17.2/30 dev {far}"),
            format!("-n {name} link set {far} up"),
        ];
        for step in steps {
            ip(&step)
                .map_err(|why| Skip(format!("no network namespaces here: ip {step}: {why}")))?;
        }
        Ok(made)
    }

    fn link(&self, up: bool) {
        let state = if up { "up" } else { "down" };
        ip(&format!("link set {} {state}", self.near)).expect("the link changes");
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // The cable goes with the namespace; if that was never made, so was nothing else.
        drop(ip(&format!("netns del {}", self.name)));
    }
}

fn ip(arguments: &str) -> Result<(), String> {
    let out = Command::new("ip").args(arguments.split(' ')).output().map_err(|e| e.to_string())?;
    let said = String::from_utf8_lossy(&out.stderr).trim().to_owned();
    if out.status.success() { Ok(()) } else { Err(said) }
}

/// Whether a status shows a worker with a lease.
fn holds(status: &Value, worker: &str) -> bool {
    let workers = status["workers"].as_array().into_iter().flatten();
    let mut named = workers.filter(|shown| shown["id"] == worker);
    named.any(|shown| shown["lease"].as_str().is_some_and(|lease| !lease.is_empty()))
}

fn namespace_cut(world: &World) -> Result<String, Skip> {
    let namespace = Namespace::new()?;
    let mut fleet = Fleet::new(&world.run);
    // Both ends of the cable are this machine's.
    fleet.environment.push(("DUET__SECURITY__ALLOW_PLAINTEXT".to_owned(), "true".to_owned()));
    let coordinator = fleet.coordinator("0.0.0.0:0", false);
    let address = format!("http://127.0.0.1:{}", coordinator.port());
    WORKERS.iter().skip(1).for_each(|name| fleet.worker(name, &address));
    fleet.within = ["ip", "netns", "exec", &namespace.name].map(str::to_owned).to_vec();
    fleet.worker(WORKERS[0], &format!("http://10.213.17.1:{}", coordinator.port()));
    let at = reach(world, 0);
    // In the middle of a lease: without it the run cannot end.
    wait_until("a lease of the worker", || {
        signals::send(&world.run.store, WORKERS[0], Kind::SIGSTOP);
        let holds = status(&address).is_some_and(|status| holds(&status, WORKERS[0]));
        if holds {
            namespace.link(false);
        }
        signals::send(&world.run.store, WORKERS[0], Kind::SIGCONT);
        holds
    });
    wait_until("the worker to be given up", || failures(status(&address), "worker-lost") > 0);
    namespace.link(true);
    done(&mut fleet);
    Ok(format!("at segment {at}"))
}
