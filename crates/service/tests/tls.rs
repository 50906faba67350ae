//! Mutual TLS between a real server and real clients: who is let in, and what the others are told.

use duet_service::channel::channel;
use duet_service::server::server;
use duet_service::tls::TlsFiles;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, date_time_ymd};
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

    /// Files of a process in `folder`, trusted until `year`.
    fn files(&self, folder: &Path, name: &str, year: i32) -> TlsFiles {
        let key = KeyPair::generate().unwrap();
        let names = vec!["127.0.0.1".to_owned(), "localhost".to_owned()];
        let mut params = CertificateParams::new(names).unwrap();
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

    let worker = ours.files(folder.path(), "worker", 2100);
    assert_eq!(ask(&url, Some(&worker)).await, Ok(()));

    // A stranger who trusts the server, but whom the server does not trust.
    let stranger = theirs.files(folder.path(), "stranger", 2100);
    let stranger = TlsFiles { ca: coordinator.ca.clone(), ..stranger };
    assert!(ask(&url, Some(&stranger)).await.is_err());
    let expired = ours.files(folder.path(), "expired", 2001);
    assert!(ask(&url, Some(&expired)).await.is_err());
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
async fn files_that_are_no_certificates_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let good = Authority::new().files(folder.path(), "good", 2100);
    let swapped = TlsFiles { certificate: good.key.clone(), ..good.clone() };
    let error = server("127.0.0.1:0", Some(&swapped)).await.err().unwrap().to_string();
    assert!(error.contains("security.certificate") && error.contains("good.key"), "{error}");
    let missing = TlsFiles { key: folder.path().join("none.key"), ..good };
    let error = server("127.0.0.1:0", Some(&missing)).await.err().unwrap().to_string();
    assert!(error.contains("security.key") && error.contains("none.key"), "{error}");
}
