//! Who may not talk to a real coordinator is refused, said once, counted, and changes nothing.

use crate::common::process::{configure, start_logged};
use crate::common::within;
use duet_cli::certs::{Authority, Pair};
use duet_config::Config;
use duet_proto::v1 as wire;
use duet_proto::v1::control_service_client::ControlServiceClient;
use duet_proto::v1::status_service_client::StatusServiceClient;
use duet_proto::v1::worker_service_client::WorkerServiceClient;
use duet_service::access::Role;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic::{Code, Status};

const DAY: Duration = Duration::from_secs(86_400);

/// A coordinator under mutual TLS, and whoever wants to talk to it.
struct Place {
    folder: tempfile::TempDir,
    config: PathBuf,
    ca: String,
    authority: Authority,
    url: String,
    _process: tokio::process::Child,
}

fn now() -> Range<SystemTime> {
    let now = SystemTime::now();
    now - DAY..now + 100 * DAY
}

impl Place {
    async fn new() -> Place {
        let folder = tempfile::tempdir().unwrap();
        let config = configure(folder.path(), 1);
        let (authority, pair) = Authority::new(now()).unwrap();
        let own =
            authority.issue(Some(Role::Coordinator), &["127.0.0.1".to_owned()], now()).unwrap();
        let put = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        put("ca.crt", &pair.certificate);
        put("coordinator.crt", &own.certificate);
        put("coordinator.key", &own.key);
        let place = folder.path().display();
        let set = [
            format!("security.ca={place}/ca.crt"),
            format!("security.certificate={place}/{{role}}.crt"),
            format!("security.key={place}/{{role}}.key"),
            "telemetry.metrics=127.0.0.1:0".to_owned(),
        ];
        let set: Vec<&str> = set.iter().flat_map(|set| ["--set", set]).collect();
        let (process, url) = start_logged(&config, &set, &folder.path().join("log")).await;
        assert!(url.starts_with("https://127.0.0.1:"), "{url}");
        Place { folder, config, ca: pair.certificate, authority, url, _process: process }
    }

    /// A channel that checks nothing of its own certificate before it shows it.
    fn channel(&self, pair: Option<&Pair>) -> Channel {
        let mut tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&self.ca));
        if let Some(pair) = pair {
            tls = tls.identity(Identity::from_pem(&pair.certificate, &pair.key));
        }
        Endpoint::from_shared(self.url.clone()).unwrap().tls_config(tls).unwrap().connect_lazy()
    }

    fn of(&self, role: Role) -> Channel {
        self.channel(Some(&self.authority.issue(Some(role), &[], now()).unwrap()))
    }

    async fn status(&self) -> wire::Status {
        let mut status = StatusServiceClient::new(self.of(Role::Operator));
        let answer = within("the status", status.get(wire::GetRequest {})).await.unwrap();
        answer.into_inner().status.unwrap()
    }

    async fn register(
        &self,
        channel: Channel,
        name: &str,
        role: wire::Role,
    ) -> Result<u64, Status> {
        let config = Config::load(&self.config, &BTreeMap::new(), &[]).unwrap();
        let request = wire::RegisterRequest {
            caller: Some(caller(name, 0)),
            role: role.into(),
            config_digest: config.digest().0.to_vec(),
            build: String::new(),
        };
        let answer = WorkerServiceClient::new(channel).register(request).await?;
        Ok(answer.into_inner().generation)
    }

    /// Everything that lies in the store, with its length.
    fn stored(&self) -> Vec<(PathBuf, u64)> {
        fn walk(folder: &Path, into: &mut Vec<(PathBuf, u64)>) {
            for entry in std::fs::read_dir(folder).unwrap().map(Result::unwrap) {
                match entry.file_type().unwrap().is_dir() {
                    true => walk(&entry.path(), into),
                    false => into.push((entry.path(), entry.metadata().unwrap().len())),
                }
            }
        }
        let mut files = Vec::new();
        walk(&self.folder.path().join("store"), &mut files);
        files.sort();
        files
    }

    /// What the log says of refusals: reason, what, and why.
    fn refusals(&self) -> Vec<[String; 3]> {
        let log = std::fs::read_to_string(self.folder.path().join("log")).unwrap();
        let lines = log.lines().map(|line| serde_json::from_str(line).unwrap());
        let refused =
            lines.filter(|line: &serde_json::Value| line.to_string().contains("refused;"));
        let word = |line: &serde_json::Value, name: &str| {
            let fields = line.get("fields").unwrap_or(line);
            fields[name].as_str().unwrap_or_else(|| panic!("no {name} in {line}")).to_owned()
        };
        refused.map(|line| ["reason", "what", "why"].map(|name| word(&line, name))).collect()
    }

    /// A counter on the page of metrics.
    async fn counted(&self, series: &str) -> f64 {
        let log = std::fs::read_to_string(self.folder.path().join("log")).unwrap();
        let line = log.lines().find(|line| line.contains("metrics at /metrics")).unwrap();
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        let address = line.get("fields").unwrap_or(&line)["address"].as_str().unwrap().to_owned();
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        stream
            .write_all(b"GET /metrics HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n")
            .await
            .unwrap();
        let mut page = String::new();
        within("the metrics", stream.read_to_string(&mut page)).await.unwrap();
        let value = page.lines().find_map(|line| line.strip_prefix(series)).unwrap_or(" 0");
        value.trim().parse().unwrap()
    }
}

fn caller(name: &str, generation: u64) -> wire::Caller {
    wire::Caller { worker_id: name.to_owned(), session: 1, generation }
}

