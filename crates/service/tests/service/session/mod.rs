//! A worker's session against a scripted coordinator on loopback.

mod coordinator;

use coordinator::{Coordinator, Script, Seen};
use duet_core::work::{Assignment, LeaseId, Outcome, Report, StepDone, Unit, Weights};
use duet_core::{Attempt, Digest, PolicyVersion, Rank, Role, TrainerEpoch, TreeId};
use duet_service::exit;
use duet_service::worker::{Connection, Session, SessionError, Verdict, WorkerOptions};
use std::collections::BTreeMap;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

fn options(coordinator: String) -> WorkerOptions {
    WorkerOptions {
        coordinator,
        worker: "rollout-0".into(),
        role: Role::Rollout,
        config_digest: Digest::of(b"configuration"),
        tls: None,
        allow_plaintext: false,
        reconnect_deadline: Duration::from_secs(60),
    }
}

fn weights(version: u64) -> Weights {
    Weights {
        version: PolicyVersion(version),
        llm: None,
        dit: None,
        digest: Digest::of(&version.to_le_bytes()),
    }
}

fn handed_back(attempt: u32) -> Report {
    let unit = Unit::Render(TreeId { iteration: 1, index: 2 }.subtree(3));
    let id = LeaseId { unit, attempt: Attempt(attempt) };
    Report::Lease { id, outcome: Outcome::HandedBack }
}

fn script(generation: u64, versions: &[u64]) -> Script {
    let assignments = versions.iter().map(|v| Assignment::Publish(weights(*v))).collect();
    Script { generation, assignments, ..Script::default() }
}

#[tokio::test]
async fn a_session_survives_a_coordinator_that_crashes_and_comes_back() {
    let mut first = Coordinator::start("127.0.0.1:0", script(1, &[7])).await;
    let session = Session::connect(options(first.url()), CancellationToken::new()).await.unwrap();
    let Seen::Registered(before) = first.sees().await else { panic!("not registered first") };
    assert_eq!((session.generation().0, session.run().as_str()), (1, "scripted"));
    assert_eq!(session.next().await.unwrap(), Assignment::Publish(weights(7)));

    let address = first.address.to_string();
    first.crash().await;
    let mut second = Coordinator::start(&address, script(2, &[8])).await;

    assert_eq!(session.report(handed_back(1)).await.unwrap(), Verdict::Accepted);
    let Seen::Registered(after) = second.sees().await else { panic!("not registered again") };
    assert_eq!((after.session, after.worker), (before.session, before.worker));
    assert_eq!(second.sees().await, Seen::Reported(handed_back(1)));
    assert_eq!(session.next().await.unwrap(), Assignment::Publish(weights(8)));
    assert_eq!(session.generation().0, 2);
}

#[tokio::test]
async fn a_held_poll_survives_a_crash() {
    let mut first = Coordinator::start("127.0.0.1:0", script(1, &[])).await;
    let session = Session::connect(options(first.url()), CancellationToken::new()).await.unwrap();
    let waiting = tokio::spawn({
        let session = session.clone();
        async move { session.next().await }
    });
    while first.seen.recv().await != Some(Seen::Polled(session.number())) {}
    let address = first.address.to_string();
    first.crash().await;
    let _second = Coordinator::start(&address, script(2, &[9])).await;
    assert_eq!(waiting.await.unwrap().unwrap(), Assignment::Publish(weights(9)));
}

#[tokio::test]
async fn the_next_assignment_comes_with_the_answer_to_a_report() {
    let mut coordinator = Coordinator::start("127.0.0.1:0", script(1, &[7, 8])).await;
    let session =
        Session::connect(options(coordinator.url()), CancellationToken::new()).await.unwrap();
    assert_eq!(session.report_and_go_on(handed_back(1)).await.unwrap(), Verdict::Accepted);
    assert_eq!(session.next().await.unwrap(), Assignment::Publish(weights(7)));
    // What was taken is not given again, and a plain report takes nothing.
    assert_eq!(session.report(handed_back(2)).await.unwrap(), Verdict::Accepted);
    assert_eq!(session.next().await.unwrap(), Assignment::Publish(weights(8)));
    let mut polls = 0;
    while let Ok(seen) = coordinator.seen.try_recv() {
        polls += u32::from(matches!(seen, Seen::Polled(_)));
    }
    assert_eq!(polls, 1, "the second one");
}

