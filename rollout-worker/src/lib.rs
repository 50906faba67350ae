//! The rollout worker: thinks (samples traces) and draws (samples images) for a run, and measures
//! or shows what a model can do.
//!
//! ```text
//! coordinator --leases--> serve (async) --closures--> device thread: engine (models, policies)
//!             <-reports-- serve <--bytes-- engine;  serve --artifacts--> store, before the report
//! ```
#![forbid(unsafe_code)]

pub mod args;
mod desk;
pub mod engine;
pub mod error;
pub mod evaluate;
pub mod export;
pub mod failure;
pub mod load;
pub mod picture;
pub mod place;
pub mod policies;
pub mod progress;
pub mod run;
pub mod sample;
pub mod serve;
