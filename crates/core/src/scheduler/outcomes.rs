//! What becomes of leases: reports of every kind, deadlines, retries and trees given up.

use super::leases::Live;
use super::record::Record;
use super::{Scheduler, Verdict};
use crate::mutation::Mutation;
use crate::work::{Done, LeaseId, Outcome, Score, Unit};
use crate::{Millis, WorkerId};

/// A unit is given out at most this many times its allowed failures, whatever became of the tries.
const LOST_FACTOR: u32 = 8;
/// Tries that come to nothing without a failure before the next one has to wait.
const PATIENCE: u32 = 3;

impl Scheduler {
    pub(super) fn lease_reported(
        &mut self,
        worker: &WorkerId,
        id: LeaseId,
        outcome: Outcome,
    ) -> Verdict {
        let Some(tries) = self.state.tries(id.unit) else { return Verdict::Stale };
        let last = tries.given == id.attempt.0 && tries.dead != id.attempt.0;
        let theirs = tries.worker.as_ref() == Some(worker);
        if !(last && theirs || Mutation::AcceptStale.on()) {
            return Verdict::Stale;
        }
        if self.state.is_done(id.unit) && !Mutation::AcceptStale.on() {
            return Verdict::Duplicate;
        }
        self.workers.release(worker, id.unit);
        match outcome {
            Outcome::HandedBack => {
                if self.leases.release(id.unit).is_none() {
                    return Verdict::Duplicate;
                }
                self.requeue(id.unit);
            }
            Outcome::Failed { kind, reason } => {
                self.blame(worker, Some(id.unit.tree()));
                self.attempt_failed(id, worker, &kind, reason, false);
            }
            Outcome::Done { result, took } => match self.admissible(id.unit, &result) {
                Ok(()) => self.completed(id, worker, result, took),
                Err(reason) => {
                    self.blame(worker, Some(id.unit.tree()));
                    self.attempt_failed(id, worker, "bad-report", reason, false);
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
        if let Some(live) = self.leases.forget(id.unit) {
            self.leases.took(id.unit, self.now.since(live.granted));
        }
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

    fn settled(&mut self, iteration: u32) {
        if let Some(left) = self.unsettled.get_mut(&iteration) {
            *left = left.saturating_sub(1);
        }
    }

    /// Records an attempt that came to nothing. `lost`: through its worker, not through the unit.
    /// The unit is tried again, after a backoff when it failed, or its tree is given up.
    pub(super) fn attempt_failed(
        &mut self,
        id: LeaseId,
        worker: &WorkerId,
        kind: &str,
        reason: String,
        lost: bool,
    ) {
        let text = format!(
            "{} {} of {} on {worker}: {kind}: {reason}",
            id.unit.stage(),
            id.attempt,
            id.unit.place()
        );
        self.fail(kind, text.clone());
        self.leases.forget(id.unit);
        let kind = kind.to_owned();
        self.commit(Record::AttemptFailed { id, worker: worker.clone(), kind, reason, lost });
        let tries = self.state.tries(id.unit).cloned().unwrap_or_default();
        let failed = tries.failed;
        if self.is_spent(id.unit) {
            let given = tries.given;
            let text = format!("{given} attempts, {failed} of them failed; the last: {text}");
            self.give_up(id.unit, text);
        } else if lost {
            self.requeue(id.unit);
        } else {
            self.retry_after(self.backoff(failed), id.unit);
        }
    }

    /// Whether a unit has had all its attempts. Bounded also when none of them failed: a worker
    /// that takes leases and forgets them must not keep a tree in the air for ever.
    pub(super) fn is_spent(&self, unit: Unit) -> bool {
        let limit = self.spec.max_attempts;
        let Some(tries) = self.state.tries(unit) else { return false };
        let spent = tries.failed >= limit || tries.given >= limit.saturating_mul(LOST_FACTOR);
        spent && !Mutation::NeverGiveUp.on()
    }

    /// Queues a unit whose attempt ended without a failure of its own.
    pub(super) fn requeue(&mut self, unit: Unit) {
        let given = self.state.tries(unit).map_or(0, |tries| tries.given);
        if self.is_spent(unit) {
            self.give_up(unit, format!("{given} attempts at {} came to nothing", unit.stage()));
        } else {
            self.retry_after(self.backoff(given.saturating_sub(PATIENCE)), unit);
        }
    }

    fn retry_after(&mut self, wait: Millis, unit: Unit) {
        if wait.0 == 0 || Mutation::ForgetBackoff.on() {
            self.leases.ready(unit);
        } else {
            self.leases.delay(self.now.after(wait), unit);
        }
    }

    /// How long to wait after so many failures: nothing after none, then doubling to a limit.
    pub(super) fn backoff(&self, failures: u32) -> Millis {
        let timing = self.spec.timing;
        let Some(doublings) = failures.checked_sub(1) else { return Millis(0) };
        let wait = timing.backoff.0.saturating_mul(1 << doublings.min(16));
        Millis(wait.min(timing.backoff_max.0))
    }

    pub(super) fn give_up(&mut self, unit: Unit, reason: String) {
        let tree = unit.tree();
        let mut units = vec![Unit::Think(tree)];
        let traces = self.state.trees.get(&tree).map_or(0, |tree| tree.subtrees.len());
        for trace in 0..traces as u32 {
            units.extend([Unit::Render(tree.subtree(trace)), Unit::Score(tree.subtree(trace))]);
        }
        for unit in units {
            if let Some(live) = self.leases.forget(unit) {
                self.workers.release(&live.worker, unit);
            }
        }
        self.commit(Record::GivenUp { tree, reason });
        self.settled(tree.iteration);
    }

    pub(super) fn expire_leases(&mut self) {
        while let Some(unit) = self.leases.expired(self.now) {
            let Some(live) = self.leases.release(unit) else { continue };
            self.workers.release(&live.worker, unit);
            self.blame(&live.worker, Some(unit.tree()));
            let id = LeaseId { unit, attempt: live.attempt };
            let reason = "the lease ran out before a report came".to_owned();
            self.attempt_failed(id, &live.worker, "lease-expired", reason, true);
        }
    }

    /// Grants a unit to a worker; the record makes sure that the attempt never repeats.
    pub(super) fn grant(&mut self, unit: Unit, worker: &WorkerId, span: Millis) -> LeaseId {
        let given = self.state.tries(unit).map_or(0, |tries| tries.given);
        let attempt = crate::Attempt(given + u32::from(!Mutation::ReuseAttempt.on() || given == 0));
        let id = LeaseId { unit, attempt };
        let session = self.workers.get(worker).map_or(0, |worker| worker.session);
        self.commit(Record::Leased { id, worker: worker.clone(), session });
        let (granted, expires) = (self.now, self.now.after(span));
        let live = Live { worker: worker.clone(), attempt, granted, expires };
        if let Err(violation) = self.leases.grant(unit, live) {
            self.halt(violation.to_string());
        }
        self.workers.hold(worker, unit);
        id
    }
}
