//! `duet-trainer sft`: a rank of supervised fine-tuning (arXiv 2601.10332 section 3.1).
//!
//! ```text
//! rank 0   serve the ranks' store, write its address --> group --> restore --> step ... step --> checkpoint
//! rank r   --join ADDRESS ----------------------------/                                     \-> model/, summary.json
//! ```
//! The stage's folder holds `checkpoints/`, `metrics.jsonl` (a line a step), `model/` (the pipeline
//! folder) and, last of all, `summary.json`: a folder with it is finished.

mod checkpoint;
mod command;
pub mod data;
mod tuner;

pub use checkpoint::Checkpoints;
pub use command::{SftArgs, Summary, run};
pub use tuner::{Settings, StepDone, Tuner};
