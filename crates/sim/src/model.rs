//! What honest work yields: pure functions of what was asked, so that the same tree gives the same
//! bytes whoever grows it, as the real models do.

use crate::dice::Dice;
use crate::options::Options;
use duet_core::work::{
    Done, Finish, LeafScores, Lease, Outcome, Score, Step, Trace, TrainTree, Unit, Work,
};
use duet_core::{ArtifactRef, Digest, Millis, PolicyVersion, Rank, TrainerEpoch, TreeId};

/// An artifact whose digest says all that went into it.
pub fn artifact(key: String, content: &[&[u8]]) -> ArtifactRef {
    let mut hasher = blake3::Hasher::new();
    for part in content {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    ArtifactRef { key, digest: Digest(*hasher.finalize().as_bytes()), bytes: 1 }
}

fn chance(seed: u64, path: [u64; 4]) -> Dice {
    let mut dice = Dice::new(seed, 77);
    let mixed = path.iter().fold(dice.next(), |state, part| Dice::new(state, *part).next());
    Dice::new(mixed, 78)
}

/// Whether a tree fails wherever it is tried, and at which stage.
pub fn poisoned(options: &Options, tree: TreeId) -> Option<&'static str> {
    let path = [1, u64::from(tree.iteration), u64::from(tree.index), 0];
    let mut dice = chance(options.seed, path);
    dice.permille(options.poisoned_trees).then(|| dice.pick(&["think", "render", "score"]))
}

/// What an honest worker makes of a lease.
pub fn outcome(options: &Options, lease: &Lease) -> Outcome {
    let unit = lease.id.unit;
    if poisoned(options, unit.tree()) == Some(unit.stage()) {
        let reason = "this tree fails everywhere".to_owned();
        return Outcome::Failed { kind: "model".to_owned(), reason };
    }
    Outcome::Done { result: result(options, lease), took: Millis(5) }
}

fn result(options: &Options, lease: &Lease) -> Done {
    let place = lease.id.unit.place();
    match (&lease.work, lease.id.unit) {
        (Work::Think(work), _) => {
            let trace = |j: u32| {
                let content: [&[u8]; 4] = [
                    &work.weights.digest.0,
                    &work.seed.0,
                    work.prompt.text.as_bytes(),
                    &j.to_le_bytes(),
                ];
                Trace {
                    artifact: artifact(format!("{place}/j{j}/think"), &content),
                    text: String::new(),
                    refined_prompt: format!("{} {j}", work.prompt.text),
                    well_formed: true,
                    tokens: 1,
                    finish: Finish::Stop,
                }
            };
            Done::Think((0..work.traces).map(trace).collect())
        }
        (Work::Render(work), _) => {
            let window = [work.window.start.to_le_bytes(), work.window.len.to_le_bytes()].concat();
            let content: [&[u8]; 4] =
                [&work.weights.digest.0, &work.trace.digest.0, &work.seed.0, &window];
            Done::Render(artifact(format!("{place}/render"), &content))
        }
        (Work::Score(work), unit) => {
            let leaf = |k: u32| leaf_scores(options, unit, &work.render, k);
            Done::Score((0..work.leaves).map(leaf).collect())
        }
    }
}

/// Scores are a function of the image; few values, so that groups without spread come up.
fn leaf_scores(options: &Options, unit: Unit, render: &ArtifactRef, leaf: u32) -> LeafScores {
    let names = ["aesthetic", "consistency", "semantic"];
    let score = |(i, name): (usize, &&str)| {
        let tree = unit.tree();
        let path = [u64::from(tree.iteration), u64::from(tree.index), u64::from(leaf), i as u64];
        let seed = u64::from_le_bytes(render.digest.0[..8].try_into().unwrap_or_default());
        let mut dice = chance(seed, path);
        let fails = chance(options.seed ^ 3, path).permille(options.failing_scores);
        let score = match fails {
            true if dice.permille(500) => Score::TimedOut(Millis(7)),
            true => Score::Failed("no answer".to_owned()),
            false => Score::Scored(dice.between(0, 5) as f64 / 5.0),
        };
        ((*name).to_owned(), score)
    };
    names.iter().enumerate().map(score).collect()
}

/// What of a step decides the weights after it.
pub fn substance(step: &Step) -> String {
    let tree = |tree: &TrainTree| format!("{} {} {:?}", tree.id, tree.prompt.row, tree.traces);
    let trees: Vec<String> = step.trees.iter().map(tree).collect();
    format!("{} {:?} {:?} {}", step.iteration, step.gates, step.window, trees.join(";"))
}

/// The weights after a step on weights `before`.
pub fn after(before: Digest, step: &Step) -> Digest {
    if !step.update {
        return before;
    }
    artifact(String::new(), &[&before.0, substance(step).as_bytes()]).digest
}

/// The shard that a rank of a group writes of a version.
pub fn shard(version: PolicyVersion, epoch: TrainerEpoch, rank: Rank) -> ArtifactRef {
    let key = format!("checkpoints/{}/r{}-e{}", version.0, rank.0, epoch.0);
    ArtifactRef { digest: Digest::of(key.as_bytes()), bytes: key.len() as u64, key }
}
