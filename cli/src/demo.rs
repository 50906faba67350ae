//! `duet demo`: the whole loop on one machine.
//!
//! ```text
//! base model (cached by content) -> evaluate held-out prompts -> train -> export -> evaluate again -> report
//! ```
//! Every phase leaves something behind; `--resume` takes up after the last one that is whole.

use crate::CliError;
use crate::args::{ConfigArgs, DemoArgs, LaunchArgs};
use crate::children::Memory;
use crate::launch::{self, Outcome};
use crate::phase::Phase;
use crate::report::{self, Facts, Places, Summary};
use crate::show::{bold, dim};
use duet_config::Config;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Where seconds of finished phases are kept, so that a resumed demo can add them up.
const PHASES: &str = "phases.json";

/// `duet demo`.
///
/// # Errors
/// A phase failed; the error says which and why.
pub async fn run(args: DemoArgs) -> Result<u8, CliError> {
    let demo = Demo::new(args)?;
    demo.say_hello();
    let mut phases = demo.read_phases();
    demo.bootstrap(&mut phases).await?;
    demo.evaluate("before", &demo.base, &mut phases).await?;
    let config = launch::load(&demo.args.config, &demo.set)?;
    let outcome = demo.train(&config, &mut phases).await?;
    if outcome.interrupted {
        launch::farewell(&outcome, &demo.again());
        return Ok(0);
    }
    demo.export(&config).await?;
    demo.evaluate("after", &demo.folder.join("model"), &mut phases).await?;
    let summary = demo.report(&config, &outcome, &phases).await?;
    println!("{}", report::table(&summary));
    demo.say_where();
    Ok(0)
}

struct Demo {
    args: DemoArgs,
    folder: PathBuf,
    base: PathBuf,
    set: Vec<String>,
    memory: Memory,
}

/// Seconds of each finished phase.
type Phases = BTreeMap<String, f64>;

impl Demo {
    fn new(args: DemoArgs) -> Result<Demo, CliError> {
        if args.name.is_empty() || args.name.contains(['/', '\\']) || args.name.starts_with('.') {
            return Err(CliError::Usage(format!(
                "--name `{}` must be a plain folder name",
                args.name
            )));
        }
        let folder = Path::new("runs").join(&args.name);
        let base = cache().join(format!("{}-seed{}", args.profile, args.seed));
        let path = |p: PathBuf| toml_string(&p.display().to_string());
        let mut set = vec![
            format!("run.name={}", toml_string(&args.name)),
            format!("run.seed={}", args.seed),
            format!("run.store={}", path(folder.clone())),
            format!("model.path={}", path(base.clone())),
            format!("data.prompts={}", path(base.join("miniworld/prompts-train.jsonl"))),
        ];
        set.extend(args.set.iter().cloned());
        launch::load(&args.config, &set)?;
        let logs = folder.join("logs");
        if !args.resume && folder.join("journal").exists() {
            // The demo is a thing to repeat: its old run makes room, and nothing else does.
            std::fs::remove_dir_all(&folder).map_err(|e| CliError::io("remove", &folder, e))?;
        }
        std::fs::create_dir_all(&logs).map_err(|e| CliError::io("create", &logs, e))?;
        Ok(Demo { args, folder, base, set, memory: Memory::start() })
    }

    fn say_hello(&self) {
        eprintln!("{}", bold("Duet: a think-then-generate model learns by Dual-GRPO"));
        eprintln!(
            "  {}",
            dim(&format!(
                "everything goes to {}/, logs to {}/logs/",
                self.folder.display(),
                self.folder.display()
            ))
        );
    }

    fn say_where(&self) {
        let folder = self.folder.display();
        println!("  pictures   {folder}/grid.png, {folder}/curves.png");
        println!("  numbers    {folder}/summary.json, {folder}/lineage/, {folder}/tensorboard/");
        println!("  model      {folder}/model/");
        println!(
            "  try it     target/debug/duet sample --model {folder}/model --prompt \"draw two plus three, in the color of grass, at the top left\" --out a.png"
        );
    }

    fn again(&self) -> String {
        format!("make demo NAME={} SEED={} ARGS=--resume", self.args.name, self.args.seed)
    }

    fn read_phases(&self) -> Phases {
        let text = std::fs::read(self.folder.join(PHASES)).unwrap_or_default();
        serde_json::from_slice(&text).unwrap_or_default()
    }

    fn finished(&self, phases: &mut Phases, name: &str, seconds: f64) -> Result<(), CliError> {
        *phases.entry(name.to_owned()).or_default() += seconds;
        let path = self.folder.join(PHASES);
        let text = serde_json::to_vec(phases).unwrap_or_default();
        std::fs::write(&path, text).map_err(|e| CliError::io("write", &path, e))
    }

