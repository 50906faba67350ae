//! `duet`: the command line that starts, watches and reports on runs.
#![forbid(unsafe_code)]

pub mod args;
pub mod audit;
pub mod certs;
pub mod checkpoints;
pub mod children;
pub mod client;
pub mod control;
pub mod demo;
pub mod error;
pub mod eval;
pub mod experiment;
pub mod launch;
pub mod phase;
pub mod plan;
pub mod progress;
pub mod report;
pub mod sft;
pub mod show;
pub mod status;
pub mod suite;

pub use error::CliError;
