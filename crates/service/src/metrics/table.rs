//! Every metric: name, kind, labels and meaning. The only place where a name is written; the page
//! `docs/metrics.md` is made from it, and a test compares dashboards with it.

use std::fmt::Write;

/// How a metric behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Grows, and starts over with its process unless the text says otherwise.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Counts observations by size; seconds unless the name says otherwise.
    Histogram,
}

impl Kind {
    /// As Prometheus calls it.
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        }
    }
}

/// Which processes have a metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The coordinator: `telemetry.metrics`.
    Coordinator,
    /// Every worker: `telemetry.worker_metrics`.
    Worker,
}

/// One metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Metric {
    /// Its whole name, as it is queried; base units, `_total` at the end of counters.
    pub name: &'static str,
    /// How it behaves.
    pub kind: Kind,
    /// Who has it.
    pub place: Place,
    /// Its labels, in the order in which values are given.
    pub labels: &'static [&'static str],
    /// What it says; one sentence without its full stop.
    pub help: &'static str,
}

macro_rules! metrics {
    ($($id:ident: $place:ident $kind:ident $name:literal [$($label:literal),*] $help:literal;)*) => {
        $(
            #[doc = $help]
            pub const $id: Metric = Metric {
                name: $name,
                kind: Kind::$kind,
                place: Place::$place,
                labels: &[$($label),*],
                help: $help,
            };
        )*
        /// All metrics, in the order of the page.
        pub const ALL: &[Metric] = &[$($id),*];
    };
}

metrics! {
    RUN_INFO: Coordinator Gauge "duet_run_info" ["run", "version"] "Always 1; names the run and the version of this program";
    RUN_STATE: Coordinator Gauge "duet_run_state" ["state"] "1 for what the run is doing: starting, running, paused, stopping, completed, stopped, failed";
    GENERATION: Coordinator Gauge "duet_coordinator_generation" [] "Incarnation of the coordinator";
    EPOCH: Coordinator Gauge "duet_trainer_epoch" [] "Incarnation of the trainer group";
    POLICY_VERSION: Coordinator Gauge "duet_policy_version" [] "Committed optimiser steps";
    ITERATIONS: Coordinator Gauge "duet_iterations" [] "Optimiser steps that the run is configured for";
    ETA: Coordinator Gauge "duet_eta_seconds" [] "Seconds to the end at the pace of the last steps; absent before the first";
    TREES: Coordinator Gauge "duet_trees" ["state"] "Trees by state: thinking, rendering, scoring, ready, trained, zero-spread, failed";
    IMAGES: Coordinator Counter "duet_images_total" [] "Images rendered since the run began";
    IMAGE_RATE: Coordinator Gauge "duet_images_per_second" [] "Images a second over the last steps";
    REWARD: Coordinator Gauge "duet_reward" ["name"] "Mean reward of the newest committed iteration: branch llm or dit, or a component";
    TRAINING: Coordinator Gauge "duet_training" ["name"] "Any number of the newest committed iteration, under its name in metrics.jsonl: loss, grad_norm, kl and so on";
    WORKERS: Coordinator Gauge "duet_workers" ["role", "state"] "Connected workers by role and state: idle, busy, draining, quarantined";
    POLICY_LAG: Coordinator Gauge "duet_policy_lag_versions" [] "Versions that the rollout worker furthest behind still has to fetch";
    LEASES: Coordinator Gauge "duet_leases" ["stage"] "Leases that are out: think, render, score";
    LEASES_GRANTED: Coordinator Counter "duet_leases_granted_total" ["stage"] "Leases given out";
    LEASES_EXPIRED: Coordinator Counter "duet_leases_expired_total" ["stage"] "Leases that ran out or whose worker was lost";
    LEASE_RETRIES: Coordinator Counter "duet_lease_retries_total" [] "Leases given out again";
    LEASE_SECONDS: Coordinator Histogram "duet_lease_seconds" ["stage"] "From giving out a lease to the report that completed it";
    STALE_REPORTS: Coordinator Counter "duet_stale_reports_total" [] "Reports that came too late to count";
    FAILURES: Coordinator Counter "duet_failures_total" ["kind"] "Failures by kind: attempts since the run began, others since this process started";
    STEP_SECONDS: Coordinator Histogram "duet_step_seconds" [] "From giving a step to the trainer group to its commit";
    JOURNAL_SECONDS: Coordinator Histogram "duet_journal_append_seconds" [] "To make a batch of records durable";
    JOURNAL_RECORDS: Coordinator Counter "duet_journal_records_total" [] "Records made durable";
    PUBLISH_SECONDS: Coordinator Histogram "duet_publish_seconds" [] "From telling a rollout worker of new weights to its acknowledgement";
    PUBLISH_BYTES: Coordinator Counter "duet_publish_bytes_total" [] "Bytes of weights that rollout workers fetched and acknowledged";
    PUBLISH_FAILURES: Coordinator Counter "duet_publish_failures_total" [] "Weights that a rollout worker could not take";
    CHECKPOINT_SECONDS: Coordinator Histogram "duet_checkpoint_seconds" [] "From the ranks' shards being durable to the manifest being there";
    CHECKPOINT_BYTES: Coordinator Gauge "duet_checkpoint_bytes" [] "Bytes of the trainers' shards of the newest checkpoint that this process wrote";
    CHECKPOINT_VERSION: Coordinator Gauge "duet_checkpoint_version" [] "Version of the newest complete checkpoint; absent before the first";
    CHECKPOINT_TIME: Coordinator Gauge "duet_checkpoint_timestamp_seconds" [] "When this process wrote its newest checkpoint, in seconds since 1970";
    CHECKPOINT_FAILURES: Coordinator Counter "duet_checkpoint_failures_total" [] "Checkpoints that could not be completed";
    REFUSED: Coordinator Counter "duet_refused_total" ["reason"] "Connections and calls that were refused, by reason: certificate (the handshake failed), role, rate, connections";
    WORKER_INFO: Worker Gauge "duet_worker_info" ["worker", "role", "version"] "Always 1; names the worker";
    WORK: Worker Counter "duet_worker_assignments_total" ["kind", "outcome"] "Assignments carried out: think, render, score, step, publish; done or failed";
    WORK_SECONDS: Worker Histogram "duet_worker_assignment_seconds" ["kind"] "Time spent on an assignment, fetching and storing included";
}

/// The page of `docs/metrics.md`.
pub fn page() -> String {
    let mut page = String::from(
        "# Metrics\n\n<!-- Made from crates/service/src/metrics/table.rs by `cargo run -p duet-service \
         --example metrics > docs/metrics.md`. -->\n",
    );
    for (place, title, text) in [
        (
            Place::Coordinator,
            "Coordinator",
            "Served at `/metrics` of `telemetry.metrics` (off by default).",
        ),
        (
            Place::Worker,
            "Workers",
            "Served at `/metrics` of `telemetry.worker_metrics` (off by default) by rollout, reward and \
             trainer workers.",
        ),
    ] {
        let _ = write!(
            page,
            "\n## {title}\n{text}\n\n| name | kind | labels | what |\n|---|---|---|---|\n"
        );
        for metric in ALL.iter().filter(|metric| metric.place == place) {
            let labels: Vec<String> = metric.labels.iter().map(|l| format!("`{l}`")).collect();
            let (name, kind) = (metric.name, metric.kind.as_str());
            let _ =
                writeln!(page, "| `{name}` | {kind} | {} | {} |", labels.join(", "), metric.help);
        }
    }
    page
}
