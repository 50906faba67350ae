//! Who is connected, who waits, who holds what.
//!
//! ```text
//!            Registered            Polled                 Effect::Assign
//! (unknown) ------------> idle  ------------> waiting ------------------> busy --Reported--> idle
//!     ^                     |                    |                          |
//!     +--- Left, heartbeat timeout, new session -+--------------------------+   leases fail or go back
//! ```

use super::record::Record;
use super::{Scheduler, Verdict};
use crate::work::{LeaseId, Unit};
use crate::{Millis, PolicyVersion, Role, WorkerId};
use std::collections::{BTreeMap, BTreeSet};

/// A connected worker.
#[derive(Clone, Debug)]
pub(super) struct Worker {
    pub role: Role,
    pub session: u64,
    pub heard: Millis,
    pub waiting: bool,
    pub draining: bool,
    pub quarantined: bool,
    pub leaving: bool,
    /// Failures since the last success.
    pub failures: u32,
    pub done: u64,
    pub failed: u64,
    /// Units it holds. A worker computes one at a time, so this has at most one entry.
    pub holds: BTreeSet<Unit>,
    /// Committed versions it has fetched and verified (DU-12).
    pub versions: BTreeSet<PolicyVersion>,
}

/// Versions a rollout worker is taken to remember besides the newest.
const REMEMBERED: usize = 2;

/// All connected workers, with an index of those who wait and of when each was heard last.
#[derive(Default)]
pub(super) struct Workers {
    all: BTreeMap<WorkerId, Worker>,
    waiting: BTreeMap<Role, BTreeSet<WorkerId>>,
    heard: BTreeSet<(Millis, WorkerId)>,
}

impl Workers {
    pub(super) fn len(&self) -> usize {
        self.all.len()
    }

    pub(super) fn get(&self, id: &WorkerId) -> Option<&Worker> {
        self.all.get(id)
    }

    pub(super) fn get_mut(&mut self, id: &WorkerId) -> Option<&mut Worker> {
        self.all.get_mut(id)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&WorkerId, &Worker)> {
        self.all.iter()
    }

    /// The waiting workers of a role, in name order.
    pub(super) fn waiting(&self, role: Role) -> impl Iterator<Item = &WorkerId> {
        self.waiting.get(&role).into_iter().flatten()
    }

    pub(super) fn wait(&mut self, id: &WorkerId) {
        if let Some(worker) = self.all.get_mut(id) {
            worker.waiting = true;
            self.waiting.entry(worker.role).or_default().insert(id.clone());
        }
    }

    pub(super) fn unwait(&mut self, id: &WorkerId) {
        if let Some(worker) = self.all.get_mut(id) {
            worker.waiting = false;
            if let Some(set) = self.waiting.get_mut(&worker.role) {
                set.remove(id);
            }
        }
    }

    pub(super) fn stop_waiting(&mut self, id: &WorkerId, session: u64) {
        if self.all.get(id).is_some_and(|worker| worker.session == session) {
            self.unwait(id);
        }
    }

    fn insert(&mut self, id: WorkerId, worker: Worker) {
        self.heard.insert((worker.heard, id.clone()));
        self.all.insert(id, worker);
    }

    fn remove(&mut self, id: &WorkerId) -> Option<Worker> {
        self.unwait(id);
        let worker = self.all.remove(id)?;
        self.heard.remove(&(worker.heard, id.clone()));
        Some(worker)
    }

    fn touch(&mut self, id: &WorkerId, now: Millis) {
        if let Some(worker) = self.all.get_mut(id) {
            self.heard.remove(&(worker.heard, id.clone()));
            worker.heard = now;
            self.heard.insert((now, id.clone()));
        }
    }

    pub(super) fn release(&mut self, id: &WorkerId, unit: Unit) {
        if let Some(worker) = self.all.get_mut(id) {
            worker.holds.remove(&unit);
        }
    }

    pub(super) fn succeeded(&mut self, id: &WorkerId) {
        if let Some(worker) = self.all.get_mut(id) {
            worker.failures = 0;
            worker.done += 1;
        }
    }

