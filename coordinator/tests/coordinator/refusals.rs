//! What a coordinator refuses to start with: the message names the thing, the exit code its class,
//! and nothing is changed.

use crate::common::process::{configure, output, start};
use crate::common::within;
use std::process::Output;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn assert_refused(output: &Output, code: i32, words: &str) {
    let said = said(output);
    assert_eq!(output.status.code(), Some(code), "{said}");
    assert!(said.contains(words), "`{words}` is not in: {said}");
}

#[tokio::test]
async fn wrong_configurations_name_the_key() {
    let folder = tempfile::tempdir().unwrap();
    let config = configure(folder.path(), 1);
    let zero = output(&config, &["--set", "run.iterations=0"]).await;
    assert_refused(&zero, 78, "run.iterations");
    assert_refused(&output(&folder.path().join("none.toml"), &[]).await, 78, "none.toml");
    assert_refused(&output(&config, &["--no-such-flag"]).await, 64, "--no-such-flag");
    let open = output(&config, &["--listen", "0.0.0.0:0"]).await;
    assert_refused(&open, 78, "duet certs");
    let url = output(&config, &["--set", "run.store=gopher://host/run"]).await;
    assert_refused(&url, 78, "gopher");
    assert!(!folder.path().join("store").exists());
}

#[tokio::test]
async fn broken_prompts_name_file_and_line() {
    let folder = tempfile::tempdir().unwrap();
    let config = configure(folder.path(), 1);
    let prompts = folder.path().join("prompts.jsonl");
    std::fs::write(&prompts, "{\"prompt\": \"a\"}\nnonsense\n").unwrap();
    assert_refused(&output(&config, &[]).await, 78, "prompts.jsonl, line 2");
    std::fs::write(&prompts, "").unwrap();
    assert_refused(&output(&config, &[]).await, 78, "has no prompts");
    std::fs::write(&prompts, "{\"prompt\": \"only one\"}\n").unwrap();
    assert_refused(&output(&config, &[]).await, 78, "prompts_per_iteration");
    std::fs::remove_file(&prompts).unwrap();
    assert_refused(&output(&config, &[]).await, 78, "prompts.jsonl");
}

#[tokio::test]
async fn a_busy_port_and_an_occupied_store_are_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let config = configure(folder.path(), 1);
    let (mut first, url) = start(&config, &[]).await;
    let port = url.trim_start_matches("http://");
    assert_refused(&output(&config, &["--resume", "--listen", port]).await, 74, port);
    assert_refused(&output(&config, &[]).await, 78, "--resume");
    let other = output(&config, &["--resume", "--set", "run.seed=2"]).await;
    assert_refused(&other, 78, "configuration differs");
    // None of them took the journal over: the first one can still write.
    assert_eq!(crate::common::status(&url).await.generation, 1);
    let mut control = duet_service::channel::control_client(crate::common::connect(&url));
    control.stop(duet_proto::v1::StopRequest { reason: "test".to_owned() }).await.unwrap();
    assert!(within("the end", first.wait()).await.unwrap().success());
}

#[tokio::test]
async fn a_folder_that_cannot_be_written_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let config = configure(folder.path(), 1);
    std::fs::write(folder.path().join("store"), "a file where a folder should be").unwrap();
    assert_refused(&output(&config, &[]).await, 78, "store");
}

#[tokio::test]
async fn reflection_and_health_list_the_services() {
    let folder = tempfile::tempdir().unwrap();
    let config = configure(folder.path(), 1);
    let (_child, url) = start(&config, &[]).await;
    let channel = crate::common::connect(&url);
    let request = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let answers = ServerReflectionClient::new(channel.clone())
        .server_reflection_info(tokio_stream::once(request))
        .await
        .unwrap();
    let answer = answers.into_inner().message().await.unwrap().unwrap().message_response;
    let Some(MessageResponse::ListServicesResponse(list)) = answer else { panic!("{answer:?}") };
    let names: Vec<&str> = list.service.iter().map(|s| s.name.as_str()).collect();
    for service in ["WorkerService", "StatusService", "ControlService"] {
        let service = format!("duet.v1.{service}");
        assert!(names.contains(&service.as_str()), "{names:?}");
        let check = HealthCheckRequest { service };
        let health = HealthClient::new(channel.clone()).check(check).await.unwrap();
        assert_eq!(health.into_inner().status, 1, "serving");
    }
}
