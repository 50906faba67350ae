//! The tables and checkpoints, compared with each other and with the journal.

use super::ledger::Ledger;
use super::shape;
use duet_core::TreeId;
use duet_core::scheduler::State;
use duet_core::work::Unit;
use duet_store::lineage::Rows;
use duet_store::{Store, StoreError};
use std::collections::{BTreeMap, BTreeSet};

/// What the tables say.
#[derive(Debug, Default)]
pub struct Tables {
    /// Trees by fate.
    pub fates: BTreeMap<String, u64>,
    /// Trees whose every piece is there once.
    pub exactly_once: u64,
    /// Trees of each iteration, dynamic sampling's left out, and those that were not given up.
    sizes: BTreeMap<u32, (u64, u64)>,
    /// Images.
    pub images: u64,
    /// Failed and timed-out scores.
    pub missing_scores: u64,
    /// Digest of the weights by version.
    pub digests: BTreeMap<u64, String>,
    /// Checkpoints that were compared.
    pub checkpoints: u64,
    /// Contradictions.
    pub violations: Vec<String>,
}

impl Tables {
    /// Reads and compares the tables of all committed iterations.
    ///
    /// # Errors
    /// The store fails; a missing table is a contradiction, not an error.
    pub async fn read(store: &Store, ledger: &Ledger) -> Result<Tables, StoreError> {
        let mut tables = Tables::default();
        for iteration in 0..u32::try_from(ledger.version).unwrap_or(u32::MAX) {
            match store.lineage().read(iteration).await {
                Ok(rows) => tables.iteration(iteration, &rows, ledger),
                Err(error @ (StoreError::Missing { .. } | StoreError::Table { .. })) => {
                    tables.wrong(iteration, &format!("is committed, but {error}"));
                }
                Err(error) => return Err(error),
            }
        }
        for found in store.lineage().iterations().await? {
            if u64::from(found) >= ledger.version {
                tables.wrong(found, "has tables, but its step is not in the journal");
            }
        }
        tables.compare_sizes();
        tables.checkpoints(store, ledger).await?;
        Ok(tables)
    }

    fn wrong(&mut self, iteration: u32, text: &str) {
        self.violations.push(format!("iteration {iteration} {text}"));
    }

    fn iteration(&mut self, iteration: u32, rows: &Rows, ledger: &Ledger) {
        let version = u64::from(iteration) + 1;
        match rows.updates.as_slice() {
            [update] if update.policy_version == version => {
                let digest = update.weights_digest.clone();
                if ledger.digests.get(&version).is_some_and(|journaled| *journaled != digest) {
                    self.wrong(iteration, "has other weights in its table than in the journal");
                }
                self.digests.insert(version, digest);
                let sampled = |v: u64| v == update.sampled_with;
                let all = rows.prompts.iter().all(|row| sampled(row.policy_version))
                    && rows.traces.iter().all(|row| sampled(row.policy_version))
                    && rows.leaves.iter().all(|row| sampled(row.policy_version));
                if !all || update.sampled_with > u64::from(iteration) {
                    self.wrong(iteration, "mixes samples of several policy versions");
                }
            }
            [update] => {
                let found = update.policy_version;
                self.wrong(iteration, &format!("went to version {found}, not {version}"));
            }
            updates => {
                let count = updates.len();
                self.wrong(iteration, &format!("has {count} optimiser steps instead of one"));
            }
        }
        self.trees(iteration, rows, ledger);
        self.images += rows.leaves.len() as u64;
        for row in &rows.rewards {
            self.missing_scores += u64::from(row.status != "scored");
            if (row.status == "scored") != row.value.is_some_and(f64::is_finite) {
                let place = TreeId { iteration, index: row.tree }.subtree(row.trace).leaf(row.leaf);
                let text =
                    format!("has a score of {place} that is {}: {:?}", row.status, row.value);
                self.wrong(iteration, &text);
            }
        }
    }

