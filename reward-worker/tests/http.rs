//! The scorer behind HTTP, against a real server.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use duet_config::HttpScorer;
use duet_core::work::{LeafScores, PromptRow, Score};
use duet_reward_worker::http::Remote;
use duet_reward_worker::scorer::{Job, Panel, Scorer};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;
use tch::Tensor;

/// A request as it came.
struct Asked {
    head: String,
    body: Value,
}

/// A server that gives these answers, one a connection, and tells what it was asked.
fn server(answers: Vec<(u16, String)>) -> (String, Receiver<Asked>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/score", listener.local_addr().unwrap());
    let (tell, told) = channel();
    thread::spawn(move || {
        for (status, body) in answers {
            let (mut stream, _) = listener.accept().unwrap();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            let (mut head, mut line) = (String::new(), String::new());
            while reader.read_line(&mut line).unwrap() > 2 {
                head += &line.to_lowercase();
                line.clear();
            }
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
            let mut content = vec![0; length.unwrap().trim().parse().unwrap()];
            reader.read_exact(&mut content).unwrap();
            let _ = tell.send(Asked { head, body: serde_json::from_slice(&content).unwrap() });
            let length = body.len();
            write!(
                stream,
                "HTTP/1.1 {status} x\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}"
            )
            .unwrap();
        }
    });
    (url, told)
}

fn settings(url: &str) -> HttpScorer {
    HttpScorer {
        url: url.to_owned(),
        components: vec!["beauty".to_owned(), "match".to_owned()],
        refined: vec!["match".to_owned()],
        token_env: None,
    }
}

fn remote(url: &str) -> Remote {
    Remote::new(&settings(url), Duration::from_secs(20)).unwrap()
}

fn job() -> Job {
    let images = Tensor::arange(2 * 4 * 6 * 3, (tch::Kind::Uint8, tch::Device::Cpu));
    let prompt = PromptRow { row: 3, text: "five".to_owned(), meta: r#"{"digit":5}"#.to_owned() };
    Job { prompt, refined_prompt: "A red 5.".to_owned(), images: images.view([2, 4, 6, 3]) }
}

fn failed(scores: &LeafScores, component: &str) -> String {
    match &scores[component] {
        Score::Failed(reason) => reason.clone(),
        other => panic!("{component} is {other:?}"),
    }
}

#[test]
fn a_server_is_told_all_and_its_scores_are_taken() {
    let answer = json!({
        "scores": [{"beauty": 0.25, "match": 1}, {"beauty": null}],
        "errors": {"beauty": "too dark"},
    });
    let (url, told) = server(vec![(200, answer.to_string())]);
    let scores = remote(&url).score(&job()).unwrap();
    assert_eq!(scores[0]["beauty"], Score::Scored(0.25));
    assert_eq!(scores[0]["match"], Score::Scored(1.0));
    assert_eq!(failed(&scores[1], "beauty"), "too dark");
    assert_eq!(failed(&scores[1], "match"), "the scorer left it out");
    let body = told.recv().unwrap().body;
    assert_eq!(body["components"], json!({"beauty": "five", "match": "A red 5."}));
    assert_eq!((&body["prompt"], &body["refined_prompt"]), (&json!("five"), &json!("A red 5.")));
    assert_eq!(body["meta"], json!({"digit": 5}));
    let png = STANDARD.decode(body["images"][1].as_str().unwrap()).unwrap();
    let image = image::load_from_memory(&png).unwrap().to_rgb8();
    let expected: Vec<u8> = (72..144).collect();
    assert_eq!((image.dimensions(), image.into_raw()), ((6, 4), expected));
}

#[test]
fn an_overloaded_server_is_asked_again_and_one_that_refuses_is_not() {
    let good =
        json!({"scores": [{"beauty": 1, "match": 1}, {"beauty": 0, "match": 0}]}).to_string();
    let (url, told) = server(vec![(503, "busy".into()), (429, String::new()), (200, good)]);
    assert_eq!(remote(&url).score(&job()).unwrap()[1]["match"], Score::Scored(0.0));
    assert_eq!(told.iter().count(), 3);
    let (url, told) = server(vec![(400, "no such component".into())]);
    let reason = remote(&url).score(&job()).unwrap_err();
    assert!(reason.contains("400") && reason.contains("no such component"), "{reason}");
    assert_eq!(told.iter().count(), 1);
}

#[test]
fn nonsense_is_never_a_number() {
    for (answer, expected) in [
        ("not JSON", "not understood"),
        (r#"{"scores": [{"beauty": "high"}]}"#, "not understood"),
        (r#"{"scores": [{"beauty": 1, "match": 1}]}"#, "1 answers for 2 images"),
    ] {
        let (url, _told) = server(vec![(200, answer.to_owned())]);
        let mut panel = Panel::new(vec![Box::new(remote(&url))]).unwrap();
        let scores = panel.score(&job());
        assert_eq!(scores.len(), 2);
        let reason = failed(&scores[1], "match");
        assert!(reason.contains(expected), "{reason}");
    }
}

#[test]
fn a_server_that_is_not_there_is_named_without_its_credentials() {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let url = format!("http://me:secret@127.0.0.1:{port}/score?key=hidden");
    let mut remote = Remote::new(&settings(&url), Duration::from_millis(150)).unwrap();
    let reason = remote.score(&job()).unwrap_err();
    assert!(reason.contains("cannot be asked"), "{reason}");
    assert!(!reason.contains("secret") && !reason.contains("hidden"), "{reason}");
}

#[test]
fn a_token_comes_from_the_environment() {
    let (url, told) = server(vec![(200, json!({"scores": [{}, {}]}).to_string())]);
    // Every process of `cargo test` has this one.
    let with = HttpScorer { token_env: Some("CARGO_PKG_NAME".to_owned()), ..settings(&url) };
    let limit = Duration::from_secs(20);
    Remote::new(&with, limit).unwrap().score(&job()).unwrap();
    let head = told.recv().unwrap().head;
    assert!(head.contains("authorization: bearer duet-reward-worker"), "{head}");
    let without = HttpScorer { token_env: Some("NO_SUCH_TOKEN".to_owned()), ..settings(&url) };
    let reason = Remote::new(&without, limit).unwrap_err().to_string();
    assert!(reason.contains("NO_SUCH_TOKEN"), "{reason}");
}
