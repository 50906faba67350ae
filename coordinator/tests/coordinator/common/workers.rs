//! Workers that compute nothing, quickly: results are pure functions of the lease, as the real ones'
//! are, and artifacts are really written.

use bytes::Bytes;
use duet_config::Telemetry;
use duet_core::work::{
    Assignment, Done, Finish, Lease, Outcome, Report, Score, ShardDone, Step, StepDone, Trace,
    Unit, Weights, Work,
};
use duet_core::{ArtifactRef, Digest, Millis, PolicyVersion, Role, WorkerId};
use duet_service::observe::{Observer, Showing};
use duet_service::traces::Run;
use duet_service::worker::{Session, SessionError, WorkerOptions};
use duet_store::{Store, keys};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// How often each unit was worked on, and each update was taken by rank 0.
#[derive(Clone, Default)]
pub struct Ledger(Arc<Mutex<BTreeMap<String, u32>>>);

impl Ledger {
    pub fn note(&self, what: String) {
        *self.0.lock().unwrap().entry(what).or_default() += 1;
    }

    pub fn counts(&self) -> BTreeMap<String, u32> {
        self.0.lock().unwrap().clone()
    }
}

pub fn worker_options(url: &str, name: &str, role: Role, config: Digest) -> WorkerOptions {
    WorkerOptions {
        coordinator: url.to_owned(),
        worker: WorkerId::from(name),
        role,
        config_digest: config,
        tls: None,
        allow_plaintext: false,
        reconnect_deadline: Duration::from_secs(30),
    }
}

/// Two rollout workers, a reward worker and two trainer ranks.
const NAMES: [(&str, Role); 5] = [
    ("rollout-0", Role::Rollout),
    ("rollout-1", Role::Rollout),
    ("reward-0", Role::Reward),
    ("trainer-0", Role::Trainer),
    ("trainer-1", Role::Trainer),
];

/// Workers of every role.
pub struct Crew {
    pub tasks: JoinSet<Result<(), SessionError>>,
    pub shutdown: CancellationToken,
    pub ledger: Ledger,
}

impl Crew {
    /// Two rollout workers, a reward worker and two trainer ranks.
    pub fn hire(url: &str, store: &Store, config: Digest) -> Crew {
        Crew::hire_with(url, store, config, |_| Observer::off())
    }

    /// The same, each with its own metrics and traces.
    pub async fn hire_observed(
        url: &str,
        store: &Store,
        config: Digest,
        telemetry: &Telemetry,
    ) -> Crew {
        let run = Run { name: "test".to_owned(), config };
        let mut observers = BTreeMap::new();
        for (worker, role) in NAMES {
            let role = match role {
                Role::Rollout => "rollout",
                Role::Reward => "reward",
                Role::Trainer => "trainer",
            };
            let otlp = telemetry.otlp.as_deref();
            let showing = Showing { run: &run, worker, role, metrics: None, otlp };
            observers.insert(worker, Observer::start(showing).await.unwrap());
        }
        Crew::hire_with(url, store, config, |name| observers[name].clone())
    }

    fn hire_with(
        url: &str,
        store: &Store,
        config: Digest,
        observer: impl Fn(&str) -> Observer,
    ) -> Crew {
        let (shutdown, ledger) = (CancellationToken::new(), Ledger::default());
        let mut tasks = JoinSet::new();
        for (name, role) in NAMES {
            let options = worker_options(url, name, role, config);
            let worker =
                Worker { store: store.clone(), ledger: ledger.clone(), version: 0, place: (0, 1) };
            tasks.spawn(worker.run(options, shutdown.clone(), observer(name)));
        }
        Crew { tasks, shutdown, ledger }
    }

    /// Waits until all were sent home.
    pub async fn home(mut self) -> Ledger {
        while let Some(ended) = super::within("the end of a worker", self.tasks.join_next()).await {
            ended.unwrap().unwrap();
        }
        self.ledger
    }
}

struct Worker {
    store: Store,
    ledger: Ledger,
    version: u64,
    /// Rank and size of its group.
    place: (u32, u32),
}

