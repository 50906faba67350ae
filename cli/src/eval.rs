//! `duet eval`: draws a suite's prompts with a model, has the images scored, and adds up.
//!
//! ```text
//! suite --> prompts.jsonl --rollout worker--> images/, eval.json --reward worker--> scores.jsonl
//!                                             report.json, index.html, a table <--+
//! ```

use crate::CliError;
use crate::args::EvalArgs;
use crate::children::Memory;
use crate::phase::Phase;
use crate::suite::score::{ImageScores, Roles, Totals, columns, of_image, totals};
use crate::suite::{self, Suite};
use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{Cell, CellAlignment, Table};
use duet_core::work::PromptRow;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

mod gallery;

/// What is read of `eval.json`.
#[derive(Debug, Deserialize)]
struct Made {
    settings: serde_json::Value,
    prompts: Vec<MadePrompt>,
}

#[derive(Debug, Deserialize)]
struct MadePrompt {
    row: u64,
    trace: String,
    refined_prompt: String,
    images: Vec<MadeImage>,
}

#[derive(Debug, Deserialize)]
struct MadeImage {
    file: String,
}

/// An image with its scores.
#[derive(Clone, Debug, Serialize)]
pub struct Shown {
    /// Its file, relative to the report.
    pub file: String,
    /// The suite's scores.
    pub scores: BTreeMap<String, f64>,
    /// Why there is no score, by component.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub failed: BTreeMap<String, String>,
}

/// A prompt with its images.
#[derive(Clone, Debug, Serialize)]
pub struct Entry {
    /// What the suite calls it.
    pub id: String,
    /// What it counts for.
    pub category: String,
    /// What was asked.
    pub prompt: String,
    /// What the model thought; empty where it was not asked to.
    pub trace: String,
    /// What the images were drawn from.
    pub refined_prompt: String,
    /// The images.
    pub images: Vec<Shown>,
}

/// `report.json`.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// `duet-suite-1`.
    pub format: String,
    /// Whose suite.
    pub suite: String,
    /// Its files.
    pub files: Vec<PathBuf>,
    /// The model's folder.
    pub model: PathBuf,
    /// How images were made.
    pub settings: serde_json::Value,
    /// The scores.
    pub totals: Totals,
    /// Every prompt, in the suite's order.
    pub entries: Vec<Entry>,
}

/// `duet eval`.
///
/// # Errors
/// The suite is broken, or a worker failed.
pub async fn run(args: EvalArgs) -> Result<u8, CliError> {
    let mut suite = suite::read(&args.suite, &args.questions, args.format)?;
    suite.items.truncate(args.limit.unwrap_or(usize::MAX));
    let roles = Roles::new(suite.format, &args.role)?;
    let out = args.out.clone().unwrap_or_else(|| place(&args));
    let work = Work { args: &args, suite: &suite, out: &out, memory: Memory::start() };
    work.draw().await?;
    let scored = work.score().await?;
    let report = work.add_up(&roles, scored)?;
    let path = out.join("report.json");
    let text = serde_json::to_vec_pretty(&report).unwrap_or_default();
    std::fs::write(&path, text).map_err(|e| CliError::io("write", &path, e))?;
    gallery::write(&report, &out)?;
    println!("{}", table(&report));
    say_what_is_missing(&report);
    println!("  gallery   {}", out.join("index.html").display());
    println!("  numbers   {}", path.display());
    Ok(0)
}

/// `runs/eval/<model>-<suite>`.
fn place(args: &EvalArgs) -> PathBuf {
    let name = |path: &Path| path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    // A trained folder is called `model`: its run's name says more.
    let model = args.model.canonicalize().unwrap_or_else(|_| args.model.clone());
    let own = name(&model);
    let own = match (own.as_str(), model.parent()) {
        ("model", Some(parent)) => name(parent),
        _ => own,
    };
    let suite = args.suite.first().map(|path| name(path)).unwrap_or_default();
    Path::new("runs/eval").join(format!("{own}-{suite}"))
}

/// An evaluation under way.
struct Work<'a> {
    args: &'a EvalArgs,
    suite: &'a Suite,
    out: &'a Path,
    memory: Memory,
}

