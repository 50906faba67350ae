//! Reports that bring the next assignment along, one after the other on one stream.

use super::link::{CALL_LIMIT, Link};
use duet_proto::v1 as wire;
use std::sync::PoisonError;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

/// A stream on which each report is answered before the next one is sent.
pub(super) struct Exchange {
    reports: mpsc::Sender<wire::ReportRequest>,
    answers: Streaming<wire::ReportResponse>,
}

impl Exchange {
    async fn open(link: &Link) -> Result<Exchange, Status> {
        let (reports, stream) = mpsc::channel(1);
        let answers = link.client().exchange(ReceiverStream::new(stream)).await?.into_inner();
        Ok(Exchange { reports, answers })
    }

    async fn ask(&mut self, report: wire::ReportRequest) -> Result<wire::ReportResponse, Status> {
        // Fails when the stream is over, and then the answer says why.
        let _ = self.reports.send(report).await;
        let answer = self.answers.message().await?;
        answer.ok_or_else(|| Status::unavailable("the coordinator ended the stream of reports"))
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
            // Taken out: whoever gives up waiting leaves no stream behind on which the answer to this
            // report could be taken for that to another one.
            let open = self.exchange.lock().unwrap_or_else(PoisonError::into_inner).take();
            let mut exchange = match open {
                Some(exchange) => exchange,
                None => Exchange::open(self).await?,
            };
            let answer = exchange.ask(report).await?;
            *self.exchange.lock().unwrap_or_else(PoisonError::into_inner) = Some(exchange);
            Ok(answer)
        };
        tokio::time::timeout(CALL_LIMIT, asked).await.unwrap_or_else(|_| {
            let seconds = CALL_LIMIT.as_secs();
            Err(Status::deadline_exceeded(format!("no answer to a report within {seconds} s")))
        })
    }
}
