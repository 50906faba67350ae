//! The coordinator as this worker sees it, through its session.

use crate::serve::Desk;
use duet_core::work::{Assignment, Report};
use duet_service::worker::{Session, SessionError, Verdict};

impl Desk for Session {
    type Error = SessionError;

    async fn next(&mut self) -> Result<Assignment, SessionError> {
        Session::next(self).await
    }

    async fn report(&mut self, report: Report) -> Result<(), SessionError> {
        let failure = match &report {
            Report::StepDone(done) => Some((done.epoch, done.rank)),
            _ => None,
        };
        let told = match (Session::report(self, report).await, failure) {
            // A result that cannot be told (a number that is not finite) is a failure of its step.
            (Err(SessionError::Message(error)), Some((epoch, rank))) => {
                let (kind, reason) = ("protocol".to_owned(), error.to_string());
                tracing::warn!(reason, "a result cannot be told");
                Session::report(self, Report::TrainerFailed { epoch, rank, kind, reason }).await
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
