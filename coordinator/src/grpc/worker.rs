//! The worker service.

use super::lines::Lines;
use super::roles::Roles;
use super::{gone, malformed, sender};
use crate::driver::{Handle, Held, Next, Polled};
use duet_core::scheduler::Verdict;
use duet_core::work::Report;
use duet_core::{Digest, Generation};
use duet_proto::convert::{MAX_BUILD, Sender, clip_reason, decode_digest, decode_role};
use duet_proto::v1 as wire;
use duet_proto::v1::worker_service_server::WorkerService;
use duet_service::access::{self, Meter};
use futures::StreamExt;
use futures::stream::{self, BoxStream};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

/// Gives out work and takes reports. Cheap to clone.
#[derive(Clone)]
pub struct Workers {
    handle: Handle,
    lines: Lines,
    roles: Roles,
    closing: CancellationToken,
}

impl Workers {
    /// The service in front of a driver; open lines end with `closing`.
    pub fn new(handle: Handle, roles: Roles, closing: CancellationToken) -> Workers {
        Workers { handle, lines: Lines::default(), roles, closing }
    }

    fn generation(&self) -> u64 {
        self.handle.terms().generation.0
    }

    /// Whether the worker registered here. It did not when it names another generation: an older one
    /// means that it has not noticed this coordinator yet; a newer one, that this one was replaced and
    /// may not be obeyed any more.
    fn is_ours(&self, sender: &Sender) -> Result<bool, Status> {
        let Generation(ours) = self.handle.terms().generation;
        match sender.generation.0 {
            theirs if theirs > ours => Err(Status::unavailable(format!(
                "this coordinator (generation {ours}) was replaced by generation {theirs}"
            ))),
            theirs => Ok(theirs == ours),
        }
    }

    /// Who calls; refused when the certificate is not of the role that registered under that name.
    fn sender<T>(
        &self,
        request: &Request<T>,
        caller: Option<wire::Caller>,
    ) -> Result<Sender, Status> {
        self.own(access::role(request), caller)
    }

    /// As [`Workers::sender`], of whoever showed this role.
    fn own(
        &self,
        shown: Option<access::Role>,
        caller: Option<wire::Caller>,
    ) -> Result<Sender, Status> {
        let sender = sender(caller)?;
        self.roles.is_own(shown, &sender.worker)?;
        Ok(sender)
    }

    /// Takes a report of whoever showed this role, and gives what there is to do next, if that is asked;
    /// if there is nothing yet, what it waits for that with.
    async fn reported(
        &self,
        shown: Option<access::Role>,
        request: wire::ReportRequest,
    ) -> Result<(wire::ReportResponse, Option<Held>), Status> {
        let sender = self.own(shown, request.caller)?;
        let report = request.report.ok_or_else(|| Status::invalid_argument("no report"))?;
        let report = Report::try_from(report).map_err(malformed)?;
        let (verdict, next) = match (self.is_ours(&sender)?, request.next) {
            (false, _) => (Verdict::Unknown, Next::Nothing),
            (true, false) => {
                let said = self.handle.report(sender.worker, sender.session, report).await;
                (said.map_err(gone)?, Next::Nothing)
            }
            (true, true) => {
                let said = self.handle.exchange(sender.worker, sender.session, report).await;
                said.map_err(gone)?
            }
        };
        let (assignment, held) = match next {
            Next::Given(assignment) => (Some((&*assignment).into()), None),
            Next::Later(held) => (None, Some(held)),
            Next::Nothing => (None, None),
        };
        let (verdict, reason) = match verdict {
            Verdict::Accepted => (wire::Verdict::Accepted, String::new()),
            Verdict::Duplicate => (wire::Verdict::Duplicate, String::new()),
            Verdict::Stale => (wire::Verdict::Stale, String::new()),
            Verdict::Unknown => (wire::Verdict::Unknown, String::new()),
            Verdict::Refused(reason) => (wire::Verdict::Refused, clip_reason(&reason)),
        };
        let (generation, verdict) = (self.generation(), verdict.into());
        let more = held.is_some();
        Ok((wire::ReportResponse { generation, verdict, reason, assignment, more }, held))
    }

