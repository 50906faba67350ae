//! What load balancers and `grpcurl` ask a server: the standard health and reflection services.

use duet_service::{channel, server};
use tokio_stream::StreamExt;
use tokio_util::sync::CancellationToken;
use tonic::Code;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
use tonic_reflection::pb::v1::{ServerReflectionRequest, ServiceResponse};

async fn start() -> (String, CancellationToken) {
    let server = server("127.0.0.1:0", None).await.unwrap();
    let url = format!("http://{}", server.address());
    let shutdown = CancellationToken::new();
    tokio::spawn(server.serve(shutdown.clone()));
    (url, shutdown)
}

fn about(service: &str) -> HealthCheckRequest {
    HealthCheckRequest { service: service.to_owned() }
}

#[tokio::test]
async fn health_serves_and_then_says_that_it_stops() {
    let (url, shutdown) = start().await;
    let mut health = HealthClient::new(channel(&url, None).unwrap());
    let unknown = health.check(about("duet.v1.Nothing")).await.unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound);

    let mut states = health.watch(about("")).await.unwrap().into_inner();
    let mut next = async || {
        let state: HealthCheckResponse = states.next().await.unwrap().unwrap();
        state.status()
    };
    assert_eq!(next().await, ServingStatus::Serving);
    shutdown.cancel();
    assert_eq!(next().await, ServingStatus::NotServing);
}

#[tokio::test]
async fn reflection_lists_duets_services() {
    let (url, _shutdown) = start().await;
    let mut reflection = ServerReflectionClient::new(channel(&url, None).unwrap());
    let request = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let answers = reflection.server_reflection_info(tokio_stream::once(request)).await.unwrap();
    let answer = answers.into_inner().next().await.unwrap().unwrap();
    let Some(MessageResponse::ListServicesResponse(list)) = answer.message_response else {
        panic!("no list: {answer:?}");
    };
    let names: Vec<String> =
        list.service.into_iter().map(|ServiceResponse { name }| name).collect();
    for name in ["ControlService", "StatusService", "WorkerService"] {
        assert!(names.contains(&format!("duet.v1.{name}")), "{names:?}");
    }
}
