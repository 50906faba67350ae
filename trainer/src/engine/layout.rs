//! Where each parameter's gradient lies: one row of numbers, cut into buckets that travel on their own,
//! each cut into one share for each rank.
//!
//! ```text
//! row      | layers.0.a | layers.0.b | layers.1.a | ... | zeros |     natural order of names
//! buckets  |------ 0 ------|------ 1 ------|-------- 2 ---------|     whole blocks for each rank
//! shares   | r0 | r1 | r2  | r0 | r1 | r2  |  r0  |  r1  |  r2  |     equal, whole blocks
//! blocks   |.|.|.|.|.|.|.|.|.|.|.|.|.|.|.|.|.|.|.|.|.|.|.|.|.|.|.|     what norms are made of
//! ```
//! Blocks depend on the parameters alone, so that a norm made of them is the same bits however the row
//! is shared out.

use duet_torch::Tensors;
use std::ops::Range;

/// Elements of a block.
pub const BLOCK: i64 = 1024;

/// A rank's place in its group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seat {
    /// Which rank.
    pub rank: u32,
    /// Of how many.
    pub world: u32,
}

impl Seat {
    /// The only rank.
    pub const ALONE: Seat = Seat { rank: 0, world: 1 };
}

/// A stretch of a parameter that lies in one bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Which parameter, in natural order.
    pub param: usize,
    /// Where in the flattened parameter it begins.
    pub from: i64,
    /// How many elements.
    pub len: i64,
    /// Which bucket.
    pub bucket: usize,
    /// Where in the bucket it begins.
    pub at: i64,
}

/// The row of a model's trained parameters, as one rank sees it.
#[derive(Clone, Debug)]
pub struct Layout {
    seat: Seat,
    names: Vec<String>,
    lens: Vec<i64>,
    buckets: Vec<Range<i64>>,
    /// By parameter, then by bucket.
    spans: Vec<Vec<Span>>,
}

impl Layout {
    /// Buckets of about `bucket` elements.
    pub fn new(params: &Tensors, seat: Seat, bucket: usize) -> Layout {
        let mut names: Vec<String> = params.keys().cloned().collect();
        names.sort_by_cached_key(|name| natural(name));
        let lens: Vec<i64> = names.iter().map(|name| params[name].numel() as i64).collect();
        let unit = BLOCK * i64::from(seat.world);
        let round = |len: i64| (len + unit - 1) / unit * unit;
        let end = round(lens.iter().sum());
        let size = round((bucket as i64).max(1));
        let buckets: Vec<Range<i64>> =
            (0..end).step_by(size as usize).map(|at| at..(at + size).min(end)).collect();
        let mut start = 0;
        let mut spans = Vec::with_capacity(names.len());
        for (param, len) in lens.iter().enumerate() {
            spans.push(spans_of(param, start..start + len, size));
            start += len;
        }
        Layout { seat, names, lens, buckets, spans }
    }

    /// The rank it was made for.
    pub fn seat(&self) -> Seat {
        self.seat
    }

    /// Names of the parameters, in natural order.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// Elements of a parameter.
    pub fn len_of(&self, param: usize) -> i64 {
        self.lens[param]
    }

    /// The buckets, as stretches of the row.
    pub fn buckets(&self) -> &[Range<i64>] {
        &self.buckets
    }

    /// Elements of a bucket.
    pub fn bucket_len(&self, bucket: usize) -> i64 {
        self.buckets[bucket].end - self.buckets[bucket].start
    }

    /// Elements of the row, the zeros at its end included.
    pub fn total(&self) -> i64 {
        self.buckets.last().map_or(0, |last| last.end)
    }

    /// This rank's share of a bucket, as a stretch of it.
    pub fn share(&self, bucket: usize) -> Range<i64> {
        let len = self.bucket_len(bucket) / i64::from(self.seat.world);
        let start = len * i64::from(self.seat.rank);
        start..start + len
    }

    /// The stretches of a parameter.
    pub fn spans(&self, param: usize) -> &[Span] {
        &self.spans[param]
    }

