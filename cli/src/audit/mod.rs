//! `duet audit`: accounts for every tree of a run from its journal and tables alone. Reads only, and
//! may be run beside a coordinator, whose newest work it may then miss.

mod ledger;
mod shape;
mod tables;

use crate::CliError;
use crate::args::AuditArgs;
use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{Cell, CellAlignment, Table};
use duet_core::scheduler::{Record, State};
use duet_store::{Store, journal, keys};
use ledger::Ledger;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
use tables::Tables;

/// An account of a run.
#[derive(Debug, Serialize)]
pub struct Account {
    /// The store.
    pub store: String,
    /// Whether the journal goes back to the run's beginning; if not, older work is known by the
    /// tables alone.
    pub whole_journal: bool,
    /// Committed steps; also the newest policy version.
    pub version: u64,
    /// Iterations admitted.
    pub admitted: u32,
    /// Trees by fate, of committed iterations.
    pub trees: BTreeMap<String, u64>,
    /// Of these, trees whose every trace was sampled, rendered and scored once by journal and tables.
    pub exactly_once: u64,
    /// Trees of iterations that are not committed.
    pub in_flight: u64,
    /// Images of committed iterations.
    pub images: u64,
    /// Scores that are missing because a scorer failed or took too long.
    pub missing_scores: u64,
    /// Coordinators that ran it, one after the other.
    pub coordinators: u64,
    /// Trainer groups that were formed.
    pub trainer_groups: u64,
    /// Attempts given out, as far as the journal goes back.
    pub leases: u64,
    /// Units of work they were for.
    pub units: u64,
    /// Of these, attempts that failed.
    pub failed: u64,
    /// Attempts lost with their worker, or too slow.
    pub lost: u64,
    /// Attempts handed back or never delivered.
    pub handed_back: u64,
    /// Attempts in flight whenever a coordinator took over.
    pub in_flight_at_takeover: u64,
    /// Attempts for work that was done already.
    pub redone: u64,
    /// Failed attempts by kind.
    pub failures: BTreeMap<String, u64>,
    /// Checkpoints that are whole and agree.
    pub checkpoints: u64,
    /// Digest of the newest weights.
    pub weights: Option<String>,
    /// Everything that does not add up; empty when each tree is accounted for exactly once.
    pub violations: Vec<String>,
}

/// `duet audit`; the exit code: 0 when everything adds up, else 1.
///
/// # Errors
/// The store, journal or tables cannot be read.
pub async fn run(args: &AuditArgs) -> Result<u8, CliError> {
    let account = account(&args.run).await?;
    if args.json {
        let text = serde_json::to_string_pretty(&account);
        println!("{}", text.map_err(|error| CliError::Usage(error.to_string()))?);
    } else {
        show(&account);
    }
    Ok(u8::from(!account.violations.is_empty()))
}

/// Audits the run in a store.
///
/// # Errors
/// It cannot be read, or there is none.
pub async fn account(url: &str) -> Result<Account, CliError> {
    let usage = |error: &dyn std::fmt::Display| CliError::Usage(error.to_string());
    let store = Store::open(url).map_err(|error| usage(&error))?;
    let kept = journal::retained(&store, keys::JOURNAL).await.map_err(|error| usage(&error))?;
    if kept.base.is_none() && kept.batches.is_empty() {
        let text = format!("{} holds no run: its journal is empty", store.place());
        return Err(CliError::Usage(text));
    }
    let whole_journal = kept.base.is_none();
    let mut ledger = match kept.base {
        Some(state) => Ledger::from_state(&read::<State>(&state, "snapshot")?),
        None => Ledger::default(),
    };
    for batch in &kept.batches {
        ledger.batch(batch.number, batch.generation);
        for record in &batch.records {
            ledger.take(&read::<Record>(record, &format!("segment {}", batch.number))?);
        }
    }
    let tables = Tables::read(&store, &ledger).await.map_err(|error| usage(&error))?;
    Ok(close(&store, whole_journal, ledger, tables))
}

fn read<T: DeserializeOwned>(bytes: &[u8], place: &str) -> Result<T, CliError> {
    serde_json::from_slice(bytes).map_err(|error| {
        CliError::Usage(format!("journal {place} cannot be read by this build: {error}"))
    })
}

fn close(store: &Store, whole_journal: bool, ledger: Ledger, tables: Tables) -> Account {
    let in_flight = ledger.trees_in_flight() as u64;
    let newest = ledger.digests.get(&ledger.version).or(tables.digests.get(&ledger.version));
    let mut violations = ledger.violations;
    violations.extend(tables.violations);
    Account {
        store: store.place().to_owned(),
        whole_journal,
        version: ledger.version,
        admitted: ledger.admitted,
        trees: tables.fates,
        exactly_once: tables.exactly_once,
        in_flight,
        images: tables.images,
        missing_scores: tables.missing_scores,
        coordinators: ledger.coordinators,
        trainer_groups: ledger.groups,
        leases: ledger.leases,
        units: ledger.units.len() as u64,
        failed: ledger.failed,
        lost: ledger.lost,
        handed_back: ledger.handed_back,
        in_flight_at_takeover: ledger.in_flight,
        redone: ledger.redone,
        failures: ledger.kinds,
        checkpoints: tables.checkpoints,
        weights: newest.cloned(),
        violations,
    }
}

fn show(account: &Account) {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED).set_header(["", "", "what it means"]);
    let mut row = |name: &str, value: u64, meaning: &str| {
        let value = Cell::new(value).set_alignment(CellAlignment::Right);
        table.add_row([Cell::new(name), value, Cell::new(meaning)]);
    };
    row("steps", account.version, "each took the version up by one");
    for (fate, count) in &account.trees {
        row(&format!("trees {fate}"), *count, "retired with exactly one fate");
    }
    row("exactly once", account.exactly_once, "sampled, rendered and scored once, in one step");
    row("trees in flight", account.in_flight, "of iterations not committed yet");
    row("images", account.images, "of committed iterations");
    row("scores missing", account.missing_scores, "the scorer failed; left out, never a number");
    row("coordinators", account.coordinators, "that ran it, one after the other");
    row("trainer groups", account.trainer_groups, "formed; each began at the newest checkpoint");
    row("leases", account.leases, &format!("for {} units of work", account.units));
    row("  failed", account.failed, "given out again after a failure");
    row("  lost", account.lost, "with their worker, or too slow");
    row("  handed back", account.handed_back, "by a leaving worker, or never delivered");
    row("  in flight", account.in_flight_at_takeover, "when a coordinator took over");
    row("  done twice", account.redone, "work repeated beyond what was in flight");
    row("checkpoints", account.checkpoints, "whole, with the weights of the journal");
    println!("{}\n{table}", account.store);
    if !account.whole_journal {
        println!("the journal was shortened: leases count from its oldest snapshot on");
    }
    if let Some(digest) = &account.weights {
        println!("weights of version {}: {digest}", account.version);
    }
    match account.violations.as_slice() {
        [] => println!("every tree is accounted for exactly once"),
        wrong => {
            println!("{} things do not add up:", wrong.len());
            wrong.iter().for_each(|text| println!("  {text}"));
        }
    }
}
