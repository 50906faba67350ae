//! A data-parallel trainer rank: it forms a group with the other ranks, restores, and takes one
//! optimiser step for each iteration's trees.
#![forbid(unsafe_code)]

pub mod address;
pub mod args;
pub mod bootstrap;
mod desk;
pub mod engine;
pub mod error;
pub mod failure;
pub mod rank;
pub mod replay;
pub mod run;
pub mod saver;
pub mod serve;
pub mod sft;
pub mod shards;
pub mod translate;

pub use error::TrainError;