    /// All stretches that lie in a bucket.
    pub fn within(&self, bucket: usize) -> impl Iterator<Item = &Span> {
        self.spans.iter().flatten().filter(move |span| span.bucket == bucket)
    }

    /// What of the parameters lies in this rank's shares, in the order of the row.
    pub fn owned(&self) -> Vec<Span> {
        let own = |span: &Span| {
            let share = self.share(span.bucket);
            let from = span.at.max(share.start);
            let to = (span.at + span.len).min(share.end);
            let skipped = from - span.at;
            (from < to).then(|| Span {
                from: span.from + skipped,
                len: to - from,
                at: from,
                ..*span
            })
        };
        self.spans.iter().flatten().filter_map(own).collect()
    }

    /// The name of a stretch: the parameter's where it is the whole of it, else with the stretch.
    pub fn name_of(&self, span: &Span) -> String {
        let name = &self.names[span.param];
        match span.len == self.lens[span.param] {
            true => name.clone(),
            false => format!("{name}{}", range(span)),
        }
    }
}

/// A stretch as it is written behind a tensor's name: `[START..END]`.
pub fn range(span: &Span) -> String {
    format!("[{}..{}]", span.from, span.from + span.len)
}

/// The stretches of a parameter that lies at `row` among buckets of `size` elements.
fn spans_of(param: usize, row: Range<i64>, size: i64) -> Vec<Span> {
    let mut spans = Vec::new();
    let mut at = row.start;
    while at < row.end {
        let bucket = at / size;
        let end = ((bucket + 1) * size).min(row.end);
        let (from, at_bucket) = (at - row.start, at - bucket * size);
        let bucket = bucket as usize;
        spans.push(Span { param, from, len: end - at, bucket, at: at_bucket });
        at = end;
    }
    spans
}

/// A part of a name between dots. Numbers come in their own order, so that layer 10 follows layer 9.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    Number(u64),
    Text(String),
}

fn natural(name: &str) -> Vec<Part> {
    let part = |text: &str| match text.parse() {
        Ok(number) => Part::Number(number),
        Err(_) => Part::Text(text.to_owned()),
    };
    name.split('.').map(part).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tch::{Device, Kind, Tensor};

    fn params(lens: &[i64]) -> Tensors {
        let tensor = |len: &i64| Tensor::zeros([*len], (Kind::Float, Device::Cpu));
        lens.iter().enumerate().map(|(i, len)| (format!("layer.{i}"), tensor(len))).collect()
    }

    #[test]
    fn layers_come_in_the_order_of_their_numbers() {
        let layout = Layout::new(&params(&[1; 12]), Seat::ALONE, 1);
        let expected: Vec<String> = (0..12).map(|i| format!("layer.{i}")).collect();
        assert_eq!(layout.names(), expected);
    }

    proptest! {
        #[test]
        fn every_element_has_exactly_one_owner_whatever_the_world(
            lens in proptest::collection::vec(1i64..9000, 1..8),
            world in 1u32..6,
            bucket in 1usize..20_000,
        ) {
            let params = params(&lens);
            let mut owners: Vec<Vec<u32>> = lens.iter().map(|len| vec![0; *len as usize]).collect();
            for rank in 0..world {
                let layout = Layout::new(&params, Seat { rank, world }, bucket);
                prop_assert!(layout.total() % (BLOCK * i64::from(world)) == 0);
                for (bucket, row) in layout.buckets().iter().enumerate() {
                    let share = layout.share(bucket);
                    prop_assert_eq!((row.start + share.start) % BLOCK, 0);
                    prop_assert_eq!((share.end - share.start) % BLOCK, 0);
                }
                for span in layout.owned() {
                    for at in span.from..span.from + span.len {
                        owners[span.param][at as usize] += 1;
                    }
                    let share = layout.share(span.bucket);
                    prop_assert!(span.at >= share.start && span.at + span.len <= share.end);
                }
            }
            prop_assert!(owners.iter().flatten().all(|count| *count == 1));
        }
    }
}
