//! Blows against the disk that the run's store lies on.

use super::{Scenario, Skip, World, audit};
use crate::{text, wait_until};
use std::process::{Child, Command};

/// Size of the small disk.
const MIB: u64 = 256;

pub(super) const SCENARIOS: &[Scenario] = &[Scenario {
    name: "disk-full",
    what: "the store's disk is full: the run ends and says so; with room again, --resume",
    attack: disk_full,
    felt: |audit| audit["coordinators"].as_u64() >= Some(2),
}];

fn mount(world: &World) -> Result<(), Skip> {
    let disk = &world.run.store;
    std::fs::create_dir_all(disk).expect("a folder");
    let size = format!("size={MIB}m");
    let out = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(disk).output();
    match out {
        Ok(out) if out.status.success() => Ok(()),
        Ok(out) => Err(Skip(format!("no disk can be mounted here: {}", text(&out).trim()))),
        Err(error) => Err(Skip(format!("no disk can be mounted here: {error}"))),
    }
}

/// Takes the disk away, if there is one.
pub(super) fn unmount(world: &World) {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    if mounts.contains(&world.run.store.display().to_string()) {
        drop(Command::new("umount").arg("-l").arg(&world.run.store).output());
    }
}

/// Waits for a launched run's bad end; what it said.
fn failed(world: &World, mut launcher: Child) -> String {
    wait_until("the run to fail", || launcher.try_wait().expect("a status").is_some());
    let status = launcher.wait().expect("a status");
    assert!(!status.success(), "the run did not notice: {}", world.run.log());
    world.run.log()
}

fn disk_full(world: &World) -> Result<String, Skip> {
    mount(world)?;
    let mut launcher = world.run.start();
    let at = world.wait(&mut launcher, 0);
    let ballast = world.run.store.join("ballast");
    // Written until the disk is full, which is the error that ends the copy.
    let zeros = std::fs::File::open("/dev/zero").expect("zeros");
    let mut file = std::fs::File::create(&ballast).expect("a file");
    let filled = std::io::copy(&mut std::io::Read::take(zeros, MIB << 21), &mut file);
    assert!(filled.is_err(), "the disk has no end");
    // Removed, it would take its space until it is closed.
    drop(file);
    let said = failed(world, launcher);
    assert!(said.contains("o space left"), "the reason is not named: {said}");
    std::fs::remove_file(ballast).expect("removed");
    let version = audit(&world.run)["version"].as_u64();
    world.finish(world.run.begin(true));
    Ok(format!("at segment {at}, version {}", version.unwrap_or(0)))
}