#[tokio::test]
async fn work_that_comes_later_comes_as_the_second_answer_to_the_report() {
    let mut coordinator = Coordinator::start("127.0.0.1:0", script(1, &[])).await;
    let session =
        Session::connect(options(coordinator.url()), CancellationToken::new()).await.unwrap();
    for version in [7, 8] {
        let report = handed_back(version as u32);
        assert_eq!(session.report_and_go_on(report).await.unwrap(), Verdict::Accepted);
        let mut next = Box::pin(session.next());
        assert!(poll_once(&mut next).await.is_none());
        coordinator.give(Assignment::Publish(weights(version)));
        assert_eq!(next.await.unwrap(), Assignment::Publish(weights(version)));
    }
    while let Ok(seen) = coordinator.seen.try_recv() {
        assert!(!matches!(seen, Seen::Polled(_)), "it asked again for what it was owed");
    }
}

#[tokio::test]
async fn who_has_more_to_say_before_the_second_answer_hangs_up_and_waits_anew() {
    let mut coordinator = Coordinator::start("127.0.0.1:0", script(1, &[])).await;
    let shutdown = CancellationToken::new();
    let session = Session::connect(options(coordinator.url()), shutdown.clone()).await.unwrap();
    assert_eq!(session.report_and_go_on(handed_back(1)).await.unwrap(), Verdict::Accepted);
    assert_eq!(session.report_and_go_on(handed_back(2)).await.unwrap(), Verdict::Accepted);
    while coordinator.seen.recv().await != Some(Seen::HungUp) {}
    coordinator.give(Assignment::Publish(weights(7)));
    assert_eq!(session.next().await.unwrap(), Assignment::Publish(weights(7)));
    // So does whoever is told to stop.
    assert_eq!(session.report_and_go_on(handed_back(3)).await.unwrap(), Verdict::Accepted);
    let mut next = Box::pin(session.next());
    assert!(poll_once(&mut next).await.is_none());
    shutdown.cancel();
    assert!(matches!(next.await, Err(SessionError::Stopped)));
    while coordinator.seen.recv().await != Some(Seen::HungUp) {}
    assert_eq!(session.report(handed_back(4)).await.unwrap(), Verdict::Accepted);
}

#[tokio::test]
async fn a_second_answer_that_is_owed_survives_a_crash() {
    let first = Coordinator::start("127.0.0.1:0", script(1, &[])).await;
    let session = Session::connect(options(first.url()), CancellationToken::new()).await.unwrap();
    assert_eq!(session.report_and_go_on(handed_back(1)).await.unwrap(), Verdict::Accepted);
    let address = first.address.to_string();
    first.crash().await;
    let _second = Coordinator::start(&address, script(2, &[9])).await;
    assert_eq!(session.next().await.unwrap(), Assignment::Publish(weights(9)));
}

#[tokio::test]
async fn sessions_of_a_process_may_share_a_connection() {
    let mut coordinator = Coordinator::start("127.0.0.1:0", script(1, &[7, 8])).await;
    let connection = Connection::to(&options(coordinator.url())).unwrap();
    let mut sessions = Vec::new();
    for worker in ["rollout-0.0", "rollout-0.1"] {
        let options = WorkerOptions { worker: worker.into(), ..options(coordinator.url()) };
        let session = Session::connect_over(&connection, options, CancellationToken::new()).await;
        let Seen::Registered(who) = coordinator.sees().await else { panic!("not registered") };
        assert_eq!(who.worker.0, worker);
        sessions.push(session.unwrap());
    }
    assert_eq!(coordinator.connections(), 1);
    let [first, second] = &sessions[..] else { panic!("two sessions") };
    assert_eq!(first.next().await.unwrap(), Assignment::Publish(weights(7)));
    first.leave("done").await;
    assert_eq!(coordinator.sees().await, Seen::Left("done".to_owned()));
    // The other one's goodbye was its own.
    assert_eq!(second.report_and_go_on(handed_back(1)).await.unwrap(), Verdict::Accepted);
    assert_eq!(second.next().await.unwrap(), Assignment::Publish(weights(8)));
}

