//! The points of a tree's life that become spans, and their ids.
//!
//! ```text
//! trace of a tree:       tree -> lease (think | render | score) -> work, at the worker
//!                             -> train, publish                   (linked to the iteration's)
//! trace of an iteration: step -> rank, at each trainer
//!                             -> publication -> hold, at each rollout worker
//! ```
//! An id is a hash over the run and what the span is about, so every process knows the ids of the
//! others' spans from its assignment alone, and no message carries a context.

use duet_core::work::LeaseId;
use duet_core::{Digest, PolicyVersion, TrainerEpoch, TreeId, WorkerId};
use opentelemetry::trace::{SpanId, TraceId};

/// What makes ids of different runs different.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// Its name.
    pub name: String,
    /// Hash over the configuration that decides results.
    pub config: Digest,
}

/// Something that a span is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Point {
    /// A tree, from its admission to its end. By the coordinator.
    Tree(TreeId),
    /// A lease, from giving it out to the report. By the coordinator.
    Lease(LeaseId),
    /// The work on a lease. By its worker.
    Work(LeaseId),
    /// A tree's step, from giving it to the trainers to its commit. By the coordinator.
    Train(TreeId),
    /// From the commit until every rollout worker holds the weights. By the coordinator.
    Publish(TreeId),
    /// An iteration's step in a trainer group. By the coordinator.
    Step(u32, TrainerEpoch),
    /// A rank's part in it. By the rank.
    Rank(u32, TrainerEpoch, u32),
    /// Weights on their way to the rollout workers. By the coordinator.
    Publication(PolicyVersion),
    /// A rollout worker's fetching them. By the worker.
    Hold(PolicyVersion, WorkerId),
}

impl Point {
    /// The name of its span: few different ones, so that they can be grouped by.
    pub fn name(&self) -> String {
        match self {
            Point::Tree(_) => "tree".to_owned(),
            Point::Lease(id) => format!("lease {}", id.unit.stage()),
            Point::Work(id) => id.unit.stage().to_owned(),
            Point::Train(_) => "train".to_owned(),
            Point::Publish(_) => "publish".to_owned(),
            Point::Step(..) => "step".to_owned(),
            Point::Rank(..) => "step of a rank".to_owned(),
            Point::Publication(_) => "publication".to_owned(),
            Point::Hold(..) => "hold weights".to_owned(),
        }
    }

    /// What it is part of.
    pub fn parent(&self) -> Option<Point> {
        match self {
            Point::Tree(_) | Point::Step(..) | Point::Publication(_) => None,
            Point::Lease(id) => Some(Point::Tree(id.unit.tree())),
            Point::Work(id) => Some(Point::Lease(*id)),
            Point::Train(tree) | Point::Publish(tree) => Some(Point::Tree(*tree)),
            Point::Rank(iteration, epoch, _) => Some(Point::Step(*iteration, *epoch)),
            Point::Hold(version, _) => Some(Point::Publication(*version)),
        }
    }

    /// What tells it from every other point of the run.
    fn text(&self) -> String {
        match self {
            Point::Tree(tree) => format!("tree {tree}"),
            Point::Lease(id) => lease("lease", id),
            Point::Work(id) => lease("work", id),
            Point::Train(tree) => format!("train {tree}"),
            Point::Publish(tree) => format!("publish {tree}"),
            Point::Step(iteration, epoch) => format!("step {iteration} {}", epoch.0),
            Point::Rank(iteration, epoch, rank) => format!("rank {iteration} {} {rank}", epoch.0),
            Point::Publication(version) => format!("publication {}", version.0),
            Point::Hold(version, worker) => format!("hold {} {}", version.0, worker.0),
        }
    }

    /// The trace that it belongs to.
    fn trace(&self) -> String {
        match self {
            Point::Tree(tree) | Point::Train(tree) | Point::Publish(tree) => format!("tree {tree}"),
            Point::Lease(id) | Point::Work(id) => format!("tree {}", id.unit.tree()),
            Point::Step(iteration, _) | Point::Rank(iteration, ..) => {
                format!("iteration {iteration}")
            }
            // Version v is what iteration v - 1 led to.
            Point::Publication(version) | Point::Hold(version, _) => {
                format!("iteration {}", version.0.saturating_sub(1))
            }
        }
    }
}

fn lease(what: &str, id: &LeaseId) -> String {
    format!("{what} {} {} {}", id.unit.stage(), id.unit.place(), id.attempt.0)
}

impl Run {
    /// The id of a point's trace.
    pub fn trace_id(&self, point: &Point) -> TraceId {
        TraceId::from_bytes(self.hash("trace", &point.trace()))
    }

    /// The id of a point's span.
    pub fn span_id(&self, point: &Point) -> SpanId {
        SpanId::from_bytes(self.hash("span", &point.text()))
    }

    fn hash<const N: usize>(&self, kind: &str, text: &str) -> [u8; N] {
        // No field can hold the separator but the last one.
        let all = format!("{kind}\n{}\n{}\n{text}", self.name, self.config);
        let hash = Digest::of(all.as_bytes()).0;
        std::array::from_fn(|i| hash[i])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use duet_core::Attempt;
    use duet_core::work::Unit;
    use std::collections::BTreeSet;

    #[test]
    fn points_differ_by_id_and_parents_share_their_trace() {
        let run = Run { name: "r".to_owned(), config: Digest([1; 32]) };
        let other = Run { name: "s".to_owned(), ..run.clone() };
        let mut points = Vec::new();
        for iteration in 0..3u32 {
            let (epoch, version) = (TrainerEpoch(2), PolicyVersion(u64::from(iteration) + 1));
            points.push(Point::Step(iteration, epoch));
            points.push(Point::Step(iteration, TrainerEpoch(3)));
            points.extend((0..2).map(|rank| Point::Rank(iteration, epoch, rank)));
            points.push(Point::Publication(version));
            points.push(Point::Hold(version, "rollout-0".into()));
            for index in 0..3 {
                let tree = TreeId { iteration, index };
                points.extend([Point::Tree(tree), Point::Train(tree), Point::Publish(tree)]);
                let (render, score) = (tree.subtree(1), tree.subtree(1));
                for unit in [Unit::Think(tree), Unit::Render(render), Unit::Score(score)] {
                    for attempt in [1, 2] {
                        let id = LeaseId { unit, attempt: Attempt(attempt) };
                        points.extend([Point::Lease(id), Point::Work(id)]);
                    }
                }
            }
        }
        let ids: BTreeSet<_> = points.iter().map(|p| run.span_id(p).to_bytes()).collect();
        assert_eq!(ids.len(), points.len());
        for point in &points {
            if let Some(parent) = point.parent() {
                assert_eq!(run.trace_id(point), run.trace_id(&parent), "{point:?}");
            }
            assert_ne!(run.trace_id(point), other.trace_id(point));
        }
        let traces: BTreeSet<_> = points.iter().map(|p| run.trace_id(p).to_bytes()).collect();
        assert_eq!(traces.len(), 3 + 9, "one for each iteration and tree");
    }
}
