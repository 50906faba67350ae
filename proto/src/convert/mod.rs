//! Between the wire and the core.
//!
//! `wire::X::from(&core_x)` encodes; text meant for a person is cut to its bound there.
//! `core::X::try_from(wire_x)` decodes and refuses, with the field's name, whatever is missing,
//! out of bounds, not finite or contradictory.

mod assignment;
mod basic;
mod report;

pub use basic::{MAX_BUILD, MAX_KEY, MAX_NAME, MAX_REASON, MAX_TEXT, decode_digest, decode_role};
pub use basic::{Sender, clip_reason};
pub use report::{MAX_COMPONENTS, MAX_LEAVES, MAX_METRICS, MAX_SHARDS};

pub use assignment::{MAX_TRACES, MAX_TREES};

/// Why a message cannot be taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// A field that must be there is not.
    #[error("`{0}` is missing: the sender must set it")]
    Missing(&'static str),
    /// A digest or seed of another length than 32 bytes.
    #[error("`{field}` has {length} bytes: it must have 32")]
    NotThirtyTwo {
        /// Which field.
        field: &'static str,
        /// Its length.
        length: usize,
    },
    /// A number that is NaN or infinite.
    #[error("`{0}` is not a finite number: report a failure instead")]
    NonFinite(&'static str),
    /// A text longer than its bound.
    #[error("`{field}` has {length} bytes: at most {bound} are taken")]
    TooLong {
        /// Which field.
        field: &'static str,
        /// Its length in bytes.
        length: usize,
        /// The bound.
        bound: usize,
    },
    /// A list longer than its bound.
    #[error("`{field}` has {count} elements: at most {bound} are taken")]
    TooMany {
        /// Which field.
        field: &'static str,
        /// Its length.
        count: usize,
        /// The bound.
        bound: usize,
    },
    /// An enumeration's zero, or a number this build does not know.
    #[error("`{field}` is {value}, which this build does not know: are the builds the same?")]
    Unknown {
        /// Which field.
        field: &'static str,
        /// The number.
        value: i32,
    },
    /// A name that is empty or has other characters than letters, digits, `.`, `_` and `-`.
    #[error("`{field}` is `{name}`: use letters, digits, `.`, `_` and `-`")]
    BadName {
        /// Which field.
        field: &'static str,
        /// The name, cut.
        name: String,
    },
    /// A name that stands twice in a list.
    #[error("`{field}` names `{name}` twice: each name may stand once")]
    Twice {
        /// Which field.
        field: &'static str,
        /// The name.
        name: String,
    },
    /// Two fields that contradict each other.
    #[error("`{field}` contradicts its message: {why}")]
    Contradiction {
        /// Which field.
        field: &'static str,
        /// How.
        why: &'static str,
    },
}
