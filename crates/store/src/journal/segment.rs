//! The bytes of a journal segment and of a snapshot.
//!
//! ```text
//! segment  "duetseg1" | generation u64 | number u64 | voids u64 | nonce [16] | length u64 | count u32
//!          | crc32c u32 of all before
//!          | count x ( length u32 | crc32c u32 of number, index and payload | payload )
//! snapshot "duetsnp1" | generation u64 | number u64 | length u64 | crc32c u32 of all before
//!          | payload | crc32c u32 of payload
//! ```
//! All numbers are little-endian. `length` counts the whole segment, so a torn one is told from a
//! changed one. An object holds one segment, or several that follow each other with numbers that do,
//! and perhaps zeros after them. A record's checksum covers its place, so records cannot change places either.

use bytes::Bytes;

const SEGMENT: &[u8; 8] = b"duetseg1";
const SNAPSHOT: &[u8; 8] = b"duetsnp1";
/// Bytes before the first record, checksum included.
pub(super) const HEADER: usize = 8 + 8 + 8 + 8 + 16 + 8 + 4 + 4;
const SNAPSHOT_HEADER: usize = 8 + 8 + 8 + 8 + 4;

/// Largest record, in bytes.
pub const MAX_RECORD: usize = 64 << 20;
/// Most records of a batch.
pub const MAX_RECORDS: usize = 1 << 20;
/// Largest segment or snapshot, in bytes.
pub const MAX_SEGMENT: usize = 1 << 30;

/// What a segment says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    pub generation: u64,
    pub number: u64,
    /// A torn segment that this one declares void; zero: none.
    pub voids: u64,
    pub nonce: [u8; 16],
    pub records: Vec<Vec<u8>>,
}

/// Why bytes are not a segment.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Bad {
    /// They end too early, as a write that a crash cut off would, or are all zero from somewhere on.
    Torn(String),
    /// They are something else.
    Corrupt(String),
}

impl Bad {
    pub(super) fn reason(self) -> String {
        match self {
            Bad::Torn(reason) | Bad::Corrupt(reason) => reason,
        }
    }
}

pub(super) fn encode(segment: &Segment) -> Bytes {
    let payload: usize = segment.records.iter().map(|record| record.len() + 8).sum();
    let mut out = Vec::with_capacity(HEADER + payload);
    out.extend_from_slice(SEGMENT);
    out.extend_from_slice(&segment.generation.to_le_bytes());
    out.extend_from_slice(&segment.number.to_le_bytes());
    out.extend_from_slice(&segment.voids.to_le_bytes());
    out.extend_from_slice(&segment.nonce);
    out.extend_from_slice(&((HEADER + payload) as u64).to_le_bytes());
    out.extend_from_slice(&(segment.records.len() as u32).to_le_bytes());
    let crc = crc32c::crc32c(&out);
    out.extend_from_slice(&crc.to_le_bytes());
    for (index, record) in (0u32..).zip(&segment.records) {
        out.extend_from_slice(&(record.len() as u32).to_le_bytes());
        out.extend_from_slice(&record_crc(segment.number, index, record).to_le_bytes());
        out.extend_from_slice(record);
    }
    out.into()
}

/// The bytes of a segment with these records, as [`Journal::append`](super::Journal::append) writes
/// them but for the nonce, which is zero.
pub fn segment_bytes(generation: u64, number: u64, records: &[Vec<u8>]) -> Bytes {
    encode(&Segment { generation, number, voids: 0, nonce: [0; 16], records: records.to_vec() })
}

/// The records in the bytes of segment `number`.
///
/// # Errors
/// Why they are not that segment, or not the whole of it.
pub fn segment_records(bytes: &[u8], number: u64) -> Result<Vec<Vec<u8>>, String> {
    decode(bytes, number).map(|segment| segment.records).map_err(Bad::reason)
}

/// The state in the bytes of the snapshot after segment `number`.
///
/// # Errors
/// Why they are not that snapshot.
pub fn snapshot_state(bytes: &Bytes, number: u64) -> Result<Bytes, String> {
    decode_snapshot(bytes, number).map_err(Bad::reason)
}

/// Length, number and index are under the checksum with the payload.
fn record_crc(number: u64, index: u32, record: &[u8]) -> u32 {
    let mut place = [0; 16];
    place[..8].copy_from_slice(&number.to_le_bytes());
    place[8..12].copy_from_slice(&index.to_le_bytes());
    place[12..].copy_from_slice(&(record.len() as u32).to_le_bytes());
    crc32c::crc32c_append(crc32c::crc32c(&place), record)
}