#[tokio::test]
async fn a_line_that_ends_is_opened_again() {
    let mut first = Coordinator::start("127.0.0.1:0", script(1, &[])).await;
    let session = Session::connect(options(first.url()), CancellationToken::new()).await.unwrap();
    let attended = |seen| seen == Some(Seen::Attended(session.number()));
    while !attended(first.seen.recv().await) {}
    let address = first.address.to_string();
    first.crash().await;
    let mut second = Coordinator::start(&address, script(2, &[])).await;
    while !attended(second.seen.recv().await) {}
}

#[tokio::test]
async fn a_report_whose_answer_is_lost_is_told_again_and_counts_once() {
    let mut script = script(1, &[]);
    script.lose_answers = 1;
    let coordinator = Coordinator::start("127.0.0.1:0", script).await;
    let session =
        Session::connect(options(coordinator.url()), CancellationToken::new()).await.unwrap();
    assert_eq!(session.report(handed_back(1)).await.unwrap(), Verdict::Duplicate);
}

#[tokio::test]
async fn streams_of_reports_are_opened_again_when_they_or_their_coordinator_end() {
    let mut script = script(1, &[7]);
    script.lose_answers = 1;
    let first = Coordinator::start("127.0.0.1:0", script.clone()).await;
    let session = Session::connect(options(first.url()), CancellationToken::new()).await.unwrap();
    assert_eq!(session.report_and_go_on(handed_back(1)).await.unwrap(), Verdict::Duplicate);
    assert_eq!(session.report_and_go_on(handed_back(2)).await.unwrap(), Verdict::Accepted);
    assert_eq!(session.next().await.unwrap(), Assignment::Publish(weights(7)));
    let address = first.address.to_string();
    first.crash().await;
    script.lose_answers = 0;
    let _second = Coordinator::start(&address, script).await;
    assert_eq!(session.report_and_go_on(handed_back(3)).await.unwrap(), Verdict::Accepted);
    assert_eq!(session.next().await.unwrap(), Assignment::Publish(weights(7)));
}

#[tokio::test]
async fn who_stops_waiting_for_an_answer_is_not_given_it_for_another_report() {
    let coordinator = Coordinator::start("127.0.0.1:0", script(1, &[7, 8])).await;
    let session =
        Session::connect(options(coordinator.url()), CancellationToken::new()).await.unwrap();
    // The second is dropped when its message may have gone out, and its answer be on the way.
    assert_eq!(session.report_and_go_on(handed_back(1)).await.unwrap(), Verdict::Accepted);
    assert_eq!(session.next().await.unwrap(), Assignment::Publish(weights(7)));
    let mut dropped = Box::pin(session.report_and_go_on(handed_back(1)));
    assert!(poll_once(&mut dropped).await.is_none());
    drop(dropped);
    assert_eq!(session.report_and_go_on(handed_back(2)).await.unwrap(), Verdict::Accepted);
}

/// Polls a future once.
async fn poll_once<F: Future + Unpin>(future: &mut F) -> Option<F::Output> {
    std::future::poll_fn(|context| {
        std::task::Poll::Ready(match std::pin::Pin::new(&mut *future).poll(context) {
            std::task::Poll::Ready(value) => Some(value),
            std::task::Poll::Pending => None,
        })
    })
    .await
}

