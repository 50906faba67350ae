//! Processes of a run, found and signalled by name.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::path::Path;

pub use nix::sys::signal::Signal as Kind;

/// The process of the run in `store` that is called so: `coordinator`, `rollout-0`, `trainer-1`.
pub fn find(store: &Path, name: &str) -> Option<i32> {
    let entries = std::fs::read_dir("/proc").ok()?;
    let pids = entries.flatten().filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|pid| is(*pid, store, name)).max()
}

fn is(pid: i32, store: &Path, name: &str) -> bool {
    let Ok(bytes) = std::fs::read(format!("/proc/{pid}/cmdline")) else { return false };
    let line = String::from_utf8_lossy(&bytes);
    let words: Vec<&str> = line.split('\0').collect();
    let program = words.first().and_then(|path| path.rsplit('/').next()).unwrap_or_default();
    let of_run = line.contains(&format!("\"{}\"", store.display()));
    let named = match name {
        "coordinator" => program == "duet-coordinator",
        worker => words.windows(2).any(|pair| pair == ["--id", worker]),
    };
    of_run && named && program.starts_with("duet-")
}

/// Sends a signal to a process of a run.
///
/// # Panics
/// When there is no such process.
pub fn send(store: &Path, name: &str, signal: Signal) -> i32 {
    let pid = find(store, name).unwrap_or_else(|| panic!("{name} does not run"));
    // It may have ended since; then there is nothing to signal.
    kill(Pid::from_raw(pid), signal).ok();
    pid
}

/// Sends a signal to a process by number.
pub fn send_to(pid: u32, signal: Signal) {
    kill(Pid::from_raw(pid as i32), signal).ok();
}
