//! Time as the core sees it: milliseconds on a clock that only the driver reads.

use serde::{Deserialize, Serialize};

/// A moment, or a span, in milliseconds.
///
/// Moments count from a point the driver chooses (Unix time for the coordinator, zero for the
/// simulator); the core only compares and adds them.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Millis(pub u64);

impl Millis {
    /// The moment `span` after this one, saturating at the end of time.
    pub fn after(self, span: Millis) -> Millis {
        Millis(self.0.saturating_add(span.0))
    }

    /// How long after `earlier` this moment is; zero when it is not after it.
    pub fn since(self, earlier: Millis) -> Millis {
        Millis(self.0.saturating_sub(earlier.0))
    }
}
