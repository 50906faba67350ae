//! How a run is shown while it runs: bars on a terminal, lines elsewhere.

use crate::client::Run;
use crate::show::{dim, span};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// Longest silence where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(15);

/// Shows a run.
pub struct Progress {
    bars: Option<Bars>,
    said: Option<(Instant, u64)>,
    last_error: String,
}

struct Bars {
    all: MultiProgress,
    iterations: ProgressBar,
    trees: ProgressBar,
    rewards: ProgressBar,
}

impl Progress {
    /// Nothing shown yet.
    pub fn new() -> Progress {
        let bars = std::io::stderr().is_terminal().then(Bars::new);
        Progress { bars, said: None, last_error: String::new() }
    }

    /// Shows the run as it is now.
    pub fn show(&mut self, run: &Run) {
        if run.last_error != self.last_error && !run.last_error.is_empty() {
            self.last_error.clone_from(&run.last_error);
            self.say(&format!("  {} {}", dim("note:"), run.last_error));
        }
        match &self.bars {
            Some(bars) => bars.show(run),
            None => self.line(run),
        }
    }

    /// Prints a line between the bars.
    pub fn say(&self, text: &str) {
        match &self.bars {
            Some(bars) => bars.all.suspend(|| eprintln!("{text}")),
            None => eprintln!("{text}"),
        }
    }

    /// Takes the bars away.
    pub fn finish(&self) {
        if let Some(bars) = &self.bars {
            bars.iterations.finish_and_clear();
            bars.trees.finish_and_clear();
            bars.rewards.finish_and_clear();
        }
    }

    fn line(&mut self, run: &Run) {
        let due = match self.said {
            None => true,
            Some((at, version)) => {
                let tenth = u64::from(run.iterations).div_ceil(10).max(1);
                version / tenth != run.version / tenth
                    || (version != run.version && at.elapsed() > LINE_EVERY)
            }
        };
        if due {
            self.said = Some((Instant::now(), run.version));
            let eta = run.eta_seconds.map_or_else(String::new, |s| format!("  {} to go", span(s)));
            eprintln!("  iteration {}/{}  {}{eta}", run.version, run.iterations, rewards(run));
        }
    }
}

impl Default for Progress {
    fn default() -> Self {
        Progress::new()
    }
}

impl Bars {
    fn new() -> Bars {
        let all = MultiProgress::new();
        let style = |template: &str| {
            ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
        };
        let add = |style: ProgressStyle| all.add(ProgressBar::new(1).with_style(style));
        let iterations =
            add(style("  iterations {bar:36.cyan/dim} {pos:>4}/{len:<4} {elapsed_precise} {msg}")
                .progress_chars("━━─"));
        let trees = add(style("  trees      {msg}"));
        let rewards = add(style("  rewards    {msg}"));
        Bars { all, iterations, trees, rewards }
    }

    fn show(&self, run: &Run) {
        self.iterations.set_length(u64::from(run.iterations));
        self.iterations.set_position(run.version);
        let eta = run.eta_seconds.map_or_else(String::new, |s| format!("{} to go", span(s)));
        self.iterations.set_message(eta);
        let flying: Vec<String> = ["thinking", "rendering", "scoring", "ready"]
            .iter()
            .map(|state| format!("{:>2} {state}", run.trees.get(*state).copied().unwrap_or(0)))
            .collect();
        self.trees.set_message(format!(
            "{}   {:>5} images, {:.1} a second",
            flying.join("  "),
            run.images,
            run.images_per_second
        ));
        self.rewards.set_message(rewards(run));
    }
}

fn rewards(run: &Run) -> String {
    let named =
        |name: &str, label: &str| run.rewards.get(name).map(|value| format!("{label} {value:.3}"));
    let branches = [named("llm", "LLM"), named("dit", "DiT")];
    let components = run
        .rewards
        .iter()
        .filter(|(name, _)| *name != "llm" && *name != "dit")
        .map(|(name, value)| format!("{name} {value:.3}"));
    let parts: Vec<String> = branches.into_iter().flatten().chain(components).collect();
    if parts.is_empty() { "none yet".to_owned() } else { parts.join("  ") }
}
