//! The pure heart of Duet: identifiers, seeds, rewards, advantages, schedules, invariants and the
//! scheduler that grows trees of rollouts.
//!
//! Nothing here touches a socket, a file, a clock or a random source: `now` and seeds are
//! arguments, so every run can be replayed bit for bit (RULE 1 of `ARCHITECTURE.md`).
#![forbid(unsafe_code)]

pub mod advantage;
pub mod digest;
pub mod exact;
pub mod ids;
pub mod invariants;
pub mod mutation;
pub mod reward;
pub mod schedule;
pub mod scheduler;
pub mod seed;
pub mod spec;
pub mod time;
pub mod url;
pub mod work;

pub use digest::{ArtifactRef, Digest};
pub use ids::{
    Attempt, Generation, LeafId, PolicyVersion, Rank, Role, SubtreeId, TrainerEpoch, TreeId,
    WorkerId,
};
pub use seed::{Purpose, Seed};
pub use time::Millis;
