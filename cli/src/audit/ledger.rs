//! The journal, read record by record by rules of its own: not by the scheduler's code, which wrote it.

use duet_core::scheduler::{Record, State};
use duet_core::work::{Done, LeaseId, Unit};
use duet_core::{Generation, TreeId, WorkerId};
use std::collections::{BTreeMap, BTreeSet};

/// What is known of a unit of work.
#[derive(Clone, Debug, Default)]
pub struct Entry {
    /// The newest attempt that was given out.
    pub given: u32,
    /// Who holds it now.
    live: Option<WorkerId>,
    /// The attempt that did it, and who.
    pub done: Option<(u32, WorkerId)>,
}

/// What the journal says, and where it contradicts itself.
#[derive(Debug, Default)]
pub struct Ledger {
    /// Units of work by name.
    pub units: BTreeMap<Unit, Entry>,
    /// Traces of each tree that has some.
    pub traces: BTreeMap<TreeId, u32>,
    /// Trees that were given up.
    pub given_up: BTreeSet<TreeId>,
    /// Trees that dynamic sampling added, by iteration.
    pub added: BTreeMap<u32, u32>,
    /// Digest of the weights by version.
    pub digests: BTreeMap<u64, String>,
    /// Iterations admitted.
    pub admitted: u32,
    /// Committed steps.
    pub version: u64,
    /// Version of the newest checkpoint.
    pub checkpoint: Option<u64>,
    /// Coordinators that took the journal over, the first one counted.
    pub coordinators: u64,
    /// Trainer groups that were formed.
    pub groups: u64,
    /// Attempts given out.
    pub leases: u64,
    /// Attempts that failed by the unit's or worker's own fault.
    pub failed: u64,
    /// Attempts lost with their worker, or too slow.
    pub lost: u64,
    /// Attempts handed back, or whose assignment never arrived.
    pub handed_back: u64,
    /// Attempts in flight when a coordinator took over.
    pub in_flight: u64,
    /// Attempts given out for what was done already: work done again for nothing.
    pub redone: u64,
    /// Failed attempts by kind.
    pub kinds: BTreeMap<String, u64>,
    /// Contradictions.
    pub violations: Vec<String>,
}

impl Ledger {
    /// A ledger that begins with a state, where the journal does not go back to the run's beginning.
    pub fn from_state(state: &State) -> Ledger {
        let mut ledger = Ledger {
            admitted: state.admitted,
            version: state.version.0,
            checkpoint: state.checkpoint.as_ref().map(|(version, _)| version.0),
            coordinators: state.generation.0,
            groups: state.epoch.0,
            kinds: state.totals.failures.clone(),
            ..Ledger::default()
        };
        for step in state.steps.values() {
            ledger.digests.insert(step.weights.version.0, step.weights.digest.to_string());
        }
        for (id, tree) in &state.trees {
            if matches!(tree.fate, Some(duet_core::scheduler::Fate::Failed(_))) {
                ledger.given_up.insert(*id);
            }
            ledger.known(Unit::Think(*id), &tree.think_tries, !tree.subtrees.is_empty());
            if !tree.subtrees.is_empty() {
                ledger.traces.insert(*id, tree.subtrees.len() as u32);
            }
            for (trace, subtree) in (0u32..).zip(&tree.subtrees) {
                let id = id.subtree(trace);
                ledger.known(Unit::Render(id), &subtree.render_tries, subtree.render.is_some());
                ledger.known(Unit::Score(id), &subtree.score_tries, subtree.scores.is_some());
            }
        }
        ledger
    }

    fn known(&mut self, unit: Unit, tries: &duet_core::scheduler::Tries, done: bool) {
        let worker = tries.worker.clone().unwrap_or_else(|| WorkerId::from(""));
        let mut entry = Entry { given: tries.given, ..Entry::default() };
        if done {
            entry.done = Some((tries.given, worker));
        } else if tries.given > tries.dead {
            entry.live = Some(worker);
        }
        self.units.insert(unit, entry);
    }

    fn wrong(&mut self, text: String) {
        self.violations.push(text);
    }

    /// A batch of records begins: nobody writes once a later coordinator has taken over.
    pub fn batch(&mut self, number: u64, generation: Generation) {
        if generation.0 < self.coordinators {
            let newer = self.coordinators;
            self.wrong(format!("segment {number} is of {generation}, after generation {newer}"));
        }
    }

