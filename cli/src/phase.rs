//! A phase of a longer undertaking: a child process with a log, whose last line is shown meanwhile.

use crate::CliError;
use crate::children::{Logged, Memory, program};
use crate::show::{bold, dim, span};
use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How often the last line of the log is shown.
const LOOK: Duration = Duration::from_millis(200);

/// What is to be done.
pub struct Phase<'a> {
    /// What to call the process.
    pub name: &'a str,
    /// What it makes, for people.
    pub what: &'a str,
    /// Its log.
    pub log: PathBuf,
    /// The command that goes on after an interruption.
    pub again: &'a str,
    /// Counts its memory.
    pub memory: &'a Memory,
}

impl Phase<'_> {
    /// Runs it to its end; how long it took, in seconds.
    ///
    /// # Errors
    /// It failed, or a person interrupted it.
    pub async fn run<S: AsRef<str>>(
        &self,
        binary: &'static str,
        args: &[S],
    ) -> Result<f64, CliError> {
        let started = Instant::now();
        let args: Vec<&str> = args.iter().map(AsRef::as_ref).collect();
        let path = program(binary)?;
        let mut child = Logged::start(self.name, &path, &args, self.log.clone(), self.memory)?;
        let bar = spinner(self.what);
        let status = loop {
            tokio::select! {
                status = child.wait() => break status?,
                () = tokio::time::sleep(LOOK) => bar.set_message(last_line(&self.log)),
                _ = tokio::signal::ctrl_c() => {
                    bar.finish_and_clear();
                    let (what, again) = (self.what, self.again);
                    return Err(CliError::Usage(format!("interrupted while making: {what}; go on with: {again}")));
                }
            }
        };
        bar.finish_and_clear();
        if !status.success() {
            return Err(child.failure(status));
        }
        let seconds = started.elapsed().as_secs_f64();
        eprintln!("{} {} {}", bold("done"), self.what, dim(&format!("({})", span(seconds))));
        Ok(seconds)
    }
}

fn spinner(what: &str) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        eprintln!("making: {what}");
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{spinner:.cyan} {prefix} {elapsed} {wide_msg:.dim}");
    let style = style.unwrap_or_else(|_| ProgressStyle::default_spinner());
    let bar = ProgressBar::new_spinner().with_style(style).with_prefix(what.to_owned());
    bar.enable_steady_tick(LOOK);
    bar
}

fn last_line(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default().to_owned()
}
