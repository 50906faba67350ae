//! The status of a run as metrics.

use crate::driver::{Handle, RunStatus};
use duet_core::Role;
use duet_core::scheduler::{FinishReason, RunState};
use duet_service::metrics::{Metrics, table};
use std::collections::BTreeMap;

/// Brings the gauges up to date; a driver that has ended leaves them as they were.
pub async fn refresh(handle: Handle, metrics: Metrics) {
    if let Ok(status) = handle.status().await {
        show(&metrics, &status);
    }
}

/// Sets everything that a status says.
pub fn show(metrics: &Metrics, status: &RunStatus) {
    let view = &status.view;
    let set = |metric, value: f64| metrics.set(metric, &[], value);
    metrics.set(&table::RUN_INFO, &[&status.run, env!("CARGO_PKG_VERSION")], 1.0);
    metrics.clear(&table::RUN_STATE);
    metrics.set(&table::RUN_STATE, &[state(status)], 1.0);
    set(&table::GENERATION, view.generation.0 as f64);
    set(&table::EPOCH, view.epoch.0 as f64);
    set(&table::POLICY_VERSION, view.version.0 as f64);
    set(&table::ITERATIONS, f64::from(view.iterations));
    metrics.clear(&table::ETA);
    if let Some(seconds) = status.eta_seconds {
        set(&table::ETA, seconds);
    }
    for (name, count) in &view.trees {
        metrics.set(&table::TREES, &[name], *count as f64);
    }
    set(&table::IMAGES, view.images as f64);
    set(&table::IMAGE_RATE, status.images_per_second);
    named(metrics, &table::REWARD, &status.rewards);
    named(metrics, &table::TRAINING, &status.metrics);
    workers(metrics, status);
    set(&table::LEASE_RETRIES, status.retries as f64);
    set(&table::STALE_REPORTS, view.stale_reports as f64);
    for (kind, count) in &status.failures {
        metrics.set(&table::FAILURES, &[kind], *count as f64);
    }
    if let Some(version) = view.checkpoint {
        set(&table::CHECKPOINT_VERSION, version.0 as f64);
    }
}

fn named(metrics: &Metrics, metric: &table::Metric, values: &BTreeMap<String, f64>) {
    metrics.clear(metric);
    for (name, value) in values {
        metrics.set(metric, &[name], *value);
    }
}

fn workers(metrics: &Metrics, status: &RunStatus) {
    let view = &status.view;
    let mut counts: BTreeMap<(&str, &str), u64> = BTreeMap::new();
    for worker in &view.workers {
        let role = match worker.role {
            Role::Rollout => "rollout",
            Role::Reward => "reward",
            Role::Trainer => "trainer",
        };
        *counts.entry((role, worker.state)).or_default() += 1;
    }
    metrics.clear(&table::WORKERS);
    for ((role, state), count) in counts {
        metrics.set(&table::WORKERS, &[role, state], count as f64);
    }
    let rollout = view.workers.iter().filter(|worker| worker.role == Role::Rollout);
    // A worker that holds nothing yet has the base model, which is version 0.
    let held = rollout.map(|worker| worker.version.map_or(0, |version| version.0));
    let lag = held.min().map_or(0, |oldest| view.version.0.saturating_sub(oldest));
    metrics.set(&table::POLICY_LAG, &[], lag as f64);
}

fn state(status: &RunStatus) -> &'static str {
    match &status.view.state {
        RunState::Running if status.starting => "starting",
        RunState::Running => "running",
        RunState::Paused => "paused",
        RunState::Stopping => "stopping",
        RunState::Finished(FinishReason::Completed) => "completed",
        RunState::Finished(FinishReason::Stopped) => "stopped",
        RunState::Finished(FinishReason::Failed(_)) => "failed",
    }
}
