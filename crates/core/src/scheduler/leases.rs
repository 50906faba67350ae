//! Units that wait for a worker, units that are held, and their deadlines.

use super::record::Record;
use super::state::State;
use super::{Scheduler, Verdict};
use crate::invariants::Violation;
use crate::work::{Done, LeaseId, Outcome, Score, Unit};
use crate::{Attempt, Millis, Role, WorkerId};
use std::collections::{BTreeMap, BTreeSet};

/// A lease that is held.
#[derive(Clone, Debug)]
pub(super) struct Live {
    pub worker: WorkerId,
    pub attempt: Attempt,
    pub expires: Millis,
}

/// Volatile: rebuilt from the durable state after a restart.
#[derive(Default)]
pub(super) struct Leases {
    think: BTreeSet<Unit>,
    render: BTreeSet<Unit>,
    score: BTreeSet<Unit>,
    /// Units that wait out their backoff.
    delayed: BTreeSet<(Millis, Unit)>,
    live: BTreeMap<Unit, Live>,
    expiries: BTreeSet<(Millis, Unit)>,
}

impl Leases {
    pub(super) fn ready(&mut self, unit: Unit) {
        self.queue(unit).insert(unit);
    }

    fn queue(&mut self, unit: Unit) -> &mut BTreeSet<Unit> {
        match unit {
            Unit::Think(_) => &mut self.think,
            Unit::Render(_) => &mut self.render,
            Unit::Score(_) => &mut self.score,
        }
    }

    /// The unit a worker of this role should get next: the oldest tree first, and rendering before
    /// thinking, because a tree that is under way blocks its iteration and one that is not does not.
    pub(super) fn next(&self, role: Role) -> Option<Unit> {
        match role {
            Role::Rollout => {
                let render = self.render.first().copied();
                let think = self.think.first().copied();
                match (render, think) {
                    (Some(r), Some(t)) if t.tree().iteration < r.tree().iteration => Some(t),
                    (render, think) => render.or(think),
                }
            }
            Role::Reward => self.score.first().copied(),
            Role::Trainer => None,
        }
    }

    pub(super) fn grant(&mut self, unit: Unit, live: Live) {
        self.queue(unit).remove(&unit);
        self.expiries.insert((live.expires, unit));
        self.live.insert(unit, live);
    }

    pub(super) fn live(&self, unit: Unit) -> Option<&Live> {
        self.live.get(&unit)
    }

    /// Ends a lease, if the unit is held.
    pub(super) fn release(&mut self, unit: Unit) -> Option<Live> {
        let live = self.live.remove(&unit)?;
        self.expiries.remove(&(live.expires, unit));
        Some(live)
    }

    /// Takes a unit out of every queue: its tree has ended, or it is done.
    pub(super) fn forget(&mut self, unit: Unit) {
        self.release(unit);
        self.queue(unit).remove(&unit);
        self.delayed.retain(|(_, other)| *other != unit);
    }

    pub(super) fn delay(&mut self, until: Millis, unit: Unit) {
        self.delayed.insert((until, unit));
    }

    /// Lets units whose backoff is over be leased again.
    pub(super) fn wake(&mut self, now: Millis) {
        while let Some((at, unit)) = self.delayed.first().copied().filter(|(at, _)| *at <= now) {
            self.delayed.remove(&(at, unit));
            self.ready(unit);
        }
    }

    fn expired(&self, now: Millis) -> Option<Unit> {
        self.expiries.first().filter(|(at, _)| *at <= now).map(|(_, unit)| *unit)
    }

    pub(super) fn next_deadline(&self) -> Option<Millis> {
        let first = |set: &BTreeSet<(Millis, Unit)>| set.first().map(|(at, _)| *at);
        [first(&self.expiries), first(&self.delayed)].into_iter().flatten().min()
    }

    pub(super) fn has_ready(&self, role: Role) -> bool {
        self.next(role).is_some()
    }

    /// DU-5 holds by construction of the map; what could break is a lease on something finished.
    pub(super) fn check(&self, state: &State) -> Result<(), Violation> {
        match self.live.keys().find(|unit| state.is_done(**unit)) {
            Some(unit) => Err(Violation::new(
                "DU-5",
                format!("{} of {} is leased although it is done", unit.stage(), unit.tree()),
            )),
            None => Ok(()),
        }
    }
}

