//! The table of calls against the descriptors of the services and the page of the documentation, and
//! what a server does with those who ask too much.

use duet_service::access::{Role, Shown, allowed, table};
use duet_service::channel::{channel, status_client};
use duet_service::metrics::{Metrics, table::Place};
use duet_service::server::{Limits, server_with};
use prost::Message;
use prost_types::FileDescriptorSet;
use std::collections::BTreeSet;
use tokio_util::sync::CancellationToken;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

/// Paths of all calls of a descriptor set.
fn calls(descriptors: &[u8]) -> BTreeSet<String> {
    let set = FileDescriptorSet::decode(descriptors).unwrap();
    let mut paths = BTreeSet::new();
    for file in &set.file {
        for service in &file.service {
            for method in &service.method {
                let (service, method) = (service.name(), method.name());
                paths.insert(format!("/{}.{service}/{method}", file.package()));
            }
        }
    }
    paths
}

#[test]
fn every_call_of_every_service_stands_in_the_table_and_no_other() {
    let mut served = calls(duet_proto::FILE_DESCRIPTOR_SET);
    assert!(served.len() >= 12, "{served:?}");
    served.extend(calls(tonic_health::pb::FILE_DESCRIPTOR_SET));
    served.extend(calls(tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET));
    served.extend(calls(tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET));
    let table: BTreeSet<String> = table::CALLS.iter().map(|c| c.path.to_owned()).collect();
    assert_eq!(table, served);
    assert_eq!(table.len(), table::CALLS.len(), "a call stands twice");
}

#[test]
fn only_who_stands_in_the_table_may_call() {
    for call in table::CALLS {
        assert!(!call.roles.is_empty(), "{}", call.path);
        for role in Role::ALL {
            let answer = allowed(&Shown::Role(role), call.path);
            assert_eq!(answer.is_ok(), call.roles.contains(&role), "{role} {}", call.path);
            if let Err(status) = answer {
                assert_eq!(status.code(), tonic::Code::PermissionDenied);
                for word in [role.as_str(), call.path, "duet certs"] {
                    assert!(status.message().contains(word), "{}", status.message());
                }
            }
        }
        assert!(allowed(&Shown::NoRole("no URI".to_owned()), call.path).is_err());
    }
    for role in Role::ALL {
        assert!(allowed(&Shown::Role(role), "/duet.v1.ControlService/Explode").is_err());
        let changes = ["Pause", "Resume", "Stop"];
        for change in changes.map(|method| format!("/duet.v1.ControlService/{method}")) {
            assert_eq!(allowed(&Shown::Role(role), &change).is_ok(), role == Role::Operator);
        }
    }
}

#[test]
fn the_table_in_the_documentation_is_this_one() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/security.md");
    let page = std::fs::read_to_string(path).unwrap();
    assert!(page.contains(&table::page()), "docs/security.md wants:\n{}", table::page());
}

#[tokio::test]
async fn who_asks_too_often_is_told_when_to_come_again() {
    let limits = Limits { requests_per_second: 3, ..Limits::default() };
    let metrics = Metrics::new(Place::Coordinator);
    let server = server_with("127.0.0.1:0", None, limits, metrics.clone()).await.unwrap();
    let url = format!("http://{}", server.address());
    let stop = CancellationToken::new();
    let serving = tokio::spawn(server.serve(stop.clone()));
    let mut health = HealthClient::new(channel(&url, None).unwrap());
    // However slowly the first few go: a hundred in a row are too many for three a second, unless
    // they take half a minute.
    let mut refused = 0;
    for _ in 0..100 {
        if let Err(status) = health.check(HealthCheckRequest::default()).await {
            assert_eq!(status.code(), tonic::Code::ResourceExhausted);
            let hint = status.metadata().get("grpc-retry-pushback-ms").unwrap();
            assert!((1..=334).contains(&hint.to_str().unwrap().parse::<u32>().unwrap()));
            refused += 1;
        }
    }
    assert!(refused > 0);
    let counted = format!("duet_refused_total{{reason=\"rate\"}} {refused}");
    assert!(metrics.text().contains(&counted), "{}", metrics.text());
    stop.cancel();
    serving.await.unwrap().unwrap();
}

#[tokio::test]
async fn connections_beyond_the_limit_are_closed_and_places_come_back() {
    let limits = Limits { connections: 1, ..Limits::default() };
    let metrics = Metrics::new(Place::Coordinator);
    let server = server_with("127.0.0.1:0", None, limits, metrics.clone()).await.unwrap();
    let (place, url) = (server.address(), format!("http://{}", server.address()));
    let stop = CancellationToken::new();
    let serving = tokio::spawn(server.serve(stop.clone()));
    let first = channel(&url, None).unwrap();
    HealthClient::new(first.clone()).check(HealthCheckRequest::default()).await.unwrap();
    // Closed without a word.
    let mut second = tokio::net::TcpStream::connect(place).await.unwrap();
    let mut byte = [0];
    let read = tokio::io::AsyncReadExt::read(&mut second, &mut byte).await;
    assert!(matches!(read, Ok(0) | Err(_)), "{read:?}");
    assert!(metrics.text().contains("duet_refused_total{reason=\"connections\"} 1"));
    drop(first);
    let again = async {
        loop {
            let mut health = HealthClient::new(channel(&url, None).unwrap());
            if health.check(HealthCheckRequest::default()).await.is_ok() {
                return;
            }
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(30), again).await.unwrap();
    stop.cancel();
    serving.await.unwrap().unwrap();
}

#[tokio::test]
async fn headers_without_end_are_not_taken() {
    let server = duet_service::server("127.0.0.1:0", None).await.unwrap();
    let url = format!("http://{}", server.address());
    let stop = CancellationToken::new();
    let serving = tokio::spawn(server.serve(stop.clone()));
    let mut status = status_client(channel(&url, None).unwrap());
    let mut request = tonic::Request::new(duet_proto::v1::GetRequest {});
    request.metadata_mut().insert("x-long", "a".repeat(64 << 10).parse().unwrap());
    let answer = status.get(request).await.unwrap_err();
    assert_ne!(
        answer.code(),
        tonic::Code::Unimplemented,
        "it must not reach the services: {answer}"
    );
    stop.cancel();
    serving.await.unwrap().unwrap();
}
