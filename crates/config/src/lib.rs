//! The configuration of a run: TOML read in layers, checked as a whole, immutable afterwards.
//!
//! ```text
//! preset  <  file  <  environment (DUET__SECTION__KEY=value)  <  --set section.key=value
//! ```
//! Every key has one meaning and every default is stated at its field. A wrong key, type, value or
//! combination is an error that names the key and the fix, and all of them are found at once.
//! Relative paths in a configuration are relative to the current directory of the process.
#![forbid(unsafe_code)]

mod check;
mod digest;
mod error;
mod layers;
mod presets;
mod processes;
pub mod prompts;
mod raw;
mod sections;
mod sft;
mod spec;
mod telemetry;

pub use error::{ConfigError, Problem};
pub use layers::environment;
pub use presets::PRESETS;
pub use raw::{
    Advantages, Failure, Schedule as RawSchedule, ScheduleKind, Window as RawWindow, WindowKind,
};
pub use sections::{
    Aggregation, Bootstrap, Branch, COMPONENTS, Checkpoint, Collective, Coordinator, Data, Device,
    Dit, DitKl, DitObjective, Dtype, Evaluation, HttpScorer, KlEstimator, Llm, LlmObjective, Lora,
    Model, NftOld, Optimizer, Reduce, Reward, Rollout, Run, Sampler, Scorer, Security, Tls,
    Trainer, Workers,
};
pub use sft::Sft;
pub use spec::Config;
pub use telemetry::Telemetry;
