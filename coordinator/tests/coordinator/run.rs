//! A run from its beginning to its end over real gRPC.

use crate::common::workers::{Crew, worker_options};
use crate::common::{DEADLINE, Running, count, options, status, until, within};
use duet_core::scheduler::FinishReason;
use duet_core::work::{Assignment, Outcome, Report};
use duet_core::{Digest, Millis, PolicyVersion, Role};
use duet_proto::v1::{self as wire, RunState, WorkerState};
use duet_service::worker::{Session, SessionError};
use tokio_util::sync::CancellationToken;

#[tokio::test]
async fn a_run_completes_and_leaves_its_tables_behind() {
    let folder = tempfile::tempdir().unwrap();
    let options = options(folder.path(), 3);
    let (store, config) = (options.store.clone(), options.config);
    let running = Running::start(options).await;

    let before = status(&running.url).await;
    assert_eq!((before.run.as_str(), before.state()), ("test", RunState::Starting));
    let crew = Crew::hire(&running.url, &store, config);
    let after = until(&running.url, "completion", |s| s.state() == RunState::Completed).await;
    let ledger = crew.home().await;
    assert_eq!(running.ended().await.unwrap(), FinishReason::Completed);

    assert_eq!((after.iteration, after.iterations, after.version), (3, 3, 3));
    assert_eq!(after.images_done, 3 * 2 * 2 * 2);
    assert_eq!(count(&after.trees, "trained") + count(&after.trees, "zero-spread"), 6);
    assert_eq!(after.last_checkpoint_version, Some(3));
    assert!(after.failures.is_empty(), "{:?}", after.failures);
    let rewards: Vec<&str> = after.rewards.iter().map(|r| r.name.as_str()).collect();
    assert_eq!(rewards, ["dit", "llm", "semantic"]);

    let counts = ledger.counts();
    assert_eq!(counts.len(), 6 + 12 + 12 + 3, "trees, sub-trees rendered and scored, steps");
    assert!(counts.values().all(|count| *count == 1), "{counts:?}");

    assert_eq!(store.lineage().iterations().await.unwrap(), [0, 1, 2]);
    let newest = store.checkpoints().newest().await.unwrap().unwrap();
    assert_eq!(newest.version, PolicyVersion(3));
    store.checkpoints().verify(&newest).await.unwrap();
    let metrics = std::fs::read_to_string(folder.path().join("metrics.jsonl")).unwrap();
    assert_eq!(metrics.lines().count(), 3);
    for name in ["\"reward/llm\":", "\"rewards/semantic/mean\":", "\"loss\":0.1", "\"time_ms\":"] {
        assert!(metrics.lines().all(|line| line.contains(name)), "{name} in {metrics}");
    }
}

#[tokio::test]
async fn stopping_saves_and_resuming_goes_on_without_repeating_anything() {
    let folder = tempfile::tempdir().unwrap();
    let first = options(folder.path(), 5);
    let (store, config) = (first.store.clone(), first.config);
    let running = Running::start(first).await;
    let crew = Crew::hire(&running.url, &store, config);
    until(&running.url, "the first step", |s| s.version >= 1).await;
    running.shutdown.cancel();
    let before = crew.home().await.counts();
    assert_eq!(running.ended().await.unwrap(), FinishReason::Stopped);
    let saved = store.checkpoints().newest().await.unwrap().unwrap().version;
    assert!(saved >= PolicyVersion(1));

    let mut second = options(folder.path(), 5);
    second.resume = true;
    let running = Running::start(second).await;
    let crew = Crew::hire(&running.url, &store, config);
    until(&running.url, "completion", |s| s.state() == RunState::Completed).await;
    let after = crew.home().await.counts();
    assert_eq!(running.ended().await.unwrap(), FinishReason::Completed);
    let twice: Vec<_> = after.keys().filter(|what| before.contains_key(*what)).collect();
    assert!(twice.is_empty(), "done before and after the stop: {twice:?}");
    assert_eq!(before.len() + after.len(), 10 + 20 + 20 + 5);
    assert_eq!(store.lineage().iterations().await.unwrap(), [0, 1, 2, 3, 4]);
}

#[tokio::test]
async fn a_complete_run_is_complete_without_anybody() {
    let folder = tempfile::tempdir().unwrap();
    let first = options(folder.path(), 1);
    let (store, config) = (first.store.clone(), first.config);
    let running = Running::start(first).await;
    Crew::hire(&running.url, &store, config).home().await;
    assert_eq!(running.ended().await.unwrap(), FinishReason::Completed);
    let mut again = options(folder.path(), 1);
    again.resume = true;
    let running = Running::start(again).await;
    until(&running.url, "completion", |s| s.state() == RunState::Completed).await;
    assert_eq!(running.ended().await.unwrap(), FinishReason::Completed);
}

