//! The real program as a child process.

use super::within;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::Duration;
use tokio::process::{Child, Command};

/// A configuration file for the real program, with everything it names, in `folder`.
pub fn configure(folder: &Path, iterations: u32) -> PathBuf {
    let prompts: String = (0..5).map(|row| format!("{{\"prompt\": \"prompt {row}\"}}\n")).collect();
    std::fs::write(folder.join("prompts.jsonl"), prompts).unwrap();
    let text = format!(
        r#"
[run]
name = "test"
iterations = {iterations}
store = "{0}/store"
[model]
path = "{0}/model"
[data]
prompts = "{0}/prompts.jsonl"
[rollout]
prompts_per_iteration = 2
traces = 2
images_per_trace = 2
[reward.llm]
semantic = 1.0
[reward.dit]
semantic = 1.0
[trainer]
world_size = 2
[coordinator]
heartbeat_ms = 50
poll_ms = 200
backoff_ms = 10
[checkpoint]
every = 2
"#,
        folder.display()
    );
    let path = folder.join("run.toml");
    std::fs::write(&path, text).unwrap();
    path
}

fn command(config: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_duet-coordinator"));
    command.arg("--config").arg(config).kill_on_drop(true).env("DUET_LOG", "info");
    command
}

/// Runs the program to its end.
pub async fn output(config: &Path, arguments: &[&str]) -> Output {
    let mut command = command(config);
    command.args(arguments);
    within("the end of the program", command.output()).await.unwrap()
}

/// Starts the program and waits until it listens; the process and its address.
pub async fn start(config: &Path, arguments: &[&str]) -> (Child, String) {
    start_into(config, arguments, "text", Stdio::inherit()).await
}

/// As [`start`], with its log going elsewhere, as JSON.
pub async fn start_logged(config: &Path, arguments: &[&str], log: &Path) -> (Child, String) {
    start_into(config, arguments, "json", std::fs::File::create(log).unwrap().into()).await
}

async fn start_into(
    config: &Path,
    arguments: &[&str],
    format: &str,
    log: Stdio,
) -> (Child, String) {
    let ready = config.with_extension("addr");
    drop(std::fs::remove_file(&ready));
    let mut command = command(config);
    command.arg("--ready-file").arg(&ready).args(arguments);
    command.env("DUET_LOG_FORMAT", format).stderr(log);
    let mut child = command.spawn().unwrap();
    let url = async {
        loop {
            if let Ok(url) = std::fs::read_to_string(&ready) {
                return url.trim().to_owned();
            }
            if let Some(status) = child.try_wait().unwrap() {
                panic!("the coordinator ended before it listened: {status}");
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let url = within("the coordinator's address", url).await;
    (child, url)
}
