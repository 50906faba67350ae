//! The reward worker: scores the images of a run, each component of each image on its own.
//!
//! ```text
//! coordinator --score leases--> serve (async) --closures--> device thread: scorers
//!             <--typed scores-- serve <--artifacts-- store
//! ```
#![forbid(unsafe_code)]

pub mod args;
mod desk;
pub mod failure;
pub mod http;
pub mod run;
pub mod score;
pub mod scorer;
pub mod serve;
pub mod world;
