//! The one place where the coordinator reads the time.

use duet_core::Millis;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::time::Instant;

/// Unix time in milliseconds that never goes back: read once, then counted by the monotonic clock.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    base: Millis,
    start: Instant,
}

impl Clock {
    /// A clock that starts now.
    pub fn start() -> Clock {
        Clock { base: unix_now(), start: Instant::now() }
    }

    /// When it was started.
    pub fn started(&self) -> Millis {
        self.base
    }

    /// Now.
    pub fn now(&self) -> Millis {
        let elapsed = u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.base.after(Millis(elapsed))
    }

    /// The moment `at`, as a timer wants it; not before the clock's start.
    pub fn instant(&self, at: Millis) -> Instant {
        self.start + Duration::from_millis(at.since(self.base).0)
    }
}

/// Unix time by the system's clock, which may jump.
pub fn unix_now() -> Millis {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Millis(u64::try_from(now.as_millis()).unwrap_or(u64::MAX))
}