#[tokio::test]
async fn another_configuration_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let running = Running::start(options(folder.path(), 1)).await;
    let other = Digest::of(b"another configuration");
    let options = worker_options(&running.url, "rollout-0", Role::Rollout, other);
    let refused = Session::connect(options, CancellationToken::new()).await;
    let Err(SessionError::Refused(why)) = refused else { panic!("it was let in") };
    assert!(why.contains("configuration of rollout-0"), "{why}");
    assert!(status(&running.url).await.workers.is_empty());
}

#[tokio::test]
async fn pausing_holds_work_back_and_draining_sends_one_worker_home() {
    let folder = tempfile::tempdir().unwrap();
    let options = options(folder.path(), 1);
    let config = options.config;
    let running = Running::start(options).await;
    let mut control = duet_service::channel::control_client(crate::common::connect(&running.url));
    control.pause(wire::PauseRequest {}).await.unwrap();
    let worker = worker_options(&running.url, "rollout-0", Role::Rollout, config);
    let session = Session::connect(worker, CancellationToken::new()).await.unwrap();
    let next = tokio::spawn({
        let session = session.clone();
        async move { session.next().await }
    });
    let seen = until(&running.url, "an idle worker", |s| {
        s.workers.iter().any(|w| w.state() == WorkerState::Idle)
    });
    let seen = seen.await;
    assert_eq!((seen.state(), seen.workers[0].worker_id.as_str()), (RunState::Paused, "rollout-0"));
    assert_eq!(seen.workers[0].role(), wire::Role::Rollout);

    let worker_id = "rollout-7".to_owned();
    let unknown = control.drain(wire::DrainRequest { worker_id }).await.unwrap_err();
    assert_eq!(unknown.code(), tonic::Code::NotFound);
    let worker_id = "rollout-0".to_owned();
    control.drain(wire::DrainRequest { worker_id }).await.unwrap();
    let sent = within("the drain", next).await.unwrap().unwrap();
    assert!(matches!(sent, Assignment::Leave { .. }), "{sent:?}");
    session.leave("drained").await;
    let seen = until(&running.url, "the goodbye", |s| {
        s.workers.iter().any(|w| w.state() == WorkerState::Left)
    });
    seen.await;
}

#[tokio::test]
async fn who_reports_on_a_stream_is_told_at_once_and_given_work_when_there_is_some() {
    let folder = tempfile::tempdir().unwrap();
    let mut options = options(folder.path(), 1);
    options.poll = DEADLINE;
    let config = options.config;
    let running = Running::start(options).await;
    let mut control = duet_service::channel::control_client(crate::common::connect(&running.url));
    let worker = worker_options(&running.url, "rollout-0", Role::Rollout, config);
    let session = Session::connect(worker, CancellationToken::new()).await.unwrap();
    let Assignment::Lease(lease) = session.next().await.unwrap() else { panic!("no lease") };
    control.pause(wire::PauseRequest {}).await.unwrap();

    let mut client = duet_service::channel::worker_client(crate::common::connect(&running.url));
    let report = Report::Lease { id: lease.id, outcome: Outcome::HandedBack };
    let (worker_id, session_number) = ("rollout-0".to_owned(), session.number());
    let caller = wire::Caller { worker_id, session: session_number, generation: 1 };
    let request =
        wire::ReportRequest { caller: Some(caller), report: Some((&report).into()), next: true };
    let (to, requests) = tokio::sync::mpsc::channel(1);
    let requests = tokio_stream::wrappers::ReceiverStream::new(requests);
    let mut answers = client.exchange(requests).await.unwrap().into_inner();
    to.send(request.clone()).await.unwrap();
    let first = within("the first answer", answers.message()).await.unwrap().unwrap();
    assert_eq!((first.verdict(), first.more), (wire::Verdict::Accepted, true));
    assert!(first.assignment.is_none());
    let idle = |s: &wire::Status| s.workers.iter().any(|w| w.state() == WorkerState::Idle);
    until(&running.url, "an idle worker", idle).await;
    control.resume(wire::ResumeRequest {}).await.unwrap();
    let second = within("the second answer", answers.message()).await.unwrap().unwrap();
    assert!(second.assignment.is_some() && !second.more, "{second:?}");

    // A call of its own has no second answer, and a stream that is closed waits no more.
    let alone = client.report(request.clone()).await.unwrap_err();
    assert_eq!(alone.code(), tonic::Code::InvalidArgument, "{alone}");
    control.pause(wire::PauseRequest {}).await.unwrap();
    to.send(request).await.unwrap();
    let third = within("the third answer", answers.message()).await.unwrap().unwrap();
    assert_eq!((third.verdict(), third.more), (wire::Verdict::Stale, true));
    until(&running.url, "an idle worker", idle).await;
    drop((to, answers));
    until(&running.url, "a worker that does not wait", |s| !idle(s)).await;
}

