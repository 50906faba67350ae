//! Names of the things Duet accounts for.

use serde::{Deserialize, Serialize};
use std::fmt;

macro_rules! number {
    ($(#[$doc:meta])* $name:ident, $inner:ty, $prefix:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "{}"), self.0)
            }
        }
    };
}

number!(
    /// A numbered try at a lease. Reports of an old attempt change nothing (DU-6).
    Attempt, u32, "attempt "
);
number!(
    /// The incarnation of the coordinator; grows each time one takes the journal over.
    Generation, u64, "generation "
);
number!(
    /// The pair (LLM weights, DiT weights) after this many committed optimiser steps.
    PolicyVersion, u64, "v"
);
number!(
    /// A data-parallel trainer rank, from zero.
    Rank, u32, "rank "
);
number!(
    /// The incarnation of the trainer group; grows at each rendezvous.
    TrainerEpoch, u64, "epoch "
);

/// One prompt with its J traces and J x K leaves in one iteration: the field's "group".
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct TreeId {
    /// The iteration whose optimiser step the tree is meant for, from zero.
    pub iteration: u32,
    /// The position among the trees of its iteration, from zero.
    pub index: u32,
}

/// One trace of a tree with its K leaves: the unit of lease for rendering and scoring.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct SubtreeId {
    /// The tree.
    pub tree: TreeId,
    /// The trace `j`, `0 <= j < J`.
    pub trace: u32,
}

/// One image of a tree.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct LeafId {
    /// The sub-tree.
    pub subtree: SubtreeId,
    /// The image `k`, `0 <= k < K`.
    pub leaf: u32,
}

impl TreeId {
    /// The sub-tree of trace `trace`.
    pub fn subtree(self, trace: u32) -> SubtreeId {
        SubtreeId { tree: self, trace }
    }
}

impl SubtreeId {
    /// The leaf number `leaf`.
    pub fn leaf(self, leaf: u32) -> LeafId {
        LeafId { subtree: self, leaf }
    }
}

impl fmt::Display for TreeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "i{}/t{}", self.iteration, self.index)
    }
}

impl fmt::Display for SubtreeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/j{}", self.tree, self.trace)
    }
}

impl fmt::Display for LeafId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/k{}", self.subtree, self.leaf)
    }
}

/// A worker process, as it named itself: `rollout-0`, `trainer-1`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct WorkerId(pub String);

impl fmt::Display for WorkerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<&str> for WorkerId {
    fn from(name: &str) -> Self {
        WorkerId(name.to_owned())
    }
}

/// What a worker can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Thinks (samples traces) and renders (samples images).
    Rollout,
    /// Scores images.
    Reward,
    /// Takes optimiser steps.
    Trainer,
}

impl Role {
    /// The name used in configuration, certificates and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Role::Rollout => "rollout",
            Role::Reward => "reward",
            Role::Trainer => "trainer",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
