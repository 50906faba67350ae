//! The checked configuration and what others need of it.

use crate::check;
use crate::error::{ConfigError, Problems};
use crate::layers;
use crate::raw::{Advantages, Raw};
use crate::sections::{
    Bootstrap, Checkpoint, Coordinator, Data, Dit, Evaluation, Llm, Model, Reward, Rollout, Run,
    Security, Trainer, Workers,
};
use crate::sft::Sft;
use crate::{digest, prompts};
use duet_core::advantage::AdvantageSpec;
use duet_core::reward::RewardSpec;
use duet_core::schedule::{Schedule, WindowSpec};
use duet_core::spec::{RunSpec, Timing};
use duet_core::{Digest, Millis};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// A configuration that was checked as a whole. It is not changed afterwards.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Config {
    pub(crate) raw: Raw,
    /// `[run]`
    pub run: Run,
    /// `[model]`
    pub model: Model,
    /// `[data]`
    pub data: Data,
    /// `[rollout]`
    pub rollout: Rollout,
    /// `[window]`
    pub window: WindowSpec,
    /// `[schedule]`
    pub schedule: Schedule,
    /// `[reward]`
    pub reward: Reward,
    /// `[advantage.llm]`
    pub llm_advantage: AdvantageSpec,
    /// `[advantage.dit]`
    pub dit_advantage: AdvantageSpec,
    /// `[llm]`
    pub llm: Llm,
    /// `[dit]`
    pub dit: Dit,
    /// `[trainer]`
    pub trainer: Trainer,
    /// `[workers]`
    pub workers: Workers,
    /// `[coordinator]`
    pub coordinator: Coordinator,
    /// `[checkpoint]`
    pub checkpoint: Checkpoint,
    /// `[security]`
    pub security: Security,
    /// `[evaluation]`
    pub evaluation: Evaluation,
    /// `[sft]`
    pub sft: Option<Sft>,
    /// `[telemetry]`
    pub telemetry: crate::telemetry::Telemetry,
}

impl Config {
    /// Reads a file with what lies over it: environment variables `DUET__SECTION__KEY` out of `env`,
    /// then `set`, each `section.key=value`.
    ///
    /// # Errors
    /// [`ConfigError`] naming each key that is wrong, and the fix.
    pub fn load(
        path: &Path,
        env: &BTreeMap<String, String>,
        set: &[String],
    ) -> Result<Config, ConfigError> {
        let read = |source| ConfigError::Read { path: path.to_owned(), source };
        let text = std::fs::read_to_string(path).map_err(read)?;
        Config::from_text(&path.display().to_string(), &text, env, set)
    }

    /// As [`Config::load`], from text; `name` is what errors call it.
    ///
    /// # Errors
    /// The same.
    pub fn from_text(
        name: &str,
        text: &str,
        env: &BTreeMap<String, String>,
        set: &[String],
    ) -> Result<Config, ConfigError> {
        let raw = layers::read(name, text, env, set)?;
        let mut problems = Problems::default();
        let config = check::config(raw, &mut problems);
        match config {
            Some(config) if problems.0.is_empty() => Ok(config),
            _ => Err(ConfigError::Invalid { name: name.to_owned(), problems: problems.0 }),
        }
    }

