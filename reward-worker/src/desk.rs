//! The coordinator as this worker sees it, through its session.

use crate::serve::Desk;
use duet_core::work::{Assignment, Outcome, Report};
use duet_service::worker::{Session, SessionError, Verdict};

impl Desk for Session {
    type Error = SessionError;

    async fn next(&mut self) -> Result<Assignment, SessionError> {
        Session::next(self).await
    }

    async fn report(&mut self, report: Report) -> Result<(), SessionError> {
        let lease = match &report {
            Report::Lease { id, .. } => Some(*id),
            _ => None,
        };
        let told = match (Session::report_and_go_on(self, report).await, lease) {
            // A result that cannot be told (a text without bounds) is a failure of its lease.
            (Err(SessionError::Message(error)), Some(id)) => {
                let (kind, reason) = ("protocol".to_owned(), error.to_string());
                tracing::warn!(reason, "a result cannot be told");
                let outcome = Outcome::Failed { kind, reason };
                Session::report(self, Report::Lease { id, outcome }).await
            }
            (told, _) => told,
        };
        match told {
            Ok(Verdict::Accepted | Verdict::Duplicate) => Ok(()),
            Ok(Verdict::Stale) => {
                tracing::info!("the report came too late and changed nothing");
                Ok(())
            }
            Err(SessionError::ReportRefused(reason)) => {
                tracing::warn!(reason, "the coordinator refuses the report");
                Ok(())
            }
            Err(error) => Err(error),
        }
    }
}