    pub(super) fn acknowledge(&mut self, id: &WorkerId, version: PolicyVersion) -> Verdict {
        let Some(worker) = self.all.get_mut(id) else { return Verdict::Unknown };
        if !worker.versions.insert(version) {
            return Verdict::Duplicate;
        }
        while worker.versions.len() > REMEMBERED {
            worker.versions.pop_first();
        }
        Verdict::Accepted
    }
}

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
        let worker = Worker {
            role,
            session,
            heard: self.now,
            waiting: false,
            draining: false,
            quarantined: false,
            leaving: false,
            failures: 0,
            done: 0,
            failed: 0,
            holds: BTreeSet::new(),
            versions: BTreeSet::from([PolicyVersion(0)]),
        };
        self.workers.insert(id, worker);
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

    /// A poll also says "I hold nothing": an assignment that never arrived goes back at once.
    pub(super) fn polled(&mut self, id: &WorkerId, session: u64) -> Verdict {
        let verdict = self.heard(id, session);
        if verdict != Verdict::Accepted {
            return verdict;
        }
        for unit in self.workers.get(id).map(|w| w.holds.clone()).unwrap_or_default() {
            self.workers.release(id, unit);
            if self.leases.live(unit).is_some_and(|live| live.worker == *id) {
                self.leases.release(unit);
                self.leases.ready(unit);
            }
        }
        self.workers.wait(id);
        self.trainer_polled(id);
        Verdict::Accepted
    }

    pub(super) fn left(&mut self, id: &WorkerId, session: u64, reason: &str) -> Verdict {
        let verdict = self.heard(id, session);
        if verdict == Verdict::Accepted {
            let leaving = self.workers.get(id).is_some_and(|worker| worker.leaving);
            let kind = if leaving { "left" } else { "worker-left" };
            self.lose(id, kind, reason);
        }
        verdict
    }

    pub(super) fn drain(&mut self, id: &WorkerId) -> Verdict {
        match self.workers.get_mut(id) {
            Some(worker) => {
                worker.draining = true;
                Verdict::Accepted
            }
            None => Verdict::Refused(format!("no worker is called {id}")),
        }
    }

    /// One path for every way of losing a worker.
    pub(super) fn lose(&mut self, id: &WorkerId, kind: &str, reason: &str) {
        let Some(worker) = self.workers.remove(id) else { return };
        for unit in worker.holds {
            let Some(live) = self.leases.release(unit) else { continue };
            let lease = LeaseId { unit, attempt: live.attempt };
            if kind == "left" || kind == "worker-left" {
                self.leases.ready(unit);
            } else {
                self.attempt_failed(lease, id, kind.to_owned(), reason.to_owned());
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
        while let Some((heard, id)) = self.workers.heard.first().cloned() {
            if heard.after(timeout) > self.now {
                break;
            }
            let reason = format!("not heard of for {} ms", self.now.since(heard).0);
            self.lose(&id, "worker-lost", &reason);
        }
    }

    pub(super) fn next_worker_deadline(&self) -> Option<Millis> {
        let timeout = self.spec.timing.heartbeat_timeout;
        self.workers.heard.first().map(|(heard, _)| heard.after(timeout))
    }

    /// Counts a failure against a worker; too many in a row and it gets no more work.
    pub(super) fn blame(&mut self, id: &WorkerId) {
        let limit = self.spec.quarantine_after;
        let Some(worker) = self.workers.get_mut(id) else { return };
        worker.failures += 1;
        worker.failed += 1;
        if limit > 0 && worker.failures >= limit && !worker.quarantined {
            worker.quarantined = true;
            let text = format!("{id} failed {limit} times in a row and gets no more work");
            self.fail("quarantined", text);
        }
    }

    /// Operators' pause is durable: a coordinator that comes back stays paused.
    pub(super) fn is_paused(&self) -> bool {
        self.state.paused
    }

    /// Grants a unit to a worker; the record makes sure that the attempt never repeats.
    pub(super) fn grant(&mut self, unit: Unit, worker: &WorkerId, expires: Millis) -> LeaseId {
        let attempt = crate::Attempt(self.state.tries(unit).map_or(0, |tries| tries.given) + 1);
        let id = LeaseId { unit, attempt };
        self.commit(Record::Leased { id, worker: worker.clone() });
        let live = super::leases::Live { worker: worker.clone(), attempt, expires };
        self.leases.grant(unit, live);
        if let Some(worker) = self.workers.get_mut(worker) {
            worker.holds.insert(unit);
        }
        id
    }
}
