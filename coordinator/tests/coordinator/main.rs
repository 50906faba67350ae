//! The coordinator, as its workers and its operators see it.

mod common;
mod refusals;
mod run;
mod security;
mod takeover;
mod telemetry;
