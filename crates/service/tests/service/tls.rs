//! Mutual TLS between a real server and real clients: who is let in, and what the others are told.

use duet_service::channel::channel;
use duet_service::server::server;
use duet_service::tls::TlsFiles;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, SanType, date_time_ymd};
use std::path::Path;
use tokio_util::sync::CancellationToken;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

/// A private authority.
struct Authority {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Authority {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let pem = params.self_signed(&key).unwrap().pem();
        Authority { pem, issuer: Issuer::new(params, key) }
    }

    /// Files of a process in `folder`, with the role of its name, trusted until `year`.
    fn files(&self, folder: &Path, name: &str, year: i32) -> TlsFiles {
        self.files_of(folder, name, Some(name), year)
    }

    /// Files of a process in `folder`, with a role or none.
    fn files_of(&self, folder: &Path, name: &str, role: Option<&str>, year: i32) -> TlsFiles {
        let key = KeyPair::generate().unwrap();
        let names = vec!["127.0.0.1".to_owned(), "localhost".to_owned()];
        let mut params = CertificateParams::new(names).unwrap();
        let uri =
            |role: &str| SanType::URI(format!("spiffe://duet/role/{role}").try_into().unwrap());
        params.subject_alt_names.extend(role.map(uri));
        params.not_before = date_time_ymd(2000, 1, 1);
        params.not_after = date_time_ymd(year, 1, 1);
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let put = |end: &str, text: String| {
            let path = folder.join(format!("{name}.{end}"));
            std::fs::write(&path, text).unwrap();
            path
        };
        TlsFiles {
            ca: put("ca", self.pem.clone()),
            certificate: put("crt", certificate.pem()),
            key: put("key", key.serialize_pem()),
        }
    }
}

/// Asks the health service; what went wrong, with all that lies under it.
async fn ask(url: &str, tls: Option<&TlsFiles>) -> Result<(), String> {
    let mut health = HealthClient::new(channel(url, tls).map_err(|error| error.to_string())?);
    let answer = health.check(HealthCheckRequest::default()).await;
    answer.map(drop).map_err(|status| format!("{status:?}"))
}

#[tokio::test]
async fn only_those_whom_the_authority_vouches_for_are_served() {
    let folder = tempfile::tempdir().unwrap();
    let (ours, theirs) = (Authority::new(), Authority::new());
    let coordinator = ours.files(folder.path(), "coordinator", 2100);
    let server = server("127.0.0.1:0", Some(&coordinator)).await.unwrap();
    let place = server.address();
    let stop = CancellationToken::new();
    let serving = tokio::spawn(server.serve(stop.clone()));
    let url = format!("https://{place}");

    let worker = ours.files(folder.path(), "reward", 2100);
    assert_eq!(ask(&url, Some(&worker)).await, Ok(()));

    // A stranger who trusts the server, but whom the server does not trust.
    let stranger = theirs.files_of(folder.path(), "stranger", Some("reward"), 2100);
    let stranger = TlsFiles { ca: coordinator.ca.clone(), ..stranger };
    assert!(ask(&url, Some(&stranger)).await.is_err());
    let expired = ours.files_of(folder.path(), "expired", Some("reward"), 2001);
    let reason = ask(&url, Some(&expired)).await.unwrap_err();
    assert!(reason.contains("expired.crt") && reason.contains("2001"), "{reason}");
    // Of the authority, but nobody in particular.
    let plain = ours.files_of(folder.path(), "plain", None, 2100);
    let reason = ask(&url, Some(&plain)).await.unwrap_err();
    assert!(reason.contains("PermissionDenied") && reason.contains("duet certs"), "{reason}");
    // One whom the server would trust, but who does not trust it.
    let wary = TlsFiles { ca: theirs.files(folder.path(), "wary", 2100).ca, ..worker.clone() };
    let reason = ask(&url, Some(&wary)).await.unwrap_err();
    assert!(reason.contains("UnknownIssuer") || reason.contains("certificate"), "{reason}");
    // Plaintext finds nobody to talk to.
    assert!(ask(&format!("http://{place}"), None).await.is_err());
    let reason = ask(&url, None).await.unwrap_err();
    assert!(reason.contains("security.ca"), "{reason}");
    assert_eq!(ask(&url, Some(&worker)).await, Ok(()), "the others did it no harm");

    stop.cancel();
    serving.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_worker_that_poses_as_the_coordinator_is_not_talked_to() {
    let folder = tempfile::tempdir().unwrap();
    let ours = Authority::new();
    let reward = ours.files(folder.path(), "reward", 2100);
    let error = server("127.0.0.1:0", Some(&reward)).await.err().unwrap().to_string();
    assert!(error.contains("reward.crt") && error.contains("coordinator"), "{error}");

    // A server that does not check itself, as an intruder's would not.
    let pem = |path: &Path| std::fs::read(path).unwrap();
    let identity = tonic::transport::Identity::from_pem(pem(&reward.certificate), pem(&reward.key));
    let tls = tonic::transport::ServerTlsConfig::new().identity(identity);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://{}", listener.local_addr().unwrap());
    let (_, health) = tonic_health::server::health_reporter();
    let builder = tonic::transport::Server::builder().tls_config(tls).unwrap().add_service(health);
    let incoming = tonic::transport::server::TcpIncoming::from(listener);
    let serving = tokio::spawn(builder.serve_with_incoming(incoming));
    let reason = ask(&url, Some(&reward)).await.unwrap_err();
    assert!(reason.contains("role `reward`, not the coordinator's"), "{reason}");
    serving.abort();
}

#[tokio::test]
async fn files_that_are_no_certificates_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let good = Authority::new().files_of(folder.path(), "good", Some("coordinator"), 2100);
    let swapped = TlsFiles { certificate: good.key.clone(), ..good.clone() };
    let error = server("127.0.0.1:0", Some(&swapped)).await.err().unwrap().to_string();
    assert!(error.contains("security.certificate") && error.contains("good.key"), "{error}");
    let missing = TlsFiles { key: folder.path().join("none.key"), ..good };
    let error = server("127.0.0.1:0", Some(&missing)).await.err().unwrap().to_string();
    assert!(error.contains("security.key") && error.contains("none.key"), "{error}");
}
