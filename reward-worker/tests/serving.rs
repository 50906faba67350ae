//! The worker's side of the protocol, against a scripted coordinator and a store in memory.

use duet_core::work::{
    Assignment, Done, LeafScores, Lease, LeaseId, Outcome, PromptRow, Report, Score, ScoreWork,
    Unit, Work,
};
use duet_core::{ArtifactRef, Attempt, Digest, Millis, TreeId};
use duet_models::artifact::RenderArtifact;
use duet_reward_worker::scorer::{Job, Panel, Scorer};
use duet_reward_worker::serve::{Desk, Worker, serve};
use duet_store::Store;
use duet_torch::device::{DeviceError, DeviceThread};
use std::collections::VecDeque;
use std::time::Duration;
use tch::{Device, Kind, Tensor};

/// Mean brightness as a score, or a failure of its own kind for some prompts.
struct Brightness;

impl Scorer for Brightness {
    fn components(&self) -> Vec<String> {
        vec!["brightness".to_owned()]
    }

    fn score(&mut self, job: &Job) -> Result<Vec<LeafScores>, String> {
        match job.prompt.text.as_str() {
            "fail" => return Err("no such model".to_owned()),
            "panic" => Tensor::from_slice(&[1f32]).reshape([7]).print(),
            _ => {}
        }
        let means = job.images.to_kind(Kind::Double).mean_dim([1i64, 2, 3].as_slice(), false, None);
        let means = Vec::<f64>::try_from(means / 255.0).map_err(|error| error.to_string())?;
        let score = |mean| [("brightness".to_owned(), Score::Scored(mean))].into();
        Ok(means.into_iter().map(score).collect())
    }
}

/// Never answers.
struct Stuck(std::sync::mpsc::Receiver<()>);

impl Scorer for Stuck {
    fn components(&self) -> Vec<String> {
        vec!["slow".to_owned()]
    }

    fn score(&mut self, _: &Job) -> Result<Vec<LeafScores>, String> {
        Err(self.0.recv().map_or("released".to_owned(), |()| String::new()))
    }
}

#[derive(Default)]
struct Script {
    assignments: VecDeque<Assignment>,
    reports: Vec<Report>,
}

impl Desk for Script {
    type Error = ();

    async fn next(&mut self) -> Result<Assignment, ()> {
        let over = || Assignment::Leave { reason: "the run is over".to_owned() };
        Ok(self.assignments.pop_front().unwrap_or_else(over))
    }

    async fn report(&mut self, report: Report) -> Result<(), ()> {
        self.reports.push(report);
        Ok(())
    }
}

async fn worker<S: Scorer + 'static>(
    store: &Store,
    limit: Duration,
    make: impl FnOnce() -> S + Send + 'static,
) -> Worker {
    let panel =
        || Panel::new(vec![Box::new(make())]).map_err(|error| DeviceError::Gone(error.to_string()));
    let device = DeviceThread::spawn("scorer", panel).unwrap();
    Worker::new(device, store.artifacts(), limit).await.unwrap()
}

/// Two images, black and white, in the store.
async fn images(store: &Store) -> ArtifactRef {
    let white = Tensor::full([1, 4, 4, 3], 255, (Kind::Uint8, Device::Cpu));
    let artifact = RenderArtifact {
        latents: Tensor::zeros([2, 0, 1, 1], (Kind::Float, Device::Cpu)),
        log_probs: Tensor::zeros([2, 0], (Kind::Float, Device::Cpu)),
        images: Tensor::cat(&[white.zeros_like(), white], 0),
        last: None,
        window_start: 0,
    };
    store.artifacts().put("artifacts/images", artifact.encode().unwrap().into()).await.unwrap()
}

fn lease(prompt: &str, render: &ArtifactRef, leaves: u32) -> Assignment {
    let prompt = PromptRow { row: 0, text: prompt.to_owned(), meta: String::new() };
    let work = ScoreWork { prompt, refined_prompt: String::new(), render: render.clone(), leaves };
    let unit = Unit::Score(TreeId { iteration: 2, index: 0 }.subtree(1));
    let id = LeaseId { unit, attempt: Attempt(1) };
    Assignment::Lease(Lease { id, expires_in: Millis(9_000), work: Work::Score(work) })
}

async fn reports(worker: &Worker, assignments: Vec<Assignment>) -> Vec<Report> {
    let mut desk = Script { assignments: assignments.into(), reports: Vec::new() };
    let reason = serve(&mut desk, worker).await.unwrap();
    assert_eq!(reason, "the run is over");
    desk.reports
}

fn scores(report: &Report) -> &[LeafScores] {
    match report {
        Report::Lease { outcome: Outcome::Done { result: Done::Score(scores), .. }, .. } => scores,
        other => panic!("{other:?}"),
    }
}

fn failed(report: &Report) -> (&str, &str) {
    match report {
        Report::Lease { outcome: Outcome::Failed { kind, reason }, .. } => (kind, reason),
        other => panic!("{other:?}"),
    }
}

const LONG: Duration = Duration::from_secs(600);

#[tokio::test]
async fn every_leaf_is_scored_and_a_failing_scorer_is_no_failed_lease() {
    let store = Store::memory();
    let images = images(&store).await;
    let worker = worker(&store, LONG, || Brightness).await;
    let told = reports(&worker, vec![lease("x", &images, 2), lease("fail", &images, 2)]).await;
    let bright: Vec<_> = scores(&told[0]).iter().map(|leaf| leaf["brightness"].clone()).collect();
    assert_eq!(bright, [Score::Scored(0.0), Score::Scored(1.0)]);
    for leaf in scores(&told[1]) {
        assert_eq!(leaf["brightness"], Score::Failed("no such model".to_owned()));
    }
}

#[tokio::test]
async fn failures_of_the_lease_are_reported_with_their_class_and_the_worker_works_on() {
    let store = Store::memory();
    let images = images(&store).await;
    let worker = worker(&store, LONG, || Brightness).await;
    let lost = ArtifactRef { key: "artifacts/lost".to_owned(), digest: Digest::of(b""), bytes: 3 };
    let junk = store.artifacts().put("artifacts/junk", b"junk".as_slice().into()).await.unwrap();
    let leases = vec![
        lease("x", &lost, 2),
        lease("x", &junk, 2),
        lease("x", &images, 3),
        lease("panic", &images, 2),
        lease("x", &images, 2),
    ];
    let told = reports(&worker, leases).await;
    for (report, (kind, part)) in told.iter().zip([
        ("artifact", "artifacts/lost"),
        ("artifact", "artifacts/junk"),
        ("artifact", "holds 2 images, the lease asks for 3"),
        ("scorer", "shape '[7]' is invalid"),
    ]) {
        assert_eq!(failed(report).0, kind);
        assert!(failed(report).1.contains(part), "{report:?}");
    }
    assert_eq!(scores(&told[4]).len(), 2);
}

/// DU-8: a scorer that does not answer gives no number.
#[tokio::test]
async fn a_scorer_that_does_not_answer_has_timed_out() {
    let store = Store::memory();
    let images = images(&store).await;
    let (release, stuck) = std::sync::mpsc::channel();
    let worker = worker(&store, Duration::ZERO, || Stuck(stuck)).await;
    let told = reports(&worker, vec![lease("x", &images, 2)]).await;
    drop(release);
    for leaf in scores(&told[0]) {
        assert_eq!(leaf["slow"], Score::TimedOut(Millis(0)));
    }
}
