//! Reports that bring the next assignment along, one after the other on one stream.
//!
//! When there is none yet, the stream is kept with that answer owed: it comes when there is work.

use super::link::{CALL_LIMIT, Link};
use duet_proto::v1 as wire;
use std::sync::PoisonError;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

/// A stream on which each report is answered before the next one is sent.
pub(super) struct Exchange {
    reports: mpsc::Sender<wire::ReportRequest>,
    answers: Streaming<wire::ReportResponse>,
    /// Work is yet to come for the report before.
    owed: bool,
}

impl Exchange {
    async fn open(link: &Link) -> Result<Exchange, Status> {
        let (reports, stream) = mpsc::channel(1);
        let answers = link.client().exchange(ReceiverStream::new(stream)).await?.into_inner();
        Ok(Exchange { reports, answers, owed: false })
    }

    async fn ask(&mut self, report: wire::ReportRequest) -> Result<wire::ReportResponse, Status> {
        // Fails when the stream is over, and then the answer says why.
        let _ = self.reports.send(report).await;
        self.answer().await
    }

    async fn answer(&mut self) -> Result<wire::ReportResponse, Status> {
        let answer = self.answers.message().await?;
        let ended = || Status::unavailable("the coordinator ended the stream of reports");
        let answer = answer.ok_or_else(ended)?;
        self.owed = answer.more;
        Ok(answer)
    }
}

impl Link {
    /// Sends a report and waits for its answer.
    ///
    /// # Errors
    /// As the call's; the report may have been heard.
    pub(super) async fn exchange(
        &self,
        report: wire::ReportRequest,
    ) -> Result<wire::ReportResponse, Status> {
        let asked = async {
            let mut exchange = match self.stream().filter(|exchange| !exchange.owed) {
                Some(exchange) => exchange,
                None => Exchange::open(self).await?,
            };
            let answer = exchange.ask(report).await?;
            self.keep(exchange);
            Ok(answer)
        };
        tokio::time::timeout(CALL_LIMIT, asked).await.unwrap_or_else(|_| {
            let seconds = CALL_LIMIT.as_secs();
            Err(Status::deadline_exceeded(format!("no answer to a report within {seconds} s")))
        })
    }

    /// Waits for the work that is owed for the newest report; `None` if none is.
    pub(super) async fn owed(
        &self,
        limit: Duration,
    ) -> Option<Result<wire::ReportResponse, Status>> {
        let mut exchange = self.stream().filter(|exchange| exchange.owed)?;
        let answer = tokio::time::timeout(limit, exchange.answer()).await.unwrap_or_else(|_| {
            let seconds = limit.as_secs();
            Err(Status::deadline_exceeded(format!("no word from the coordinator in {seconds} s")))
        });
        if answer.is_ok() {
            self.keep(exchange);
        }
        Some(answer)
    }

    /// Takes the stream out: who gives up waiting leaves none behind on which an answer could be taken for
    /// that to something else.
    fn stream(&self) -> Option<Exchange> {
        self.exchange.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn keep(&self, exchange: Exchange) {
        *self.exchange.lock().unwrap_or_else(PoisonError::into_inner) = Some(exchange);
    }
}
