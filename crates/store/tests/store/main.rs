//! The store and what lies in it.

mod checkpoints;
mod common;
mod crash;
mod journal;
mod lineage;
mod objects;
