//! A run on an object store that fails: refuses, does not answer, answers by half, is slow.

use super::{Scenario, Skip, World};
use crate::fleet::{Fleet, WORKERS};
use crate::objects::{Objects, Vices};
use crate::text;
use std::time::Duration;

const NONE: Vices = Vices { refused: 0, unanswered: 0, cut_short: 0, delay: Duration::ZERO };

pub(super) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "store-500",
        what: "S3 store: every tenth request is answered with 500",
        attack: |world| on(world, Vices { refused: 100, ..NONE }),
        felt: |_| true,
    },
    Scenario {
        name: "store-cuts",
        what: "S3 store: a tenth is carried out unanswered, a tenth answered by half",
        attack: |world| on(world, Vices { unanswered: 100, cut_short: 100, ..NONE }),
        felt: |_| true,
    },
    Scenario {
        name: "store-slow",
        what: "S3 store: every answer comes 50 ms late",
        attack: |world| on(world, Vices { delay: Duration::from_millis(50), ..NONE }),
        felt: |_| true,
    },
];

fn on(world: &World, vices: Vices) -> Result<String, Skip> {
    // Asked about an empty store: any build gives an answer, one without S3 says so.
    let empty = Objects::start(&world.folder.join("empty"), NONE, 0);
    let mut ask = world.run.program("duet");
    ask.args(["audit", "s3://empty"]).envs(empty.environment());
    let said = ask.output().expect("duet starts");
    if text(&said).contains("built without support") {
        let how = "cargo build --workspace --bins --features duet-store/s3";
        return Err(Skip(format!("the binaries know no s3://; build them with `{how}`")));
    }
    let store = Objects::start(&world.run.store, vices, world.seed);
    let run = world.run.with("run.store=\"s3://run\"");
    let mut fleet = Fleet::new(&run);
    fleet.environment = store.environment();
    let address = format!("http://{}", fleet.coordinator("127.0.0.1:0", false));
    WORKERS.iter().for_each(|name| fleet.worker(name, &address));
    super::supervised::done(&mut fleet);
    let (requests, spoiled) = store.counts();
    assert!(spoiled > 0 || !vices.delay.is_zero(), "nothing went wrong in {requests} requests");
    Ok(format!("{spoiled} of {requests} requests went wrong"))
}
