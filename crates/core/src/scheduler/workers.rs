//! Who is connected, who waits, who holds what.
//!
//! ```text
//!            Registered            Polled                 Effect::Assign
//! (unknown) ------------> known  ------------> waiting ------------------> busy --Reported--> known
//!     ^                     |                    |                          |
//!     +--- Left, heartbeat timeout, new session -+--------------------------+   leases start over
//! ```
//! A waiting worker is *idle*, that is: gets work, unless it is draining, leaving, or parked for a
//! while after failures.

use super::Verdict;
use crate::work::Unit;
use crate::{Millis, PolicyVersion, Role, TreeId, WorkerId};
use std::collections::{BTreeMap, BTreeSet};

/// A connected worker.
#[derive(Clone, Debug)]
pub(super) struct Worker {
    pub role: Role,
    pub session: u64,
    pub heard: Millis,
    pub waiting: bool,
    pub draining: bool,
    pub leaving: bool,
    /// Its connection closed; it is lost unless it is heard of before then.
    pub cut: Option<Millis>,
    /// No other worker's connection was closed when its own closed.
    pub cut_alone: bool,
    /// Gets no work until then.
    pub parked: Option<Millis>,
    /// Whether it is parked because it failed too often, and how often that happened in a row.
    pub quarantined: bool,
    pub terms: u32,
    /// Failures on different trees since the last success, and the tree of the last one.
    pub failures: u32,
    pub blamed_for: Option<TreeId>,
    pub done: u64,
    pub failed: u64,
    /// Units it holds. A worker computes one at a time; after a restart it may claim more.
    pub holds: BTreeSet<Unit>,
    /// Committed versions it has fetched and verified (DU-12).
    pub versions: BTreeSet<PolicyVersion>,
}

impl Worker {
    pub(super) fn new(role: Role, session: u64, heard: Millis) -> Worker {
        Worker {
            role,
            session,
            heard,
            waiting: false,
            draining: false,
            leaving: false,
            cut: None,
            cut_alone: false,
            parked: None,
            quarantined: false,
            terms: 0,
            failures: 0,
            blamed_for: None,
            done: 0,
            failed: 0,
            holds: BTreeSet::new(),
            versions: BTreeSet::from([PolicyVersion(0)]),
        }
    }

    fn idle(&self) -> bool {
        self.waiting && !self.draining && !self.leaving && self.parked.is_none()
    }
}

/// All connected workers, with an index for every question that is asked at every event.
#[derive(Default)]
pub(super) struct Workers {
    all: BTreeMap<WorkerId, Worker>,
    waiting: BTreeMap<Role, BTreeSet<WorkerId>>,
    idle: BTreeMap<Role, BTreeSet<WorkerId>>,
    drained: BTreeSet<WorkerId>,
    heard: BTreeSet<(Millis, WorkerId)>,
    cut: BTreeSet<(Millis, WorkerId)>,
    parked: BTreeSet<(Millis, WorkerId)>,
}

fn file(set: &mut BTreeSet<WorkerId>, id: &WorkerId, member: bool) {
    if !member {
        set.remove(id);
    } else if !set.contains(id) {
        set.insert(id.clone());
    }
}

impl Workers {
    pub(super) fn len(&self) -> usize {
        self.all.len()
    }

    pub(super) fn get(&self, id: &WorkerId) -> Option<&Worker> {
        self.all.get(id)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&WorkerId, &Worker)> {
        self.all.iter()
    }

    /// The waiting workers of a role, in name order.
    pub(super) fn waiting(&self, role: Role) -> impl Iterator<Item = &WorkerId> {
        self.waiting.get(&role).into_iter().flatten()
    }

    /// The waiting workers of a role that may be given work, in name order.
    pub(super) fn idle(&self, role: Role) -> impl Iterator<Item = &WorkerId> {
        self.idle.get(&role).into_iter().flatten()
    }

    /// A draining worker that waits, that is: holds nothing.
    pub(super) fn next_drained(&self) -> Option<WorkerId> {
        self.drained.first().cloned()
    }

    /// The one way to change a worker: keeps the indexes true.
    pub(super) fn change(&mut self, id: &WorkerId, change: impl FnOnce(&mut Worker)) {
        let Some(worker) = self.all.get_mut(id) else { return };
        let parked = worker.parked;
        change(worker);
        if worker.parked != parked {
            if let Some(until) = parked {
                self.parked.remove(&(until, id.clone()));
            }
            if let Some(until) = worker.parked {
                self.parked.insert((until, id.clone()));
            }
        }
        file(self.waiting.entry(worker.role).or_default(), id, worker.waiting);
        file(self.idle.entry(worker.role).or_default(), id, worker.idle());
        file(&mut self.drained, id, worker.waiting && worker.draining);
    }