    /// Takes the next record.
    pub fn take(&mut self, record: &Record) {
        match record {
            Record::Opened { generation } => {
                if generation.0 <= self.coordinators && self.coordinators > 0 {
                    let before = self.coordinators;
                    self.wrong(format!(
                        "{generation} opened the journal after generation {before}"
                    ));
                }
                self.coordinators = generation.0;
                self.in_flight += self.units.values().filter(|e| e.live.is_some()).count() as u64;
            }
            Record::Admitted { iteration } => {
                if *iteration != self.admitted {
                    let next = self.admitted;
                    self.wrong(format!("iteration {iteration} was admitted where {next} was due"));
                }
                self.admitted = self.admitted.max(iteration + 1);
            }
            Record::Extended { iteration, trees } => {
                if *iteration >= self.admitted || u64::from(*iteration) < self.version {
                    self.wrong(format!("iteration {iteration} was extended, but it is not open"));
                }
                *self.added.entry(*iteration).or_default() += trees;
            }
            Record::Leased { id, worker, .. } => self.leased(*id, worker),
            Record::Completed { id, worker, result, .. } => self.completed(*id, worker, result),
            Record::AttemptFailed { id, worker, kind, lost, .. } => {
                *self.kinds.entry(kind.clone()).or_default() += 1;
                if *lost {
                    self.lost += 1
                } else {
                    self.failed += 1
                }
                if !self.holds(id, worker) {
                    self.wrong(format!("{} failed at {worker}, which did not hold it", name(id)));
                }
                self.units.entry(id.unit).or_default().live = None;
            }
            Record::GivenUp { tree, .. } => {
                if !self.given_up.insert(*tree) {
                    self.wrong(format!("tree {tree} was given up twice"));
                }
            }
            Record::EpochStarted { epoch, .. } => self.groups = epoch.0,
            Record::StepCommitted { iteration, weights, .. } => {
                self.committed(*iteration, weights.version.0);
                self.digests.insert(weights.version.0, weights.digest.to_string());
            }
            Record::Checkpointed { version, .. } => {
                if version.0 > self.version {
                    self.wrong(format!("a checkpoint of {version} before that step was committed"));
                }
                self.checkpoint = Some(version.0);
            }
            Record::Retaken { iteration, .. } => {
                if u64::from(*iteration) >= self.version {
                    self.wrong(format!("step {iteration} was repeated before it was committed"));
                }
            }
            Record::Paused(_) | Record::Stopping(_) => {}
        }
    }

    fn holds(&self, id: &LeaseId, worker: &WorkerId) -> bool {
        let entry = self.units.get(&id.unit);
        entry.is_some_and(|e| e.given == id.attempt.0 && e.live.as_ref() == Some(worker))
    }

    fn leased(&mut self, id: LeaseId, worker: &WorkerId) {
        self.leases += 1;
        let entry = self.units.entry(id.unit).or_default();
        let (given, done) = (entry.given, entry.done.is_some());
        // A lease that ended without a record was handed back, or never reached its worker.
        self.handed_back += u64::from(entry.live.is_some());
        entry.given = id.attempt.0;
        entry.live = Some(worker.clone());
        if id.attempt.0 <= given {
            self.wrong(format!("{} was given out twice", name(&id)));
        }
        if done {
            self.redone += 1;
            self.wrong(format!("{} was given out although it was done", name(&id)));
        }
        if self.given_up.contains(&id.unit.tree()) {
            self.wrong(format!("{} was given out although its tree was given up", name(&id)));
        }
    }

    fn completed(&mut self, id: LeaseId, worker: &WorkerId, result: &Done) {
        if !self.holds(&id, worker) {
            self.wrong(format!("{} was done by {worker}, which did not hold it", name(&id)));
        }
        let entry = self.units.entry(id.unit).or_default();
        entry.live = None;
        if entry.done.replace((id.attempt.0, worker.clone())).is_some() {
            self.wrong(format!("{} was done twice", name(&id)));
        }
        if let (Unit::Think(tree), Done::Think(traces)) = (id.unit, result) {
            self.traces.insert(tree, traces.len() as u32);
        }
    }

    fn committed(&mut self, iteration: u32, to: u64) {
        if u64::from(iteration) != self.version || to != self.version + 1 {
            let from = self.version;
            self.wrong(format!("step {iteration} went from version {from} to version {to}"));
        }
        self.version = to;
        let trees: BTreeSet<TreeId> = { self.units.keys() }
            .map(Unit::tree)
            .filter(|tree| tree.iteration == iteration && !self.given_up.contains(tree))
            .collect();
        let open: Vec<String> = { trees.into_iter() }
            .flat_map(|tree| self.work_of(tree))
            .filter(|unit| self.units.get(unit).is_none_or(|entry| entry.done.is_none()))
            .map(|unit| format!("{} of {}", unit.stage(), unit.place()))
            .collect();
        for unit in open {
            self.wrong(format!("step {iteration} was committed before {unit} was done"));
        }
    }

