//! Lineage: a Parquet file for each table and iteration, for DuckDB, pandas and whoever audits a run.
//!
//! ```text
//! lineage/traces/iteration=000042/part-0.parquet
//! ```
//! ```sql
//! select iteration, avg(reward) from read_parquet('lineage/advantages/*/*.parquet',
//!   hive_partitioning = true) where branch = 'llm' group by iteration order by iteration;
//! ```

pub(crate) mod column;
mod convert;
mod rows;

pub use rows::{AdvantageRow, LeafRow, PromptRow, RewardRow, TraceRow, UpdateRow};

use crate::error::{Result, StoreError};
use crate::keys;
use crate::store::Store;
use arrow::array::{ArrayRef, RecordBatch};
use arrow::datatypes::SchemaRef;
use bytes::Bytes;
use duet_core::scheduler::IterationLineage;
use futures::future::try_join5;
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::properties::{EnabledStatistics, WriterProperties};
use std::sync::Arc;

/// Largest table file that is read, in bytes.
const MAX_FILE: u64 = 4 << 30;
/// Bytes in memory below which a table is written plainly.
const SMALL: usize = 64 << 10;

/// A row of a table.
pub trait Row: Sized + Clone + PartialEq + Send + Sync + 'static {
    /// The table's name.
    const TABLE: &'static str;
    /// Its columns.
    fn schema() -> SchemaRef;
    /// Rows as columns.
    fn columns(rows: &[Self]) -> Vec<ArrayRef>;
    /// Columns as rows.
    ///
    /// # Errors
    /// Which column is missing or of another type.
    fn rows(batch: &RecordBatch) -> std::result::Result<Vec<Self>, String>;
}

/// All rows of one iteration.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rows {
    /// Trees.
    pub prompts: Vec<PromptRow>,
    /// Chains of thought.
    pub traces: Vec<TraceRow>,
    /// Images.
    pub leaves: Vec<LeafRow>,
    /// Scores.
    pub rewards: Vec<RewardRow>,
    /// Rewards and advantages.
    pub advantages: Vec<AdvantageRow>,
    /// The optimiser step.
    pub updates: Vec<UpdateRow>,
}

/// The lineage tables of a store. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Lineage {
    store: Store,
}

impl Lineage {
    /// The tables of a store.
    pub fn new(store: Store) -> Lineage {
        Lineage { store }
    }

    /// Writes an iteration's account. On a local disk it survives a loss of power only after
    /// [`Store::settle`]; what such a loss left of it is replaced when it is written again.
    ///
    /// # Errors
    /// As [`Lineage::write_rows`].
    pub async fn write(&self, lineage: Arc<IterationLineage>) -> Result<()> {
        let iteration = lineage.iteration;
        let encoded = tokio::task::spawn_blocking(move || {
            let rows = Rows::from(&*lineage);
            (encode_all(&rows), rows)
        });
        match encoded.await {
            Ok((tables, rows)) => self.write_tables(iteration, tables, &rows).await,
            Err(panic) => std::panic::resume_unwind(panic.into_panic()),
        }
    }

    /// Writes an iteration's rows. To write the same rows again is no error and changes nothing; the
    /// update comes last, so an iteration with an update is whole.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] when other rows are there.
    pub async fn write_rows(&self, iteration: u32, rows: &Rows) -> Result<()> {
        self.write_tables(iteration, encode_all(rows), rows).await
    }

    async fn write_tables(&self, iteration: u32, tables: Tables, rows: &Rows) -> Result<()> {
        if self.store.create_all_lazily(tables.objects(iteration)).await {
            return Ok(());
        }
        let Tables { prompts, traces, leaves, rewards, advantages, updates } = tables;
        try_join5(
            self.write_table(iteration, prompts, &rows.prompts),
            self.write_table(iteration, traces, &rows.traces),
            self.write_table(iteration, leaves, &rows.leaves),
            self.write_table(iteration, rewards, &rows.rewards),
            self.write_table(iteration, advantages, &rows.advantages),
        )
        .await?;
        self.write_table(iteration, updates, &rows.updates).await
    }

    /// An iteration's rows of all tables.
    ///
    /// # Errors
    /// [`StoreError::Missing`] or [`StoreError::Table`] naming the file.
    pub async fn read(&self, iteration: u32) -> Result<Rows> {
        Ok(Rows {
            prompts: self.read_table(iteration).await?,
            traces: self.read_table(iteration).await?,
            leaves: self.read_table(iteration).await?,
            rewards: self.read_table(iteration).await?,
            advantages: self.read_table(iteration).await?,
            updates: self.read_table(iteration).await?,
        })
    }