    pub(super) fn stop_waiting(&mut self, id: &WorkerId, session: u64) {
        if self.all.get(id).is_some_and(|worker| worker.session == session) {
            self.change(id, |worker| worker.waiting = false);
        }
    }

    pub(super) fn insert(&mut self, id: WorkerId, worker: Worker) {
        self.heard.insert((worker.heard, id.clone()));
        self.all.insert(id, worker);
    }

    pub(super) fn remove(&mut self, id: &WorkerId) -> Option<Worker> {
        self.change(id, |worker| {
            worker.waiting = false;
            worker.parked = None;
        });
        let worker = self.all.remove(id)?;
        self.heard.remove(&(worker.heard, id.clone()));
        if let Some(until) = worker.cut {
            self.cut.remove(&(until, id.clone()));
        }
        Some(worker)
    }

    pub(super) fn touch(&mut self, id: &WorkerId, now: Millis) {
        let Some(worker) = self.all.get_mut(id) else { return };
        if let Some(until) = worker.cut.take() {
            self.cut.remove(&(until, id.clone()));
        }
        if worker.heard == now {
            return;
        }
        self.heard.remove(&(worker.heard, id.clone()));
        worker.heard = now;
        self.heard.insert((now, id.clone()));
    }

    /// The worker's connection closed: it has until then to be heard of again.
    pub(super) fn cut(&mut self, id: &WorkerId, until: Millis) {
        let Some(worker) = self.all.get_mut(id).filter(|worker| worker.cut.is_none()) else {
            return;
        };
        worker.cut = Some(until);
        worker.cut_alone = self.cut.is_empty();
        self.cut.insert((until, id.clone()));
    }

    /// The one worker whose connection is closed, when no other's was at any time meanwhile.
    pub(super) fn cut_alone(&self) -> Option<&WorkerId> {
        let (_, id) = self.cut.first().filter(|_| self.cut.len() == 1)?;
        self.all.get(id).filter(|worker| worker.cut_alone).map(|_| id)
    }

    /// A cut worker has no longer than until then.
    pub(super) fn cut_at_most(&mut self, id: &WorkerId, until: Millis) {
        let Some(worker) = self.all.get_mut(id) else { return };
        let Some(before) = worker.cut.filter(|before| *before > until) else { return };
        worker.cut = Some(until);
        self.cut.remove(&(before, id.clone()));
        self.cut.insert((until, id.clone()));
    }

    /// The cut worker whose time is over first.
    pub(super) fn first_cut(&self) -> Option<&(Millis, WorkerId)> {
        self.cut.first()
    }

    /// The worker that was not heard of for the longest time.
    pub(super) fn quietest(&self) -> Option<&(Millis, WorkerId)> {
        self.heard.first()
    }

    pub(super) fn hold(&mut self, id: &WorkerId, unit: Unit) {
        if let Some(worker) = self.all.get_mut(id) {
            worker.holds.insert(unit);
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
            worker.terms = 0;
            worker.blamed_for = None;
            worker.done += 1;
        }
    }

    /// Gives parked workers another chance once their time is over.
    pub(super) fn unpark(&mut self, now: Millis) {
        while let Some((_, id)) = self.parked.first().filter(|(until, _)| *until <= now).cloned() {
            self.change(&id, |worker| {
                worker.parked = None;
                worker.quarantined = false;
            });
        }
    }

    pub(super) fn next_unpark(&self) -> Option<Millis> {
        self.parked.first().map(|(until, _)| *until)
    }

    /// A worker holds a version. It is taken to keep the `keep` newest ones, and the base model.
    pub(super) fn acknowledge(
        &mut self,
        id: &WorkerId,
        version: PolicyVersion,
        keep: usize,
    ) -> Verdict {
        let Some(worker) = self.all.get_mut(id) else { return Verdict::Unknown };
        if !worker.versions.insert(version) {
            return Verdict::Duplicate;
        }
        let oldest = worker.versions.iter().rev().nth(keep.saturating_sub(1)).copied();
        worker.versions.retain(|v| v.0 == 0 || oldest.is_none_or(|oldest| *v >= oldest));
        Verdict::Accepted
    }
}
