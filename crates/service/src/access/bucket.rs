//! How often each peer may ask.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Peers that are told apart; all others share one bucket.
const PEERS: usize = 4096;

struct Bucket {
    tokens: f64,
    filled: Instant,
}

/// A token bucket for each address: a second's worth of requests at once, and so many a second.
pub(super) struct Buckets {
    rate: f64,
    peers: Mutex<HashMap<Option<IpAddr>, Bucket>>,
}

impl Buckets {
    pub(super) fn new(per_second: u32) -> Buckets {
        Buckets { rate: f64::from(per_second.max(1)), peers: Mutex::default() }
    }

    /// Takes a token, or says when there will be one.
    pub(super) fn take(&self, peer: IpAddr, now: Instant) -> Result<(), Duration> {
        let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        let mut key = Some(peer);
        if !peers.contains_key(&key) && peers.len() >= PEERS {
            // Who has not asked for a second has a full bucket, like one that is not there.
            peers.retain(|_, bucket| now.duration_since(bucket.filled) < Duration::from_secs(1));
            if peers.len() >= PEERS {
                key = None;
            }
        }
        let rate = self.rate;
        let bucket = peers.entry(key).or_insert(Bucket { tokens: rate, filled: now });
        let waited = now.saturating_duration_since(bucket.filled).as_secs_f64();
        bucket.tokens = (bucket.tokens + waited * rate).min(rate);
        bucket.filled = bucket.filled.max(now);
        if bucket.tokens >= 1.0 {
            bucket.tokens -= 1.0;
            return Ok(());
        }
        Err(Duration::from_secs_f64((1.0 - bucket.tokens) / rate))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    fn peer(number: u32) -> IpAddr {
        IpAddr::V4(Ipv4Addr::from(number))
    }

    #[test]
    fn a_second_has_so_many_tokens_for_each_peer() {
        let (buckets, start) = (Buckets::new(10), Instant::now());
        for _ in 0..10 {
            assert_eq!(buckets.take(peer(1), start), Ok(()));
        }
        let wait = buckets.take(peer(1), start).unwrap_err();
        assert!((wait.as_secs_f64() - 0.1).abs() < 1e-6, "{wait:?}");
        assert_eq!(buckets.take(peer(2), start), Ok(()), "the other's bucket is its own");
        let later = start + Duration::from_secs(60);
        let taken = (0..100).filter(|_| buckets.take(peer(1), later).is_ok()).count();
        assert_eq!(taken, 10, "waiting longer saves no more than a second's worth");
    }

    #[test]
    fn memory_is_bounded_and_those_beyond_it_share() {
        let (buckets, start) = (Buckets::new(2), Instant::now());
        let many = PEERS as u32 + 100;
        let taken = (0..many).filter(|n| buckets.take(peer(*n), start).is_ok()).count();
        assert_eq!(taken, PEERS + 2);
        assert!(buckets.peers.lock().unwrap().len() <= PEERS + 1);
        assert_eq!(buckets.take(peer(many), start + Duration::from_secs(2)), Ok(()));
        assert!(buckets.peers.lock().unwrap().len() <= 2, "idle ones are forgotten");
    }
}
