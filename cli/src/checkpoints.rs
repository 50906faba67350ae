//! `duet checkpoints`: lists, verifies, exports and prunes what a run has kept. Reads the store, asks
//! nobody; only `export` starts a program, the one that holds the models.

use crate::args::{Checkpoints, ExportArgs, PruneArgs, VerifyArgs};
use crate::show::size;
use crate::{CliError, children};
use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{Cell, CellAlignment, Table};
use duet_core::scheduler::State;
use duet_core::{ArtifactRef, PolicyVersion};
use duet_store::checkpoint::Retention;
use duet_store::{Found, Manifest, Store, StoreError};
use std::collections::BTreeSet;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

/// Objects of checkpoints that were never completed may be on their way for so long.
const GRACE_MS: u64 = 3_600_000;

/// Carries a subcommand out; gives the exit code.
///
/// # Errors
/// [`CliError`] naming the run, version or file.
pub async fn run(command: Checkpoints) -> Result<u8, CliError> {
    match command {
        Checkpoints::List(args) => list(&open(&args.run)?).await.map(|()| 0),
        Checkpoints::Verify(args) => verify(&args).await,
        Checkpoints::Export(args) => export(&args).await,
        Checkpoints::Prune(args) => prune(&args).await.map(|()| 0),
    }
}

/// The store of a run, which must be there.
fn open(run: &str) -> Result<Store, CliError> {
    let local = run.strip_prefix("file://").unwrap_or(run);
    if !local.contains("://") && !Path::new(local).is_dir() {
        let hint = "give a run's folder (`runs/demo`) or the URL of its store";
        return Err(CliError::Usage(format!("there is no folder `{local}`: {hint}")));
    }
    Ok(Store::open(run)?)
}

/// A version and what can be said of it.
struct Row {
    version: PolicyVersion,
    found: Result<Found, StoreError>,
    complete: Result<(), StoreError>,
}

async fn rows(store: &Store) -> Result<Vec<Row>, CliError> {
    let checkpoints = store.checkpoints();
    let mut rows = Vec::new();
    for version in checkpoints.list().await? {
        let found = checkpoints.at(version).await;
        let complete = match &found {
            Ok(found) => checkpoints.check_present(&found.manifest).await,
            Err(_) => Ok(()),
        };
        rows.push(Row { version, found, complete });
    }
    if rows.is_empty() {
        let place = store.place();
        return Err(CliError::Usage(format!("{place} holds no checkpoints yet")));
    }
    Ok(rows)
}

async fn list(store: &Store) -> Result<(), CliError> {
    let rows = rows(store).await?;
    let whole = |row: &Row| row.found.is_ok() && row.complete.is_ok();
    let newest = rows.iter().rev().find(|row| whole(row)).map(|row| row.version);
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED);
    table.set_header(["version", "written (UTC)", "size", "files", "ranks", "state"]);
    for row in &rows {
        let state = match (&row.found, &row.complete) {
            (Err(error), _) => format!("unreadable: {error}"),
            (_, Err(error)) => format!("incomplete: {error}"),
            _ if Some(row.version) == newest => "complete, newest".to_owned(),
            _ => "complete".to_owned(),
        };
        let manifest = row.found.as_ref().ok().map(|found| &found.manifest);
        let show = |text: fn(&Manifest) -> String| manifest.map(text).unwrap_or_default();
        let right = |text: String| Cell::new(text).set_alignment(CellAlignment::Right);
        table.add_row([
            right(row.version.0.to_string()),
            Cell::new(show(|m| utc(m.created_unix_ms))),
            right(show(|m| size(m.bytes()))),
            right(show(|m| m.objects().len().to_string())),
            right(show(|m| m.world.to_string())),
            Cell::new(state),
        ]);
    }
    println!("{table}");
    Ok(())
}

/// The version that was asked for; `newest`, or nothing, is the newest complete one.
async fn find(store: &Store, wanted: &str) -> Result<Found, CliError> {
    let checkpoints = store.checkpoints();
    if wanted == "newest" {
        let none = || CliError::Usage(format!("{} holds no complete checkpoint", store.place()));
        return checkpoints.newest_found().await?.ok_or_else(none);
    }
    let number = wanted.strip_prefix('v').unwrap_or(wanted).parse();
    let version = number.map(PolicyVersion).map_err(|_| {
        CliError::Usage(format!("`{wanted}` is no version; give a number, or `newest`"))
    })?;
    match checkpoints.at(version).await {
        Err(StoreError::Missing { .. }) => {
            let there: Vec<String> =
                checkpoints.list().await?.iter().map(|version| version.0.to_string()).collect();
            Err(CliError::Usage(format!(
                "{} holds no checkpoint {wanted}; there are: {}",
                store.place(),
                if there.is_empty() { "none".to_owned() } else { there.join(", ") }
            )))
        }
        found => Ok(found?),
    }
}

async fn verify(args: &VerifyArgs) -> Result<u8, CliError> {
    let store = open(&args.run)?;
    let mut bad = 0;
    match &args.version {
        Some(version) => bad += verify_one(&store, &find(&store, version).await?.manifest).await,
        None => {
            for row in rows(&store).await? {
                match row.found {
                    Ok(found) => bad += verify_one(&store, &found.manifest).await,
                    Err(error) => {
                        println!("{:>8}  BAD  {error}", row.version.0);
                        bad += 1;
                    }
                }
            }
        }
    }
    Ok(u8::from(bad > 0))
}

