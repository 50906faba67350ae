//! Units that wait for a worker, units that are held, and their deadlines.
//!
//! ```text
//!            grant                      Completed
//! ready -----------------> live --------------------------> (next stage's units become ready)
//!   ^                       | failed, lost, expired, handed back
//!   +--- backoff is over ---+-----> delayed          or, after too many attempts: tree given up
//! ```

use super::state::State;
use crate::invariants::Violation;
use crate::mutation::Mutation;
use crate::work::Unit;
use crate::{Attempt, Millis, Role, WorkerId};
use std::collections::{BTreeMap, BTreeSet};

/// A lease that is held.
#[derive(Clone, Debug)]
pub(super) struct Live {
    pub worker: WorkerId,
    pub attempt: Attempt,
    pub granted: Millis,
    pub expires: Millis,
}

/// How long a stage usually takes, from grant to report: a moving mean over about eight leases.
#[derive(Clone, Copy, Debug, Default)]
struct Pace {
    seen: u32,
    mean: u64,
}

/// Leases of a stage before its pace means anything.
const PACE_KNOWN: u32 = 5;
/// A lease is late when it has taken this many times the usual time, and at least `LATE_MIN`.
const LATE: u64 = 3;
const LATE_MIN: u64 = 1_000;
/// Attempts after this one are left to their deadline, however late they are.
const LATE_ATTEMPTS: u32 = 2;

impl Pace {
    fn add(&mut self, took: Millis) {
        self.mean = if self.seen == 0 { took.0 } else { (7 * self.mean + took.0) / 8 };
        self.seen = self.seen.saturating_add(1);
    }

    fn late_after(&self) -> Option<Millis> {
        (self.seen >= PACE_KNOWN).then(|| Millis((LATE * self.mean).max(LATE_MIN)))
    }
}

/// Volatile: rebuilt from the durable state after a restart. Every look-up is by an ordered index;
/// nothing scans all trees.
#[derive(Default)]
pub(super) struct Leases {
    ready: [BTreeSet<Unit>; 3],
    /// Units that wait out their backoff, by its end and by unit.
    delayed: BTreeSet<(Millis, Unit)>,
    delayed_until: BTreeMap<Unit, Millis>,
    live: BTreeMap<Unit, Live>,
    expiries: BTreeSet<(Millis, Unit)>,
    /// Leases that may be given to somebody else when they are late, oldest first.
    granted: [BTreeSet<(Millis, Unit)>; 3],
    pace: [Pace; 3],
    /// Leases from before a restart, by the worker that may still be working on them.
    pub(super) orphans: BTreeMap<WorkerId, BTreeSet<Unit>>,
    /// Units that had all their attempts before a restart.
    pub(super) spent: Vec<Unit>,
}

fn stage(unit: Unit) -> usize {
    match unit {
        Unit::Think(_) => 0,
        Unit::Render(_) => 1,
        Unit::Score(_) => 2,
    }
}

fn stages(role: Role) -> &'static [usize] {
    match role {
        Role::Rollout => &[1, 0],
        Role::Reward => &[2],
        Role::Trainer => &[],
    }
}

impl Leases {
    pub(super) fn ready(&mut self, unit: Unit) {
        self.ready[stage(unit)].insert(unit);
    }

    /// The unit a worker of this role should get next: the oldest iteration first, and rendering
    /// before thinking, because a tree that is under way blocks its iteration.
    pub(super) fn next(&self, role: Role) -> Option<Unit> {
        let firsts = stages(role).iter().filter_map(|s| self.ready[*s].first().copied());
        firsts.min_by_key(|unit| (unit.tree().iteration, 2 - stage(*unit)))
    }

    /// # Errors
    /// DU-5, when the unit is held already.
    pub(super) fn grant(&mut self, unit: Unit, live: Live) -> Result<(), Violation> {
        if let Some(other) = self.live.get(&unit) {
            let text = format!("{} {} is held by {}", unit.stage(), unit.place(), other.worker);
            return Err(Violation::new("DU-5", text));
        }
        if !Mutation::LeaseTwice.on() {
            self.ready[stage(unit)].remove(&unit);
        }
        self.undelay(unit);
        self.expiries.insert((live.expires, unit));
        if live.attempt.0 <= LATE_ATTEMPTS {
            self.granted[stage(unit)].insert((live.granted, unit));
        }
        self.live.insert(unit, live);
        Ok(())
    }

    pub(super) fn live(&self, unit: Unit) -> Option<&Live> {
        self.live.get(&unit)
    }

    /// Moves a lease's deadline.
    pub(super) fn extend(&mut self, unit: Unit, expires: Millis) {
        if let Some(live) = self.live.get_mut(&unit) {
            self.expiries.remove(&(live.expires, unit));
            live.expires = expires;
            self.expiries.insert((expires, unit));
        }
    }

    /// Ends a lease, if the unit is held.
    pub(super) fn release(&mut self, unit: Unit) -> Option<Live> {
        let live = self.live.remove(&unit)?;
        self.expiries.remove(&(live.expires, unit));
        self.granted[stage(unit)].remove(&(live.granted, unit));
        Some(live)
    }

    /// Takes a unit out of every queue: its tree has ended, it is done, or it starts over.
    pub(super) fn forget(&mut self, unit: Unit) -> Option<Live> {
        self.ready[stage(unit)].remove(&unit);
        self.undelay(unit);
        self.release(unit)
    }

    /// Takes note of how long a lease took that was just completed.
    pub(super) fn took(&mut self, unit: Unit, took: Millis) {
        self.pace[stage(unit)].add(took);
    }

    pub(super) fn delay(&mut self, until: Millis, unit: Unit) {
        self.undelay(unit);
        self.delayed.insert((until, unit));
        self.delayed_until.insert(unit, until);
    }

    fn undelay(&mut self, unit: Unit) {
        if let Some(until) = self.delayed_until.remove(&unit) {
            self.delayed.remove(&(until, unit));
        }
    }

    /// Lets units whose backoff is over be leased again.
    pub(super) fn wake(&mut self, now: Millis) {
        while let Some((_, unit)) = self.delayed.first().copied().filter(|(at, _)| *at <= now) {
            self.undelay(unit);
            self.ready(unit);
        }
    }

    pub(super) fn expired(&self, now: Millis) -> Option<Unit> {
        self.expiries.first().filter(|(at, _)| *at <= now).map(|(_, unit)| *unit)
    }

    pub(super) fn next_deadline(&self) -> Option<Millis> {
        let first = |set: &BTreeSet<(Millis, Unit)>| set.first().map(|(at, _)| *at);
        [first(&self.expiries), first(&self.delayed)].into_iter().flatten().min()
    }

    /// When the oldest lease of this role becomes late, and which it is.
    pub(super) fn next_late(&self, role: Role) -> Option<(Millis, Unit)> {
        let oldest = stages(role).iter().filter_map(|s| {
            let (granted, unit) = self.granted[*s].first()?;
            Some((granted.after(self.pace[*s].late_after()?), *unit))
        });
        oldest.min()
    }

    /// DU-5 holds by construction of the map; what could break is a lease on something finished.
    pub(super) fn check(&self, state: &State) -> Result<(), Violation> {
        match self.live.keys().find(|unit| state.is_done(**unit)) {
            Some(unit) => Err(Violation::new(
                "DU-5",
                format!("{} of {} is leased although it is done", unit.stage(), unit.place()),
            )),
            None => Ok(()),
        }
    }
}
