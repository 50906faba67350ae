//! When to try again, and when to give up.

use super::SessionError;
use duet_core::Digest;
use std::time::Duration;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status};

const FIRST: Duration = Duration::from_millis(50);
const LONGEST: Duration = Duration::from_secs(3);

/// One stretch of trying: from the first failure after a success until the next success.
pub(super) struct Retry {
    coordinator: String,
    deadline: Duration,
    shutdown: CancellationToken,
    salt: u64,
    failures: u32,
    since: Option<Instant>,
}

impl Retry {
    pub(super) fn new(
        coordinator: String,
        deadline: Duration,
        shutdown: CancellationToken,
        salt: u64,
    ) -> Retry {
        Retry { coordinator, deadline, shutdown, salt, failures: 0, since: None }
    }

    /// The coordinator answered.
    pub(super) fn succeeded(&mut self) {
        (self.failures, self.since) = (0, None);
    }

    /// Takes note of a failure and waits until the next try is due.
    ///
    /// # Errors
    /// When another try cannot help, the deadline is over, or the process is told to stop.
    pub(super) async fn after(&mut self, status: &Status) -> Result<(), SessionError> {
        if let Some(error) = hopeless(status) {
            return Err(error);
        }
        let waited = self.since.get_or_insert_with(Instant::now).elapsed();
        let pause = pause(self.salt, self.failures);
        if self.shutdown.is_cancelled() || waited >= self.deadline {
            return Err(self.lost(waited, status));
        }
        if self.failures == 0 {
            let (address, error) = (&self.coordinator, status.message());
            tracing::warn!(coordinator = %address, %error, "no answer; trying again");
        }
        self.failures = self.failures.saturating_add(1);
        tokio::select! {
            () = self.shutdown.cancelled() => Ok(()), // one last try, without waiting
            () = tokio::time::sleep(pause.min(self.deadline - waited)) => Ok(()),
        }
    }

    fn lost(&self, waited: Duration, status: &Status) -> SessionError {
        let last = format!("{:?}: {}", status.code(), status.message());
        SessionError::Lost { coordinator: self.coordinator.clone(), waited, last }
    }
}

/// The error of an answer that stays the same however often one asks.
fn hopeless(status: &Status) -> Option<SessionError> {
    let message = status.message().to_owned();
    match status.code() {
        Code::FailedPrecondition | Code::PermissionDenied | Code::Unauthenticated => {
            Some(SessionError::Refused(message))
        }
        Code::InvalidArgument | Code::OutOfRange | Code::Unimplemented | Code::DataLoss => {
            Some(SessionError::Protocol { code: format!("{:?}", status.code()), message })
        }
        _ => None,
    }
}

/// Doubling from 50 ms to 3 s, each between half and all of it, so that workers that lost the same
/// coordinator do not come back as one.
fn pause(salt: u64, failures: u32) -> Duration {
    let full = FIRST.saturating_mul(1 << failures.min(6)).min(LONGEST);
    let mut bytes = salt.to_le_bytes().to_vec();
    bytes.extend(failures.to_le_bytes());
    let share = f64::from(Digest::of(&bytes).0[0]) / 255.0;
    full.mul_f64(0.5 + 0.5 * share)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_and_stay_bounded_and_differ_between_workers() {
        for failures in 0..100 {
            for salt in 0..10 {
                let full = FIRST.saturating_mul(1 << failures.min(6)).min(LONGEST);
                let pause = pause(salt, failures);
                assert!(full / 2 <= pause && pause <= full && pause <= LONGEST);
            }
        }
        assert_ne!(pause(1, 3), pause(2, 3));
    }

    #[test]
    fn only_what_can_pass_is_tried_again() {
        for code in [Code::Unavailable, Code::Unknown, Code::Cancelled, Code::DeadlineExceeded] {
            assert!(hopeless(&Status::new(code, "")).is_none(), "{code:?}");
        }
        let refused = hopeless(&Status::failed_precondition("other configuration"));
        assert!(matches!(refused, Some(SessionError::Refused(why)) if why.contains("other")));
        assert!(hopeless(&Status::invalid_argument("no")).is_some());
    }
}
