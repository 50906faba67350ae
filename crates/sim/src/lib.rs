//! A seeded simulator that attacks the scheduler.
//!
//! One thread, one clock, one queue of happenings; everything that could differ between two runs is
//! drawn from the seed, so a failure is repeated by its seed. A run has two phases: in the first,
//! messages are lost, doubled, delayed and cut off, processes of every role and the coordinator die
//! (the coordinator at any record of its journal), stand still, go slow, fail and lie. In the second
//! all of that heals, and every tree must be retired within a bound (DU-10).
//!
//! | module | what it is |
//! |---|---|
//! | `options` | what a seed decides: the run, the processes, the faults |
//! | `world` | the clock, the queue, the network and the faults |
//! | `coordinator` | the scheduler with a journal that can be torn, long polls and a manifest store |
//! | `worker` | a process of any role, honest or not |
//! | `model` | what honest work yields: a pure function of what was asked, as the real one is |
//! | `oracle` | what must hold of records and assignments, worked out independently |
//! | `run` | one seed from beginning to verdict |
#![forbid(unsafe_code)]

mod coordinator;
mod dice;
mod model;
mod options;
mod oracle;
mod run;
mod worker;
mod world;

pub use options::{Faults, Options};
pub use run::{Outcome, simulate};
