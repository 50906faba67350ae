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

#[cfg(test)]
mod tests {
    use super::*;
    use duet_core::work::{Done, LeaseId, Score, Unit, Weights};
    use duet_core::{Attempt, Digest, Millis, PolicyVersion, TreeId};

    /// Numbers that a careless parser gets wrong by one unit in the last place, and edges.
    const NUMBERS: [f64; 6] =
        [0.1 + 0.2, 5e-324, 9_007_199_254_740_992.0 + 2.0, f64::MIN_POSITIVE, -0.0, 1e300];

    #[test]
    fn numbers_in_records_come_back_bit_for_bit() {
        for (i, number) in NUMBERS.into_iter().enumerate() {
            let metrics = [("loss".to_owned(), number)].into();
            let version = PolicyVersion(1);
            let weights = Weights { version, llm: None, dit: None, digest: Digest([7; 32]) };
            let step = Record::StepCommitted { iteration: 0, weights, metrics };
            let Record::StepCommitted { metrics, .. } = again(&step) else { panic!() };
            assert_eq!(metrics["loss"].to_bits(), number.to_bits(), "number {i}");

            let leaf = [("semantic".to_owned(), Score::Scored(number))].into();
            let unit = Unit::Score(TreeId::default().subtree(0));
            let done = Record::Completed {
                id: LeaseId { unit, attempt: Attempt(1) },
                worker: "reward-0".into(),
                result: Done::Score(vec![leaf]),
                took: Millis(3),
            };
            let Record::Completed { result: Done::Score(leaves), .. } = again(&done) else {
                panic!()
            };
            let Score::Scored(read) = leaves[0]["semantic"] else { panic!() };
            assert_eq!(read.to_bits(), number.to_bits(), "number {i}");
        }
    }

    #[test]
    fn a_state_comes_back_whole() {
        let mut state = State::new();
        state.trees.insert(TreeId { iteration: 3, index: 1 }, Default::default());
        let bytes = encode_state(&state).unwrap();
        assert_eq!(decode_state(&bytes).unwrap(), state);
        assert!(decode_state(&bytes[1..]).is_err());
    }

    fn again(record: &Record) -> Record {
        decode_record(&encode_record(record).unwrap()).unwrap()
    }
}