    /// All work that a tree needs, as far as its traces are known.
    pub fn work_of(&self, tree: TreeId) -> Vec<Unit> {
        let traces = 0..self.traces.get(&tree).copied().unwrap_or(0);
        let below = traces.map(|trace| tree.subtree(trace));
        let below = below.flat_map(|subtree| [Unit::Render(subtree), Unit::Score(subtree)]);
        std::iter::once(Unit::Think(tree)).chain(below).collect()
    }

    /// Trees of iterations that are not committed yet.
    pub fn trees_in_flight(&self) -> usize {
        let trees: BTreeSet<TreeId> = self.units.keys().map(Unit::tree).collect();
        trees.iter().filter(|tree| u64::from(tree.iteration) >= self.version).count()
    }
}

fn name(id: &LeaseId) -> String {
    format!("{} of {} {}", id.attempt, id.unit.stage(), id.unit.place())
}

#[cfg(test)]
mod tests {
    use super::*;
    use duet_core::work::{Finish, Trace, Weights};
    use duet_core::{ArtifactRef, Attempt, Digest, Generation, Millis, PolicyVersion};

    fn unit() -> Unit {
        Unit::Think(TreeId { iteration: 0, index: 0 })
    }

    fn id(attempt: u32) -> LeaseId {
        LeaseId { unit: unit(), attempt: Attempt(attempt) }
    }

    fn leased(attempt: u32, worker: &str) -> Record {
        Record::Leased { id: id(attempt), worker: worker.into(), session: 1 }
    }

    fn completed(attempt: u32, worker: &str) -> Record {
        done(attempt, worker, Vec::new())
    }

    fn done(attempt: u32, worker: &str, traces: Vec<Trace>) -> Record {
        let (worker, result) = (worker.into(), Done::Think(traces));
        Record::Completed { id: id(attempt), worker, result, took: Millis(1) }
    }

    fn trace() -> Trace {
        Trace {
            artifact: ArtifactRef { key: "k".to_owned(), digest: Digest([0; 32]), bytes: 1 },
            text: String::new(),
            refined_prompt: String::new(),
            well_formed: true,
            tokens: 1,
            finish: Finish::Stop,
        }
    }

    fn step(iteration: u32, version: u64) -> Record {
        let version = PolicyVersion(version);
        let weights = Weights { version, llm: None, dit: None, digest: Digest([1; 32]) };
        Record::StepCommitted { iteration, weights, metrics: BTreeMap::new() }
    }

    fn audit(records: &[Record]) -> Ledger {
        let mut ledger = Ledger::default();
        ledger.take(&Record::Opened { generation: Generation(1) });
        ledger.take(&Record::Admitted { iteration: 0 });
        records.iter().for_each(|record| ledger.take(record));
        ledger
    }

    #[test]
    fn work_that_is_given_out_again_is_counted_by_cause() {
        let lost = |attempt, lost| Record::AttemptFailed {
            id: id(attempt),
            worker: "a".into(),
            kind: "worker-lost".to_owned(),
            reason: String::new(),
            lost,
        };
        let opened = Record::Opened { generation: Generation(2) };
        let ledger = audit(&[
            leased(1, "a"),
            lost(1, true),
            leased(2, "a"),
            lost(2, false),
            leased(3, "b"),
            opened,
            leased(4, "c"),
            completed(4, "c"),
            step(0, 1),
        ]);
        assert_eq!(ledger.violations, Vec::<String>::new());
        let counts = (ledger.lost, ledger.failed, ledger.handed_back, ledger.in_flight);
        assert_eq!(counts, (1, 1, 1, 1));
        assert_eq!((ledger.leases, ledger.redone, ledger.coordinators), (4, 0, 2));
    }

    #[test]
    fn each_contradiction_is_found() {
        let cases: [(&[Record], &str); 8] = [
            (&[leased(1, "a"), completed(1, "b")], "did not hold it"),
            (&[leased(1, "a"), leased(2, "b"), completed(1, "a")], "did not hold it"),
            (&[leased(1, "a"), leased(1, "b")], "given out twice"),
            (&[leased(1, "a"), completed(1, "a"), leased(2, "a")], "although it was done"),
            (&[leased(1, "a"), completed(1, "a"), completed(1, "a")], "done twice"),
            (&[leased(1, "a"), step(0, 1)], "before think of i0/t0 was done"),
            (
                &[leased(1, "a"), done(1, "a", vec![trace()]), step(0, 1)],
                "before score of i0/t0/j0",
            ),
            (&[step(0, 1), step(0, 1)], "from version 1 to version 1"),
        ];
        for (records, words) in cases {
            let found = audit(records).violations;
            assert!(found.iter().any(|text| text.contains(words)), "{words}: {found:?}");
        }
    }
}
