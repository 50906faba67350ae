//! The journal: segments and snapshots as they lie in the store, and the records within.

use bytes::Bytes;
use duet_core::scheduler::{Record, State};
use duet_store::journal::{segment_bytes, segment_records, snapshot_state};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Bytes of a segment's header, whose last four are its checksum.
const HEADER: usize = 64;

/// Reads the bytes as a segment and as a snapshot; then once more with the header's checksum made
/// right, which no search would guess.
pub fn segment(bytes: &[u8]) {
    check(bytes);
    if let Some(body) = bytes.get(HEADER..) {
        let mut sealed = bytes[..HEADER - 4].to_vec();
        sealed.extend(crc32c::crc32c(&sealed).to_le_bytes());
        sealed.extend(body);
        check(&sealed);
    }
}

fn check(bytes: &[u8]) {
    let number = bytes.get(16..24).and_then(|number| number.try_into().ok());
    let number = u64::from_le_bytes(number.unwrap_or_default());
    match segment_records(bytes, number) {
        Ok(records) => {
            let size: usize = records.iter().map(Vec::len).sum();
            assert!(size <= bytes.len(), "more comes out than went in");
        }
        Err(reason) => assert!(!reason.is_empty()),
    }
    drop(snapshot_state(&Bytes::copy_from_slice(bytes), number));
}

/// Empty, one record, several.
pub fn segments() -> Vec<Vec<u8>> {
    let lists: [Vec<Vec<u8>>; 3] =
        [Vec::new(), vec![b"one".to_vec()], vec![b"one".to_vec(), Vec::new(), vec![0; 40]]];
    lists.iter().map(|records| segment_bytes(1, 1, records).to_vec()).collect()
}

/// A record and a scheduler's state, as the coordinator reads them.
pub fn record(bytes: &[u8]) {
    there_and_back::<Record>(bytes);
    there_and_back::<State>(bytes);
}

fn there_and_back<T: DeserializeOwned + Serialize + PartialEq>(bytes: &[u8]) {
    let Ok(value) = serde_json::from_slice::<T>(bytes) else { return };
    let written = serde_json::to_vec(&value).expect("what was read can be written");
    let again = serde_json::from_slice::<T>(&written).expect("and read again");
    assert!(again == value, "it changes when written");
}

/// Those of a run with prompts, traces, images and rewards, and what JSON allows at the edges.
pub fn records() -> Vec<Vec<u8>> {
    let edges = ["{}", "null", "[[[[[[[[", "{\"a\":1e999}", "\"\\ud800\""];
    let examples = include_str!("../corpus/records.jsonl").lines();
    edges.into_iter().chain(examples).map(|text| text.as_bytes().to_vec()).collect()
}
