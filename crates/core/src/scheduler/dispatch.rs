//! Matching of waiting workers with units, and farewells.

use super::api::Effect;
use super::{Scheduler, Verdict};
use crate::mutation::Mutation;
use crate::seed::{Purpose, Seed};
use crate::work::{
    Assignment, Lease, LeaseId, PromptRow, RenderWork, ScoreWork, ThinkWork, Unit, Window, Work,
};
use crate::{Millis, Role, TreeId, WorkerId};

impl Scheduler {
    /// J of an iteration: a phase that does not train the LLM needs one trace only.
    pub(super) fn traces(&self, iteration: u32) -> u32 {
        if self.state.gates(&self.spec, iteration).llm == 0.0 { 1 } else { self.spec.traces }
    }

    /// The window of an iteration: a phase that does not train the DiT samples by the plain ODE.
    pub(super) fn window(&self, iteration: u32) -> Window {
        if self.state.gates(&self.spec, iteration).dit == 0.0 {
            return Window::default();
        }
        self.spec.window.window(&self.root, iteration, self.spec.steps)
    }

    pub(super) fn tree_seed(&self, tree: TreeId) -> Seed {
        self.root.derive(Purpose::Tokens, &[u64::from(tree.iteration), u64::from(tree.index)])
    }

    /// Gives ready units to idle workers until one or the other runs out; then what is late.
    pub(super) fn dispatch(&mut self) {
        while let Some(worker) = self.workers.next_drained() {
            self.dismiss(&worker, "drained");
        }
        if self.state.paused || self.stopping {
            return;
        }
        for role in [Role::Rollout, Role::Reward] {
            loop {
                let next = (self.workers.idle(role).next().cloned(), self.leases.next(role));
                if let (Some(worker), Some(unit)) = next {
                    self.assign(&worker, unit);
                } else if let Some(unit) = self.late(role) {
                    self.take_over(unit);
                } else {
                    break;
                }
            }
        }
    }

    /// The lease that has been late for the longest time, when a worker idles who could do it.
    fn late(&self, role: Role) -> Option<Unit> {
        self.workers.idle(role).next()?;
        let (at, unit) = self.leases.next_late(role)?;
        (at <= self.now).then_some(unit)
    }

    /// When a lease becomes late that an idle worker could take over.
    pub(super) fn next_late(&self) -> Option<Millis> {
        if self.state.paused || self.stopping || self.finished.is_some() {
            return None;
        }
        let roles = [Role::Rollout, Role::Reward].into_iter();
        let idle = roles.filter(|role| self.workers.idle(*role).next().is_some());
        idle.filter_map(|role| self.leases.next_late(role)).map(|(at, _)| at).min()
    }

    fn take_over(&mut self, unit: Unit) {
        let Some(live) = self.leases.live(unit).cloned() else { return };
        self.workers.release(&live.worker, unit);
        let id = LeaseId { unit, attempt: live.attempt };
        let took = self.now.since(live.granted).0;
        let reason = format!("late after {took} ms while others idle");
        self.attempt_failed(id, &live.worker, "straggler", reason, true);
    }

    /// Gives a unit to a worker, or first the policy version it must hold for it (DU-12).
    fn assign(&mut self, worker: &WorkerId, unit: Unit) {
        let version = self.sampling_version(unit.tree().iteration);
        let holds = Mutation::SkipVersionCheck.on()
            || self.workers.get(worker).is_some_and(|w| w.versions.contains(&version));
        let assignment = match self.state.weights(version) {
            Some(weights) if !holds && !matches!(unit, Unit::Score(_)) => {
                Assignment::Publish(weights)
            }
            _ => {
                let span = self.lease_span(unit);
                let Some(work) = self.work(unit) else {
                    self.leases.forget(unit);
                    let place = unit.place();
                    self.halt(format!("nothing is known of {place}: not this run's journal?"));
                    return;
                };
                let id = self.grant(unit, worker, span);
                Assignment::Lease(Lease { id, expires_in: span, work })
            }
        };
        self.send(worker, assignment);
    }

    /// Answers a worker's waiting poll.
    pub(super) fn send(&mut self, worker: &WorkerId, assignment: Assignment) {
        let Some(session) = self.workers.get(worker).map(|w| w.session) else { return };
        self.workers.change(worker, |worker| worker.waiting = false);
        let worker = worker.clone();
        self.output.effects.push(Effect::Assign { worker, session, assignment });
    }

    pub(super) fn lease_span(&self, unit: Unit) -> Millis {
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

    /// The run is over: everybody who asks is sent home.
    pub(super) fn dismiss_all(&mut self) {
        for role in [Role::Rollout, Role::Reward, Role::Trainer] {
            let waiting: Vec<WorkerId> = self.workers.waiting(role).cloned().collect();
            waiting.iter().for_each(|id| self.dismiss(id, "the run is over"));
        }
    }

    fn dismiss(&mut self, id: &WorkerId, reason: &str) {
        self.workers.change(id, |worker| worker.leaving = true);
        self.send(id, Assignment::Leave { reason: reason.to_owned() });
    }

    /// Whether an event's verdict means that the worker must introduce itself again.
    pub fn must_register(verdict: &Verdict) -> bool {
        *verdict == Verdict::Unknown
    }
}
