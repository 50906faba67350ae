//! `duet experiment paper`: the rows of arXiv 2601.10332's tables 1, 4 and 5, in the small world.
//!
//! ```text
//! for each seed   bootstrap --without-sft -> duet sft -> for each row: launch, export, evaluate -> result.json
//! over all seeds  means and standard errors, orderings -> table.json, README.md, curves.png, raw/*.parquet
//! ```
//! A row with a `result.json` of the same recipe is not done again, so an interrupted experiment goes
//! on where it was.

mod record;
mod results;
pub mod rows;
pub mod statistics;
mod tables;

use crate::CliError;
use crate::args::{ConfigArgs, LaunchArgs, PaperArgs};
use crate::children::Memory;
use crate::demo::toml_string;
use crate::phase::Phase;
use crate::show::{bold, dim, span};
use crate::{launch, sft};
use record::read_evaluation;
pub use record::{Accuracies, RowResult};
use rows::{ROWS, Row, Start};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Evaluations of a model, each with noise of its own.
const REPEATS: u32 = 2;
/// Images of a prompt and evaluation; they share a chain of thought.
const IMAGES: u32 = 2;

/// `duet experiment paper`.
///
/// # Errors
/// A step failed; the error says which and why. What is finished is kept.
pub async fn run(args: PaperArgs) -> Result<u8, CliError> {
    let started = Instant::now();
    let rows = chosen(&args.row)?;
    let experiment = Experiment::new(args);
    let mut all = Vec::new();
    for seed in 1..=experiment.seeds {
        for row in &rows {
            let Some(result) = experiment.row(seed, row).await? else {
                eprintln!("  go on with: {}", experiment.again());
                return Ok(0);
            };
            all.push(result);
        }
    }
    let summary = results::Summary::new(&rows, &all);
    println!("{}", results::table(&summary));
    results::write(&experiment, &summary, &all)?;
    println!("  results   {}/README.md, table.json, curves.png, raw/", experiment.out.display());
    println!("  took      {}", span(started.elapsed().as_secs_f64()));
    Ok(0)
}

/// The rows that are asked for, in order.
fn chosen(names: &[String]) -> Result<Vec<Row>, CliError> {
    if let Some(name) = names.iter().find(|name| ROWS.iter().all(|row| row.id != name.as_str())) {
        let known: Vec<&str> = ROWS.iter().map(|row| row.id).collect();
        return Err(CliError::Usage(format!(
            "--row {name}: there is no such row; there are {}",
            known.join(", ")
        )));
    }
    let wanted = |row: &&Row| names.is_empty() || names.iter().any(|name| name == row.id);
    Ok(ROWS.iter().filter(wanted).copied().collect())
}

/// The experiment, as the command line has it.
pub(crate) struct Experiment {
    args: PaperArgs,
    pub(crate) seeds: u32,
    pub(crate) folder: PathBuf,
    pub(crate) out: PathBuf,
    memory: Memory,
}

impl Experiment {
    fn new(args: PaperArgs) -> Experiment {
        let small = |path: &str| PathBuf::from(path);
        let folder = args
            .folder
            .clone()
            .unwrap_or_else(|| small(if args.small { "runs/paper-small" } else { "runs/paper" }));
        // A small form's numbers mean nothing: they do not go where the real ones are shown.
        let out = match (&args.out, args.small) {
            (Some(out), _) => out.clone(),
            (None, true) => folder.join("results"),
            (None, false) => small("docs/results"),
        };
        let seeds = if args.small { 1 } else { args.seeds };
        Experiment { args, seeds, folder, out, memory: Memory::start() }
    }

    /// The command that goes on with it.
    pub(crate) fn again(&self) -> String {
        let small = if self.args.small { " --small" } else { "" };
        format!("duet experiment paper --seeds {}{small}", self.args.seeds)
    }

