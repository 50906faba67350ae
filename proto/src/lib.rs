//! The wire format between the coordinator, its workers and whoever watches: package `duet.v1`.
//!
//! [`v1`] is generated from `proto/duet/v1/*.proto` and checked in; [`convert`] turns its messages
//! into the types of `duet_core::work` and back. What comes in is untrusted: conversions towards
//! the core are fallible and bounded, conversions towards the wire are not fallible.
#![forbid(unsafe_code)]

pub mod convert;

/// Messages, clients and servers of package `duet.v1`, generated from the `.proto` files.
#[rustfmt::skip]
#[allow(missing_docs, clippy::all)]
#[path = "gen/duet.v1.rs"]
pub mod v1;

pub use convert::DecodeError;

/// The descriptors of all `.proto` files, with comments: what the reflection service serves.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!("gen/duet.bin");
