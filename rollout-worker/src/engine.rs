//! The models and what is done with them: thinking and rendering. Lives on the device thread.
//!
//! Everything here is a function of its arguments and of the weights of the version that it names:
//! the same call gives the same bytes on any worker of the same kind.

use crate::error::WorkError;
use crate::policies::{Policies, Trained, WeightFiles};
use duet_core::work::{Finish, Weights, Window};
use duet_core::{ArtifactRef, Seed};
use duet_models::ModelError;
use duet_models::artifact::{RenderArtifact, ThinkArtifact};
use duet_models::decoder::Decoder;
use duet_models::embed::Embedder;
use duet_models::generate::{SampleOptions, generate_watched};
use duet_models::logprob::token_log_probs;
use duet_models::lora::{Lora, LoraConfig};
use duet_models::pipeline::Pipeline;
use duet_models::render::{Condition, RenderOptions, Rendered, render, render_watched};
use duet_models::template::{ThinkTemplate, extract};
use tch::{Device, Tensor};

/// What stands for "nothing" in classifier-free guidance, as the published pipeline has it.
pub const NEGATIVE_PROMPT: &str = " ";

/// How traces and images are sampled.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// What the LLM is told to do, before the raw prompt in the user's turn.
    pub instruction: String,
    /// Logits are divided by it; zero (evaluation only): the most probable token each time.
    pub temperature: f64,
    /// Most tokens of a trace.
    pub max_new_tokens: usize,
    /// How images are sampled.
    pub render: RenderOptions,
    /// Store the final latents of images, which DiffusionNFT trains on.
    pub keep_last: bool,
}

/// Which branches are trained through an adapter, and through which.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Adapters {
    /// The LLM's.
    pub llm: Option<LoraConfig>,
    /// The DiT's.
    pub dit: Option<LoraConfig>,
}

/// A sampled trace.
#[derive(Debug)]
pub struct Thought {
    /// Its tokens, with the one that ended it.
    pub tokens: Vec<i64>,
    /// All of its text.
    pub text: String,
    /// The refined prompt.
    pub refined_prompt: String,
    /// Whether the marker was there.
    pub well_formed: bool,
    /// How it ended.
    pub finish: Finish,
    /// Embeddings of the refined prompt, `[T, D]`.
    pub embeds: Tensor,
}

/// A trace as it goes into the artifact store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredThought {
    /// The artifact's bytes.
    pub artifact: Vec<u8>,
    /// All of its text.
    pub text: String,
    /// The refined prompt.
    pub refined_prompt: String,
    /// Whether the marker was there.
    pub well_formed: bool,
    /// Response length in tokens.
    pub tokens: u32,
    /// How it ended.
    pub finish: Finish,
}

/// The models, the policies and how to sample.
#[derive(Debug)]
pub struct Engine {
    pipeline: Pipeline,
    template: ThinkTemplate,
    sampling: Sampling,
    policies: Policies,
    llm_adapter: Option<Lora>,
    dit_adapter: Option<Lora>,
    /// Embeddings of [`NEGATIVE_PROMPT`] under the active policy.
    negative: Option<Tensor>,
}

impl Engine {
    /// An engine on a loaded model that holds up to `versions` policies. Where a branch is trained
    /// through an adapter, versions replace the adapter's tensors; the base model is the adapter
    /// before training, which changes nothing.
    ///
    /// # Errors
    /// The chat template, the tokenizer, the image size or an adapter do not fit the model.
    pub fn new(
        mut pipeline: Pipeline,
        sampling: Sampling,
        adapters: Adapters,
        versions: usize,
    ) -> Result<Engine, ModelError> {
        let template =
            ThinkTemplate::new(&sampling.instruction, pipeline.tokenizer.chat_template())?;
        Embedder::new(&pipeline.lm, &pipeline.tokenizer)?;
        pipeline.grid(sampling.render.width, sampling.render.height)?;
        // B is zero before training, so what A is drawn from does not matter.
        let seed = Seed::root(0);
        let attach = |config: LoraConfig| Lora::attach(&mut pipeline.lm, config, &seed);
        let llm_adapter = adapters.llm.map(attach).transpose()?;
        let attach = |config: LoraConfig| Lora::attach(&mut pipeline.dit, config, &seed);
        let dit_adapter = adapters.dit.map(attach).transpose()?;
        let policies = Policies::new(versions);
        let negative = None;
        Ok(Engine { pipeline, template, sampling, policies, llm_adapter, dit_adapter, negative })
    }

