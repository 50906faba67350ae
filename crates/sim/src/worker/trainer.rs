//! A trainer rank: sits down in a group, takes steps, writes its shards beside them.

use super::{Alarm, Process, SAVES, Seat};
use crate::model;
use crate::world::World;
use duet_core::scheduler::SHARD;
use duet_core::work::{Held, Rendezvous, Report, ShardDone, Step, StepDone, Weights};
use duet_core::{Digest, PolicyVersion, Rank};
use std::collections::VecDeque;

impl World {
    pub(super) fn sit_down(&mut self, worker: usize, rendezvous: &Rendezvous) {
        let Rendezvous { epoch, rank, restore, newest, .. } = rendezvous;
        let base = (PolicyVersion(0), Digest([0; 32]));
        let held = match restore {
            _ if self.holds_newest(rendezvous) => newest.map(|held| (held.version, held.digest)),
            Some(manifest) => self.coordinator.manifests.get(&manifest.key).copied(),
            None => Some(base),
        };
        let Some((version, digest)) = held else {
            return self.break_off(format!("{restore:?} is to be restored, but never was written"));
        };
        let session = self.processes[worker].session;
        self.groups.entry(epoch.0).or_default().insert(rank.0, (worker, session));
        let mut reports = VecDeque::new();
        if *rank == Rank(0) {
            let address = format!("host:{}", epoch.0);
            reports.push_back((5, Report::StoreReady { epoch: *epoch, address }));
        }
        let span = self.dice.between(20, 300);
        let (epoch, rank) = (*epoch, *rank);
        let mut said = digest;
        if version.0 > 0 && self.lies_in_earnest(worker) {
            said.0[0] ^= 1;
        }
        reports.push_back((span, Report::TrainerReady { epoch, rank, version, digest: said }));
        self.processes[worker].seat = Some(Seat { epoch, rank, version, digest });
        self.processes[worker].state = Some(Held { version, digest });
        self.processes[worker].reports = reports;
    }

    /// Whether the ranks of a group go on from the newest committed version, which one of them holds.
    /// What the first one finds is what they agree on.
    fn holds_newest(&mut self, rendezvous: &Rendezvous) -> bool {
        let Some(newest) = rendezvous.newest else { return false };
        if let Some(agreed) = self.agreed.get(&rendezvous.epoch.0) {
            return *agreed;
        }
        let holds = |process: &Process| process.up && process.state == Some(newest);
        let agreed = self.processes.iter().any(holds) && self.dice.permille(700);
        self.agreed.insert(rendezvous.epoch.0, agreed);
        self.handed_on += u64::from(agreed);
        agreed
    }

    /// A rank is through with a step, or its group has come apart meanwhile.
    pub(super) fn stepped(&mut self, worker: usize, step: &Step) -> Report {
        let (epoch, iteration) = (step.epoch, step.iteration);
        let seat = self.processes[worker]
            .seat
            .filter(|seat| seat.epoch == epoch && seat.version.0 == u64::from(iteration));
        let Some(seat) = seat else {
            let held = self.processes[worker].seat;
            let rank = held.map_or(Rank(9), |seat| seat.rank);
            let reason = format!("told to take step {iteration}, but is at {held:?}");
            return Report::TrainerFailed { epoch, rank, kind: "state".to_owned(), reason };
        };
        let rank = seat.rank;
        let alone = { self.groups.get(&epoch.0).into_iter().flatten() }
            .any(|(_, (other, session))| !self.processes[*other].is(*session));
        if alone {
            let (kind, reason) = ("collective".to_owned(), "connection reset".to_owned());
            return Report::TrainerFailed { epoch, rank, kind, reason };
        }
        let mut digest = model::after(seat.digest, step);
        let version = PolicyVersion(seat.version.0 + u64::from(step.update));
        self.processes[worker].seat = Some(Seat { version, digest, ..seat });
        self.processes[worker].state = Some(Held { version, digest });
        if self.options.spec.world > 1 && self.lies_in_earnest(worker) {
            digest.0[0] ^= 1;
        }
        if step.checkpoint {
            self.save(worker, Seat { version, ..seat });
        }
        let weights = Weights { version, llm: None, dit: None, digest };
        let metrics = [("loss".to_owned(), 0.1 * f64::from(iteration))].into();
        Report::StepDone(StepDone { epoch, rank, iteration, weights, metrics })
    }

    /// A rank begins to write its shard, beside the steps to come.
    fn save(&mut self, worker: usize, seat: Seat) {
        let Seat { epoch, rank, version, .. } = seat;
        let fails = !self.healed && self.failed_shards < 2 && self.dice.permille(20);
        self.failed_shards += u32::from(fails);
        let report = if fails {
            let (kind, reason) = (SHARD.to_owned(), "the store is full".to_owned());
            Report::TrainerFailed { epoch, rank, kind, reason }
        } else {
            let shards = vec![model::shard(version, epoch, rank)];
            Report::ShardDone(ShardDone { epoch, rank, version, shards })
        };
        // Before the step's own report is heard, or long after the next step.
        let longest = self.dice.pick(&[30, 300, 2_000]);
        let span = self.dice.between(1, longest) * self.processes[worker].slow;
        self.save_requests += 1;
        let request = SAVES + self.save_requests;
        self.processes[worker].saves.insert(request, report);
        self.ring(worker, span, Alarm::Saved(request));
    }
}
