//! What is done once the records of a turn are durable.

use super::Driver;
use crate::keeper::{CheckpointJob, Job};
use duet_core::scheduler::Effect;
use duet_core::work::Assignment;
use duet_core::{PolicyVersion, WorkerId};
use std::collections::BTreeMap;

impl Driver {
    pub(super) async fn carry_out(&mut self, effects: Vec<Effect>) {
        // A worker that asked twice within a turn was given two things; only the last one counts.
        let mut assigned: BTreeMap<WorkerId, (u64, Assignment)> = BTreeMap::new();
        for effect in effects {
            match effect {
                Effect::Assign { worker, session, assignment } => {
                    assigned.insert(worker, (session, assignment));
                }
                Effect::AbortTrainers { epoch, workers, reason } => {
                    tracing::warn!(%epoch, reason, "trainer group given up");
                    self.aborted.extend(workers.into_iter().map(|worker| (worker, epoch)));
                }
                Effect::WriteCheckpoint { version, shards, weights, snapshot } => {
                    let job = CheckpointJob {
                        version,
                        shards,
                        weights,
                        journal_position: self.journal.position(),
                        generation: self.journal.generation(),
                        needed: self.weights_in_use(),
                        state: snapshot,
                    };
                    self.give(Job::Checkpoint(Box::new(job))).await;
                }
                Effect::WriteLineage(lineage) => {
                    self.board.committed(&lineage);
                    self.give(Job::Lineage(lineage.into())).await;
                }
                Effect::Collect(artifacts) => self.give(Job::Collect(artifacts)).await,
                Effect::Failed(failure) => {
                    tracing::warn!(kind = failure.kind, text = failure.text, "failed");
                }
                Effect::Finished(reason) => {
                    tracing::info!(?reason, version = %self.version(), "the run is over");
                    self.ending.finished(self.clock.now(), reason);
                }
            }
        }
        for (worker, (session, assignment)) in assigned {
            self.waiting.assign(&worker, session, assignment);
        }
    }

    /// Gives the keeper a job; waits while its queue is full, which bounds how much of a run is not
    /// yet in its tables.
    async fn give(&mut self, job: Job) {
        if self.keeper.jobs.send(job).await.is_err() {
            let text = "the task that writes checkpoints and tables has ended".to_owned();
            self.board.failed(self.clock.now(), "keeper", text);
        }
    }

    fn version(&self) -> PolicyVersion {
        self.scheduler.state().version
    }

    /// Keys of weights that the scheduler may still hand out.
    fn weights_in_use(&self) -> std::collections::BTreeSet<String> {
        let steps = self.scheduler.state().steps.values();
        let weights = steps.flat_map(|step| [&step.weights.llm, &step.weights.dit]);
        weights.flatten().map(|artifact| artifact.key.clone()).collect()
    }
}
