//! Who was turned away: every time counted, once written to the log.

use crate::metrics::{Metrics, table};
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};

/// Kinds of refusal that are told apart in the log.
const REMEMBERED: usize = 1024;

/// Counts refusals and logs each kind once.
pub struct Refusals {
    metrics: Metrics,
    logged: Mutex<BTreeSet<(Option<IpAddr>, String)>>,
}

impl Refusals {
    /// None yet.
    pub fn new(metrics: Metrics) -> Refusals {
        Refusals { metrics, logged: Mutex::default() }
    }

    /// A peer was refused `what`, for a reason that is a label of the metric: `certificate`, `role`,
    /// `rate` or `connections`.
    pub fn note(&self, peer: Option<IpAddr>, what: &str, reason: &'static str, why: &str) {
        self.metrics.add(&table::REFUSED, &[reason], 1.0);
        let mut logged = self.logged.lock().unwrap_or_else(PoisonError::into_inner);
        if logged.len() >= REMEMBERED || !logged.insert((peer, format!("{reason} {what}"))) {
            return;
        }
        let peer = peer.map_or_else(|| "unknown".to_owned(), |peer| peer.to_string());
        tracing::warn!(%peer, what, reason, why, "refused; said once, counted in duet_refused_total");
        if logged.len() == REMEMBERED {
            tracing::warn!("no more refusals are logged, only counted in duet_refused_total");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::table::Place;

    #[test]
    fn all_are_counted_and_a_bounded_number_is_remembered() {
        let metrics = Metrics::new(Place::Coordinator);
        let refusals = Refusals::new(metrics.clone());
        for n in 0..3000 {
            refusals.note(None, &format!("/call/{n}"), "role", "no");
        }
        assert_eq!(refusals.logged.lock().unwrap().len(), REMEMBERED);
        let text = metrics.text();
        assert!(text.contains("duet_refused_total{reason=\"role\"} 3000"), "{text}");
    }
}