/// Takes bytes apart from the front.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(n)?;
        self.0 = tail;
        Some(head)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N)?.try_into().ok()
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }
}

/// Reads a segment that must have this number, and nothing else.
pub(super) fn decode(bytes: &[u8], number: u64) -> Result<Segment, Bad> {
    match split(bytes, number)? {
        (segment, []) => Ok(segment),
        _ => Err(Bad::Corrupt("something follows its last record".to_owned())),
    }
}

/// Reads the segments of an object, of which the first must have this number; and what is wrong with
/// the one after the last sound one. Zeros after a segment are room for the next one.
pub(super) fn decode_all(bytes: &[u8], first: u64) -> (Vec<Segment>, Option<Bad>) {
    let (mut segments, mut rest) = (Vec::new(), bytes);
    for number in first.. {
        match split(rest, number) {
            Ok((segment, after)) => {
                segments.push(segment);
                rest = after;
            }
            Err(Bad::Corrupt(reason)) if is_unwritten(bytes, bytes.len() - rest.len()) => {
                return (segments, Some(Bad::Torn(reason)));
            }
            Err(bad) => return (segments, Some(bad)),
        }
        if rest.iter().all(|byte| *byte == 0) {
            break;
        }
    }
    (segments, None)
}

/// Whether part of the segment at `at` never came to the disk: a sector, or the segment's share of one,
/// is all zero where its room was prepared with zeros. Damage looks otherwise.
fn is_unwritten(bytes: &[u8], at: usize) -> bool {
    const SECTOR: usize = 512;
    let own = &bytes[at..];
    // Without its header a segment ends with the last byte that was written.
    let written = own.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
    let length = header(own).ok().and_then(|header| usize::try_from(header.length).ok());
    let end = at + length.unwrap_or(written).min(own.len());
    (at / SECTOR..end.div_ceil(SECTOR)).any(|sector| {
        let share = (sector * SECTOR).max(at)..((sector + 1) * SECTOR).min(end);
        bytes[share].iter().all(|byte| *byte == 0)
    })
}

/// The sound segments in an object's bytes, of which the first has number `first`: each one's number and
/// records.
pub fn segments_in(bytes: &[u8], first: u64) -> Vec<(u64, Vec<Vec<u8>>)> {
    let segments = decode_all(bytes, first).0;
    segments.into_iter().map(|segment| (segment.number, segment.records)).collect()
}

/// What a sound header says.
struct Header {
    generation: u64,
    number: u64,
    voids: u64,
    nonce: [u8; 16],
    length: u64,
    count: u32,
}

fn header(bytes: &[u8]) -> Result<Header, Bad> {
    let torn = || Bad::Torn("it ends within its header".to_owned());
    if bytes.iter().all(|byte| *byte == 0) {
        return Err(Bad::Torn("it is empty".to_owned()));
    }
    if !bytes.starts_with(&SEGMENT[..bytes.len().min(SEGMENT.len())]) {
        return Err(Bad::Corrupt("it does not begin as a segment does".to_owned()));
    }
    let mut reader = Reader(bytes.get(8..HEADER).ok_or_else(torn)?);
    let mut fields = || {
        let (generation, number, voids) = (reader.u64()?, reader.u64()?, reader.u64()?);
        let (nonce, length, count) = (reader.array()?, reader.u64()?, reader.u32()?);
        Some((Header { generation, number, voids, nonce, length, count }, reader.u32()?))
    };
    let (header, crc) = fields().ok_or_else(torn)?;
    if crc != crc32c::crc32c(&bytes[..HEADER - 4]) {
        return Err(Bad::Corrupt("the checksum of its header does not match".to_owned()));
    }
    Ok(header)
}

/// Reads the segment at the front, which must have this number, and returns what follows it.
fn split(bytes: &[u8], number: u64) -> Result<(Segment, &[u8]), Bad> {
    let Header { generation, number: found, voids, nonce, length, count } = header(bytes)?;
    if found != number {
        return Err(Bad::Corrupt(format!("it calls itself segment {found}")));
    }
    if (bytes.len() as u64) < length {
        return Err(Bad::Torn(format!("it has {} of {length} bytes", bytes.len())));
    }
    let (own, rest) = usize::try_from(length)
        .ok()
        .and_then(|length| bytes.split_at_checked(length))
        .filter(|(own, _)| own.len() >= HEADER)
        .ok_or_else(|| Bad::Corrupt("its length is shorter than its header".to_owned()))?;
    let records = records(&own[HEADER..], number, count)?;
    Ok((Segment { generation, number, voids, nonce, records }, rest))
}

