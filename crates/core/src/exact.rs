//! Values that come back from JSON bit for bit.
//!
//! Journal and snapshots are JSON. A JSON parser may be off by one unit in the last place, and one
//! such unit in a score would change an advantage and hence the weights of a replayed step; so
//! floating-point numbers are written as text and read by Rust's own parser, which is exact.

/// `f64` as its shortest text that reads back as the same number (`NaN` and `inf` included).
pub mod number {
    use serde::{Deserialize, Deserializer, Serializer};

    /// Writes a number.
    ///
    /// # Errors
    /// The serializer's.
    pub fn serialize<S: Serializer>(value: &f64, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&format_args!("{value:?}"))
    }

    /// Reads a number.
    ///
    /// # Errors
    /// When the text is not one.
    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
        let text = String::deserialize(from)?;
        text.parse().map_err(|_| serde::de::Error::custom(format!("`{text}` is not a number")))
    }
}

/// Named numbers, each as in [`number`].
pub mod numbers {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};
    use std::collections::BTreeMap;

    #[derive(Serialize, Deserialize)]
    struct Exact(#[serde(with = "super::number")] f64);

    /// Writes named numbers.
    ///
    /// # Errors
    /// The serializer's.
    pub fn serialize<S: Serializer>(map: &BTreeMap<String, f64>, to: S) -> Result<S::Ok, S::Error> {
        to.collect_map(map.iter().map(|(name, value)| (name, Exact(*value))))
    }

    /// Reads named numbers.
    ///
    /// # Errors
    /// When one of them is not a number.
    pub fn deserialize<'de, D: Deserializer<'de>>(
        from: D,
    ) -> Result<BTreeMap<String, f64>, D::Error> {
        let map = BTreeMap::<String, Exact>::deserialize(from)?;
        Ok(map.into_iter().map(|(name, value)| (name, value.0)).collect())
    }
}

/// A map whose keys are not text, as a list of pairs.
pub mod pairs {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};
    use std::collections::BTreeMap;

    /// Writes a map.
    ///
    /// # Errors
    /// The serializer's.
    pub fn serialize<K: Serialize, V: Serialize, S: Serializer>(
        map: &BTreeMap<K, V>,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        to.collect_seq(map)
    }

    /// Reads a map.
    ///
    /// # Errors
    /// When it is not a list of pairs.
    pub fn deserialize<
        'de,
        K: Deserialize<'de> + Ord,
        V: Deserialize<'de>,
        D: Deserializer<'de>,
    >(
        from: D,
    ) -> Result<BTreeMap<K, V>, D::Error> {
        Ok(Vec::<(K, V)>::deserialize(from)?.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde::{Deserialize, Serialize};
    use std::collections::BTreeMap;

    #[derive(Serialize, Deserialize)]
    struct Held {
        #[serde(with = "super::number")]
        one: f64,
        #[serde(with = "super::numbers")]
        many: BTreeMap<String, f64>,
        #[serde(with = "super::pairs")]
        pairs: BTreeMap<(u32, u32), u8>,
    }

    proptest! {
        #[test]
        fn every_bit_pattern_survives_json(bits in any::<u64>()) {
            let one = f64::from_bits(bits);
            let many = BTreeMap::from([("x".to_owned(), one)]);
            let held = Held { one, many, pairs: BTreeMap::from([((1, 2), 3)]) };
            let text = serde_json::to_string(&held).unwrap();
            let back: Held = serde_json::from_str(&text).unwrap();
            prop_assert!(back.one.to_bits() == bits || one.is_nan() && back.one.is_nan());
            prop_assert_eq!(back.many["x"].is_nan(), one.is_nan());
            prop_assert_eq!(back.pairs, held.pairs);
        }
    }
}