    /// The second response to a report: work, when there is some.
    async fn worked(&self, held: Held) -> Result<wire::ReportResponse, Status> {
        let assignment = assignment(&held.wait().await.map_err(gone)?);
        let (generation, verdict) = (self.generation(), wire::Verdict::Accepted.into());
        let (reason, more) = (String::new(), false);
        Ok(wire::ReportResponse { generation, verdict, reason, assignment, more })
    }

    fn check_config(&self, sender: &Sender, theirs: Digest) -> Result<(), Status> {
        let ours = self.handle.terms().config;
        if theirs == ours {
            return Ok(());
        }
        let text = format!(
            "the configuration of {} ({}) is not the run's ({}): start it with the configuration \
             file and the overrides that the coordinator was started with",
            sender.worker,
            theirs.short(),
            ours.short()
        );
        tracing::warn!(worker = %sender.worker, "refused: another configuration");
        Err(Status::failed_precondition(text))
    }
}

/// A stream of reports and what is said to them.
struct Exchange {
    workers: Workers,
    shown: Option<access::Role>,
    meter: Option<Meter>,
    requests: Streaming<wire::ReportRequest>,
    /// What the worker waits for work with, which is the next response.
    held: Option<Held>,
}

impl Exchange {
    async fn next(&mut self) -> Option<Result<wire::ReportResponse, Status>> {
        if let Some(held) = self.held.take() {
            return Some(self.workers.worked(held).await);
        }
        let request = self.requests.next().await?;
        Some(self.reported(request).await)
    }

    async fn reported(
        &mut self,
        request: Result<wire::ReportRequest, Status>,
    ) -> Result<wire::ReportResponse, Status> {
        let request = request?;
        self.meter.iter().try_for_each(Meter::count)?;
        let (response, held) = self.workers.reported(self.shown, request).await?;
        self.held = held;
        Ok(response)
    }
}

#[tonic::async_trait]
impl WorkerService for Workers {
    async fn register(
        &self,
        request: Request<wire::RegisterRequest>,
    ) -> Result<Response<wire::RegisterResponse>, Status> {
        let (from, shown) = (access::address(&request), access::role(&request));
        let request = request.into_inner();
        let sender = sender(request.caller)?;
        let role = decode_role(request.role).map_err(malformed)?;
        self.roles.may_register(shown, role)?;
        let digest = decode_digest("config_digest", &request.config_digest).map_err(malformed)?;
        self.check_config(&sender, digest)?;
        let worker = sender.worker.clone();
        self.roles.has_room(&worker)?;
        let verdict = { self.handle.register(worker, role, sender.session).await }.map_err(gone)?;
        match verdict {
            Verdict::Accepted => {
                let build: String = request.build.chars().take(MAX_BUILD).collect();
                tracing::info!(worker = %sender.worker, %role, ?from, build, "registered");
            }
            Verdict::Refused(reason) => return Err(Status::failed_precondition(reason)),
            Verdict::Duplicate | Verdict::Stale | Verdict::Unknown => {}
        }
        self.roles.registered(sender.worker, role);
        let terms = self.handle.terms();
        Ok(Response::new(wire::RegisterResponse {
            generation: terms.generation.0,
            heartbeat_ms: millis(terms.heartbeat),
            poll_ms: millis(terms.poll),
            run: terms.run.clone(),
        }))
    }

    async fn poll(
        &self,
        request: Request<wire::PollRequest>,
    ) -> Result<Response<wire::PollResponse>, Status> {
        let sender = self.sender(&request, request.get_ref().caller.clone())?;
        let polled = if self.is_ours(&sender)? {
            self.handle.poll(sender.worker, sender.session).await.map_err(gone)?
        } else {
            Polled::Unknown
        };
        let unknown = polled == Polled::Unknown;
        let assignment = assignment(&polled);
        let generation = self.generation();
        Ok(Response::new(wire::PollResponse { generation, assignment, unknown }))
    }