fn records(bytes: &[u8], number: u64, count: u32) -> Result<Vec<Vec<u8>>, Bad> {
    let mut rest = Reader(bytes);
    let mut records = Vec::new();
    for index in 0..count {
        // A header that was synced before a body that was not: the file has its length, not its bytes.
        let unwritten = !rest.0.is_empty() && rest.0.iter().all(|byte| *byte == 0);
        let bad = |reason: String| {
            if unwritten { Bad::Torn(reason) } else { Bad::Corrupt(reason) }
        };
        let mut next = || {
            let (length, crc) = (rest.u32()?, rest.u32()?);
            Some((crc, rest.take(length as usize)?))
        };
        let Some((crc, record)) = next() else {
            return Err(bad(format!("record {index} of {count} is cut off")));
        };
        if crc != record_crc(number, index, record) {
            return Err(bad(format!("the checksum of record {index} of {count} does not match")));
        }
        records.push(record.to_vec());
    }
    if rest.0.is_empty() {
        Ok(records)
    } else {
        Err(Bad::Corrupt("something follows its last record".to_owned()))
    }
}

pub(super) fn encode_snapshot(generation: u64, number: u64, payload: &[u8]) -> Bytes {
    let length = SNAPSHOT_HEADER + payload.len() + 4;
    let mut out = Vec::with_capacity(length);
    out.extend_from_slice(SNAPSHOT);
    out.extend_from_slice(&generation.to_le_bytes());
    out.extend_from_slice(&number.to_le_bytes());
    out.extend_from_slice(&(length as u64).to_le_bytes());
    let crc = crc32c::crc32c(&out);
    out.extend_from_slice(&crc.to_le_bytes());
    out.extend_from_slice(payload);
    out.extend_from_slice(&crc32c::crc32c(payload).to_le_bytes());
    out.into()
}

