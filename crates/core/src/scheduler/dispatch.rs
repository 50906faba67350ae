//! Matching of waiting workers with units, and farewells.

use super::api::Effect;
use super::{Scheduler, Verdict};
use crate::seed::{Purpose, Seed};
use crate::work::{
    Assignment, Lease, PromptRow, RenderWork, ScoreWork, ThinkWork, Unit, Window, Work,
};
use crate::{Millis, Role, TreeId, WorkerId};

impl Scheduler {
    /// J of an iteration: a phase that does not train the LLM needs one trace only.
    pub(super) fn traces(&self, iteration: u32) -> u32 {
        if self.spec.schedule.gates(iteration).llm == 0.0 { 1 } else { self.spec.traces }
    }

    /// The window of an iteration: a phase that does not train the DiT samples by the plain ODE.
    pub(super) fn window(&self, iteration: u32) -> Window {
        if self.spec.schedule.gates(iteration).dit == 0.0 {
            return Window::default();
        }
        self.spec.window.window(&self.root, iteration, self.spec.steps)
    }

    pub(super) fn tree_seed(&self, tree: TreeId) -> Seed {
        self.root.derive(Purpose::Tokens, &[u64::from(tree.iteration), u64::from(tree.index)])
    }

    /// Gives ready units to waiting workers until one or the other runs out.
    pub(super) fn dispatch(&mut self) {
        self.dismiss_drained();
        if self.is_paused() || self.stopping {
            return;
        }
        for role in [Role::Rollout, Role::Reward] {
            while self.leases.has_ready(role) {
                let Some(worker) = self.next_idle(role) else { break };
                let Some(unit) = self.leases.next(role) else { break };
                self.assign(&worker, unit);
            }
        }
    }

    fn next_idle(&self, role: Role) -> Option<WorkerId> {
        let able = |id: &&WorkerId| {
            self.workers.get(id).is_some_and(|w| !w.quarantined && !w.draining && !w.leaving)
        };
        self.workers.waiting(role).find(able).cloned()
    }

    /// Gives a unit to a worker, or first the policy version it must hold for it (DU-12).
    fn assign(&mut self, worker: &WorkerId, unit: Unit) {
        let version = self.sampling_version(unit.tree().iteration);
        let holds = self.workers.get(worker).is_some_and(|w| w.versions.contains(&version));
        let assignment = match self.state.weights(version) {
            Some(weights) if !holds && !matches!(unit, Unit::Score(_)) => {
                Assignment::Publish(weights)
            }
            _ => {
                let span = self.lease_span(unit);
                let Some(work) = self.work(unit) else {
                    // Only possible if the journal belongs to another data set; nothing to lease.
                    self.leases.forget(unit);
                    return;
                };
                let id = self.grant(unit, worker, self.now.after(span));
                Assignment::Lease(Lease { id, expires_in: span, work })
            }
        };
        self.send(worker, assignment);
    }

    /// Answers a worker's waiting poll.
    pub(super) fn send(&mut self, worker: &WorkerId, assignment: Assignment) {
        let Some(session) = self.workers.get(worker).map(|w| w.session) else { return };
        self.workers.unwait(worker);
        let worker = worker.clone();
        self.output.effects.push(Effect::Assign { worker, session, assignment });
    }

    fn lease_span(&self, unit: Unit) -> Millis {
        let timing = self.spec.timing;
        match unit {
            Unit::Think(_) => timing.think,
            Unit::Render(_) => timing.render,
            Unit::Score(_) => timing.score,
        }
    }

    fn prompt(&self, tree: TreeId) -> Option<PromptRow> {
        self.prompts.get(self.state.trees.get(&tree)?.row).cloned()
    }

    fn work(&self, unit: Unit) -> Option<Work> {
        let tree = unit.tree();
        let weights = self.state.weights(self.sampling_version(tree.iteration))?;
        let prompt = self.prompt(tree)?;
        Some(match unit {
            Unit::Think(tree) => Work::Think(ThinkWork {
                weights,
                prompt,
                traces: self.traces(tree.iteration),
                seed: self.tree_seed(tree),
            }),
            Unit::Render(id) => Work::Render(RenderWork {
                weights,
                trace: self.state.subtree(id)?.trace.artifact.clone(),
                leaves: self.spec.leaves,
                window: self.window(tree.iteration),
                seed: self.root.derive(
                    Purpose::InitialNoise,
                    &[u64::from(tree.iteration), u64::from(tree.index), u64::from(id.trace)],
                ),
            }),
            Unit::Score(id) => {
                let subtree = self.state.subtree(id)?;
                Work::Score(ScoreWork {
                    prompt,
                    refined_prompt: subtree.trace.refined_prompt.clone(),
                    render: subtree.render.clone()?,
                    leaves: self.spec.leaves,
                })
            }
        })
    }

    /// Sends drained workers home once they ask for work, that is: once they hold nothing.
    fn dismiss_drained(&mut self) {
        let drained: Vec<WorkerId> = self
            .workers
            .iter()
            .filter(|(_, w)| w.draining && w.waiting)
            .map(|(id, _)| id.clone())
            .collect();
        drained.iter().for_each(|id| self.dismiss(id, "drained"));
    }

    /// The run is over: everybody who asks is sent home.
    pub(super) fn dismiss_all(&mut self) {
        for role in [Role::Rollout, Role::Reward, Role::Trainer] {
            let waiting: Vec<WorkerId> = self.workers.waiting(role).cloned().collect();
            waiting.iter().for_each(|id| self.dismiss(id, "the run is over"));
        }
    }

    fn dismiss(&mut self, id: &WorkerId, reason: &str) {
        if let Some(worker) = self.workers.get_mut(id) {
            worker.leaving = true;
        }
        self.send(id, Assignment::Leave { reason: reason.to_owned() });
    }

    /// Whether an event's verdict means that the worker must introduce itself again.
    pub fn must_register(verdict: &Verdict) -> bool {
        *verdict == Verdict::Unknown
    }
}
