//! Workers coming, asking, failing and going.

use super::record::Record;
use super::workers::Worker;
use super::{Effect, Scheduler, Verdict};
use crate::mutation::Mutation;
use crate::work::LeaseId;
use crate::{Millis, PolicyVersion, Role, TreeId, WorkerId};

/// For a worker whose connection alone closed to be heard of again: many round trips within a site.
const ALONE: Millis = Millis(3);

impl Scheduler {
    pub(super) fn register(&mut self, id: WorkerId, role: Role, session: u64) -> Verdict {
        match self.workers.get(&id) {
            Some(known) if known.role != role => {
                return Verdict::Refused(format!(
                    "{id} is connected as a {} worker; give the {role} worker another name",
                    known.role
                ));
            }
            Some(known) if known.session == session => {
                self.workers.touch(&id, self.now);
                return Verdict::Duplicate;
            }
            Some(_) => self.lose(&id, "worker-restarted", "another process took its name"),
            None => {}
        }
        self.workers.insert(id.clone(), Worker::new(role, session, self.now));
        self.claim_orphans(&id, session);
        if role == Role::Trainer && self.state.epoch.0 > 0 {
            // It may still be in a group from before a restart of the coordinator or its own loss.
            let reason = "its group is over".to_owned();
            let (epoch, workers) = (self.state.epoch, vec![id]);
            self.output.effects.push(Effect::AbortTrainers { epoch, workers, reason });
        }
        Verdict::Accepted
    }

    pub(super) fn heard(&mut self, id: &WorkerId, session: u64) -> Verdict {
        match self.workers.get(id) {
            Some(worker) if worker.session == session => {
                self.workers.touch(id, self.now);
                Verdict::Accepted
            }
            _ => Verdict::Unknown,
        }
    }

    /// A closed connection shortens the wait for a sign of life: a process that lives connects again
    /// at once.
    pub(super) fn disconnected(&mut self, id: &WorkerId, session: u64) -> Verdict {
        let role = match self.workers.get(id) {
            Some(worker) if worker.session == session => worker.role,
            _ => return Verdict::Unknown,
        };
        self.workers.cut(id, self.now.after(self.spec.timing.reconnect));
        self.hasten(role);
        Verdict::Accepted
    }

    /// The wait is shorter still where nothing but the process can be to blame and waiting costs
    /// something: one connection alone closed, and another worker idles who could do its work. What
    /// is lost by a mistake is one lease's work. A trainer's group would be lost, so it is waited for.
    fn hasten(&mut self, role: Role) {
        let Some(id) = self.workers.cut_alone().filter(|_| role != Role::Trainer).cloned() else {
            return;
        };
        let same_role = self.workers.get(&id).is_some_and(|worker| worker.role == role);
        if same_role && self.workers.idle(role).any(|other| *other != id) {
            self.workers.cut_at_most(&id, self.now.after(ALONE));
        }
    }

    /// A poll also says "I hold nothing": an assignment that never arrived starts over.
    pub(super) fn polled(&mut self, id: &WorkerId, session: u64) -> Verdict {
        let verdict = self.heard(id, session);
        if verdict != Verdict::Accepted {
            return verdict;
        }
        for unit in self.workers.get(id).map(|w| w.holds.clone()).unwrap_or_default() {
            self.workers.release(id, unit);
            if self.leases.live(unit).is_some_and(|live| live.worker == *id) {
                self.leases.release(unit);
                self.requeue(unit);
            }
        }
        self.workers.change(id, |worker| worker.waiting = true);
        if let Some(role) = self.workers.get(id).map(|worker| worker.role) {
            self.hasten(role);
        }
        self.trainer_polled(id);
        Verdict::Accepted
    }

    pub(super) fn left(&mut self, id: &WorkerId, session: u64, reason: &str) -> Verdict {
        let verdict = self.heard(id, session);
        if verdict == Verdict::Accepted {
            self.lose(id, "worker-left", reason);
        }
        verdict
    }

    pub(super) fn drain(&mut self, id: &WorkerId) -> Verdict {
        if self.workers.get(id).is_none() {
            return Verdict::Refused(format!("no worker is called {id}"));
        }
        self.workers.change(id, |worker| worker.draining = true);
        Verdict::Accepted
    }

