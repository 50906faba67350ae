//! What must hold of every record and assignment, worked out from the journal alone and without the
//! scheduler's own code.

use crate::model;
use crate::options::Options;
use duet_core::advantage::{AdvantageSpec, Center, GroupKey, Scale};
use duet_core::reward::FailurePolicy;
use duet_core::schedule::Schedule;
use duet_core::scheduler::Record;
use duet_core::work::{
    Assignment, Done, LeafScores, Lease, LeaseId, Score, Step, Trace, Unit, Work,
};
use duet_core::{ArtifactRef, Digest, PolicyVersion, TreeId, WorkerId};
use std::collections::BTreeMap;

#[derive(Debug, Default)]
struct UnitLog {
    attempt: u32,
    worker: Option<WorkerId>,
    hard: u32,
    hard_at: u64,
    over: bool,
    done: bool,
}

#[derive(Debug, Default)]
struct TreeLog {
    traces: Vec<Trace>,
    renders: BTreeMap<u32, ArtifactRef>,
    scores: BTreeMap<u32, Vec<LeafScores>>,
    failed: bool,
}

impl TreeLog {
    fn settled(&self) -> bool {
        self.failed || !self.traces.is_empty() && self.scores.len() == self.traces.len()
    }
}

/// The journal, read by somebody else.
pub struct Oracle {
    options: Options,
    units: BTreeMap<Unit, UnitLog>,
    trees: BTreeMap<TreeId, TreeLog>,
    /// Digest of every committed version; version 0 is the base model.
    digests: Vec<Digest>,
    admitted: u32,
    opened_at: u64,
    /// What was to be trained at an iteration, and the weights that honest ranks get from it.
    steps: BTreeMap<u32, (String, Digest)>,
}

type Advantages = BTreeMap<TreeId, (Vec<Option<f64>>, Vec<Vec<Option<f64>>>)>;

fn ensure(holds: bool, text: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(text()) }
}

impl Oracle {
    /// One that has seen nothing.
    pub fn new(options: &Options) -> Oracle {
        Oracle {
            options: options.clone(),
            units: BTreeMap::new(),
            trees: BTreeMap::new(),
            digests: vec![Digest([0; 32])],
            admitted: 0,
            opened_at: 0,
            steps: BTreeMap::new(),
        }
    }

    /// The newest committed weights.
    pub fn final_digest(&self) -> Digest {
        self.digests[self.digests.len() - 1]
    }

    /// Trees that were given up.
    pub fn failed_trees(&self) -> Vec<TreeId> {
        self.trees.iter().filter(|(_, tree)| tree.failed).map(|(id, _)| *id).collect()
    }

    /// Committed steps.
    pub fn version(&self) -> u64 {
        self.digests.len() as u64 - 1
    }

    /// Trees admitted: those that every iteration has, and those of dynamic sampling.
    pub fn admitted(&self) -> (usize, usize) {
        let p = self.options.spec.prompts_per_iteration;
        let own = self.trees.keys().filter(|id| id.index < p).count();
        (own, self.trees.len() - own)
    }

    /// A record became durable.
    ///
    /// # Errors
    /// The invariant it breaks.
    pub fn record(&mut self, now: u64, record: &Record) -> Result<(), String> {
        match record {
            Record::Opened { .. } => self.opened_at = now,
            Record::Admitted { iteration } => self.admit(*iteration)?,
            Record::Extended { iteration, trees } => self.extended(*iteration, *trees)?,
            Record::Leased { id, worker, .. } => self.leased(now, *id, worker)?,
            Record::Completed { id, worker, result, .. } => self.completed(*id, worker, result)?,
            Record::AttemptFailed { id, lost, .. } => {
                let log = self.units.entry(id.unit).or_default();
                ensure(log.attempt == id.attempt.0 && !log.over && !log.done, || {
                    format!("DU-6: {id:?} failed, but it was over")
                })?;
                log.over = true;
                if !lost {
                    log.hard += 1;
                    log.hard_at = now;
                }
            }
            Record::GivenUp { tree, .. } => self.given_up(*tree)?,
            Record::StepCommitted { iteration, weights, .. } => {
                let due = self.digests.len() as u32 - 1;
                ensure(*iteration == due && weights.version.0 == u64::from(due) + 1, || {
                    format!("DU-4: step {iteration} to {} after v{due}", weights.version)
                })?;
                for (id, tree) in self.trees.range(iteration_of(*iteration)) {
                    ensure(tree.settled(), || format!("DU-2: step {iteration} without tree {id}"))?;
                }
                let honest = self.steps.get(iteration).map(|(_, weights)| *weights);
                ensure(honest == Some(weights.digest), || {
                    format!("step {iteration} commits {}, but gives {honest:?}", weights.digest)
                })?;
                self.digests.push(weights.digest);
            }
            Record::Checkpointed { version, .. } => {
                ensure(version.0 < self.digests.len() as u64, || {
                    format!("DU-4: checkpoint of {version}, never committed")
                })?;
            }
            Record::Retaken { iteration, digest } => {
                let honest = self.steps.get(iteration).map(|(_, weights)| *weights);
                ensure(honest == Some(*digest), || {
                    format!("step {iteration} repeated to {digest}, but gives {honest:?}")
                })?;
            }
            Record::EpochStarted { .. } | Record::Paused(_) | Record::Stopping(_) => {}
        }
        Ok(())
    }

