//! The L2 norm of a gradient, the same bits however it is shared out.
//!
//! Squares are summed in double precision within blocks of the row (see [`super::layout`]), whose
//! borders never depend on the ranks; sums of blocks are added up exactly, in fixed point over the
//! whole range of double precision, so that the order does not matter. One rounding follows.

use super::layout::BLOCK;
use tch::{Kind, TchError, Tensor};

/// Words of 64 bits from 2^-1074, below which double precision has nothing, beyond 2^1024.
pub const WORDS: usize = 34;
/// The exponent of the lowest bit.
const LOWEST: i32 = -1074;

/// An exact sum of numbers that are not negative.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExactSum {
    words: [u64; WORDS],
    finite: bool,
}

impl Default for ExactSum {
    fn default() -> Self {
        ExactSum { words: [0; WORDS], finite: true }
    }
}

impl ExactSum {
    /// A sum that [`words`](Self::words) gave.
    pub fn from_words(words: [u64; WORDS], finite: bool) -> ExactSum {
        ExactSum { words, finite }
    }

    /// The sum in fixed point, lowest word first.
    pub fn words(&self) -> &[u64; WORDS] {
        &self.words
    }

    /// Whether all that was added was finite.
    pub fn is_finite(&self) -> bool {
        self.finite
    }

    /// Adds a number that is not negative.
    pub fn add(&mut self, value: f64) {
        if !value.is_finite() {
            self.finite = false;
            return;
        }
        let bits = value.to_bits();
        let exponent = (bits >> 52) & 0x7ff;
        let fraction = bits & ((1 << 52) - 1);
        // A subnormal number has the exponent of the smallest normal one, and no leading one.
        let (mantissa, shift) = match exponent {
            0 => (fraction, 0),
            _ => (fraction | 1 << 52, exponent as usize - 1),
        };
        let wide = u128::from(mantissa) << (shift % 64);
        self.add_word(shift / 64, wide as u64);
        self.add_word(shift / 64 + 1, (wide >> 64) as u64);
    }

    /// Adds another sum.
    pub fn merge(&mut self, other: &ExactSum) {
        self.finite &= other.finite;
        for (at, word) in other.words.iter().enumerate() {
            self.add_word(at, *word);
        }
    }

    fn add_word(&mut self, mut at: usize, word: u64) {
        let mut carry = word;
        while carry != 0 && at < WORDS {
            let (sum, over) = self.words[at].overflowing_add(carry);
            self.words[at] = sum;
            carry = u64::from(over);
            at += 1;
        }
    }

    /// The sum, rounded to the nearest number, ties to even; NaN where something was not finite.
    pub fn value(&self) -> f64 {
        if !self.finite {
            return f64::NAN;
        }
        let Some(top) = (0..WORDS).rev().find(|at| self.words[*at] != 0) else { return 0.0 };
        let high = top as i32 * 64 + 63 - self.words[top].leading_zeros() as i32;
        if high < 53 {
            // Below 2^-1021: the words are the number.
            return f64::from_bits(self.words[0]);
        }
        // The 53 bits from the highest down, whether the next is set, and whether any below it is.
        let low = high - 52;
        let (word, bit) = (low as usize / 64, low as usize % 64);
        let pair = u128::from(self.words[word])
            | u128::from(self.words.get(word + 1).copied().unwrap_or(0)) << 64;
        let mantissa = (pair >> bit) as u64 & ((1 << 53) - 1);
        let set = |at: i32| self.words[at as usize / 64] >> (at % 64) & 1 == 1;
        let half = set(low - 1);
        let rest = (0..low - 1).any(set);
        let up = half && (rest || mantissa & 1 == 1);
        // The mantissa's own carry moves the exponent, as it should.
        let exponent = (low + 1) as u64;
        if exponent >= 0x7ff {
            return f64::INFINITY;
        }
        f64::from_bits((exponent << 52) + (mantissa - (1 << 52)) + u64::from(up))
    }
}

/// Elements that are squared at a time, to bound the memory that takes.
const AT_A_TIME: i64 = 256 * BLOCK;

/// Adds the squares of a share to a sum. Its length is a multiple of [`BLOCK`].
///
/// # Errors
/// libtorch refuses.
pub fn add_squares(share: &Tensor, sum: &mut ExactSum) -> Result<(), TchError> {
    let (share, len) = (share.f_detach()?, share.numel() as i64);
    for at in (0..len).step_by(AT_A_TIME as usize) {
        let part = share.f_narrow(0, at, AT_A_TIME.min(len - at))?;
        let squares = part.f_to_kind(Kind::Double)?.f_square_()?.f_view([-1, BLOCK])?;
        let blocks = squares.f_sum_dim_intlist(1i64, false, Kind::Double)?;
        Vec::<f64>::try_from(&blocks)?.into_iter().for_each(|block| sum.add(block));
    }
    Ok(())
}

/// The exponent that [`ExactSum`]'s lowest bit stands for, in words: a check of its constants.
const _: () = assert!(LOWEST + 64 * WORDS as i32 >= 1024 + 64);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tch::Device;

    fn sum(values: impl IntoIterator<Item = f64>) -> ExactSum {
        let mut sum = ExactSum::default();
        values.into_iter().for_each(|value| sum.add(value));
        sum
    }

    proptest! {
        #[test]
        fn one_number_comes_back(bits in 0u64..0x7ff0_0000_0000_0000) {
            prop_assert_eq!(sum([f64::from_bits(bits)]).value().to_bits(), bits);
        }

        #[test]
        fn two_numbers_are_added_as_the_processor_does(
            a in 0u64..0x7fe0_0000_0000_0000,
            apart in -60i64..60,
            low in any::<u64>(),
        ) {
            let a = f64::from_bits(a);
            let b = i128::from(a.to_bits()) + i128::from(apart << 52) + i128::from(low >> 12);
            prop_assume!((0..0x7fe0_0000_0000_0000).contains(&b));
            let b = f64::from_bits(b as u64);
            prop_assert_eq!(sum([a, b]).value().to_bits(), (a + b).to_bits());
        }

        #[test]
        fn order_and_grouping_change_nothing(
            values in proptest::collection::vec(0u64..0x7f00_0000_0000_0000, 0..40),
            cut in 0usize..40,
        ) {
            let values: Vec<f64> = values.into_iter().map(f64::from_bits).collect();
            let cut = cut.min(values.len());
            let mut parts = sum(values[cut..].iter().copied());
            parts.merge(&sum(values[..cut].iter().rev().copied()));
            prop_assert_eq!(parts, sum(values));
        }
    }

    #[test]
    fn what_is_not_finite_is_said() {
        assert!(sum([1.0, f64::INFINITY]).value().is_nan());
        assert!(!sum([f64::NAN]).is_finite());
        assert_eq!(sum([f64::MAX, f64::MAX]).value(), f64::INFINITY);
    }

    #[test]
    fn the_norm_of_a_share_is_that_of_its_numbers() {
        tch::set_num_threads(1);
        let share = Tensor::randn([5 * BLOCK], (Kind::Float, Device::Cpu));
        let mut found = ExactSum::default();
        add_squares(&share, &mut found).unwrap();
        let mut apart = ExactSum::default();
        for block in 0..5 {
            add_squares(&share.narrow(0, block * BLOCK, BLOCK), &mut apart).unwrap();
        }
        assert_eq!(found, apart, "a block's sum does not depend on its neighbours");
        let norm = share.to_kind(Kind::Double).norm().double_value(&[]);
        assert!((found.value().sqrt() - norm).abs() < 1e-12 * norm);
    }
}
