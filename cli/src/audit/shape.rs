//! Whether an iteration's rows are whole trees, each piece there exactly once.

use duet_store::lineage::Rows;
use std::collections::BTreeMap;

/// How often each piece of an iteration is there.
type Counts = BTreeMap<String, u32>;

/// Trees that are whole, and what is wrong with the others.
pub fn check(rows: &Rows) -> (u64, Vec<String>) {
    let most = |it: &mut dyn Iterator<Item = u32>| it.map(|n| n + 1).max().unwrap_or(0);
    let traces = most(&mut rows.traces.iter().map(|row| row.trace));
    let leaves = most(&mut rows.leaves.iter().map(|row| row.leaf));
    let mut components: Vec<&str> = rows.rewards.iter().map(|row| row.component.as_str()).collect();
    components.sort_unstable();
    components.dedup();
    let (mut whole, mut wrong) = (0, Vec::new());
    for prompt in &rows.prompts {
        let found = found(rows, prompt.tree);
        let due = due(traces, leaves, &components);
        let failed = prompt.fate == "failed";
        let before = wrong.len();
        for (piece, count) in &found {
            if *count > 1 || !due.contains(piece) {
                wrong.push(format!("has {piece} of tree {} {count} times", prompt.tree));
            }
        }
        // A tree that was given up keeps what it had by then.
        for piece in due.iter().filter(|piece| !failed && !found.contains_key(*piece)) {
            wrong.push(format!("lacks {piece} of tree {}", prompt.tree));
        }
        whole += u64::from(!failed && wrong.len() == before);
    }
    let owned = |tree: u32| rows.prompts.iter().any(|row| row.tree == tree);
    let stray = { rows.traces.iter().map(|row| row.tree) }
        .chain(rows.leaves.iter().map(|row| row.tree))
        .chain(rows.rewards.iter().map(|row| row.tree))
        .chain(rows.advantages.iter().map(|row| row.tree))
        .find(|tree| !owned(*tree));
    if let Some(tree) = stray {
        wrong.push(format!("has rows of tree {tree}, but not the tree"));
    }
    (whole, wrong)
}

fn trace_name(trace: u32) -> String {
    format!("trace {trace}")
}

fn leaf_name(trace: u32, leaf: u32) -> String {
    format!("image {trace}/{leaf}")
}

fn score_name(trace: u32, leaf: u32, component: &str) -> String {
    format!("score `{component}` of image {trace}/{leaf}")
}

fn advantage_name(trace: u32, leaf: Option<u32>) -> String {
    match leaf {
        Some(leaf) => format!("advantage of image {trace}/{leaf}"),
        None => format!("advantage of trace {trace}"),
    }
}

/// The pieces of a whole tree.
fn due(traces: u32, leaves: u32, components: &[&str]) -> Vec<String> {
    let mut due = Vec::new();
    for trace in 0..traces {
        due.push(trace_name(trace));
        due.push(advantage_name(trace, None));
        for leaf in 0..leaves {
            due.push(leaf_name(trace, leaf));
            due.push(advantage_name(trace, Some(leaf)));
            due.extend(components.iter().map(|component| score_name(trace, leaf, component)));
        }
    }
    due
}

fn found(rows: &Rows, tree: u32) -> Counts {
    let traces = rows.traces.iter().filter(|row| row.tree == tree).map(|row| trace_name(row.trace));
    let leaves = { rows.leaves.iter() }
        .filter(|row| row.tree == tree)
        .map(|row| leaf_name(row.trace, row.leaf));
    let scores = { rows.rewards.iter() }
        .filter(|row| row.tree == tree)
        .map(|row| score_name(row.trace, row.leaf, &row.component));
    let advantages = { rows.advantages.iter() }
        .filter(|row| row.tree == tree)
        .map(|row| advantage_name(row.trace, row.leaf));
    let mut counts = Counts::new();
    for name in traces.chain(leaves).chain(scores).chain(advantages) {
        *counts.entry(name).or_default() += 1;
    }
    counts
}