impl Worker {
    async fn run(
        mut self,
        options: WorkerOptions,
        shutdown: CancellationToken,
        observer: Observer,
    ) -> Result<(), SessionError> {
        let session = Session::connect(options, shutdown).await?.observed(observer.clone());
        loop {
            match session.next().await? {
                Assignment::Lease(lease) => {
                    self.ledger.note(format!(
                        "{} {}",
                        lease.id.unit.stage(),
                        lease.id.unit.place()
                    ));
                    let result = self.work(&lease).await;
                    let outcome = Outcome::Done { result, took: Millis(1) };
                    session.report(Report::Lease { id: lease.id, outcome }).await?;
                }
                Assignment::Publish(weights) => {
                    let version = weights.version;
                    session.report(Report::PublishAck { version }).await?;
                }
                Assignment::Rendezvous(part) => {
                    if part.store.is_none() {
                        let address = "127.0.0.1:1".to_owned();
                        session.report(Report::StoreReady { epoch: part.epoch, address }).await?;
                    }
                    let (version, digest) = self.restore(part.restore.as_ref()).await;
                    let (epoch, rank) = (part.epoch, part.rank);
                    (self.version, self.place) = (version.0, (rank.0, part.world));
                    let ready = Report::TrainerReady { epoch, rank, version, digest };
                    session.report(ready).await?;
                }
                Assignment::Step(step) => {
                    let done = self.step(&step).await;
                    let version = done.weights.version;
                    session.report(Report::StepDone(done)).await?;
                    if step.checkpoint {
                        let (rank, world) = self.place;
                        let (epoch, rank) = (step.epoch, duet_core::Rank(rank));
                        let shards =
                            vec![self.put(&keys::shard(version, rank, world, epoch)).await];
                        let done = ShardDone { epoch, rank, version, shards };
                        session.report(Report::ShardDone(done)).await?;
                    }
                }
                Assignment::Leave { .. } => {
                    session.leave("sent home").await;
                    observer.finish().await;
                    return Ok(());
                }
            }
        }
    }

    async fn put(&self, key: &str) -> ArtifactRef {
        let bytes = Bytes::from(format!("the bytes of {key}"));
        self.store.artifacts().put(key, bytes).await.unwrap()
    }

    async fn work(&self, lease: &Lease) -> Done {
        match (&lease.work, lease.id.unit) {
            (Work::Think(work), Unit::Think(tree)) => {
                let mut traces = Vec::new();
                for j in 0..work.traces {
                    let artifact = self.put(&keys::think(tree.subtree(j), lease.id.attempt)).await;
                    traces.push(Trace {
                        artifact,
                        text: "easy. Revised Prompt:\nx".to_owned(),
                        refined_prompt: "x".to_owned(),
                        well_formed: true,
                        tokens: 7,
                        finish: Finish::Stop,
                    });
                }
                Done::Think(traces)
            }
            (Work::Render(_), Unit::Render(id)) => {
                Done::Render(self.put(&keys::render(id, lease.id.attempt)).await)
            }
            (Work::Score(work), Unit::Score(id)) => {
                let noise = Digest::of(id.to_string().as_bytes()).0;
                let leaf = |k: usize| {
                    let score = Score::Scored(f64::from(noise[k]) / 255.0);
                    [("semantic".to_owned(), score)].into()
                };
                Done::Score((0..work.leaves as usize).map(leaf).collect())
            }
            (work, unit) => panic!("{work:?} is not for {unit:?}"),
        }
    }

    async fn restore(&self, manifest: Option<&ArtifactRef>) -> (PolicyVersion, Digest) {
        match manifest {
            None => (PolicyVersion(0), Digest([0; 32])),
            Some(reference) => {
                let manifest = self.store.checkpoints().read(reference).await.unwrap();
                (manifest.version, manifest.weights.digest)
            }
        }
    }

    async fn step(&mut self, step: &Step) -> StepDone {
        let (iteration, (rank, _)) = (step.iteration, self.place);
        assert_eq!(self.version, u64::from(iteration), "a step on the wrong version");
        if step.update {
            self.version += 1;
            if rank == 0 && step.publish {
                self.ledger.note(format!("step {iteration}"));
            }
        }
        let version = PolicyVersion(self.version);
        let digest = Digest::of(format!("weights {version}").as_bytes());
        let llm = match (rank, step.publish) {
            (0, true) => {
                let key = keys::weights(version, keys::Branch::Llm, step.epoch);
                Some(self.put(&key).await)
            }
            _ => None,
        };
        StepDone {
            epoch: step.epoch,
            rank: duet_core::Rank(rank),
            iteration,
            weights: Weights { version, llm, dit: None, digest },
            metrics: [("loss".to_owned(), 0.1), ("trees".to_owned(), step.trees.len() as f64)]
                .into(),
        }
    }
}