impl Scheduler {
    pub(super) fn lease_reported(
        &mut self,
        worker: &WorkerId,
        id: LeaseId,
        outcome: Outcome,
    ) -> Verdict {
        let Some(tries) = self.state.tries(id.unit) else { return Verdict::Stale };
        if tries.given != id.attempt.0 || tries.dead == id.attempt.0 {
            return Verdict::Stale;
        }
        if self.state.is_done(id.unit) {
            return Verdict::Duplicate;
        }
        if self.leases.live(id.unit).is_some_and(|live| live.worker != *worker) {
            return Verdict::Stale;
        }
        self.workers.release(worker, id.unit);
        match outcome {
            Outcome::HandedBack => {
                self.leases.release(id.unit);
                self.leases.ready(id.unit);
            }
            Outcome::Failed { kind, reason } => {
                self.leases.release(id.unit);
                self.attempt_failed(id, worker, kind, reason);
                self.blame(worker);
            }
            Outcome::Done { result, took } => match self.admissible(id.unit, &result) {
                Ok(()) => self.completed(id, worker, result, took),
                Err(reason) => {
                    self.leases.release(id.unit);
                    self.attempt_failed(id, worker, "bad-report".to_owned(), reason);
                    self.blame(worker);
                }
            },
        }
        Verdict::Accepted
    }

    /// Whether a result has the shape that was asked for; workers are not trusted.
    fn admissible(&self, unit: Unit, result: &Done) -> Result<(), String> {
        let expect = |what: &str, want: usize, got: usize| {
            if want == got { Ok(()) } else { Err(format!("{got} {what} instead of {want}")) }
        };
        match (unit, result) {
            (Unit::Think(id), Done::Think(traces)) => {
                expect("traces", self.traces(id.iteration) as usize, traces.len())
            }
            (Unit::Render(_), Done::Render(_)) => Ok(()),
            (Unit::Score(_), Done::Score(leaves)) => {
                expect("scored leaves", self.spec.leaves as usize, leaves.len())?;
                let bad = leaves
                    .iter()
                    .flatten()
                    .find(|(_, score)| matches!(score, Score::Scored(value) if !value.is_finite()));
                match bad {
                    Some((name, _)) => Err(format!("component {name} is not a finite number")),
                    None => Ok(()),
                }
            }
            _ => Err(format!("a {} lease was answered with another stage's result", unit.stage())),
        }
    }

    fn completed(&mut self, id: LeaseId, worker: &WorkerId, result: Done, took: Millis) {
        self.leases.forget(id.unit);
        self.workers.succeeded(worker);
        self.commit(Record::Completed { id, worker: worker.clone(), result, took });
        match id.unit {
            Unit::Think(tree) => {
                let traces = self.state.trees.get(&tree).map_or(0, |tree| tree.subtrees.len());
                (0..traces as u32).for_each(|j| self.leases.ready(Unit::Render(tree.subtree(j))));
            }
            Unit::Render(id) => self.leases.ready(Unit::Score(id)),
            Unit::Score(id) => {
                if self.state.trees.get(&id.tree).is_some_and(super::Tree::settled) {
                    self.settled(id.tree.iteration);
                }
            }
        }
    }

    pub(super) fn settled(&mut self, iteration: u32) {
        if let Some(left) = self.unsettled.get_mut(&iteration) {
            *left = left.saturating_sub(1);
        }
    }

    /// Records a failed attempt; the unit waits out its backoff, or its tree is given up.
    pub(super) fn attempt_failed(
        &mut self,
        id: LeaseId,
        worker: &WorkerId,
        kind: String,
        reason: String,
    ) {
        let text = format!(
            "{} {} of {} on {worker}: {kind}: {reason}",
            id.unit.stage(),
            id.attempt,
            id.unit.place()
        );
        self.fail(&kind, text.clone());
        self.commit(Record::AttemptFailed { id, worker: worker.clone(), kind, reason });
        let failed = self.state.tries(id.unit).map_or(0, |tries| tries.failed);
        if failed >= self.spec.max_attempts {
            self.give_up(id.unit, format!("{failed} attempts failed; the last: {text}"));
            return;
        }
        let timing = self.spec.timing;
        let wait = timing.backoff.0.saturating_mul(1 << (failed.saturating_sub(1)).min(16));
        self.leases.delay(self.now.after(Millis(wait.min(timing.backoff_max.0))), id.unit);
    }

    fn give_up(&mut self, unit: Unit, reason: String) {
        let tree = unit.tree();
        let mut units = vec![Unit::Think(tree)];
        let traces = self.state.trees.get(&tree).map_or(0, |tree| tree.subtrees.len());
        for trace in 0..traces as u32 {
            units.extend([Unit::Render(tree.subtree(trace)), Unit::Score(tree.subtree(trace))]);
        }
        for unit in units {
            if let Some(live) = self.leases.live(unit).map(|live| live.worker.clone()) {
                self.workers.release(&live, unit);
            }
            self.leases.forget(unit);
        }
        self.commit(Record::GivenUp { tree, reason });
        self.settled(tree.iteration);
    }

    pub(super) fn expire_leases(&mut self) {
        while let Some(unit) = self.leases.expired(self.now) {
            let Some(live) = self.leases.release(unit) else { continue };
            self.workers.release(&live.worker, unit);
            self.blame(&live.worker);
            let id = LeaseId { unit, attempt: live.attempt };
            let reason = "the lease ran out before a report came".to_owned();
            self.attempt_failed(id, &live.worker, "lease-expired".to_owned(), reason);
        }
    }
}