    fn admit(&mut self, iteration: u32) -> Result<(), String> {
        let spec = &self.options.spec;
        let open = self.digests.len() as u32 + spec.lag;
        ensure(iteration == self.admitted && iteration < open.min(spec.iterations), || {
            format!("DU-2: iteration {iteration} admitted at v{}", self.digests.len() - 1)
        })?;
        self.admitted += 1;
        for index in 0..spec.prompts_per_iteration {
            self.trees.insert(TreeId { iteration, index }, TreeLog::default());
        }
        Ok(())
    }

    /// Dynamic sampling: only when every tree of the next step is settled, as many as are missing, and
    /// within the bound.
    fn extended(&mut self, iteration: u32, trees: u32) -> Result<(), String> {
        let spec = &self.options.spec;
        let due = self.digests.len() as u32 - 1;
        ensure(iteration == due && trees > 0, || {
            format!("DU-2: iteration {iteration} extended by {trees} at v{due}")
        })?;
        let own = self.trees.range(iteration_of(iteration));
        let (mut count, mut settled) = (0, true);
        for (_, tree) in own {
            count += 1;
            settled &= tree.settled();
        }
        ensure(settled, || format!("iteration {iteration} extended before it was settled"))?;
        let teaching = self.advantages(iteration);
        let teaching = teaching
            .values()
            .filter(|(llm, dit)| llm.iter().chain(dit.iter().flatten()).any(Option::is_some));
        let missing = spec.prompts_per_iteration.saturating_sub(teaching.count() as u32);
        let left = (spec.prompts_per_iteration + spec.extra_prompts).saturating_sub(count);
        ensure(trees == missing.min(left), || {
            format!("iteration {iteration} extended by {trees} instead of {missing} or {left}")
        })?;
        for index in count..count + trees {
            self.trees.insert(TreeId { iteration, index }, TreeLog::default());
        }
        Ok(())
    }

    /// The first iteration of the DiT phase of a plateau schedule, by the definition: so many committed
    /// iterations without a new best of the mean reward (the simulator does not smooth).
    fn switched(&self) -> Option<u32> {
        let Schedule::Plateau { patience, min_delta, .. } = self.options.spec.schedule else {
            return None;
        };
        let mut best: Option<(u32, f64)> = None;
        let mut seen = 0;
        for iteration in 0..self.digests.len() as u32 - 1 {
            let trees = self.trees.range(iteration_of(iteration));
            let alive = trees.filter(|(_, tree)| !tree.failed);
            let rewards: Vec<f64> =
                alive.flat_map(|(_, tree)| self.rewards(tree).0).flatten().collect();
            if rewards.is_empty() {
                continue;
            }
            let mean = rewards.iter().sum::<f64>() / rewards.len() as f64;
            seen += 1;
            if best.is_none_or(|(_, best)| mean > best + min_delta) {
                best = Some((seen, mean));
            } else if best.is_some_and(|(at, _)| seen - at >= patience) {
                return Some(iteration + self.options.spec.lag + 1);
            }
        }
        None
    }

    fn leased(&mut self, now: u64, id: LeaseId, worker: &WorkerId) -> Result<(), String> {
        let spec = &self.options.spec;
        let tree = self.trees.get(&id.unit.tree());
        ensure(tree.is_some_and(|tree| !tree.failed), || format!("DU-2: {id:?} of no live tree"))?;
        let log = self.units.entry(id.unit).or_default();
        ensure(id.attempt.0 > log.attempt, || format!("DU-6: {id:?} after {}", log.attempt))?;
        ensure(!log.done, || format!("DU-5: {id:?} is done already"))?;
        ensure(log.hard < spec.max_attempts, || format!("DU-10: {id:?} is tried without end"))?;
        ensure(id.attempt.0 <= 8 * spec.max_attempts, || format!("DU-10: {id:?} without end"))?;
        let timing = spec.timing;
        let wait = (timing.backoff.0 << log.hard.saturating_sub(1)).min(timing.backoff_max.0);
        let early = log.over && log.hard > 0 && log.hard_at > self.opened_at;
        ensure(!(early && now < log.hard_at + wait), || {
            format!("backoff: {id:?} at {now}, although it failed at {}", log.hard_at)
        })?;
        log.attempt = id.attempt.0;
        log.worker = Some(worker.clone());
        log.over = false;
        Ok(())
    }

