//! Child processes: found beside this program, logged to a file, ended with it.
//!
//! A child's standard input is a pipe that only this process holds. It closes when this process ends,
//! however it ends, and the child takes that as the end of its life too: nothing is left running
//! behind a killed launcher.

use crate::CliError;
use duet_service::shutdown::EXIT_WITH_PARENT;
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use sysinfo::{Pid, ProcessRefreshKind, ProcessesToUpdate, System};
use tokio::process::{Child, Command};

/// How often the memory of all processes is added up.
const MEMORY_EVERY: Duration = Duration::from_millis(500);

/// Lines of a failed child's log that are shown.
const TAIL_LINES: usize = 12;

/// The program `name`, which lies beside this one.
///
/// # Errors
/// It does not.
pub fn program(name: &'static str) -> Result<PathBuf, CliError> {
    let own = std::env::current_exe().map_err(|e| CliError::io("find", Path::new("duet"), e))?;
    let folder = own.parent().unwrap_or(Path::new(".")).to_owned();
    let path = folder.join(name);
    if path.is_file() { Ok(path) } else { Err(CliError::NoProgram { name, folder }) }
}

/// Runs a program in the foreground with the terminal's input and output; its exit code.
///
/// # Errors
/// It cannot be found or started.
pub async fn pass(name: &'static str, verb: &str, rest: &[String]) -> Result<u8, CliError> {
    let path = program(name)?;
    let status = Command::new(&path).arg(verb).args(rest).status().await;
    let status = status.map_err(|e| CliError::io("start", &path, e))?;
    if let Some(signal) = std::os::unix::process::ExitStatusExt::signal(&status) {
        // It could not say so itself.
        eprintln!("{} {name} {verb} was ended by signal {signal}", crate::show::red("error:"));
    }
    Ok(code(&status))
}

/// A child with its log.
pub struct Logged {
    /// What to call it.
    pub name: String,
    /// Its log.
    pub log: PathBuf,
    child: Child,
}

impl Logged {
    /// Starts `name` with its output going to the end of `log`.
    ///
    /// # Errors
    /// The log cannot be opened, or the program not started.
    pub fn start<S: AsRef<OsStr>>(
        name: &str,
        path: &Path,
        args: &[S],
        log: PathBuf,
        memory: &Memory,
    ) -> Result<Logged, CliError> {
        let open = std::fs::OpenOptions::new().create(true).append(true).open(&log);
        let file = open.map_err(|e| CliError::io("open", &log, e))?;
        let twin = file.try_clone().map_err(|e| CliError::io("open", &log, e))?;
        let child = Command::new(path)
            .args(args)
            .env(EXIT_WITH_PARENT, "1")
            .stdin(Stdio::piped())
            .stdout(file)
            .stderr(twin)
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(|e| CliError::io("start", path, e))?;
        memory.watch(name, child.id());
        Ok(Logged { name: name.to_owned(), log, child })
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// The system cannot tell.
    pub async fn wait(&mut self) -> Result<ExitStatus, CliError> {
        self.child.wait().await.map_err(|e| CliError::io("wait for", &self.log, e))
    }

    /// Whether it has ended, without waiting.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Kills it and waits.
    pub async fn kill(&mut self) {
        if let Err(error) = self.child.kill().await {
            tracing::debug!(name = self.name, %error, "already gone");
        }
    }

    /// The error that its failure is.
    pub fn failure(&self, status: ExitStatus) -> CliError {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
        let tail = &lines[lines.len().saturating_sub(TAIL_LINES)..];
        let tail = tail.iter().map(|line| format!("\n  | {line}")).collect();
        CliError::Child {
            name: self.name.clone(),
            status: status.to_string(),
            log: self.log.clone(),
            tail,
            code: code(&status),
        }
    }
}

/// An exit status as an exit code; a signal is a failure.
pub fn code(status: &ExitStatus) -> u8 {
    status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1)
}

/// The peak of the resident memory of all children and this process together.
#[derive(Clone, Default)]
pub struct Memory {
    pids: Arc<Mutex<BTreeMap<String, u32>>>,
    peak: Arc<AtomicU64>,
}

impl Memory {
    /// Starts adding up, until the last handle is dropped.
    pub fn start() -> Memory {
        let memory = Memory::default();
        let (pids, peak) = (Arc::downgrade(&memory.pids), Arc::clone(&memory.peak));
        tokio::spawn(async move {
            let Ok(mut system) = System::new() else { return };
            while let Some(pids) = pids.upgrade() {
                let mut list: Vec<Pid> = vec![Pid::from_u32(std::process::id())];
                if let Ok(pids) = pids.lock() {
                    list.extend(pids.values().map(|pid| Pid::from_u32(*pid)));
                }
                drop(pids);
                let what = ProcessRefreshKind::nothing().with_memory();
                system.refresh_processes_specifics(ProcessesToUpdate::Some(&list), true, what);
                let sum = list.iter().filter_map(|p| system.process(*p)).map(|p| p.memory()).sum();
                peak.fetch_max(sum, Ordering::Relaxed);
                tokio::time::sleep(MEMORY_EVERY).await;
            }
        });
        memory
    }

    fn watch(&self, name: &str, pid: Option<u32>) {
        if let (Ok(mut pids), Some(pid)) = (self.pids.lock(), pid) {
            pids.insert(name.to_owned(), pid);
        }
    }

    /// The peak so far, in MiB. Memory that processes share is counted for each of them.
    pub fn peak_mib(&self) -> f64 {
        self.peak.load(Ordering::Relaxed) as f64 / f64::from(1 << 20)
    }
}
