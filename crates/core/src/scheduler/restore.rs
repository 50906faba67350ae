//! What is not in the journal because it follows from it.

use super::Scheduler;
use crate::WorkerId;
use crate::mutation::Mutation;
use crate::seed::{Purpose, Seed};
use crate::work::Unit;
use rand::Rng;

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
                Some(tries) if tries.given > tries.dead => {
                    let worker = tries.worker.clone().unwrap_or_else(|| WorkerId::from(""));
                    self.leases.orphans.entry(worker).or_default().insert(unit);
                }
                _ => self.leases.ready(unit),
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
