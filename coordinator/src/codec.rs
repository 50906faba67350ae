//! Records and states as bytes: JSON, so that a person can read a journal. The core's types take
//! care that numbers come back bit for bit.

use crate::error::CoordinatorError;
use duet_core::scheduler::{Record, State};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// A record as it lies in the journal.
///
/// # Errors
/// None that a record of this program can cause; a journal without it must not be written.
pub fn encode_record(record: &Record) -> Result<Vec<u8>, CoordinatorError> {
    encode(record)
}

/// A state as it lies in a snapshot or checkpoint.
///
/// # Errors
/// As [`encode_record`].
pub fn encode_state(state: &State) -> Result<Vec<u8>, CoordinatorError> {
    encode(state)
}

/// Reads a record.
///
/// # Errors
/// What is wrong with the bytes.
pub fn decode_record(bytes: &[u8]) -> Result<Record, String> {
    decode(bytes)
}

/// Reads a state.
///
/// # Errors
/// What is wrong with the bytes.
pub fn decode_state(bytes: &[u8]) -> Result<State, String> {
    decode(bytes)
}

fn encode(value: &impl Serialize) -> Result<Vec<u8>, CoordinatorError> {
    serde_json::to_vec(value)
        .map_err(|error| CoordinatorError::RunFailed(format!("cannot write its state: {error}")))
}

fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, String> {
    serde_json::from_slice(bytes).map_err(|error| error.to_string())
}
