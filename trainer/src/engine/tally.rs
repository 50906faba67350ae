//! What a rank found out in a step, made one over all ranks.

use crate::error::TrainError;
use duet_torch::collective::Collective;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use tch::{Device, Kind, Tensor};

/// Most bytes that a rank can say.
const CAPACITY: usize = 64 << 10;
/// Most bad places that a rank names.
const MOST_BAD: usize = 20;

/// Sums over this rank's micro-batches, and what went wrong in them.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Tally {
    /// Shares of global means and counts, by name.
    #[serde(with = "bits")]
    pub sums: BTreeMap<String, f64>,
    /// Losses that are not finite.
    pub bad: Vec<String>,
    /// Class and text of the error that ended this rank's part.
    pub failure: Option<(String, String)>,
}

impl Tally {
    /// Adds to a sum.
    pub fn add(&mut self, name: &str, value: f64) {
        *self.sums.entry(name.to_owned()).or_insert(0.0) += value;
    }

    /// Names a place where something is not finite.
    pub fn bad(&mut self, place: String) {
        if self.bad.len() < MOST_BAD {
            self.bad.push(place);
        }
    }

    /// Takes an error in place of a result.
    pub fn failed(&mut self, error: &TrainError) {
        let text: String = error.to_string().chars().take(2000).collect();
        self.failure = Some((error.kind().to_owned(), text));
    }

    /// Adds all ranks' tallies up, in rank order: every rank gets the same bits. Ranks that failed
    /// take part too, so nobody waits in vain.
    ///
    /// # Errors
    /// [`TrainError::Peer`] or [`TrainError::NonFinite`], the same on all ranks.
    pub fn exchange(self, group: &dyn Collective, iteration: u32) -> Result<Tally, TrainError> {
        let mut all = Tally::default();
        for (rank, one) in gather(&self, group)?.into_iter().enumerate() {
            if let (None, Some(failure)) = (&all.failure, one.failure) {
                let (rank, (kind, reason)) = (rank as u32, failure);
                return Err(TrainError::Peer { rank, kind, reason });
            }
            one.sums.iter().for_each(|(name, value)| all.add(name, *value));
            all.bad.extend(one.bad);
        }
        if all.bad.is_empty() {
            return Ok(all);
        }
        Err(TrainError::NonFinite {
            what: "a loss".to_owned(),
            iteration,
            place: all.bad.join(", "),
        })
    }
}

/// Numbers as their bits: JSON has no infinity, and a rank that has one must be able to say so.
mod bits {
    use serde::{Deserialize, Deserializer, Serializer};
    use std::collections::BTreeMap;

    pub fn serialize<S: Serializer>(
        sums: &BTreeMap<String, f64>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_map(sums.iter().map(|(name, value)| (name, value.to_bits())))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<BTreeMap<String, f64>, D::Error> {
        let sums = BTreeMap::<String, u64>::deserialize(deserializer)?;
        Ok(sums.into_iter().map(|(name, value)| (name, f64::from_bits(value))).collect())
    }
}

/// Every rank's tally, in rank order.
fn gather(own: &Tally, group: &dyn Collective) -> Result<Vec<Tally>, TrainError> {
    let encode = |tally: &Tally| serde_json::to_vec(tally).unwrap_or_default();
    let mut text = encode(own);
    if text.len() > CAPACITY - 8 {
        let reason = format!("{} bytes of metrics", text.len());
        let failure = Some(("model".to_owned(), reason));
        text = encode(&Tally { failure, ..Tally::default() });
    }
    let mut framed = (text.len() as u64).to_le_bytes().to_vec();
    framed.extend(text);
    framed.resize(CAPACITY, 0);
    let all =
        Tensor::f_zeros([i64::from(group.world()) * CAPACITY as i64], (Kind::Uint8, Device::Cpu))?;
    group.all_gather(&all, &Tensor::from_slice(&framed))?;
    let all = duet_torch::bytes::to_bytes(&all)?;
    all.chunks(CAPACITY).map(decode).collect()
}

fn decode(framed: &[u8]) -> Result<Tally, TrainError> {
    let garbled = || TrainError::Protocol("a rank's tally arrived garbled".to_owned());
    let (len, rest) = framed.split_first_chunk::<8>().ok_or_else(garbled)?;
    let text = rest.get(..u64::from_le_bytes(*len) as usize).ok_or_else(garbled)?;
    serde_json::from_slice(text).map_err(|_| garbled())
}

#[cfg(test)]
mod tests {
    use super::*;
    use duet_torch::collective::Solo;

    #[test]
    fn what_is_not_finite_is_named() {
        let mut tally = Tally::default();
        tally.add("dit/loss", f64::INFINITY);
        tally.add("dit/ratio", f64::NAN);
        assert_eq!(
            tally.clone().exchange(&Solo::new(), 3).unwrap().sums["dit/loss"],
            f64::INFINITY
        );
        tally.bad("dit loss of tree 3/0".to_owned());
        let error = tally.exchange(&Solo::new(), 3).unwrap_err().to_string();
        assert!(error.contains("dit loss of tree 3/0"), "{error}");
    }
}
