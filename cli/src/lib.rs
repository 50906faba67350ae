//! `duet`: the command line that starts, watches and reports on runs.
#![forbid(unsafe_code)]

pub mod report;