    /// What the scheduler needs to know.
    pub fn run_spec(&self) -> RunSpec {
        let c = &self.coordinator;
        RunSpec {
            seed: self.run.seed,
            iterations: self.run.iterations,
            prompts_per_iteration: self.rollout.prompts_per_iteration,
            traces: self.rollout.traces,
            leaves: self.rollout.images_per_trace,
            lag: self.rollout.lag,
            steps: self.rollout.steps,
            window: self.window,
            schedule: self.schedule.clone(),
            reward: self.reward_spec(),
            llm_advantage: self.llm_advantage,
            dit_advantage: self.dit_advantage,
            extra_prompts: self.rollout.extra_prompts,
            world: self.trainer.world_size,
            min_world: self.trainer.min_world_size.unwrap_or(0),
            checkpoint_every: self.checkpoint.every,
            max_attempts: c.max_attempts,
            quarantine_after: c.quarantine_after,
            timing: Timing {
                heartbeat_timeout: Millis(c.heartbeat_timeout_ms),
                reconnect: Millis(c.reconnect_ms),
                think: Millis(c.think_ms),
                render: Millis(c.render_ms),
                score: Millis(c.score_ms),
                step: Millis(c.step_ms),
                rendezvous: Millis(c.rendezvous_ms),
                backoff: Millis(c.backoff_ms),
                backoff_max: Millis(c.backoff_max_ms),
            },
        }
    }

    /// How scores become rewards.
    pub fn reward_spec(&self) -> RewardSpec {
        RewardSpec {
            llm: self.reward.llm.clone(),
            dit: self.reward.dit.clone(),
            failure: self.reward.failure,
            shape: self.reward.shape,
        }
    }

    /// The base model's pipeline folder.
    pub fn model_path(&self) -> PathBuf {
        match (&self.model.path, self.model.bootstrap) {
            (Some(path), _) => path.clone(),
            (None, Some(Bootstrap::Test)) => PathBuf::from("runs/base/test"),
            (None, _) => PathBuf::from("runs/base/demo"),
        }
    }

    /// The file of training prompts.
    pub fn prompts_path(&self) -> PathBuf {
        let own = || self.model_path().join("miniworld/prompts-train.jsonl");
        self.data.prompts.clone().unwrap_or_else(own)
    }

    /// The training prompts.
    ///
    /// # Errors
    /// As [`prompts::read`].
    pub fn read_prompts(&self) -> Result<Vec<duet_core::work::PromptRow>, prompts::PromptsError> {
        prompts::read(&self.prompts_path())
    }

    /// The file of held-out prompts, if there is one.
    pub fn evaluation_prompts_path(&self) -> Option<PathBuf> {
        let own = || {
            let bootstrapped = self.model.bootstrap.is_some();
            bootstrapped.then(|| self.model_path().join("miniworld/prompts-test.jsonl"))
        };
        self.evaluation.prompts.clone().or_else(own)
    }

    /// The file of worked examples, if there is an `[sft]` stage.
    pub fn sft_data_path(&self) -> Option<PathBuf> {
        let own = || self.model_path().join("miniworld/sft.jsonl");
        self.sft.as_ref().map(|sft| sft.data.clone().unwrap_or_else(own))
    }

    /// The folder of the `[sft]` stage: checkpoints, logs, its result in `model/`.
    pub fn sft_folder(&self) -> PathBuf {
        self.local_folder().join("sft")
    }

    /// Where everything durable lies: a folder or a URL.
    pub fn store_url(&self) -> String {
        self.run.store.clone().unwrap_or_else(|| format!("runs/{}", self.run.name))
    }

    /// The run's folder on this machine, for logs and reports: the store where that is a folder,
    /// else `runs/<name>`.
    pub fn local_folder(&self) -> PathBuf {
        let url = self.store_url();
        match url.split_once("://") {
            None => PathBuf::from(url),
            Some(("file", path)) => PathBuf::from(path),
            Some(_) => Path::new("runs").join(&self.run.name),
        }
    }

    /// Advantages as written.
    pub fn advantages(&self) -> &Advantages {
        &self.raw.advantage
    }

    /// Hash over everything that decides the results of a run, and over nothing else: not its name,
    /// its length, its place, its workers, its world size or its deadlines.
    pub fn digest(&self) -> Digest {
        digest::of(&self.raw)
    }

    /// All keys with their values, as a file that gives this configuration again. Credentials in
    /// URLs are left out.
    pub fn to_toml(&self) -> String {
        digest::print(&self.raw)
    }
}