    /// The models.
    pub fn pipeline(&self) -> &Pipeline {
        &self.pipeline
    }

    /// How it samples.
    pub fn sampling(&self) -> &Sampling {
        &self.sampling
    }

    /// Whether `weights` can be used without fetching its files.
    pub fn holds(&self, weights: &Weights) -> bool {
        self.policies.holds(weights)
    }

    /// As [`Policies::has`].
    pub fn has(&self, file: &ArtifactRef) -> bool {
        self.policies.has(file)
    }

    /// Takes a policy version in.
    ///
    /// # Errors
    /// As [`Policies::hold`].
    pub fn hold(&mut self, weights: &Weights, files: WeightFiles) -> Result<(), WorkError> {
        let trained = trained(&self.pipeline, &self.llm_adapter, &self.dit_adapter);
        self.policies.hold(weights, files, trained)
    }

    /// Sets the models to a policy version.
    ///
    /// # Errors
    /// As [`Policies::activate`].
    pub fn activate(&mut self, weights: &Weights) -> Result<(), WorkError> {
        let trained = trained(&self.pipeline, &self.llm_adapter, &self.dit_adapter);
        if self.policies.activate(weights, trained)? {
            self.negative = None;
        }
        Ok(())
    }

    /// Token ids of the turn that asks for a trace of `prompt`.
    ///
    /// # Errors
    /// The template or the tokenizer refuses.
    pub fn question(&self, prompt: &str) -> Result<Vec<i64>, ModelError> {
        self.pipeline.tokenizer.encode(&self.template.render(prompt)?)
    }

    /// Samples `traces` traces of `question` in one batch and encodes their refined prompts, with
    /// the active policy. Trace `j` takes its numbers from `seed.derive(Tokens, [j])`.
    ///
    /// # Errors
    /// [`ModelError`], among them logits that are not finite.
    pub fn think(
        &self,
        question: &[i64],
        traces: usize,
        seed: &Seed,
    ) -> Result<Vec<Thought>, ModelError> {
        self.think_watched(question, traces, seed, &mut |_| ())
    }

    /// As [`Engine::think`]; `watch` is told how many tokens there are.
    ///
    /// # Errors
    /// As [`Engine::think`].
    pub fn think_watched(
        &self,
        question: &[i64],
        traces: usize,
        seed: &Seed,
        watch: &mut dyn FnMut(usize),
    ) -> Result<Vec<Thought>, ModelError> {
        let tokenizer = &self.pipeline.tokenizer;
        let options = SampleOptions {
            traces,
            max_new_tokens: self.sampling.max_new_tokens,
            temperature: self.sampling.temperature,
            eos: vec![tokenizer.im_end(), tokenizer.end_of_text()],
        };
        let decoder = Decoder::new(&self.pipeline.lm)?;
        let sampled = generate_watched(&decoder, question, seed, &options, watch)?;
        let texts = sampled
            .iter()
            .map(|answer| tokenizer.decode(&answer.tokens))
            .collect::<Result<Vec<_>, _>>()?;
        let answers: Vec<_> = texts.iter().map(|text| extract(text)).collect();
        let refined: Vec<&str> = answers.iter().map(|answer| answer.refined.as_str()).collect();
        let embeds = self.embedder()?.embed_many(&refined)?;
        let parts = sampled.into_iter().zip(texts).zip(answers).zip(embeds);
        let thoughts = parts.map(|(((sampled, text), answer), embeds)| Thought {
            tokens: sampled.tokens,
            text,
            refined_prompt: answer.refined,
            well_formed: answer.well_formed,
            finish: sampled.finish,
            embeds,
        });
        Ok(thoughts.collect())
    }

