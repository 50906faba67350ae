//! The worker's side of the protocol, against a scripted coordinator and a store in memory.

mod common;

use common::{base, engine, pipeline};
use duet_core::work::{
    Assignment, Done, Lease, LeaseId, Outcome, PromptRow, RenderWork, Report, ScoreWork, ThinkWork,
    Trace, Unit, Weights, Window, Work,
};
use duet_core::{ArtifactRef, Attempt, Digest, Millis, PolicyVersion, Seed, TreeId};
use duet_models::artifact::RenderArtifact;
use duet_rollout_worker::engine::Adapters;
use duet_rollout_worker::error::WorkError;
use duet_rollout_worker::serve::{Desk, Worker, serve};
use duet_store::Store;
use duet_torch::device::DeviceThread;
use duet_torch::tensorfile::encode;
use std::collections::VecDeque;

/// Hands out a script, then says to stop; keeps the reports.
#[derive(Default)]
struct Script {
    assignments: VecDeque<Assignment>,
    reports: Vec<Report>,
}

impl Desk for Script {
    type Error = &'static str;

    async fn next(&mut self) -> Result<Assignment, &'static str> {
        self.assignments.pop_front().ok_or("stopped")
    }

    async fn report(&mut self, report: Report) -> Result<(), &'static str> {
        self.reports.push(report);
        Ok(())
    }
}

const TREE: TreeId = TreeId { iteration: 4, index: 1 };

fn worker(store: &Store) -> Worker {
    let make = || Ok::<_, WorkError>(engine(Adapters::default()));
    Worker::new(DeviceThread::spawn("device", make).unwrap(), store.artifacts())
}

/// Works through assignments and gives the reports.
async fn reports(worker: &Worker, assignments: Vec<Assignment>) -> Vec<Report> {
    let mut desk = Script { assignments: assignments.into(), reports: Vec::new() };
    desk.assignments.push_back(Assignment::Leave { reason: "the run is over".to_owned() });
    let reason = serve(&mut desk, worker).await.unwrap();
    assert_eq!(reason, "the run is over");
    desk.reports
}

fn lease(unit: Unit, work: Work) -> Assignment {
    let id = LeaseId { unit, attempt: Attempt(2) };
    Assignment::Lease(Lease { id, expires_in: Millis(60_000), work })
}

fn prompt() -> PromptRow {
    PromptRow { row: 0, text: "The number after three".to_owned(), meta: String::new() }
}

fn think(weights: &Weights) -> Assignment {
    let (weights, prompt, seed) = (weights.clone(), prompt(), Seed::root(5));
    lease(Unit::Think(TREE), Work::Think(ThinkWork { weights, prompt, traces: 2, seed }))
}

fn render(weights: &Weights, trace: &ArtifactRef) -> Assignment {
    let (weights, trace, seed) = (weights.clone(), trace.clone(), Seed::root(6));
    let window = Window { start: 0, len: 1 };
    let work = RenderWork { weights, trace, leaves: 2, window, seed };
    lease(Unit::Render(TREE.subtree(1)), Work::Render(work))
}

fn traces(report: &Report) -> &[Trace] {
    match report {
        Report::Lease { outcome: Outcome::Done { result: Done::Think(traces), .. }, .. } => traces,
        other => panic!("{other:?}"),
    }
}

fn failed(report: &Report) -> (&str, &str) {
    match report {
        Report::Lease { outcome: Outcome::Failed { kind, reason }, .. } => (kind, reason),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_tree_is_thought_and_rendered_through_the_store() {
    let store = Store::memory();
    let worker = worker(&store);
    let thought = reports(&worker, vec![think(&base())]).await;
    let traces = traces(&thought[0]);
    assert_eq!(traces.len(), 2);
    assert_eq!(traces[1].artifact.key, "artifacts/i000004/t0001/j1/think-a2.safetensors");
    let rendered = reports(&worker, vec![render(&base(), &traces[1].artifact)]).await;
    let Report::Lease { id, outcome: Outcome::Done { result: Done::Render(image), .. } } =
        &rendered[0]
    else {
        panic!("{rendered:?}");
    };
    assert_eq!((id.unit, id.attempt), (Unit::Render(TREE.subtree(1)), Attempt(2)));
    let bytes = store.artifacts().get(image).await.unwrap();
    let artifact = RenderArtifact::decode(&image.key, bytes.into(), tch::Device::Cpu).unwrap();
    assert_eq!((artifact.leaves(), artifact.log_probs.size()), (2, vec![2, 1]));

    // Another worker that is given the same attempt leaves the same bytes: the store takes them.
    let again = reports(&self::worker(&store), vec![think(&base())]).await;
    assert_eq!(self::traces(&again[0]), traces);
}

#[tokio::test]
async fn a_policy_is_held_when_published_and_fetched_when_it_was_not() {
    let store = Store::memory();
    let shifted = pipeline();
    let params = shifted.lm.params().iter().map(|(n, t)| (n.to_owned(), t * 1.1)).collect();
    let bytes = encode(&params, &Default::default()).unwrap();
    let llm = Some(store.artifacts().put("weights/llm", bytes.into()).await.unwrap());
    let digest = Digest::of(b"one");
    let weights = Weights { version: PolicyVersion(1), llm, dit: None, digest };

    let one = worker(&store);
    let told = reports(&one, vec![Assignment::Publish(weights.clone()), think(&weights)]).await;
    assert_eq!(told[0], Report::PublishAck { version: PolicyVersion(1) });
    let fetched = reports(&worker(&store), vec![think(&weights)]).await;
    assert_eq!(traces(&told[1]), traces(&fetched[0]));
    let at_base = reports(&worker(&Store::memory()), vec![think(&base())]).await;
    assert_ne!(traces(&told[1])[0].artifact.digest, traces(&at_base[0])[0].artifact.digest);
}

#[tokio::test]
async fn failures_are_reported_with_their_class_and_the_worker_works_on() {
    let store = Store::memory();
    let worker = worker(&store);
    let lost = ArtifactRef { key: "artifacts/x".to_owned(), digest: Digest::of(b""), bytes: 9 };
    let gone = Weights { llm: Some(lost.clone()), version: PolicyVersion(7), ..base() };
    let work = ScoreWork {
        prompt: prompt(),
        refined_prompt: String::new(),
        render: lost.clone(),
        leaves: 1,
    };
    let told = reports(
        &worker,
        vec![
            render(&base(), &lost),
            think(&gone),
            Assignment::Publish(gone.clone()),
            lease(Unit::Score(TREE.subtree(0)), Work::Score(work)),
            think(&base()),
        ],
    )
    .await;
    assert_eq!(failed(&told[0]).0, "artifact");
    assert!(failed(&told[0]).1.contains("artifacts/x"), "{told:?}");
    assert_eq!(failed(&told[1]).0, "artifact");
    let Report::PublishFailed { version, reason } = &told[2] else { panic!("{told:?}") };
    assert!(*version == PolicyVersion(7) && reason.contains("artifacts/x"), "{reason}");
    assert_eq!(failed(&told[3]).0, "protocol");
    assert_eq!(traces(&told[4]).len(), 2);
}

#[tokio::test]
async fn told_to_stop_it_has_reported_what_it_had() {
    let worker = worker(&Store::memory());
    let mut desk = Script { assignments: vec![think(&base())].into(), reports: Vec::new() };
    assert_eq!(serve(&mut desk, &worker).await, Err("stopped"));
    assert_eq!(traces(&desk.reports[0]).len(), 2);
}