    /// Iterations whose rows are all there, ascending.
    ///
    /// # Errors
    /// What can happen to any operation.
    pub async fn iterations(&self) -> Result<Vec<u32>> {
        let table = UpdateRow::TABLE;
        let entries = self.store.list(&format!("{}/{table}", keys::LINEAGE)).await?;
        Ok(entries.iter().filter_map(|entry| keys::table_iteration(table, &entry.key)).collect())
    }

    /// Writes one table, whose rows are these, as bytes.
    async fn write_table<R: Row>(&self, iteration: u32, bytes: Encoded, rows: &[R]) -> Result<()> {
        let key = keys::table(R::TABLE, iteration);
        let bytes = bytes.map_err(|reason| self.bad(&key, reason))?;
        match self.store.create_lazily(&key, bytes).await {
            // Another version of this program may have written the same rows as other bytes.
            Err(StoreError::Exists { .. }) if self.read_table::<R>(iteration).await? == rows => {
                Ok(())
            }
            Err(StoreError::Exists { .. }) => Err(self.store.conflict(&key)),
            done => done,
        }
    }

    /// Reads one table.
    ///
    /// # Errors
    /// As [`Lineage::read`].
    pub async fn read_table<R: Row>(&self, iteration: u32) -> Result<Vec<R>> {
        let key = keys::table(R::TABLE, iteration);
        let bytes = self.store.get_at_most(&key, MAX_FILE).await?;
        decode(bytes).map_err(|reason| self.bad(&key, reason))
    }

    fn bad(&self, key: &str, reason: String) -> StoreError {
        let (place, key) = (self.store.place().to_owned(), key.to_owned());
        StoreError::Table { place, key, reason }
    }
}

/// A table's bytes, or why it has none.
type Encoded = std::result::Result<Bytes, String>;

/// The tables of one iteration.
struct Tables {
    prompts: Encoded,
    traces: Encoded,
    leaves: Encoded,
    rewards: Encoded,
    advantages: Encoded,
    updates: Encoded,
}

impl Tables {
    /// All of them under their keys, the update last; none when one of them has no bytes.
    fn objects(&self, iteration: u32) -> Vec<(String, Bytes)> {
        let all = [
            (PromptRow::TABLE, &self.prompts),
            (TraceRow::TABLE, &self.traces),
            (LeafRow::TABLE, &self.leaves),
            (RewardRow::TABLE, &self.rewards),
            (AdvantageRow::TABLE, &self.advantages),
            (UpdateRow::TABLE, &self.updates),
        ];
        let keyed = all.into_iter().map(|(table, bytes)| {
            Ok((keys::table(table, iteration), bytes.as_ref().map_err(drop)?.clone()))
        });
        keyed.collect::<std::result::Result<_, ()>>().unwrap_or_default()
    }
}

fn encode_all(rows: &Rows) -> Tables {
    Tables {
        prompts: encode(&rows.prompts),
        traces: encode(&rows.traces),
        leaves: encode(&rows.leaves),
        rewards: encode(&rows.rewards),
        advantages: encode(&rows.advantages),
        updates: encode(&rows.updates),
    }
}

/// The same rows give the same bytes.
fn encode<R: Row>(rows: &[R]) -> Encoded {
    let said = |error: &dyn std::error::Error| error.to_string();
    let schema = R::schema();
    let batch =
        RecordBatch::try_new(schema.clone(), R::columns(rows)).map_err(|error| said(&error))?;
    let properties = WriterProperties::builder().set_created_by("duet".to_owned());
    // What is used of the memory, so that the same rows always give the same bytes.
    let used = |column: &ArrayRef| column.to_data().get_slice_memory_size().unwrap_or(SMALL);
    let properties = match batch.columns().iter().map(used).sum() {
        // To set up a compressor, a dictionary and an index of pages for each column would take
        // longer than all the rest.
        ..SMALL => properties
            .set_compression(Compression::UNCOMPRESSED)
            .set_dictionary_enabled(false)
            .set_statistics_enabled(EnabledStatistics::Chunk),
        _ => properties.set_compression(Compression::ZSTD(ZstdLevel::default())),
    };
    let mut out = Vec::new();
    let mut writer = ArrowWriter::try_new(&mut out, schema, Some(properties.build()))
        .map_err(|error| said(&error))?;
    writer.write(&batch).map_err(|error| said(&error))?;
    writer.close().map_err(|error| said(&error))?;
    Ok(out.into())
}

fn decode<R: Row>(bytes: Bytes) -> std::result::Result<Vec<R>, String> {
    let reader = ParquetRecordBatchReaderBuilder::try_new(bytes)
        .and_then(|builder| builder.build())
        .map_err(|error| error.to_string())?;
    let mut rows = Vec::new();
    for batch in reader {
        rows.extend(R::rows(&batch.map_err(|error| error.to_string())?)?);
    }
    Ok(rows)
}
