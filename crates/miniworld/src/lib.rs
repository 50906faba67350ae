//! The small world that Duet demonstrates itself in: handwritten digits in a colour at a place, and
//! prompts that have to be thought about before they can be drawn.
//!
//! Here are its prompts ([`prompts`]), what its language model reads ([`corpus`]), the bootstrap that
//! makes a base model from nothing ([`bootstrap`]), the image scorers that reward ([`scorers`]) and
//! the judge that only measures ([`judge`]).

#![forbid(unsafe_code)]

pub mod bootstrap;
pub mod corpus;
pub mod digits;
pub mod error;
pub mod eval;
pub mod facts;
mod files;
pub mod judge;
mod learn;
mod nets;
pub mod prompts;
pub mod scorers;

pub use error::{Result, WorldError};
pub use learn::Plan;