    /// One path for every way of losing a worker.
    pub(super) fn lose(&mut self, id: &WorkerId, kind: &str, reason: &str) {
        let Some(worker) = self.workers.remove(id) else { return };
        for unit in worker.holds {
            let Some(live) = self.leases.release(unit) else { continue };
            let lease = LeaseId { unit, attempt: live.attempt };
            if Mutation::LoseWithWorker.on() {
                continue;
            }
            if kind == "worker-left" {
                self.requeue(unit);
            } else {
                self.attempt_failed(lease, id, kind, reason.to_owned(), true);
            }
        }
        if worker.role == Role::Trainer {
            self.trainer_lost(id, kind, reason);
        }
        if !worker.leaving {
            self.fail(kind, format!("{} worker {id}: {reason}", worker.role));
        }
    }

    pub(super) fn expire_workers(&mut self) {
        let timeout = self.spec.timing.heartbeat_timeout;
        while let Some((heard, id)) = self.workers.quietest().cloned() {
            if heard.after(timeout) > self.now {
                break;
            }
            let reason = format!("not heard of for {} ms", self.now.since(heard).0);
            self.lose(&id, "worker-lost", &reason);
        }
        while let Some((until, id)) = self.workers.first_cut().cloned() {
            if until > self.now {
                break;
            }
            let reason = "its connection closed and it did not come back in time".to_owned();
            self.lose(&id, "worker-lost", &reason);
        }
    }

    pub(super) fn next_worker_deadline(&self) -> Option<Millis> {
        let timeout = self.spec.timing.heartbeat_timeout;
        let quiet = self.workers.quietest().map(|(heard, _)| heard.after(timeout));
        let cut = self.workers.first_cut().map(|(until, _)| *until);
        [quiet, cut, self.workers.next_unpark()].into_iter().flatten().min()
    }

    /// Counts a failure against a worker. Too many in a row, on different trees (a poisoned tree
    /// must not take the workers with it), and it is quarantined: parked for a while, longer each
    /// time, and then tried again, so that a fault that has gone does not cost the worker for good.
    pub(super) fn blame(&mut self, id: &WorkerId, tree: Option<TreeId>) {
        let limit = self.spec.quarantine_after;
        let longest = self.spec.timing.backoff_max.0;
        let Some(worker) = self.workers.get(id) else { return };
        let same_tree = tree.is_some() && worker.blamed_for == tree;
        let failures = worker.failures + u32::from(!same_tree);
        let quarantine = limit > 0 && failures >= limit && worker.parked.is_none();
        let until = self.now.after(Millis(longest.saturating_mul(1 << worker.terms.min(2))));
        self.workers.change(id, |worker| {
            worker.failed += 1;
            worker.failures = failures;
            worker.blamed_for = tree;
            if quarantine {
                worker.parked = Some(until);
                worker.quarantined = true;
                worker.terms += 1;
                worker.failures = limit - 1;
            }
        });
        if quarantine {
            let text = format!(
                "{id} failed on {failures} different trees in a row; no more work for it for {} ms",
                until.since(self.now).0
            );
            self.fail("quarantined", text);
        }
    }

    /// A worker holds a version. Iterations in flight need at most the newest L + 1.
    pub(super) fn published(&mut self, id: &WorkerId, version: PolicyVersion) -> Verdict {
        if version > self.state.version {
            return Verdict::Refused(format!("{version} was never committed"));
        }
        self.workers.acknowledge(id, version, self.spec.lag as usize + 1)
    }

    /// A worker could not take a policy version: it rests for a backoff before it is asked again.
    pub(super) fn publish_failed(&mut self, id: &WorkerId) -> Verdict {
        self.blame(id, None);
        let failures = self.workers.get(id).map_or(0, |worker| worker.failures);
        let until = self.now.after(self.backoff(failures.max(1)));
        self.workers.change(id, |worker| {
            worker.parked = Some(worker.parked.map_or(until, |other| other.max(until)));
        });
        Verdict::Accepted
    }

    pub(super) fn pause(&mut self, paused: bool) {
        if self.state.paused != paused {
            self.commit(Record::Paused(paused));
        }
    }
}