/// The payload of a snapshot that must have this number.
pub(super) fn decode_snapshot(bytes: &Bytes, number: u64) -> Result<Bytes, Bad> {
    let corrupt = |reason: &str| Bad::Corrupt(reason.to_owned());
    let mut header = Reader(bytes);
    let mut fields = || {
        let magic: [u8; 8] = header.array()?;
        let (_generation, found, length) = (header.u64()?, header.u64()?, header.u64()?);
        Some((magic, found, length, header.u32()?))
    };
    let (magic, found, length, crc) = fields().ok_or_else(|| corrupt("it is cut off"))?;
    if &magic != SNAPSHOT || found != number {
        return Err(corrupt("it is not the snapshot that its name says"));
    }
    if crc != crc32c::crc32c(&bytes[..SNAPSHOT_HEADER - 4]) {
        return Err(corrupt("the checksum of its header does not match"));
    }
    if bytes.len() as u64 != length || bytes.len() < SNAPSHOT_HEADER + 4 {
        return Err(corrupt("it is cut off"));
    }
    let (payload, crc) = bytes[SNAPSHOT_HEADER..].split_at(bytes.len() - SNAPSHOT_HEADER - 4);
    if crc != crc32c::crc32c(payload).to_le_bytes() {
        return Err(corrupt("its checksum does not match"));
    }
    Ok(bytes.slice(SNAPSHOT_HEADER..bytes.len() - 4))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn segment(records: Vec<Vec<u8>>) -> Segment {
        Segment { generation: 3, number: 9, voids: 0, nonce: [7; 16], records }
    }

    fn records() -> impl Strategy<Value = Vec<Vec<u8>>> {
        proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..40), 0..6)
    }

    proptest! {
        #[test]
        fn a_segment_survives(records in records()) {
            let segment = segment(records);
            prop_assert_eq!(decode(&encode(&segment), 9), Ok(segment.clone()));
            prop_assert!(decode(&encode(&segment), 8).is_err());
        }

        #[test]
        fn a_changed_byte_anywhere_is_detected(records in records(), at in any::<prop::sample::Index>(), flip in 1u8..) {
            let mut bytes = encode(&segment(records)).to_vec();
            let at = at.index(bytes.len());
            bytes[at] ^= flip;
            prop_assert!(decode(&bytes, 9).is_err());
        }

        #[test]
        fn a_cut_anywhere_is_torn_and_a_longer_one_corrupt(records in records(), at in any::<prop::sample::Index>()) {
            let bytes = encode(&segment(records));
            let cut = decode(&bytes[..at.index(bytes.len())], 9);
            prop_assert!(matches!(cut, Err(Bad::Torn(_))), "{:?}", cut);
            let longer = [&bytes[..], &[0]].concat();
            prop_assert!(matches!(decode(&longer, 9), Err(Bad::Corrupt(_))));
        }

        #[test]
        fn segments_in_a_row_are_read_up_to_where_they_are_cut(
            all in proptest::collection::vec(records(), 1..5), at in any::<prop::sample::Index>(),
        ) {
            let all: Vec<Segment> =
                (9..).zip(all).map(|(number, records)| Segment { number, ..segment(records) }).collect();
            let each: Vec<Bytes> = all.iter().map(encode).collect();
            let bytes = each.concat();
            prop_assert_eq!(decode_all(&bytes, 9), (all.clone(), None));
            let cut = at.index(bytes.len());
            let ends = each.iter().scan(0, |end, one| { *end += one.len(); Some(*end) });
            let whole = ends.clone().filter(|end| *end <= cut).count();
            let (found, bad) = decode_all(&bytes[..cut], 9);
            prop_assert_eq!(&found[..], &all[..whole]);
            let on_an_edge = ends.clone().any(|end| end == cut);
            prop_assert_eq!(matches!(bad, Some(Bad::Torn(_))), !on_an_edge, "{:?}", bad);
            prop_assert_eq!(segments_in(&bytes[..cut], 9).len(), whole);
        }

        #[test]
        fn in_prepared_room_what_a_crash_leaves_is_torn_and_a_changed_byte_is_not(
            before in records(), last in proptest::collection::vec(proptest::collection::vec(1u8.., 0..900), 1..4),
            lost in any::<prop::sample::Index>(), at in any::<prop::sample::Index>(), flip in 1u8..,
        ) {
            let first = Segment { number: 9, ..segment(before) };
            let second = Segment { number: 10, ..segment(last) };
            let (one, two) = (encode(&first), encode(&second));
            let (begin, end) = (one.len(), one.len() + two.len());
            let mut file = [&one[..], &two[..]].concat();
            file.resize(end + 5000, 0);
            prop_assert_eq!(decode_all(&file, 9), (vec![first.clone(), second], None));
            // Sectors come to the disk in any order, or not.
            let mut crashed = file.clone();
            let sectors: Vec<usize> = (begin / 512..end.div_ceil(512)).collect();
            let sector = sectors[lost.index(sectors.len())];
            crashed[(sector * 512).max(begin)..((sector + 1) * 512).min(end)].fill(0);
            match decode_all(&crashed, 9) {
                // The only one: as if it had never been begun.
                (found, None) => {
                    prop_assert_eq!(&found[..], std::slice::from_ref(&first));
                    prop_assert_eq!(sectors.len(), 1);
                }
                (found, Some(Bad::Torn(_))) => {
                    prop_assert_eq!(&found[..], std::slice::from_ref(&first));
                }
                (_, Some(Bad::Corrupt(reason))) => prop_assert!(false, "{}", reason),
            }
            let mut changed = file;
            changed[begin + at.index(end - begin)] ^= flip;
            let (found, bad) = decode_all(&changed, 9);
            prop_assert_eq!(found, vec![first]);
            prop_assert!(bad.is_some());
        }

        #[test]
        fn arbitrary_bytes_do_no_harm(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = (decode(&bytes, 9), decode_all(&bytes, 9));
            let _ = decode_snapshot(&bytes.into(), 9);
        }

        #[test]
        fn a_snapshot_survives_and_a_changed_byte_is_detected(
            payload in proptest::collection::vec(any::<u8>(), 0..100),
            at in any::<prop::sample::Index>(), flip in 1u8..,
        ) {
            let bytes = encode_snapshot(2, 5, &payload);
            prop_assert_eq!(decode_snapshot(&bytes, 5).unwrap(), payload);
            let mut bad = bytes.to_vec();
            let at = at.index(bad.len());
            // The generation is told, not relied on; it is under the header's checksum all the same.
            bad[at] ^= flip;
            prop_assert!(decode_snapshot(&bad.into(), 5).is_err());
        }
    }
}