    fn completed(&mut self, id: LeaseId, worker: &WorkerId, result: &Done) -> Result<(), String> {
        let log = self.units.entry(id.unit).or_default();
        ensure(!log.done, || format!("DU-1: {id:?} is done twice"))?;
        let theirs = log.worker.as_ref() == Some(worker);
        ensure(log.attempt == id.attempt.0 && !log.over && theirs, || {
            format!("DU-6: {id:?} by {worker}, but the last is {log:?}")
        })?;
        log.done = true;
        let Some(tree) = self.trees.get_mut(&id.unit.tree()) else {
            return Err(format!("DU-2: {id:?} of no tree"));
        };
        match (id.unit, result) {
            (Unit::Think(_), Done::Think(traces)) => tree.traces = traces.clone(),
            (Unit::Render(id), Done::Render(artifact)) => {
                tree.renders.insert(id.trace, artifact.clone());
            }
            (Unit::Score(id), Done::Score(scores)) => {
                tree.scores.insert(id.trace, scores.clone());
            }
            _ => return Err(format!("{id:?} has another stage's result")),
        }
        Ok(())
    }

    fn given_up(&mut self, id: TreeId) -> Result<(), String> {
        let spec = &self.options.spec;
        let spent = self.units.iter().any(|(unit, log)| {
            unit.tree() == id
                && (log.hard >= spec.max_attempts || log.attempt >= 8 * spec.max_attempts)
        });
        ensure(spent, || format!("tree {id} was given up too early"))?;
        let tree = self.trees.entry(id).or_default();
        ensure(!tree.failed, || format!("DU-2: tree {id} has two fates"))?;
        tree.failed = true;
        Ok(())
    }

    /// A worker is told something.
    ///
    /// # Errors
    /// The invariant it breaks.
    pub fn assigned(&mut self, worker: &WorkerId, assignment: &Assignment) -> Result<(), String> {
        match assignment {
            Assignment::Lease(lease) => self.lease(worker, lease),
            Assignment::Publish(weights) => self.committed(weights.version, weights.digest),
            Assignment::Step(step) if step.update => self.step(step),
            Assignment::Step(_) | Assignment::Rendezvous(_) | Assignment::Leave { .. } => Ok(()),
        }
    }

    fn committed(&self, version: PolicyVersion, digest: Digest) -> Result<(), String> {
        ensure(self.digests.get(version.0 as usize) == Some(&digest), || {
            format!("DU-12: {version} with {digest} was never committed")
        })
    }

    fn lease(&self, worker: &WorkerId, lease: &Lease) -> Result<(), String> {
        let id = lease.id;
        let log = self.units.get(&id.unit);
        let durable =
            log.is_some_and(|l| l.attempt == id.attempt.0 && l.worker.as_ref() == Some(worker));
        ensure(durable, || format!("RULE 7: {id:?} was given out before it was journaled"))?;
        let weights = match &lease.work {
            Work::Think(work) => &work.weights,
            Work::Render(work) => &work.weights,
            Work::Score(_) => return Ok(()),
        };
        let spec = &self.options.spec;
        let due = id.unit.tree().iteration.saturating_sub(spec.lag);
        ensure(weights.version.0 == u64::from(due), || {
            format!("DU-3: {id:?} is sampled with {} instead of v{due}", weights.version)
        })?;
        self.committed(weights.version, weights.digest)
    }

    /// A step holds exactly what the scores of its trees say, however often it is repeated.
    fn step(&mut self, step: &Step) -> Result<(), String> {
        let substance = model::substance(step);
        let iteration = step.iteration;
        if let Some((before, _)) = self.steps.get(&iteration) {
            return ensure(*before == substance, || {
                format!("DU-1: step {iteration} is repeated with other trees")
            });
        }
        ensure(u64::from(iteration) == self.version(), || {
            format!("DU-4: step {iteration} is due at v{iteration}, not at v{}", self.version())
        })?;
        for (id, (llm, dit)) in self.advantages(iteration) {
            let taught = llm.iter().chain(dit.iter().flatten()).any(Option::is_some);
            let tree = step.trees.iter().find(|tree| tree.id == id);
            ensure(taught == tree.is_some(), || format!("DU-1: tree {id} in step: {}", !taught))?;
            let Some(tree) = tree else { continue };
            for ((trace, llm), dit) in tree.traces.iter().zip(&llm).zip(&dit) {
                let same = close(&[trace.advantage], &[*llm]) && close(&trace.leaf_advantages, dit);
                ensure(same, || {
                    format!("DU-7, DU-8: {id}/j{}: {trace:?}, not {llm:?} {dit:?}", trace.trace)
                })?;
            }
        }
        let weights = model::after(self.final_digest(), step);
        self.steps.insert(iteration, (substance, weights));
        Ok(())
    }