#[tokio::test]
async fn a_worker_whose_process_dies_is_missed_long_before_its_heartbeats() {
    let folder = tempfile::tempdir().unwrap();
    let mut options = options(folder.path(), 1);
    options.spec.timing.heartbeat_timeout = Millis(3_600_000);
    options.spec.timing.reconnect = Millis(50);
    let config = options.config;
    let running = Running::start(options).await;
    let hire = |name| {
        let worker = worker_options(&running.url, name, Role::Rollout, config);
        Session::connect(worker, CancellationToken::new())
    };
    // In a runtime of its own, whose end closes the connection as the end of a process does.
    let process = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let doomed = process.spawn(hire("rollout-0")).await.unwrap().unwrap();
    let lease = process.spawn({
        let doomed = doomed.clone();
        async move { doomed.next().await }
    });
    let Assignment::Lease(lost) = lease.await.unwrap().unwrap() else { panic!() };
    // It says goodbye to nobody.
    process.shutdown_background();
    // The worker, and its lease.
    until(&running.url, "the loss", |s| count(&s.failures, "worker-lost") == 2).await;

    let heir = hire("rollout-1").await.unwrap();
    let mut seen = std::collections::BTreeSet::new();
    while !seen.contains(&lost.id.unit) {
        let next = within("a lease", heir.next()).await.unwrap();
        let Assignment::Lease(lease) = next else { panic!("{next:?}") };
        seen.insert(lease.id.unit);
        let outcome = Outcome::Failed { kind: "test".to_owned(), reason: String::new() };
        heir.report_and_go_on(Report::Lease { id: lease.id, outcome }).await.unwrap();
    }
    assert_eq!(count(&status(&running.url).await.failures, "worker-lost"), 2, "the heir lives");
    drop(doomed);
}

#[tokio::test]
async fn messages_of_other_generations_and_malformed_ones_change_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let options = options(folder.path(), 1);
    let config = options.config;
    let running = Running::start(options).await;
    let worker = worker_options(&running.url, "rollout-0", Role::Rollout, config);
    let session = Session::connect(worker, CancellationToken::new()).await.unwrap();
    let mut client = duet_service::channel::worker_client(crate::common::connect(&running.url));
    let caller = |worker_id: &str, generation: u64| {
        let (worker_id, session) = (worker_id.to_owned(), session.number());
        Some(wire::Caller { worker_id, session, generation })
    };
    let beat = |caller| wire::HeartbeatRequest { caller };

    let now = client.heartbeat(beat(caller("rollout-0", 1))).await.unwrap().into_inner();
    assert_eq!((now.unknown, now.generation), (false, 1));
    let old = client.heartbeat(beat(caller("rollout-0", 0))).await.unwrap().into_inner();
    assert!(old.unknown, "whoever registered with another coordinator must register here");
    let newer = client.heartbeat(beat(caller("rollout-0", 2))).await.unwrap_err();
    assert_eq!(newer.code(), tonic::Code::Unavailable, "a replaced coordinator is not obeyed");
    let stranger = client.heartbeat(beat(caller("rollout-9", 1))).await.unwrap().into_inner();
    assert!(stranger.unknown);

    for bad in [None, caller("", 1), caller("a b", 1), caller(&"x".repeat(500), 1)] {
        let status = client.heartbeat(beat(bad)).await.unwrap_err();
        assert_eq!(status.code(), tonic::Code::InvalidArgument, "{status}");
    }
    let empty = wire::ReportRequest { caller: caller("rollout-0", 1), report: None, next: false };
    let status = client.report(empty).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::InvalidArgument);
    assert_eq!(crate::common::status(&running.url).await.workers.len(), 1);
}

#[tokio::test]
async fn a_run_whose_tables_cannot_be_written_fails_and_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let options = options(folder.path(), 1);
    let (store, config) = (options.store.clone(), options.config);
    std::fs::write(folder.path().join("lineage"), "a file where a folder should be").unwrap();
    let running = Running::start(options).await;
    let crew = Crew::hire(&running.url, &store, config);
    let failed = until(&running.url, "failure", |s| s.state() == RunState::Failed).await;
    assert!(count(&failed.failures, "lineage") >= 1, "{:?}", failed.failures);
    crew.home().await;
    let error = running.ended().await.unwrap_err();
    assert!(error.to_string().contains("tables of iteration 0"), "{error}");
    assert!(store.checkpoints().list().await.unwrap().is_empty());
}