impl Work<'_> {
    fn text(path: &Path) -> String {
        path.display().to_string()
    }

    fn prompts(&self) -> PathBuf {
        self.out.join("prompts.jsonl")
    }

    async fn child(
        &self,
        name: &str,
        binary: &'static str,
        what: &str,
        args: &[String],
    ) -> Result<(), CliError> {
        let log = self.out.join(format!("{name}.log"));
        let again = "the same command";
        let phase = Phase { name, what, log, again, memory: &self.memory };
        phase.run(binary, args).await.map(drop)
    }

    /// Makes the images, unless those of before are to be scored again.
    async fn draw(&self) -> Result<(), CliError> {
        let (args, out) = (self.args, self.out);
        if args.rescore {
            let made = out.join("eval.json");
            return match made.is_file() {
                true => Ok(()),
                false => Err(CliError::Usage(format!(
                    "--rescore: {} is missing; leave --rescore out to make the images",
                    made.display()
                ))),
            };
        }
        std::fs::create_dir_all(out).map_err(|e| CliError::io("create", out, e))?;
        let row = |(row, item): (u64, &suite::Item)| PromptRow {
            row,
            text: item.prompt.clone(),
            meta: item.meta.to_string(),
        };
        let rows: Vec<PromptRow> = (0u64..).zip(&self.suite.items).map(row).collect();
        let path = self.prompts();
        std::fs::write(&path, duet_config::prompts::to_text(&rows))
            .map_err(|e| CliError::io("write", &path, e))?;
        let mut list: Vec<String> = vec!["eval".to_owned()];
        let pairs = [
            ("--model", Work::text(&args.model)),
            ("--prompts", Work::text(&path)),
            ("--out", Work::text(out)),
            ("--images-per-prompt", args.images_per_prompt.to_string()),
            ("--seed", args.seed.to_string()),
        ];
        list.extend(pairs.into_iter().flat_map(|(name, value)| [name.to_owned(), value]));
        list.extend(args.sampling.iter().cloned());
        let count = self.suite.items.len() * args.images_per_prompt as usize;
        let what = format!("{count} images of {}", args.model.display());
        self.child("draw", "duet-rollout-worker", &what, &list).await
    }

    /// Has the images scored; nothing where nobody can.
    async fn score(&self) -> Result<Vec<ImageScores>, CliError> {
        let own = self.args.scorers.clone().unwrap_or_else(|| self.args.model.clone());
        let miniworld = own.join("miniworld/scorers.safetensors").is_file();
        let mut list: Vec<String> = ["score", "--eval"].map(str::to_owned).to_vec();
        list.push(Work::text(self.out));
        list.extend(["--prompts".to_owned(), Work::text(&self.prompts())]);
        match &self.args.config {
            Some(config) => {
                list.extend(["--config".to_owned(), Work::text(config)]);
                for set in &self.args.set {
                    list.extend(["--set".to_owned(), set.clone()]);
                }
                if miniworld {
                    list.extend(["--scorers".to_owned(), Work::text(&own)]);
                }
            }
            None if miniworld => list.extend(["--scorers".to_owned(), Work::text(&own)]),
            None => {
                eprintln!(
                    "nobody scores: give --config FILE, whose [reward] names scorers; the images are made"
                );
                return Ok(Vec::new());
            }
        }
        self.child("score", "duet-reward-worker", "scores", &list).await?;
        let path = self.out.join("scores.jsonl");
        let text = std::fs::read_to_string(&path).map_err(|e| CliError::io("read", &path, e))?;
        let line = |line: &str| {
            serde_json::from_str(line)
                .map_err(|e| CliError::Usage(format!("{}: {e}", path.display())))
        };
        let scores: Vec<ImageScores> = text.lines().map(line).collect::<Result<_, _>>()?;
        let failed = || scores.iter().flat_map(|one| one.failed.iter()).next();
        if scores.iter().all(|one| one.scores.is_empty())
            && let Some((component, reason)) = failed()
        {
            return Err(CliError::Usage(format!(
                "no image could be scored; {component}: {reason}"
            )));
        }
        Ok(scores)
    }

    fn add_up(&self, roles: &Roles, scored: Vec<ImageScores>) -> Result<Report, CliError> {
        let path = self.out.join("eval.json");
        let bytes = std::fs::read(&path).map_err(|e| CliError::io("read", &path, e))?;
        let made: Made = serde_json::from_slice(&bytes)
            .map_err(|e| CliError::Usage(format!("{}: {e}", path.display())))?;
        let names = columns(self.suite.format, &scored);
        let by_place: BTreeMap<(u64, usize), ImageScores> =
            scored.into_iter().map(|one| ((one.row, one.image), one)).collect();
        let mut entries = Vec::new();
        for made in &made.prompts {
            let item = self.suite.items.get(made.row as usize).ok_or_else(|| {
                CliError::Usage(format!(
                    "{} has a prompt {} that the suite has not: make the images again",
                    path.display(),
                    made.row
                ))
            })?;
            let shown = |(image, file): (usize, &MadeImage)| {
                let one = by_place.get(&(made.row, image)).cloned().unwrap_or_default();
                let scores = of_image(self.suite.format, item, &one.scores, roles);
                Shown { file: file.file.clone(), scores, failed: one.failed }
            };
            entries.push(Entry {
                id: item.id.clone(),
                category: item.category.clone(),
                prompt: item.prompt.clone(),
                trace: made.trace.clone(),
                refined_prompt: made.refined_prompt.clone(),
                images: made.images.iter().enumerate().map(shown).collect(),
            });
        }
        let images: Vec<Vec<BTreeMap<String, f64>>> = entries
            .iter()
            .map(|entry| entry.images.iter().map(|image| image.scores.clone()).collect())
            .collect();
        Ok(Report {
            format: "duet-suite-1".to_owned(),
            suite: self.suite.format.to_string(),
            files: self.args.suite.clone(),
            model: self.args.model.clone(),
            settings: made.settings,
            totals: totals(self.suite, names, &images),
            entries,
        })
    }
}

/// The table of the terminal.
pub fn table(report: &Report) -> Table {
    let totals = &report.totals;
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED);
    let mut head = vec![format!("{} (of 100)", report.suite), "prompts".to_owned()];
    head.extend(totals.columns.iter().cloned());
    table.set_header(head);
    let right = |text: String| Cell::new(text).set_alignment(CellAlignment::Right);
    let overall = ("overall".to_owned(), totals.overall.clone());
    for (name, means) in totals.categories.iter().chain([&overall]) {
        let mut row = vec![Cell::new(name), right(means.prompts.to_string())];
        let cell = |column: &String| {
            means.means.get(column).map_or("-".to_owned(), |value| format!("{:.1}", 100.0 * value))
        };
        row.extend(totals.columns.iter().map(|column| right(cell(column))));
        table.add_row(row);
    }
    table
}

fn say_what_is_missing(report: &Report) {
    let totals = &report.totals;
    println!("  overall   {}", totals.weighting);
    if !totals.missing.is_empty() {
        println!("  left out  {}: nothing was scored of it", totals.missing.join(", "));
    }
    if totals.overall.unscored > 0 && !totals.columns.is_empty() {
        let (unscored, images) = (totals.overall.unscored, totals.overall.images);
        println!("  unscored  {unscored} of {images} images; they count for nothing");
    }
}