    fn advantages(&self, iteration: u32) -> Advantages {
        let spec = &self.options.spec;
        let gates = spec.schedule.gates(iteration, self.switched());
        let mut all = Advantages::new();
        for (id, tree) in self.trees.range(iteration_of(iteration)) {
            if tree.failed {
                continue;
            }
            let (llm, dit) = self.rewards(tree);
            let shut = |leaves: &Vec<Option<f64>>| vec![None; leaves.len()];
            let llm = if gates.llm > 0.0 { group(&spec.llm_advantage, &llm) } else { shut(&llm) };
            let dit = match (gates.dit > 0.0, spec.dit_advantage.group) {
                (false, _) => dit.iter().map(shut).collect(),
                (true, GroupKey::Trace) => {
                    dit.iter().map(|leaves| group(&spec.dit_advantage, leaves)).collect()
                }
                (true, GroupKey::Tree) => {
                    let whole = group(&spec.dit_advantage, &dit.concat());
                    whole.chunks(spec.leaves as usize).map(<[_]>::to_vec).collect()
                }
            };
            all.insert(*id, (llm, dit));
        }
        all
    }

    fn rewards(&self, tree: &TreeLog) -> (Vec<Option<f64>>, Vec<Vec<Option<f64>>>) {
        let value = |leaf: &LeafScores, name: &str| match leaf.get(name) {
            Some(Score::Scored(value)) => Some(*value),
            _ => None,
        };
        let (mut llm, mut dit) = (Vec::new(), Vec::new());
        for leaves in tree.scores.values() {
            let semantic: Vec<f64> = leaves.iter().filter_map(|l| value(l, "semantic")).collect();
            let mixed: Vec<Option<f64>> = leaves
                .iter()
                .map(|l| {
                    let (a, c) = (value(l, "aesthetic")?, value(l, "consistency")?);
                    Some(0.1 * a + 0.2 * c + 0.7 * value(l, "semantic")?)
                })
                .collect();
            let strict = !matches!(self.options.spec.reward.failure, FailurePolicy::AtLeast(_));
            let enough = semantic.len() >= if strict { leaves.len() } else { 1 };
            llm.push(enough.then(|| semantic.iter().sum::<f64>() / semantic.len() as f64));
            let whole = !strict || mixed.iter().all(Option::is_some);
            dit.push(if whole { mixed } else { vec![None; leaves.len()] });
        }
        let hole = llm.iter().chain(dit.iter().flatten()).any(Option::is_none);
        if hole && self.options.spec.reward.failure == FailurePolicy::DropTree {
            llm.iter_mut().chain(dit.iter_mut().flatten()).for_each(|reward| *reward = None);
        }
        (llm, dit)
    }
}

fn iteration_of(iteration: u32) -> std::ops::RangeInclusive<TreeId> {
    TreeId { iteration, index: 0 }..=TreeId { iteration, index: u32::MAX }
}

/// The formula once more, as a loop over members.
fn group(spec: &AdvantageSpec, rewards: &[Option<f64>]) -> Vec<Option<f64>> {
    let known: Vec<f64> = rewards.iter().flatten().copied().collect();
    let n = known.len() as f64;
    if known.len() < 2 {
        return vec![None; rewards.len()];
    }
    let mut sum = 0.0;
    known.iter().for_each(|r| sum += r);
    let mut square = 0.0;
    known.iter().for_each(|r| square += (r - sum / n) * (r - sum / n));
    let std = (square / (n - f64::from(spec.ddof))).sqrt();
    if std < 1e-9 {
        return vec![None; rewards.len()];
    }
    let one = |r: f64| {
        let base = match spec.center {
            Center::Mean => sum / n,
            Center::LeaveOneOut => (sum - r) / (n - 1.0),
        };
        let scale = if spec.scale == Scale::Group { std + spec.eps } else { 1.0 };
        ((r - base) / scale).max(-spec.clip).min(spec.clip)
    };
    rewards.iter().map(|r| r.map(one)).collect()
}

fn close(a: &[Option<f64>], b: &[Option<f64>]) -> bool {
    a.len() == b.len()
        && a.iter().zip(b).all(|pair| match pair {
            (Some(x), Some(y)) => (x - y).abs() < 1e-9,
            (None, None) => true,
            _ => false,
        })
}