    fn trees(&mut self, iteration: u32, rows: &Rows, ledger: &Ledger) {
        let indexes: Vec<u32> = rows.prompts.iter().map(|row| row.tree).collect();
        if !indexes.iter().copied().eq(0..indexes.len() as u32) {
            self.wrong(iteration, &format!("does not have each tree once: {indexes:?}"));
        }
        let added = ledger.added.get(&iteration).copied().unwrap_or(0);
        let whole = rows.prompts.iter().filter(|row| row.fate != "failed").count() as u64;
        let asked = (indexes.len() as u64).saturating_sub(u64::from(added));
        self.sizes.insert(iteration, (asked, whole));
        let named: BTreeSet<u32> = { ledger.units.keys().map(Unit::tree) }
            .filter(|tree| tree.iteration == iteration)
            .map(|tree| tree.index)
            .collect();
        for index in named.iter().copied().filter(|index| !indexes.contains(index)) {
            let tree = TreeId { iteration, index };
            self.wrong(iteration, &format!("lacks {tree}, which the journal has"));
        }
        for index in indexes.iter().copied().filter(|i| !named.is_empty() && !named.contains(i)) {
            let tree = TreeId { iteration, index };
            self.wrong(iteration, &format!("has {tree}, which the journal has not"));
        }
        let used: BTreeSet<u32> = { rows.advantages.iter() }
            .filter(|row| row.advantage.is_some())
            .map(|row| row.tree)
            .collect();
        for row in &rows.prompts {
            let tree = TreeId { iteration, index: row.tree };
            *self.fates.entry(row.fate.clone()).or_default() += 1;
            match row.fate.as_str() {
                "trained" if !used.contains(&row.tree) => {
                    self.wrong(iteration, &format!("trained {tree} without an advantage"));
                }
                "trained" => {}
                "zero-spread" | "failed" if used.contains(&row.tree) => {
                    self.wrong(iteration, &format!("learned from {tree}, which is {}", row.fate));
                }
                "zero-spread" | "failed" => {}
                other => self.wrong(iteration, &format!("has a fate `{other}` for {tree}")),
            }
            if (row.fate == "failed") != ledger.given_up.contains(&tree)
                && ledger.units.contains_key(&Unit::Think(tree))
            {
                let text = format!("calls {tree} {}; the journal says otherwise", row.fate);
                self.wrong(iteration, &text);
            }
        }
        let (once, wrong) = shape::check(rows);
        self.exactly_once += once;
        wrong.iter().for_each(|text| self.wrong(iteration, text));
        self.work(iteration, rows, ledger);
    }

    /// Every iteration admits as many trees as most do.
    fn compare_sizes(&mut self) {
        let mut count: BTreeMap<u64, u32> = BTreeMap::new();
        for (asked, _) in self.sizes.values() {
            *count.entry(*asked).or_default() += 1;
        }
        let Some(most) = count.into_iter().max_by_key(|(_, n)| *n).map(|(asked, _)| asked) else {
            return;
        };
        let sizes: Vec<(u32, u64)> =
            self.sizes.iter().map(|(i, (asked, _))| (*i, *asked)).collect();
        for (iteration, asked) in sizes.into_iter().filter(|(_, asked)| *asked != most) {
            self.wrong(iteration, &format!("has {asked} trees, where others have {most}"));
        }
    }

    /// The scheduler's totals in a checkpoint, counted when the trees were still in memory.
    fn totals(&mut self, state: &State) {
        let steps = u32::try_from(state.version.0).unwrap_or(u32::MAX);
        let tabled: u64 = self.sizes.range(..steps).map(|(_, (_, whole))| whole).sum();
        let counted = state.totals.trained + state.totals.zero_spread;
        if tabled != counted {
            self.violations.push(format!(
                "the checkpoint of {} counts {counted} trees in its steps, the tables have {tabled}",
                state.version
            ));
        }
    }

    /// Who did what at which attempt, where the journal still knows.
    fn work(&mut self, iteration: u32, rows: &Rows, ledger: &Ledger) {
        let tree = |index| TreeId { iteration, index };
        let thought = { rows.traces.iter() }
            .map(|row| (Unit::Think(tree(row.tree)), row.attempt, row.worker.clone()));
        let rendered = { rows.leaves.iter() }.map(|row| {
            let unit = Unit::Render(tree(row.tree).subtree(row.trace));
            (unit, row.attempt, row.worker.clone())
        });
        let scored = { rows.rewards.iter() }.map(|row| {
            let unit = Unit::Score(tree(row.tree).subtree(row.trace));
            (unit, row.attempt, row.worker.clone())
        });
        let all: BTreeSet<_> = thought.chain(rendered).chain(scored).collect();
        for (unit, attempt, worker) in all {
            let Some(entry) = ledger.units.get(&unit) else { continue };
            let same = entry.done.as_ref().is_some_and(|(a, w)| *a == attempt && w.0 == worker);
            if !same {
                let what = format!("{} of {}", unit.stage(), unit.place());
                let text = format!(
                    "has {what} by {worker}, attempt {attempt}; the journal says otherwise"
                );
                self.wrong(iteration, &text);
            }
        }
    }

    async fn checkpoints(&mut self, store: &Store, ledger: &Ledger) -> Result<(), StoreError> {
        for version in store.checkpoints().list().await? {
            let manifest = store.checkpoints().at(version).await?.manifest;
            self.checkpoints += 1;
            let digest = manifest.weights.digest.to_string();
            let journaled = ledger.digests.get(&version.0);
            let known = self.digests.get(&version.0).or(journaled);
            if version.0 > ledger.version {
                self.violations.push(format!("a checkpoint of {version}, never committed"));
            } else if known.is_some_and(|known| *known != digest) {
                self.violations.push(format!("the checkpoint of {version} holds other weights"));
            }
            if let Some(missing) = store.checkpoints().verify(&manifest).await.err() {
                self.violations
                    .push(format!("the checkpoint of {version} is not whole: {missing}"));
            } else if let Some(reference) = &manifest.scheduler {
                let bytes = store.artifacts().get(reference).await?;
                match serde_json::from_slice::<State>(&bytes) {
                    Ok(state) => self.totals(&state),
                    Err(error) => {
                        let text = format!("the scheduler's state of {version}: {error}");
                        self.violations.push(text);
                    }
                }
            }
        }
        Ok(())
    }
}