    fn profile(&self) -> &'static str {
        if self.args.small { "test" } else { "demo" }
    }

    fn seed_folder(&self, seed: u32) -> PathBuf {
        self.folder.join(format!("seed-{seed}"))
    }

    pub(crate) fn row_folder(&self, seed: u32, row: &str) -> PathBuf {
        self.seed_folder(seed).join(row)
    }

    fn base(&self, seed: u32) -> PathBuf {
        self.seed_folder(seed).join("base-model")
    }

    /// The overrides of the configuration for a run in `folder` that starts from `model`.
    fn set(&self, seed: u32, name: &str, model: &Path, folder: &Path) -> Vec<String> {
        let path = |path: &Path| toml_string(&path.display().to_string());
        let data = self.base(seed).join("miniworld");
        let mut set = vec![
            format!("run.name=\"{name}\""),
            format!("run.seed={seed}"),
            format!("run.store={}", path(folder)),
            format!("model.path={}", path(model)),
            format!("model.bootstrap=\"{}\"", self.profile()),
            format!("data.prompts={}", path(&data.join("prompts-train.jsonl"))),
            format!("sft.data={}", path(&data.join("sft.jsonl"))),
        ];
        if self.args.small {
            let small = [
                "run.iterations=2",
                "rollout.prompts_per_iteration=2",
                "rollout.traces=2",
                "rollout.images_per_trace=2",
                "rollout.steps=4",
                "window.high=3",
                "trainer.world_size=1",
                "workers.rollout=1",
                "sft.epochs=1",
                "sft.batch=512",
            ];
            set.extend(small.map(str::to_owned));
        }
        set
    }

    fn launch_args(&self, set: Vec<String>, resume: bool) -> LaunchArgs {
        let config = ConfigArgs { config: self.args.config.clone(), set };
        LaunchArgs { config, resume }
    }

    /// The command line that a person would type.
    fn command(&self, verb: &str, set: &[String]) -> String {
        let set: String = set.iter().map(|set| format!(" --set '{set}'")).collect();
        format!("duet {verb} {}{set}", self.args.config.display())
    }

    async fn child(
        &self,
        folder: &Path,
        name: &str,
        binary: &'static str,
        what: &str,
        args: &[String],
    ) -> Result<(), CliError> {
        let logs = folder.join("logs");
        std::fs::create_dir_all(&logs).map_err(|e| CliError::io("create", &logs, e))?;
        let log = logs.join(format!("{name}.log"));
        let again = self.again();
        let phase = Phase { name, what, log, again: &again, memory: &self.memory };
        phase.run(binary, args).await.map(drop)
    }

    /// Makes the model that a row starts from; nothing when a person interrupted it.
    async fn start(
        &self,
        seed: u32,
        start: Start,
        commands: &mut Vec<String>,
    ) -> Result<Option<PathBuf>, CliError> {
        let base = self.base(seed);
        let args: Vec<String> = [
            "bootstrap",
            "--without-sft",
            "--seed",
            &seed.to_string(),
            "--profile",
            self.profile(),
            "--out",
            &base.display().to_string(),
        ]
        .map(str::to_owned)
        .to_vec();
        commands.push(format!("duet-trainer {}", args.join(" ")));
        // One that is there, whole, is used again: the child sees to that, in a moment.
        let what = format!("base model of seed {seed}");
        self.child(&self.seed_folder(seed), "bootstrap", "duet-trainer", &what, &args).await?;
        if start == Start::Base {
            return Ok(Some(base));
        }
        let folder = self.row_folder(seed, "sft");
        let set = self.set(seed, "sft", &base, &folder);
        commands.push(self.command("sft", &set));
        let config = launch::load(&self.args.config, &set)?;
        sft::stage(&config, &self.launch_args(set, true), &self.again(), &self.memory).await
    }

    /// Does a row, unless it is done; nothing when a person interrupted it.
    async fn row(&self, seed: u32, row: &Row) -> Result<Option<RowResult>, CliError> {
        let folder = self.row_folder(seed, row.id);
        let file = folder.join("result.json");
        let recipe = self.recipe(seed, row)?;
        let before = std::fs::read(&file).ok();
        let before = before.and_then(|text| serde_json::from_slice::<RowResult>(&text).ok());
        if let Some(result) = before.filter(|result| result.recipe == recipe) {
            eprintln!("{} seed {seed}, {}", dim("done before:"), row.label);
            return Ok(Some(result));
        }
        eprintln!("{}", bold(&format!("seed {seed}, {}", row.label)));
        let mut result = RowResult {
            recipe,
            row: row.id.to_owned(),
            seed,
            training_images: 0,
            iterations: 0,
            seconds: 0.0,
            evaluations: Vec::new(),
            commands: Vec::new(),
        };
        let Some(start) = self.start(seed, row.start, &mut result.commands).await? else {
            return Ok(None);
        };
        let model = match row.training {
            None => start,
            Some(_) => match self.train(seed, row, &start, &mut result).await? {
                Some(model) => model,
                None => return Ok(None),
            },
        };
        for repeat in 0..REPEATS {
            result
                .evaluations
                .push(self.evaluate(seed, row, &model, repeat, &mut result.commands).await?);
        }
        let text = serde_json::to_vec_pretty(&result).unwrap_or_default();
        std::fs::write(&file, text).map_err(|e| CliError::io("write", &file, e))?;
        Ok(Some(result))
    }

    /// What decides a row: the values of its configuration, and how it is measured.
    fn recipe(&self, seed: u32, row: &Row) -> Result<String, CliError> {
        let folder = self.row_folder(seed, row.id);
        let mut set = self.set(seed, row.id, &self.base(seed), &folder);
        let config = launch::load(&self.args.config, &set)?;
        if let Some(training) = row.training {
            set.extend(training.set(config.run.iterations));
        }
        let config = launch::load(&self.args.config, &set)?;
        let iterations = row.training.map(|_| config.run.iterations);
        let text = format!(
            "{} {iterations:?} {:?} {:?} {REPEATS} {IMAGES} {}",
            config.digest(),
            row.start,
            row.think,
            self.profile()
        );
        Ok(duet_core::Digest::of(text.as_bytes()).to_string())
    }

    /// Reinforcement learning; the trained pipeline folder.
    async fn train(
        &self,
        seed: u32,
        row: &Row,
        start: &Path,
        result: &mut RowResult,
    ) -> Result<Option<PathBuf>, CliError> {
        let folder = self.row_folder(seed, row.id);
        let mut set = self.set(seed, row.id, start, &folder);
        let config = launch::load(&self.args.config, &set)?;
        let training = row.training.map(|training| training.set(config.run.iterations));
        set.extend(training.unwrap_or_default());
        // SFT has been done: this is what it would do again.
        let config = launch::load(&self.args.config, &set)?;
        result.commands.push(format!("{} --skip-sft", self.command("launch", &set)));
        let stale = std::fs::read_to_string(folder.join("recipe")).ok();
        if stale.is_some_and(|stale| stale != result.recipe) {
            std::fs::remove_dir_all(&folder).map_err(|e| CliError::io("remove", &folder, e))?;
        }
        std::fs::create_dir_all(&folder).map_err(|e| CliError::io("create", &folder, e))?;
        let mark = folder.join("recipe");
        std::fs::write(&mark, &result.recipe).map_err(|e| CliError::io("write", &mark, e))?;
        let resume = folder.join("journal").exists();
        let args = self.launch_args(set, resume);
        let outcome = launch::train(&config, &args, &self.memory).await?;
        if outcome.interrupted {
            return Ok(None);
        }
        let manifest = launch::newest(&folder).await?;
        result.iterations = manifest.version.0;
        // Each iteration renders the same number, resumed or not.
        let (p, j, k) = (
            config.rollout.prompts_per_iteration,
            config.rollout.traces,
            config.rollout.images_per_trace,
        );
        result.training_images = manifest.version.0 * u64::from(p) * u64::from(j) * u64::from(k);
        result.seconds = outcome.seconds;
        let model = folder.join("model");
        let average = config.trainer.ema > 0.0;
        let args = launch::export_args(&folder, start, &model, &manifest, average);
        result.commands.push(format!("duet-rollout-worker {}", args.join(" ")));
        let what = "trained pipeline folder";
        self.child(&folder, "export", "duet-rollout-worker", what, &args).await?;
        Ok(Some(model))
    }

    /// Where an evaluation of a row lies.
    pub(crate) fn evaluation(&self, seed: u32, row: &str, repeat: u32) -> PathBuf {
        self.row_folder(seed, row).join(format!("eval-{repeat}"))
    }

    async fn evaluate(
        &self,
        seed: u32,
        row: &Row,
        model: &Path,
        repeat: u32,
        commands: &mut Vec<String>,
    ) -> Result<Accuracies, CliError> {
        let folder = self.row_folder(seed, row.id);
        let out = self.evaluation(seed, row.id, repeat);
        let base = self.base(seed);
        let text = |path: &Path| path.display().to_string();
        let pairs = [
            ("--model", text(model)),
            ("--prompts", text(&base.join("miniworld/prompts-test.jsonl"))),
            ("--out", text(&out)),
            ("--judge", text(&base)),
            ("--seed", (1000 * seed + repeat).to_string()),
            ("--temperature", "1.0".to_owned()),
            ("--images-per-prompt", IMAGES.to_string()),
        ];
        let mut args = vec!["eval".to_owned()];
        args.extend(pairs.into_iter().flat_map(|(name, value)| [name.to_owned(), value]));
        if !row.think {
            args.push("--no-think".to_owned());
        }
        if self.args.small {
            args.extend(["--limit", "8"].map(str::to_owned));
        }
        commands.push(format!("duet-rollout-worker {}", args.join(" ")));
        let what = format!("held-out prompts, evaluation {} of {REPEATS}", repeat + 1);
        let name = format!("eval-{repeat}");
        self.child(&folder, &name, "duet-rollout-worker", &what, &args).await?;
        Ok(read_evaluation(&out)?.totals)
    }
}
