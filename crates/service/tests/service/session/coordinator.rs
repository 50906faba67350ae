//! A coordinator that follows a script, in a runtime of its own: dropping that runtime is a crash.

use duet_core::work::{Assignment, Report};
use duet_proto::convert::Sender;
use duet_proto::v1 as wire;
use duet_service::access;
use duet_service::server::server;
use futures::{Stream, StreamExt, stream};
use std::collections::{BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

/// What the coordinator saw.
#[derive(Debug, PartialEq)]
pub enum Seen {
    Registered(Sender),
    Polled(u64),
    /// Whoever waited for the second answer to a report waits no more.
    HungUp,
    Attended(u64),
    Reported(Report),
    Left(String),
}

/// What it does.
#[derive(Clone, Default)]
pub struct Script {
    pub generation: u64,
    pub refuse: Option<&'static str>,
    /// Answers to polls, and to reports that ask for work; whoever finds none waits for what is given.
    pub assignments: VecDeque<Assignment>,
    /// How many first reports count without the worker being told.
    pub lose_answers: u32,
    pub abort_epoch: Option<u64>,
    /// Calls the scripted coordinator forgets everybody after: one heartbeat's worth.
    pub forget_at_heartbeat: bool,
}

struct State {
    script: Script,
    known: BTreeSet<(String, u64)>,
    reports: Vec<Report>,
    /// From where sessions registered.
    peers: BTreeSet<SocketAddr>,
    seen: mpsc::UnboundedSender<Seen>,
    given: Arc<Notify>,
}

#[derive(Clone)]
struct Scripted(Arc<Mutex<State>>);

/// Says when nobody waits any more.
struct Waiter(Option<mpsc::UnboundedSender<Seen>>);

impl Drop for Waiter {
    fn drop(&mut self) {
        let _ = self.0.as_ref().map(|seen| seen.send(Seen::HungUp));
    }
}

impl Scripted {
    fn is_known(&self, caller: &Sender) -> bool {
        let state = self.0.lock().unwrap();
        caller.generation.0 == state.script.generation
            && state.known.contains(&(caller.worker.0.clone(), caller.session))
    }
}

impl Scripted {
    fn reported(&self, request: wire::ReportRequest) -> Result<wire::ReportResponse, Status> {
        let known = self.is_known(&sender(request.caller)?);
        let report = Report::try_from(request.report.unwrap_or_default())
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        let mut state = self.0.lock().unwrap();
        let verdict = if !known {
            wire::Verdict::Unknown
        } else if state.reports.contains(&report) {
            wire::Verdict::Duplicate
        } else {
            state.reports.push(report.clone());
            let _ = state.seen.send(Seen::Reported(report));
            wire::Verdict::Accepted
        };
        if known && state.script.lose_answers > 0 {
            state.script.lose_answers -= 1;
            return Err(Status::unavailable("the answer is lost"));
        }
        let generation = state.script.generation;
        let given = request.next.then(|| state.script.assignments.pop_front()).flatten();
        let more = known && request.next && given.is_none();
        let assignment = given.as_ref().map(Into::into);
        let (verdict, reason) = (verdict.into(), String::new());
        Ok(wire::ReportResponse { generation, verdict, reason, assignment, more })
    }

    /// The second answer to a report.
    async fn later(&self) -> wire::ReportResponse {
        let (given, seen) = {
            let state = self.0.lock().unwrap();
            (state.given.clone(), state.seen.clone())
        };
        let mut waiter = Waiter(Some(seen));
        loop {
            let notified = given.notified();
            let (assignment, generation) = {
                let script = &mut self.0.lock().unwrap().script;
                (script.assignments.pop_front(), script.generation)
            };
            if let Some(assignment) = assignment {
                waiter.0 = None;
                let assignment = Some((&assignment).into());
                return wire::ReportResponse { generation, assignment, ..Default::default() };
            }
            notified.await;
        }
    }
}

fn sender(caller: Option<wire::Caller>) -> Result<Sender, Status> {
    Sender::try_from(caller).map_err(|error| Status::invalid_argument(error.to_string()))
}

#[tonic::async_trait]
impl wire::worker_service_server::WorkerService for Scripted {
    async fn register(
        &self,
        request: Request<wire::RegisterRequest>,
    ) -> Result<Response<wire::RegisterResponse>, Status> {
        let peer = access::address(&request);
        let caller = sender(request.into_inner().caller)?;
        let mut state = self.0.lock().unwrap();
        state.peers.extend(peer);
        if let Some(why) = state.script.refuse {
            return Err(Status::failed_precondition(why));
        }
        state.known.insert((caller.worker.0.clone(), caller.session));
        let _ = state.seen.send(Seen::Registered(caller));
        Ok(Response::new(wire::RegisterResponse {
            generation: state.script.generation,
            heartbeat_ms: 1,
            poll_ms: 60_000,
            run: "scripted".to_owned(),
        }))
    }

    async fn poll(
        &self,
        request: Request<wire::PollRequest>,
    ) -> Result<Response<wire::PollResponse>, Status> {
        let caller = sender(request.into_inner().caller)?;
        let known = self.is_known(&caller);
        let (generation, assignment) = {
            let mut state = self.0.lock().unwrap();
            let _ = state.seen.send(Seen::Polled(caller.session));
            let next = if known { state.script.assignments.pop_front() } else { None };
            (state.script.generation, next)
        };
        if known && assignment.is_none() {
            std::future::pending::<()>().await;
        }
        let assignment = assignment.as_ref().map(Into::into);
        Ok(Response::new(wire::PollResponse { generation, assignment, unknown: !known }))
    }

    async fn report(
        &self,
        request: Request<wire::ReportRequest>,
    ) -> Result<Response<wire::ReportResponse>, Status> {
        self.reported(request.into_inner()).map(Response::new)
    }

    type ExchangeStream = Pin<Box<dyn Stream<Item = Result<wire::ReportResponse, Status>> + Send>>;

    async fn exchange(
        &self,
        request: Request<Streaming<wire::ReportRequest>>,
    ) -> Result<Response<Self::ExchangeStream>, Status> {
        let all = self.clone();
        let answers = request.into_inner().then(move |request| {
            let all = all.clone();
            async move {
                let first = request.and_then(|request| all.reported(request));
                let more = first.as_ref().is_ok_and(|answer| answer.more);
                let second = stream::iter(more.then_some(()));
                stream::iter([first]).chain(second.then(move |()| {
                    let all = all.clone();
                    async move { Ok(all.later().await) }
                }))
            }
        });
        Ok(Response::new(Box::pin(answers.flatten())))
    }

    type AttendStream = ReceiverStream<Result<wire::AttendResponse, Status>>;

    async fn attend(
        &self,
        request: Request<wire::AttendRequest>,
    ) -> Result<Response<Self::AttendStream>, Status> {
        let caller = sender(request.into_inner().caller)?;
        let unknown = !self.is_known(&caller);
        let (to, stream) = mpsc::channel(1);
        let state = self.0.lock().unwrap();
        let _ = state.seen.send(Seen::Attended(caller.session));
        let generation = state.script.generation;
        to.try_send(Ok(wire::AttendResponse { generation, unknown })).unwrap();
        // Open until the client goes.
        tokio::spawn(async move { to.closed().await });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn heartbeat(
        &self,
        request: Request<wire::HeartbeatRequest>,
    ) -> Result<Response<wire::HeartbeatResponse>, Status> {
        let caller = sender(request.into_inner().caller)?;
        {
            let mut state = self.0.lock().unwrap();
            if std::mem::take(&mut state.script.forget_at_heartbeat) {
                state.known.clear();
            }
        }
        let unknown = !self.is_known(&caller);
        let state = self.0.lock().unwrap();
        Ok(Response::new(wire::HeartbeatResponse {
            generation: state.script.generation,
            unknown,
            abort_epoch: state.script.abort_epoch,
        }))
    }

    async fn leave(
        &self,
        request: Request<wire::LeaveRequest>,
    ) -> Result<Response<wire::LeaveResponse>, Status> {
        let state = self.0.lock().unwrap();
        let _ = state.seen.send(Seen::Left(request.into_inner().reason));
        Ok(Response::new(wire::LeaveResponse { generation: state.script.generation }))
    }
}

/// A running coordinator.
pub struct Coordinator {
    pub address: SocketAddr,
    pub seen: mpsc::UnboundedReceiver<Seen>,
    runtime: Option<tokio::runtime::Runtime>,
    state: Arc<Mutex<State>>,
}

impl Coordinator {
    /// Starts one on `address` (port 0: any).
    pub async fn start(address: &str, script: Script) -> Coordinator {
        let (tell, seen) = mpsc::unbounded_channel();
        let (known, reports, peers) = (BTreeSet::new(), Vec::new(), BTreeSet::new());
        let given = Arc::default();
        let state = State { script, known, reports, peers, seen: tell, given };
        let state = Arc::new(Mutex::new(state));
        let service = Scripted(state.clone());
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let (bound, address_of) = oneshot::channel();
        let address = address.to_owned();
        runtime.spawn(async move {
            let server = server(&address, None).await.unwrap().with_worker(service).await;
            bound.send(server.address()).unwrap();
            server.serve(CancellationToken::new()).await.unwrap();
        });
        let address = address_of.await.unwrap();
        Coordinator { address, seen, runtime: Some(runtime), state }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Connections over which sessions registered.
    pub fn connections(&self) -> usize {
        self.state.lock().unwrap().peers.len()
    }

    /// There is more to do.
    pub fn give(&self, assignment: Assignment) {
        let mut state = self.state.lock().unwrap();
        state.script.assignments.push_back(assignment);
        state.given.notify_waiters();
    }

    /// Dies at once, with all its connections.
    pub async fn crash(mut self) {
        let runtime = self.runtime.take();
        tokio::task::spawn_blocking(move || drop(runtime)).await.unwrap();
    }

    /// What it sees next, polls left out.
    pub async fn sees(&mut self) -> Seen {
        loop {
            match self.seen.recv().await.unwrap() {
                Seen::Polled(_) | Seen::HungUp | Seen::Attended(_) => {}
                seen => return seen,
            }
        }
    }
}

impl Drop for Coordinator {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}