    async fn report(
        &self,
        request: Request<wire::ReportRequest>,
    ) -> Result<Response<wire::ReportResponse>, Status> {
        let (shown, request) = (access::role(&request), request.into_inner());
        if request.next {
            let text = "there is one answer to Report: ask for work with Exchange, or with Poll";
            return Err(Status::invalid_argument(text));
        }
        let (response, _) = self.reported(shown, request).await?;
        Ok(Response::new(response))
    }

    type ExchangeStream = BoxStream<'static, Result<wire::ReportResponse, Status>>;

    async fn exchange(
        &self,
        request: Request<Streaming<wire::ReportRequest>>,
    ) -> Result<Response<Self::ExchangeStream>, Status> {
        let exchange = Exchange {
            workers: self.clone(),
            shown: access::role(&request),
            meter: access::meter(&request),
            requests: request.into_inner(),
            held: None,
        };
        let answers = stream::unfold(exchange, |mut exchange| async move {
            exchange.next().await.map(|answer| (answer, exchange))
        });
        // An error is the last word: tonic ends the stream with it.
        let closing = self.closing.clone().cancelled_owned();
        Ok(Response::new(answers.take_until(closing).boxed()))
    }

    type AttendStream = ReceiverStream<Result<wire::AttendResponse, Status>>;

    async fn attend(
        &self,
        request: Request<wire::AttendRequest>,
    ) -> Result<Response<Self::AttendStream>, Status> {
        let sender = self.sender(&request, request.get_ref().caller.clone())?;
        let known = match self.is_ours(&sender)? {
            true => {
                let heard = self.handle.heartbeat(sender.worker.clone(), sender.session).await;
                heard.map_err(gone)?.known
            }
            false => false,
        };
        let (to, stream) = mpsc::channel(1);
        let generation = self.generation();
        // The channel is empty and open: this cannot fail.
        drop(to.try_send(Ok(wire::AttendResponse { generation, unknown: !known })));
        if known {
            let line = self.lines.open(self.handle.clone(), sender.worker, sender.session);
            let closing = self.closing.clone();
            tokio::spawn(async move {
                tokio::select! {
                    () = closing.cancelled() => {}
                    () = to.closed() => {}
                }
                drop(line);
            });
        }
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn heartbeat(
        &self,
        request: Request<wire::HeartbeatRequest>,
    ) -> Result<Response<wire::HeartbeatResponse>, Status> {
        let sender = self.sender(&request, request.get_ref().caller.clone())?;
        let generation = self.generation();
        if !self.is_ours(&sender)? {
            let answer = wire::HeartbeatResponse { generation, unknown: true, abort_epoch: None };
            return Ok(Response::new(answer));
        }
        let beat = self.handle.heartbeat(sender.worker, sender.session).await.map_err(gone)?;
        Ok(Response::new(wire::HeartbeatResponse {
            generation,
            unknown: !beat.known,
            abort_epoch: beat.aborted.map(|epoch| epoch.0),
        }))
    }

    async fn leave(
        &self,
        request: Request<wire::LeaveRequest>,
    ) -> Result<Response<wire::LeaveResponse>, Status> {
        let sender = self.sender(&request, request.get_ref().caller.clone())?;
        let request = request.into_inner();
        if self.is_ours(&sender)? {
            let reason = clip_reason(&request.reason);
            tracing::info!(worker = %sender.worker, reason, "left");
            self.handle.leave(sender.worker, sender.session, reason).await.map_err(gone)?;
        }
        Ok(Response::new(wire::LeaveResponse { generation: self.generation() }))
    }
}

/// The work that a poll was answered with.
fn assignment(polled: &Polled) -> Option<wire::Assignment> {
    match polled {
        Polled::Assigned(assignment) => Some((&**assignment).into()),
        Polled::Nothing | Polled::Unknown => None,
    }
}

fn millis(span: std::time::Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}
