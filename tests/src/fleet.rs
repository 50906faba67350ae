//! A run whose processes the harness supervises itself: for faults that a launcher cannot have, such
//! as a coordinator that comes back somewhere else.

use crate::{DEADLINE, Run, root, wait_until};
use std::fs::OpenOptions;
use std::net::SocketAddr;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Instant;

/// The processes of a run.
pub struct Fleet<'a> {
    run: &'a Run,
    coordinator: Option<Child>,
    workers: Vec<(String, Child)>,
    /// Put before a worker's command: runs it in a network namespace.
    pub within: Vec<String>,
    /// Environment of every process.
    pub environment: Vec<(String, String)>,
}

/// The workers of `configs/test.toml`.
pub const WORKERS: [&str; 5] = ["rollout-0", "rollout-1", "reward-0", "trainer-0", "trainer-1"];

impl<'a> Fleet<'a> {
    /// No processes yet.
    pub fn new(run: &'a Run) -> Fleet<'a> {
        let (workers, within, environment) = Default::default();
        Fleet { run, coordinator: None, workers, within, environment }
    }

    fn spawn(&self, name: &str, mut command: Command) -> Child {
        let log = self.run.store.with_file_name(format!("{name}.log"));
        let log = OpenOptions::new().create(true).append(true).open(log).expect("a log");
        let twin = log.try_clone().expect("a log");
        // The pipe is held open by this process: if it dies, so do the children.
        command.env("DUET_EXIT_WITH_PARENT", "1").stdin(Stdio::piped());
        command.envs(self.environment.iter().cloned());
        command.stdout(log).stderr(twin).spawn().expect("it starts")
    }

    /// Starts a coordinator at `listen` and waits until it answers; its address.
    ///
    /// # Panics
    /// When it does not.
    pub fn coordinator(&mut self, listen: &str, resume: bool) -> SocketAddr {
        let ready = self.run.store.with_file_name("ready");
        drop(std::fs::remove_file(&ready));
        let mut command = self.run.program("duet-coordinator");
        command.arg("--config").arg(root().join("configs/test.toml")).args(self.run.overrides());
        command.args(["--listen", listen, "--ready-file"]).arg(&ready);
        if resume {
            command.arg("--resume");
        }
        let mut child = self.spawn("coordinator", command);
        wait_until("the coordinator", || {
            assert!(child.try_wait().expect("a status").is_none(), "{}", self.log("coordinator"));
            ready.is_file()
        });
        self.coordinator = Some(child);
        let text = std::fs::read_to_string(ready).expect("an address");
        text.trim().trim_start_matches("http://").parse().expect("an address")
    }

    /// Starts a worker.
    pub fn worker(&mut self, name: &str, coordinator: &str) {
        let program = match name.split('-').next() {
            Some("rollout") => "duet-rollout-worker",
            Some("reward") => "duet-reward-worker",
            _ => "duet-trainer",
        };
        let plain = self.run.program(program);
        let mut command = match self.within.split_first() {
            None => plain,
            Some((first, rest)) => {
                let mut command = Command::new(first);
                command.args(rest).arg(plain.get_program());
                command.current_dir(self.run.store.parent().expect("a folder"));
                command
            }
        };
        command.args(["run", "--config"]).arg(root().join("configs/test.toml"));
        command.args(self.run.overrides());
        command.args(["--coordinator", coordinator, "--id", name]);
        let child = self.spawn(name, command);
        self.workers.push((name.to_owned(), child));
    }

    /// Kills the coordinator.
    ///
    /// # Panics
    /// When there is none.
    pub fn kill_coordinator(&mut self) {
        let mut child = self.coordinator.take().expect("a coordinator");
        child.kill().expect("SIGKILL");
        child.wait().expect("its end");
    }

    /// Kills a worker for good.
    ///
    /// # Panics
    /// When there is none of this name.
    pub fn kill(&mut self, name: &str) {
        let at = self.workers.iter().position(|(n, _)| n == name).expect("a worker");
        let (_, mut child) = self.workers.remove(at);
        child.kill().expect("SIGKILL");
        child.wait().expect("its end");
    }

    /// Waits for a worker's end.
    ///
    /// # Panics
    /// When it does not come.
    pub fn left(&mut self, name: &str) -> ExitStatus {
        let at = self.workers.iter().position(|(n, _)| n == name).expect("a worker");
        let (_, mut child) = self.workers.remove(at);
        wait(&format!("{name} to leave"), &mut child)
    }

    /// Waits until the coordinator ends; how it ended.
    ///
    /// # Panics
    /// When it does not.
    pub fn ended(&mut self) -> ExitStatus {
        wait("the end of the run", self.coordinator.as_mut().expect("a coordinator"))
    }

    /// Fails with the coordinator's words when it has ended.
    ///
    /// # Panics
    /// When it has, or there is none.
    pub fn goes_on(&mut self) {
        let over = self.coordinator.as_mut().expect("a coordinator").try_wait();
        assert!(over.expect("a status").is_none(), "{}", self.log("coordinator"));
    }

    /// What a process said.
    pub fn log(&self, name: &str) -> String {
        let path = self.run.store.with_file_name(format!("{name}.log"));
        std::fs::read_to_string(path).unwrap_or_default()
    }
}

impl Drop for Fleet<'_> {
    fn drop(&mut self) {
        for (_, child) in &mut self.workers {
            drop(child.kill());
            drop(child.wait());
        }
        if let Some(child) = &mut self.coordinator {
            drop(child.kill());
            drop(child.wait());
        }
    }
}

fn wait(what: &str, child: &mut Child) -> ExitStatus {
    let until = Instant::now() + DEADLINE;
    loop {
        if let Some(status) = child.try_wait().expect("a status") {
            return status;
        }
        assert!(Instant::now() < until, "waited in vain for {what}");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}