    /// Makes the base model, unless one with the same content is cached.
    async fn bootstrap(&self, phases: &mut Phases) -> Result<(), CliError> {
        let (seed, out) = (self.args.seed.to_string(), self.base.display().to_string());
        let args = ["bootstrap", "--out", &out, "--seed", &seed, "--profile", &self.args.profile];
        let seconds = self.child("bootstrap", "duet-trainer", "base model", &args).await?;
        self.finished(phases, "bootstrap", seconds)
    }

    /// Measures a model on the held-out prompts, once.
    async fn evaluate(
        &self,
        when: &str,
        model: &Path,
        phases: &mut Phases,
    ) -> Result<(), CliError> {
        let out = self.folder.join(when);
        if self.args.resume && out.join("eval.json").is_file() {
            return Ok(());
        }
        let (model, out) = (model.display().to_string(), out.display().to_string());
        let world = self.base.join("miniworld").display().to_string();
        let prompts = format!("{world}/prompts-test.jsonl");
        let (seed, judge) = (self.args.seed.to_string(), self.base.display().to_string());
        let args = [
            "eval",
            "--model",
            &model,
            "--prompts",
            &prompts,
            "--out",
            &out,
            "--judge",
            &judge,
            "--seed",
            &seed,
            "--temperature",
            "1.0",
            "--images-per-prompt",
            "2",
        ];
        let what = format!("held-out prompts, {when} training");
        let seconds =
            self.child(&format!("eval-{when}"), "duet-rollout-worker", &what, &args).await?;
        self.finished(phases, &format!("evaluate {when}"), seconds)
    }

    async fn train(&self, config: &Config, phases: &mut Phases) -> Result<Outcome, CliError> {
        eprintln!(
            "{} {} rollout workers, {} reward worker, {} trainer ranks, one coordinator",
            bold("train"),
            config.workers.rollout,
            config.workers.reward,
            config.trainer.world_size
        );
        let resume = self.args.resume && self.folder.join("journal").exists();
        let config_args = ConfigArgs { config: self.args.config.clone(), set: self.set.clone() };
        let args = LaunchArgs { config: config_args, resume };
        let outcome = launch::train(config, &args, &self.memory).await?;
        self.finished(phases, "train", outcome.seconds)?;
        Ok(outcome)
    }

    /// Writes the trained pipeline folder.
    async fn export(&self, config: &Config) -> Result<(), CliError> {
        let manifest = launch::newest(&self.folder).await?;
        let out = self.folder.join("model");
        let average = config.trainer.ema > 0.0;
        let args = launch::export_args(&self.folder, &self.base, &out, &manifest, average);
        let what = "trained pipeline folder";
        self.child("export", "duet-rollout-worker", what, &args).await.map(drop)
    }

    async fn report(
        &self,
        config: &Config,
        outcome: &Outcome,
        phases: &Phases,
    ) -> Result<Summary, CliError> {
        let places = Places {
            run: self.folder.clone(),
            metrics: self.folder.join("metrics.jsonl"),
            before: self.folder.join("before"),
            after: self.folder.join("after"),
        };
        let manifest = launch::newest(&self.folder).await?;
        let train = phases.get("train").copied().unwrap_or(outcome.seconds);
        let workers = [
            ("coordinator", 1),
            ("rollout", config.workers.rollout),
            ("reward", config.workers.reward),
            ("trainer", config.trainer.world_size),
        ];
        let images = outcome.run.images;
        let facts = Facts {
            name: self.args.name.clone(),
            seed: self.args.seed,
            iterations: manifest.version.0 as u32,
            images,
            images_per_second: if train > 0.0 { images as f64 / train } else { 0.0 },
            wall_seconds: phases.values().sum(),
            phases: phases.clone(),
            peak_rss_mib: self.memory.peak_mib(),
            workers: workers.map(|(role, n)| (role.to_owned(), n)).into(),
            weights_digest: manifest.weights.digest.to_string(),
        };
        let files = [
            ("model", "model"),
            ("lineage", "lineage"),
            ("metrics", "metrics.jsonl"),
            ("checkpoints", "checkpoints"),
        ];
        Ok(report::write(&places, facts, &files)?)
    }

    /// Runs a phase as a child process and shows the last line of its log; how long it took.
    async fn child<S: AsRef<str>>(
        &self,
        name: &str,
        binary: &'static str,
        what: &str,
        args: &[S],
    ) -> Result<f64, CliError> {
        let log = self.folder.join("logs").join(format!("{name}.log"));
        let phase = Phase { name, what, log, again: &self.again(), memory: &self.memory };
        phase.run(binary, args).await
    }
}

/// Where base models are kept: they depend on seed and profile alone.
pub fn cache() -> PathBuf {
    let home = std::env::var_os("HOME").map_or_else(|| PathBuf::from("."), PathBuf::from);
    let cache =
        std::env::var_os("XDG_CACHE_HOME").map_or_else(|| home.join(".cache"), PathBuf::from);
    cache.join("duet").join("miniworld")
}

/// A TOML string: quotes and backslashes in a path must not end it.
pub fn toml_string(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}