    /// A think lease: samples the traces of a prompt with a policy version and computes their
    /// log-probabilities as the trainer will, all traces in one batch.
    ///
    /// # Errors
    /// [`WorkError`]; nothing that is not finite is returned.
    pub fn think_lease(
        &mut self,
        weights: &Weights,
        prompt: &str,
        traces: usize,
        seed: &Seed,
    ) -> Result<Vec<StoredThought>, WorkError> {
        self.activate(weights)?;
        let question = self.question(prompt)?;
        let thoughts = self.think(&question, traces, seed)?;
        let answers: Vec<Vec<i64>> =
            thoughts.iter().map(|thought| thought.tokens.clone()).collect();
        let log_probs = tch::no_grad(|| {
            let temperature = self.sampling.temperature;
            token_log_probs(&self.pipeline.lm, &question, &answers, temperature, false)
        })?;
        let negative = self.negative()?;
        let stored = thoughts.into_iter().zip(log_probs.split()).map(|(thought, log_probs)| {
            let tokens = [question.as_slice(), thought.tokens.as_slice()].concat();
            let artifact = ThinkArtifact {
                tokens: Tensor::from_slice(&tokens),
                prompt_len: question.len(),
                log_probs,
                embeds: thought.embeds.to_kind(tch::Kind::Float),
                negative_embeds: negative.to_kind(tch::Kind::Float),
            };
            Ok(StoredThought {
                artifact: artifact.encode()?,
                text: thought.text,
                refined_prompt: thought.refined_prompt,
                well_formed: thought.well_formed,
                tokens: thought.tokens.len() as u32,
                finish: thought.finish,
            })
        });
        stored.collect()
    }

    /// Samples `leaves` images from a refined prompt's embeddings `[T, D]`, with the active policy.
    ///
    /// # Errors
    /// [`ModelError`], among them latents that are not finite.
    pub fn draw(
        &mut self,
        embeds: &Tensor,
        leaves: usize,
        window: Window,
        seed: &Seed,
    ) -> Result<Rendered, ModelError> {
        self.draw_watched(embeds, leaves, (window, seed), &mut |_| ())
    }

    /// As [`Engine::draw`]; `watch` is told how many denoising steps are done.
    ///
    /// # Errors
    /// As [`Engine::draw`].
    pub fn draw_watched(
        &mut self,
        embeds: &Tensor,
        leaves: usize,
        (window, seed): (Window, &Seed),
        watch: &mut dyn FnMut(usize),
    ) -> Result<Rendered, ModelError> {
        let negative = self.negative()?;
        let condition = Condition { embeds, negative: Some(&negative) };
        let options = (window, seed, &self.sampling.render);
        render_watched(&self.pipeline, condition, leaves, options, watch)
    }

    /// A render lease: samples the leaves of a stored trace with a policy version. Returns the
    /// bytes of the render artifact.
    ///
    /// # Errors
    /// [`WorkError`]; nothing that is not finite is returned.
    pub fn render_lease(
        &mut self,
        weights: &Weights,
        (label, trace): (&str, Vec<u8>),
        leaves: usize,
        window: Window,
        seed: &Seed,
    ) -> Result<Vec<u8>, WorkError> {
        self.activate(weights)?;
        let device = self.pipeline.lm.device();
        let trace = ThinkArtifact::decode(label, trace, device)?;
        let condition = Condition { embeds: &trace.embeds, negative: Some(&trace.negative_embeds) };
        let options = &self.sampling.render;
        let rendered = render(&self.pipeline, condition, leaves, window, seed, options)?;
        let artifact = RenderArtifact {
            latents: rendered.latents.to_device(Device::Cpu),
            log_probs: rendered.log_probs.to_device(Device::Cpu),
            images: rendered.images.to_device(Device::Cpu),
            last: self.sampling.keep_last.then(|| rendered.last.to_device(Device::Cpu)),
            window_start: window.start,
        };
        Ok(artifact.encode()?)
    }

    /// Embeddings of a text under the active policy, `[T, D]`.
    ///
    /// # Errors
    /// The tokenizer refuses.
    pub fn embed(&self, text: &str) -> Result<Tensor, ModelError> {
        self.embedder()?.embed(text)
    }

    fn embedder(&self) -> Result<Embedder<'_>, ModelError> {
        Embedder::new(&self.pipeline.lm, &self.pipeline.tokenizer)
    }

    /// Embeddings of the negative prompt under the active policy, computed once a version.
    fn negative(&mut self) -> Result<Tensor, ModelError> {
        let negative = match self.negative.take() {
            Some(negative) => negative,
            None => self.embed(NEGATIVE_PROMPT)?,
        };
        let kept = negative.shallow_clone();
        self.negative = Some(negative);
        Ok(kept)
    }
}

/// What versions replace.
fn trained<'a>(
    pipeline: &'a Pipeline,
    llm: &'a Option<Lora>,
    dit: &'a Option<Lora>,
) -> Trained<'a> {
    Trained {
        llm: llm.as_ref().map_or(pipeline.lm.params(), Lora::params),
        dit: dit.as_ref().map_or(pipeline.dit.params(), Lora::params),
    }
}
