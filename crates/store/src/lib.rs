//! Everything durable of a run, on any `object_store` backend: artifacts, the journal, checkpoints
//! and lineage tables.
//!
//! Stores differ in what they promise (some ignore write conditions, some check them without
//! atomicity, the local file system has no conditional update), so all of this stands on two
//! operations only: **create an object once** and **list**. There is no pointer to the latest of
//! anything; the newest is found by listing. [`doctor::probe`] tests whether a store keeps the two
//! promises.
//!
//! ```text
//! Store ---- Artifacts     bytes under a BLAKE3 hash, verified at every read (DU-9)
//!        |-- Journal       numbered segments: group commit, fencing by generation, snapshots
//!        |-- Checkpoints   shards first, manifest last; retention
//!        |-- folder        whole folders of files (models), fetched into a cache and verified
//!        '-- Lineage       Parquet tables, a file per table and iteration
//! ```
#![forbid(unsafe_code)]

pub mod artifacts;
pub mod blocking;
pub mod checkpoint;
pub mod doctor;
pub mod error;
pub mod folder;
pub mod journal;
pub mod keys;
mod large;
mod lazy;
pub mod lineage;
mod remote;
pub mod store;

pub use artifacts::Artifacts;
pub use blocking::BlockingStore;
pub use checkpoint::{Checkpoints, Found, Manifest};
pub use error::{Result, StoreError};
pub use journal::{Journal, JournalError, Opened};
pub use lineage::Lineage;
pub use store::{Entry, Limits, Store};
