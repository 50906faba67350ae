//! `duet status`: a run for a person, for a program, or on the screen until it is over.

use crate::CliError;
use crate::args::StatusArgs;
use crate::client::{Client, Run, environment_tls, environment_trusts, resolve};
use crate::show::{size, span};
use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{Cell, CellAlignment, Table};
use std::fmt::Write;
use std::io::IsTerminal;
use std::time::Duration;

/// How often a watched status changes at most.
const EVERY: Duration = Duration::from_millis(500);

/// `duet status`.
///
/// # Errors
/// No coordinator answers.
pub async fn run(args: StatusArgs) -> Result<(), CliError> {
    let address = resolve(args.address.address.as_deref())?;
    let client =
        Client::connect(&address, environment_tls().as_ref(), environment_trusts()).await?;
    if !args.watch {
        show(&client.get().await?, args.json);
        return Ok(());
    }
    let mut stream = client.watch(EVERY).await?;
    while let Some(run) = Client::next(&mut stream).await {
        if std::io::stdout().is_terminal() && !args.json {
            // Clear the screen and start at its top: a whole page each time, no flicker of old lines.
            print!("\x1b[2J\x1b[H");
        }
        show(&run, args.json);
        if run.over() {
            break;
        }
    }
    Ok(())
}

fn show(run: &Run, json: bool) {
    if json {
        // Plain data with string keys always has a JSON form.
        println!("{}", serde_json::to_string(run).unwrap_or_default());
    } else {
        print!("{}", page(run));
    }
}

/// A run as a page of text.
pub fn page(run: &Run) -> String {
    let mut text = String::new();
    let bar = bar(run.version, u64::from(run.iterations), 30);
    let eta = run.eta_seconds.map_or_else(String::new, |s| format!(", {} to go", span(s)));
    let _ = writeln!(
        text,
        "{}  {}  {bar}  {}/{} iterations{eta}",
        run.run, run.state, run.version, run.iterations
    );
    let trees: Vec<String> = run
        .trees
        .iter()
        .filter(|(_, n)| **n > 0)
        .map(|(state, n)| format!("{n} {state}"))
        .collect();
    let _ = writeln!(text, "trees    {}", or_none(&trees.join(", ")));
    let _ = writeln!(text, "images   {} ({:.1} a second)", run.images, run.images_per_second);
    let rewards: Vec<String> =
        run.rewards.iter().map(|(name, v)| format!("{name} {v:.3}")).collect();
    let _ = writeln!(text, "rewards  {}", or_none(&rewards.join("   ")));
    let checkpoint = run.checkpoint.map_or_else(|| "none yet".to_owned(), |v| format!("v{v}"));
    let _ = writeln!(
        text,
        "policy   v{}, checkpoint {checkpoint}, generation {}",
        run.version, run.generation
    );
    if let Some(weights) = &run.publication {
        let _ = writeln!(
            text,
            "weights  v{} with {} of {} rollout workers, {}, {:.1} s for the slowest",
            weights.version,
            weights.workers,
            run.workers.iter().filter(|worker| worker.role == "rollout").count(),
            size(weights.bytes),
            weights.seconds
        );
    }
    let failures: Vec<String> =
        run.failures.iter().map(|(kind, n)| format!("{n} {kind}")).collect();
    if !failures.is_empty() || run.stale_reports > 0 {
        let _ = writeln!(
            text,
            "failures {} ({} late reports)",
            or_none(&failures.join(", ")),
            run.stale_reports
        );
    }
    if !run.last_error.is_empty() {
        let _ = writeln!(text, "newest   {}", run.last_error);
    }
    let _ = writeln!(text, "{}", workers(run));
    text
}

fn or_none(text: &str) -> &str {
    if text.is_empty() { "none" } else { text }
}

/// `████░░░░`.
pub fn bar(done: u64, of: u64, width: u64) -> String {
    let full = (done * width).checked_div(of).unwrap_or(0).min(width);
    "█".repeat(full as usize) + &"░".repeat((width - full) as usize)
}

fn workers(run: &Run) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED);
    table.set_header(["worker", "role", "state", "works on", "policy", "done", "failed", "heard"]);
    let right = |text: String| Cell::new(text).set_alignment(CellAlignment::Right);
    for worker in &run.workers {
        table.add_row([
            Cell::new(&worker.id),
            Cell::new(&worker.role),
            Cell::new(&worker.state),
            Cell::new(&worker.lease),
            Cell::new(worker.version.map_or_else(String::new, |v| format!("v{v}"))),
            right(worker.done.to_string()),
            right(worker.failed.to_string()),
            right(format!("{:.1} s", worker.heard_ms_ago as f64 / 1000.0)),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::{Publication, Worker};

    #[test]
    fn a_page_names_everything_that_matters() {
        let run = Run {
            run: "demo".to_owned(),
            state: "running".to_owned(),
            version: 5,
            iterations: 20,
            trees: [("rendering".to_owned(), 3)].into(),
            rewards: [("llm".to_owned(), 0.25)].into(),
            failures: [("lease-expired".to_owned(), 2)].into(),
            last_error: "render attempt 1 of i3/t1/j0 on rollout-0: model: nan".to_owned(),
            publication: Some(Publication { version: 5, bytes: 1536, workers: 1, seconds: 0.25 }),
            workers: vec![Worker {
                id: "rollout-0".to_owned(),
                role: "rollout".to_owned(),
                ..Worker::default()
            }],
            ..Run::default()
        };
        let page = page(&run);
        let weights = "v5 with 1 of 1 rollout workers, 1.5 KiB, 0.2 s for the slowest";
        for part in [
            "5/20",
            "3 rendering",
            "llm 0.250",
            "2 lease-expired",
            "i3/t1/j0",
            "rollout-0",
            weights,
        ] {
            assert!(page.contains(part), "{part} is missing from\n{page}");
        }
        assert_eq!(bar(1, 4, 8), "██░░░░░░");
    }
}