#[tokio::test]
async fn a_forgotten_session_registers_again_by_its_heartbeat() {
    let mut script = script(1, &[]);
    script.forget_at_heartbeat = true;
    let mut coordinator = Coordinator::start("127.0.0.1:0", script).await;
    let session =
        Session::connect(options(coordinator.url()), CancellationToken::new()).await.unwrap();
    for _ in 0..2 {
        let seen = coordinator.sees().await;
        assert!(matches!(seen, Seen::Registered(who) if who.session == session.number()));
    }
}

#[tokio::test]
async fn heartbeats_bring_the_end_of_a_trainer_group() {
    let mut script = script(1, &[]);
    script.abort_epoch = Some(4);
    let coordinator = Coordinator::start("127.0.0.1:0", script).await;
    let session =
        Session::connect(options(coordinator.url()), CancellationToken::new()).await.unwrap();
    let mut aborted = session.aborted();
    let newest = *aborted.wait_for(Option::is_some).await.unwrap();
    assert_eq!(newest, Some(TrainerEpoch(4)));
}

#[tokio::test]
async fn a_refused_worker_is_told_why_and_does_not_try_again() {
    let mut script = script(1, &[]);
    script.refuse = Some("the configuration is not this run's");
    let coordinator = Coordinator::start("127.0.0.1:0", script).await;
    let error = Session::connect(options(coordinator.url()), CancellationToken::new()).await.err();
    let error = error.expect("refused");
    assert!(matches!(&error, SessionError::Refused(why) if why.contains("configuration")));
    assert_eq!(error.exit_code(), exit::CONFIG);
}

#[tokio::test]
async fn a_coordinator_that_stays_away_is_given_up() {
    let gone = Coordinator::start("127.0.0.1:0", script(1, &[])).await;
    let mut options = options(gone.url());
    options.reconnect_deadline = Duration::ZERO;
    gone.crash().await;
    let error = Session::connect(options, CancellationToken::new()).await.err().expect("lost");
    assert!(matches!(error, SessionError::Lost { .. }), "{error}");
    assert_eq!(error.exit_code(), exit::RETRY);
}

#[tokio::test]
async fn shutdown_ends_a_held_poll_and_still_lets_reports_and_the_goodbye_out() {
    let mut coordinator = Coordinator::start("127.0.0.1:0", script(1, &[])).await;
    let shutdown = CancellationToken::new();
    let session = Session::connect(options(coordinator.url()), shutdown.clone()).await.unwrap();
    let waiting = tokio::spawn({
        let session = session.clone();
        async move { session.next().await }
    });
    while coordinator.seen.recv().await != Some(Seen::Polled(session.number())) {}
    shutdown.cancel();
    assert!(matches!(waiting.await.unwrap(), Err(SessionError::Stopped)));
    assert_eq!(session.report(handed_back(2)).await.unwrap(), Verdict::Accepted);
    session.leave("told to stop").await;
    assert_eq!(coordinator.sees().await, Seen::Reported(handed_back(2)));
    assert_eq!(coordinator.sees().await, Seen::Left("told to stop".to_owned()));
}

#[tokio::test]
async fn a_number_that_is_not_finite_never_leaves_the_worker() {
    let mut coordinator = Coordinator::start("127.0.0.1:0", script(1, &[])).await;
    let session =
        Session::connect(options(coordinator.url()), CancellationToken::new()).await.unwrap();
    let done = StepDone {
        epoch: TrainerEpoch(1),
        rank: Rank(0),
        iteration: 0,
        weights: weights(1),
        metrics: BTreeMap::from([("loss".to_owned(), f64::NAN)]),
    };
    let error = session.report(Report::StepDone(done)).await.expect_err("not finite");
    assert!(error.to_string().contains("step_done.metrics.value"), "{error}");
    session.leave("broken").await;
    assert!(matches!(coordinator.sees().await, Seen::Registered(_)));
    assert_eq!(coordinator.sees().await, Seen::Left("broken".to_owned()));
}
