//! What is not in the journal because it follows from it.

use super::Scheduler;
use super::leases::Live;
use crate::mutation::Mutation;
use crate::seed::{Purpose, Seed};
use crate::work::{LeaseId, Unit};
use crate::{Attempt, WorkerId};
use rand::Rng;

/// Marks the seeds of dynamic sampling apart from those of epochs.
const EXTRA: u64 = 1;

impl Scheduler {
    /// The data set rows of an iteration: the run's prompts in an order shuffled anew each epoch. A
    /// pure function of seed, iteration, P and the size of the data set; there is no cursor to lose.
    pub(super) fn rows(&mut self, iteration: u32) -> Vec<usize> {
        let p = u64::from(self.spec.prompts_per_iteration);
        let n = self.prompts.len() as u64;
        let first = u64::from(iteration) * p;
        (first..first + p)
            .map(|position| {
                let epoch = position / n;
                let root = self.root;
                let order = self.epoch_order.entry(epoch).or_insert_with(|| {
                    shuffled(&root.derive(Purpose::Prompts, &[epoch]), n as usize)
                });
                order[(position % n) as usize]
            })
            .collect()
    }

    /// Rows of the next `trees` trees beyond an iteration's own: another order of the data set for
    /// each iteration, without the rows that it has, over again when all have been taken.
    pub(super) fn extra_rows(&self, iteration: u32, trees: u32) -> Vec<usize> {
        let own = self.state.trees.range(super::iteration_range(iteration));
        let p = self.spec.prompts_per_iteration as usize;
        let have: Vec<usize> = own.map(|(_, tree)| tree.row).collect();
        let (first, drawn) = have.split_at(p.min(have.len()));
        let seed = self.root.derive(Purpose::Prompts, &[u64::from(iteration), EXTRA]);
        let order: Vec<usize> = { shuffled(&seed, self.prompts.len()).into_iter() }
            .filter(|row| !first.contains(row))
            .collect();
        let all = if order.is_empty() { first.to_vec() } else { order };
        all.into_iter().cycle().skip(drawn.len()).take(trees as usize).collect()
    }

    /// Recomputes what is derived from the durable state: units that are ready, that may still be
    /// held from before, and trees that are not settled.
    pub(super) fn rebuild(&mut self) {
        let mut units = Vec::new();
        for (id, tree) in &self.state.trees {
            if u64::from(id.iteration) < self.state.version.0 || tree.settled() {
                continue;
            }
            *self.unsettled.entry(id.iteration).or_default() += 1;
            if tree.subtrees.is_empty() {
                units.push(Unit::Think(*id));
            }
            for (trace, subtree) in (0u32..).zip(&tree.subtrees) {
                let id = id.subtree(trace);
                match (&subtree.render, &subtree.scores) {
                    (None, _) => units.push(Unit::Render(id)),
                    (Some(_), None) if Mutation::ForgetOnRestart.on() => {}
                    (Some(_), None) => units.push(Unit::Score(id)),
                    (Some(_), Some(_)) => {}
                }
            }
        }
        for unit in units {
            match self.state.tries(unit) {
                _ if self.is_spent(unit) => self.leases.spent.push(unit),
                Some(tries) if tries.given > tries.dead => {
                    let worker = tries.worker.clone().unwrap_or_else(|| WorkerId::from(""));
                    self.leases.orphans.entry(worker).or_default().insert(unit);
                }
                _ => self.leases.ready(unit),
            }
        }
    }

    /// Gives up trees whose last attempt is in the journal and whose end is not: the journal may end
    /// between two records of one decision.
    pub(super) fn finish_decisions(&mut self) {
        for unit in std::mem::take(&mut self.leases.spent) {
            if !self.state.is_done(unit) {
                let reason = format!("{} had all its attempts before a restart", unit.stage());
                self.give_up(unit, reason);
            }
        }
    }

    /// Takes up the leases from before a restart: their workers may still be at it, so they have
    /// one heartbeat's time to come back before anybody else gets the unit.
    pub(super) fn adopt_orphans(&mut self) {
        let expires = self.now.after(self.spec.timing.heartbeat_timeout);
        let orphans: Vec<(WorkerId, Unit)> = { self.leases.orphans.iter() }
            .flat_map(|(worker, units)| units.iter().map(|unit| (worker.clone(), *unit)))
            .collect();
        for (worker, unit) in orphans {
            let attempt = Attempt(self.state.tries(unit).map_or(0, |tries| tries.given));
            let live = Live { worker, attempt, granted: self.now, expires };
            if let Err(violation) = self.leases.grant(unit, live) {
                self.halt(violation.to_string());
            }
        }
    }

    /// A worker of before the restart is back: the same process goes on, a new one has lost all.
    pub(super) fn claim_orphans(&mut self, worker: &WorkerId, session: u64) {
        for unit in self.leases.orphans.remove(worker).unwrap_or_default() {
            let Some(live) = self.leases.live(unit).filter(|live| live.worker == *worker) else {
                continue;
            };
            let id = LeaseId { unit, attempt: live.attempt };
            let same = self.state.tries(unit).is_some_and(|tries| tries.session == session);
            if same {
                self.leases.extend(unit, self.now.after(self.lease_span(unit)));
                self.workers.hold(worker, unit);
            } else {
                let reason = "another process took the worker's name".to_owned();
                self.attempt_failed(id, worker, "worker-restarted", reason, true);
            }
        }
    }
}

fn shuffled(seed: &Seed, n: usize) -> Vec<usize> {
    let mut rng = seed.rng();
    let mut order: Vec<usize> = (0..n).collect();
    for i in (1..n).rev() {
        order.swap(i, (rng.next_u64() % (i as u64 + 1)) as usize);
    }
    order
}
