//! How fast a run goes, and when it will be over.

use duet_core::Millis;
use std::collections::VecDeque;

/// Steps that the estimate looks back on.
const LOOK_BACK: usize = 8;

#[derive(Clone, Copy, Debug)]
struct Mark {
    at: Millis,
    images: u64,
    version: u64,
}

/// Marks at the start of this coordinator and at each commit since.
#[derive(Clone, Debug)]
pub(super) struct Pace {
    marks: VecDeque<Mark>,
}

impl Pace {
    pub(super) fn new(at: Millis, images: u64, version: u64) -> Pace {
        Pace { marks: VecDeque::from([Mark { at, images, version }]) }
    }

    pub(super) fn committed(&mut self, at: Millis, images: u64, version: u64) {
        self.marks.push_back(Mark { at, images, version });
        if self.marks.len() > LOOK_BACK + 1 {
            self.marks.pop_front();
        }
    }

    /// Images per second since the oldest mark; zero when no time has passed.
    pub(super) fn images_per_second(&self, now: Millis, images: u64) -> f64 {
        let Some(first) = self.marks.front() else { return 0.0 };
        let span = now.since(first.at).0;
        let made = images.saturating_sub(first.images);
        if span == 0 { 0.0 } else { made as f64 * 1000.0 / span as f64 }
    }

    /// Seconds until `iterations` steps are committed at the pace of the last ones; `None` before the
    /// first commit.
    pub(super) fn eta_seconds(&self, now: Millis, iterations: u64) -> Option<f64> {
        let (first, last) = (self.marks.front()?, self.marks.back()?);
        let steps = last.version.checked_sub(first.version).filter(|steps| *steps > 0)?;
        let per_step = super::seconds(last.at.since(first.at)) / steps as f64;
        let left = iterations.saturating_sub(last.version) as f64;
        Some((left * per_step - super::seconds(now.since(last.at))).max(0.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_even_pace_gives_an_even_estimate() {
        let mut pace = Pace::new(Millis(1000), 0, 2);
        assert_eq!(pace.eta_seconds(Millis(2000), 10), None);
        assert_eq!(pace.images_per_second(Millis(1000), 0), 0.0);
        for step in 1..=3 {
            pace.committed(Millis(1000 + step * 2000), step * 8, 2 + step);
        }
        // Three steps took 6 s; five are left, and the sixth second of the first of them has not begun.
        assert_eq!(pace.eta_seconds(Millis(7000), 10), Some(10.0));
        assert_eq!(pace.eta_seconds(Millis(8000), 10), Some(9.0));
        assert_eq!(pace.eta_seconds(Millis(99_000), 10), Some(0.0));
        assert_eq!(pace.images_per_second(Millis(7000), 24), 4.0);
    }
}