/// Reads every byte of a checkpoint; says and counts what is not right.
async fn verify_one(store: &Store, manifest: &Manifest) -> usize {
    let (version, artifacts) = (manifest.version.0, store.artifacts());
    let objects = manifest.objects();
    let mut bad = 0;
    for object in &objects {
        if let Err(error) = artifacts.get(object).await {
            println!("{version:>8}  BAD  {error}");
            bad += 1;
        }
    }
    if bad == 0 {
        println!("{version:>8}  ok   {} files, {}", objects.len(), size(manifest.bytes()));
    }
    bad
}

async fn export(args: &ExportArgs) -> Result<u8, CliError> {
    let store = open(&args.run)?;
    let manifest = find(&store, &args.version).await?.manifest;
    let aside = args.to.with_extension("weights");
    let io = |error| CliError::io("make", &aside, error);
    std::fs::create_dir_all(&aside).map_err(io)?;
    let mut rest = vec![
        "--model".to_owned(),
        args.model.display().to_string(),
        "--out".to_owned(),
        args.to.display().to_string(),
    ];
    let weights = [("llm", &manifest.weights.llm), ("dit", &manifest.weights.dit)];
    for (name, artifact) in weights {
        let Some(artifact) = artifact else { continue };
        let path = aside.join(format!("{name}.safetensors"));
        fetch(&store, artifact, &path).await?;
        rest.extend([format!("--{name}-weights"), path.display().to_string()]);
    }
    let code = children::pass("duet-rollout-worker", "export", &rest).await;
    std::fs::remove_dir_all(&aside).map_err(|error| CliError::io("remove", &aside, error))?;
    code
}

/// An artifact as a file, verified on its way.
async fn fetch(store: &Store, artifact: &ArtifactRef, path: &Path) -> Result<(), CliError> {
    let bytes = store.artifacts().get(artifact).await?;
    std::fs::write(path, bytes).map_err(|error| CliError::io("write", path, error))
}

async fn prune(args: &PruneArgs) -> Result<(), CliError> {
    let store = open(&args.run)?;
    let checkpoints = store.checkpoints();
    let retention = Retention { last: args.keep, every: args.keep_every, grace_ms: GRACE_MS };
    let newest = find(&store, "newest").await?.manifest;
    let protect = in_use(&store, &newest).await?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let now = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
    let plan = checkpoints.plan(retention, &protect, now).await?;
    let files = plan.objects.values().map(BTreeSet::len).sum::<usize>() + plan.versions.len();
    let versions: Vec<String> = plan.versions.iter().map(|version| version.0.to_string()).collect();
    let versions = if versions.is_empty() { "none".to_owned() } else { versions.join(", ") };
    let what = format!("checkpoints {versions}: {files} files, {}", size(plan.bytes));
    if args.dry_run {
        println!("would delete {what}");
        for key in plan.objects.values().flatten() {
            println!("  {key}");
        }
        return Ok(());
    }
    if !plan.versions.is_empty() {
        // Older ones go only when every byte of the newest is right.
        let bytes = checkpoints.verify(&newest).await?;
        println!("checkpoint {} is whole: {} verified", newest.version.0, size(bytes));
    }
    let pruned = checkpoints.prune(retention, &protect, now).await?;
    println!("deleted {what}");
    if pruned.objects < files {
        println!("{} files stay: a checkpoint was completed meanwhile", files - pruned.objects);
    }
    Ok(())
}

/// Weights that a run which goes on from this checkpoint may still hand out.
async fn in_use(store: &Store, newest: &Manifest) -> Result<BTreeSet<String>, CliError> {
    let Some(scheduler) = &newest.scheduler else { return Ok(BTreeSet::new()) };
    let bytes = store.artifacts().get(scheduler).await?;
    let state: State = serde_json::from_slice(&bytes).map_err(|error| {
        let key = &scheduler.key;
        CliError::Usage(format!("`{key}` cannot be read by this version of duet: {error}"))
    })?;
    let weights = state.steps.values().flat_map(|step| [&step.weights.llm, &step.weights.dit]);
    Ok(weights.flatten().map(|artifact| artifact.key.clone()).collect())
}

/// Milliseconds since 1970 as `2026-11-23 16:05:09`.
fn utc(unix_ms: u64) -> String {
    let seconds = unix_ms / 1000;
    let (days, time) = (seconds / 86_400, seconds % 86_400);
    // Years that begin in March, in eras of 400 of them (H. Hinnant, "chrono-compatible low-level
    // date algorithms").
    let shifted = days + 719_468;
    let (era, day) = (shifted / 146_097, shifted % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let (of_month, month) = (day - (153 * month + 2) / 5 + 1, (month + 2) % 12 + 1);
    let year = era * 400 + year + u64::from(month <= 2);
    let (hour, minute, second) = (time / 3600, time / 60 % 60, time % 60);
    format!("{year:04}-{month:02}-{of_month:02} {hour:02}:{minute:02}:{second:02}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_for_people() {
        assert_eq!(utc(0), "1970-01-01 00:00:00");
        assert_eq!(utc(951_782_399_000), "2000-02-28 23:59:59");
        assert_eq!(utc(951_782_400_000), "2000-02-29 00:00:00");
        assert_eq!(utc(1_795_449_909_000), "2026-11-23 16:05:09");
        assert_eq!(utc(4_107_542_400_000), "2100-03-01 00:00:00");
    }
}