/// Asks for everything that would change something; what each was told.
async fn all(place: &Place, channel: &Channel) -> Vec<Status> {
    let mut control = ControlServiceClient::new(channel.clone());
    let drain = wire::DrainRequest { worker_id: "rollout-0".to_owned() };
    vec![
        within("pause", control.pause(wire::PauseRequest {})).await.unwrap_err(),
        within("resume", control.resume(wire::ResumeRequest {})).await.unwrap_err(),
        within("stop", control.stop(wire::StopRequest::default())).await.unwrap_err(),
        within("drain", control.drain(drain)).await.unwrap_err(),
        within("register", place.register(channel.clone(), "reward-9", wire::Role::Reward))
            .await
            .unwrap_err(),
    ]
}

#[tokio::test]
async fn without_the_right_certificate_nothing_is_changed_and_it_is_said_once() {
    let place = Place::new().await;
    // Its trees are admitted first, by itself.
    let admitted = async {
        loop {
            let status = place.status().await;
            if status.trees.iter().any(|state| state.count > 0) {
                return status;
            }
        }
    };
    let before = (within("the first trees", admitted).await, place.stored());
    let then = SystemTime::now();
    let operator = |valid| place.authority.issue(Some(Role::Operator), &[], valid).unwrap();
    let expired = operator(then - 9 * DAY..then - DAY);
    let early = operator(then + DAY..then + 9 * DAY);
    let other = Authority::new(now()).unwrap().0;
    let foreign = other.issue(Some(Role::Operator), &[], now()).unwrap();
    for shown in [None, Some(&expired), Some(&early), Some(&foreign)] {
        for _ in 0..2 {
            for told in all(&place, &place.channel(shown)).await {
                // It never came to a call: the handshake failed.
                assert_ne!(told.code(), Code::PermissionDenied, "{told:?}");
            }
        }
    }
    let handshakes = place.refusals();
    assert_eq!(handshakes.len(), 4, "{handshakes:?}");
    assert!(handshakes.iter().all(|[reason, ..]| reason == "certificate"), "{handshakes:?}");
    assert!(place.counted("duet_refused_total{reason=\"certificate\"}").await >= 8.0);

    let roleless = place.authority.issue(None, &[], now()).unwrap();
    let viewer = place.authority.issue(Some(Role::Viewer), &[], now()).unwrap();
    let rollout = place.authority.issue(Some(Role::Rollout), &[], now()).unwrap();
    let coordinator = place.authority.issue(Some(Role::Coordinator), &[], now()).unwrap();
    for shown in [&roleless, &viewer, &rollout, &coordinator] {
        for _ in 0..2 {
            for told in all(&place, &place.channel(Some(shown))).await {
                assert_eq!(told.code(), Code::PermissionDenied, "{told:?}");
                assert!(told.message().contains("certificate"), "{told:?}");
            }
        }
    }
    let told = place.register(place.of(Role::Operator), "reward-9", wire::Role::Reward).await;
    assert_eq!(told.unwrap_err().code(), Code::PermissionDenied);
    let calls = place.refusals().split_off(4);
    let distinct: std::collections::BTreeSet<_> = calls.iter().map(|[_, what, _]| what).collect();
    assert_eq!(calls.len(), distinct.len(), "said twice: {calls:?}");
    assert_eq!(calls.len(), 4 * 5 + 1, "{calls:?}");
    assert_eq!(place.counted("duet_refused_total{reason=\"role\"}").await, 41.0);

    let after = (place.status().await, place.stored());
    assert_eq!(steady(before.0), steady(after.0));
    assert_eq!(before.1, after.1, "the store was written to");
}

/// Without what changes by itself.
fn steady(status: wire::Status) -> wire::Status {
    wire::Status { eta_seconds: None, images_per_second: 0.0, ..status }
}

/// What ended a stream of two reports.
async fn exchanged(
    client: &mut WorkerServiceClient<Channel>,
    report: wire::ReportRequest,
) -> Status {
    let reports = futures::stream::iter([report.clone(), report]);
    let mut answers = within("exchange", client.exchange(reports)).await.unwrap().into_inner();
    within("an answer", answers.message()).await.unwrap_err()
}

#[tokio::test]
async fn nobody_speaks_for_a_worker_of_another_role() {
    let place = Place::new().await;
    let trainer = place.of(Role::Trainer);
    let generation =
        place.register(trainer.clone(), "trainer-0", wire::Role::Trainer).await.unwrap();
    let mut theirs = WorkerServiceClient::new(place.of(Role::Rollout));
    let caller = || Some(caller("trainer-0", generation));
    let leave = wire::LeaveRequest { caller: caller(), reason: String::new() };
    let report = wire::ReportRequest { caller: caller(), ..wire::ReportRequest::default() };
    let told = [
        theirs.heartbeat(wire::HeartbeatRequest { caller: caller() }).await.unwrap_err(),
        theirs.poll(wire::PollRequest { caller: caller() }).await.unwrap_err(),
        theirs.attend(wire::AttendRequest { caller: caller() }).await.unwrap_err(),
        theirs.report(report.clone()).await.unwrap_err(),
        exchanged(&mut theirs, report).await,
        theirs.leave(leave).await.unwrap_err(),
    ];
    for told in told {
        assert_eq!(told.code(), Code::PermissionDenied, "{told:?}");
        assert!(told.message().contains("trainer-0"), "{told:?}");
    }
    // A worker's node may send workers of its role home, and no others.
    let drain = || wire::DrainRequest { worker_id: "trainer-0".to_owned() };
    let mut control = ControlServiceClient::new(place.of(Role::Rollout));
    assert_eq!(control.drain(drain()).await.unwrap_err().code(), Code::PermissionDenied);
    let mut own = WorkerServiceClient::new(trainer.clone());
    own.heartbeat(wire::HeartbeatRequest { caller: caller() }).await.unwrap();
    ControlServiceClient::new(trainer).drain(drain()).await.unwrap();
}
