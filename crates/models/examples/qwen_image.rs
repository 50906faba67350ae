//! One side of scripts/gpu/qwen_image.py: a transformer of Qwen-Image's published size with random
//! weights, sampled and trained as the product does it, one piece at a time on request.
//!
//! ```text
//! qwen_image [--device cpu|cuda] [--dtype bfloat16|float32] [--layers N] [--heads N] [--size PX]
//!            [--steps N] [--leaves N] [--text N] [--threads N]
//! ```
//!
//! Says `ready PARAMETERS`, then reads commands from its input: `sample` denoises the leaves from
//! noise and says `sample SECONDS SHAPE`, `train` takes one step on an adapter and says
//! `train SECONDS PARAMETERS`. The first `train` puts the adapter on; images sampled after it have it
//! on too. How much memory a GPU holds is for the caller to read: libtorch's figures have no binding.

#![forbid(unsafe_code)]

use duet_core::Seed;
use duet_core::work::Window;
use duet_models::dit::{Dit, DitConfig};
use duet_models::flow::{FlowConfig, FlowSchedule};
use duet_models::lora::{Lora, LoraConfig};
use duet_models::params::{Init, ParamSet, ParamSpec};
use duet_models::render::{Condition, RenderOptions, Sampler, replay};
use duet_models::sde::{SdeKind, step};
use duet_torch::Tensors;
use duet_torch::optim::{AdamW, AdamWOptions, clip_grad_norm};
use std::error::Error;
use std::io::{BufRead, Write};
use std::str::FromStr;
use std::time::Instant;
use tch::{Device, Kind, Tensor};

type Outcome<T> = Result<T, Box<dyn Error>>;

/// Standard deviation of every weight: small enough for numbers to stay finite through all blocks.
const STD: f64 = 0.02;
/// Denoising steps that are trained.
const WINDOW: u32 = 2;
const RANK: i64 = 32;
const LEARNING_RATE: f64 = 1e-5;
/// Pixels along the side of one latent: the published autoencoder's.
const PIXELS_PER_LATENT: i64 = 8;

/// What is asked for on the command line.
struct Options {
    cuda: bool,
    kind: Kind,
    config: DitConfig,
    size: i64,
    steps: usize,
    leaves: i64,
    text: i64,
    threads: u32,
}

impl Options {
    fn parse(arguments: &[String]) -> Outcome<Options> {
        let mut options = Options {
            cuda: false,
            kind: Kind::BFloat16,
            config: DitConfig {
                patch_size: 2,
                in_channels: 64,
                out_channels: 16,
                num_layers: 60,
                attention_head_dim: 128,
                num_attention_heads: 24,
                joint_attention_dim: 3584,
                axes_dims_rope: [16, 56, 56],
            },
            size: 512,
            steps: 50,
            leaves: 1,
            text: 64,
            threads: 1,
        };
        for pair in arguments.chunks(2) {
            let [name, value] = pair else {
                return Err(format!("`{}` wants a value", pair.concat()).into());
            };
            match (name.as_str(), value.as_str()) {
                ("--device", "cpu") => options.cuda = false,
                ("--device", "cuda") => options.cuda = true,
                ("--dtype", "bfloat16") => options.kind = Kind::BFloat16,
                ("--dtype", "float32") => options.kind = Kind::Float,
                ("--layers", _) => options.config.num_layers = positive(name, value)?,
                ("--heads", _) => options.config.num_attention_heads = positive(name, value)?,
                ("--size", _) => options.size = positive(name, value)?,
                ("--steps", _) => options.steps = positive(name, value)?,
                ("--leaves", _) => options.leaves = positive(name, value)?,
                ("--text", _) => options.text = positive(name, value)?,
                ("--threads", _) => options.threads = positive(name, value)?,
                _ => return Err(format!("`{name} {value}` is not understood").into()),
            }
        }
        let side = PIXELS_PER_LATENT * options.config.patch_size;
        if options.size % side != 0 {
            let size = options.size;
            return Err(format!("--size {size} is no multiple of {side} pixels").into());
        }
        if options.steps < WINDOW as usize {
            let steps = options.steps;
            return Err(
                format!("--steps {steps} is less than the {WINDOW} that are trained").into()
            );
        }
        Ok(options)
    }
}

fn positive<T: FromStr + PartialOrd + Default>(name: &str, value: &str) -> Outcome<T> {
    let parsed = value.parse().ok().filter(|number| *number > T::default());
    parsed.ok_or_else(|| format!("{name} wants a whole number above zero, not `{value}`").into())
}

/// The transformer, its weights drawn where they stay: 41 GB of them never pass through the host.
/// Layers that a fresh model leaves at zero are drawn too, or every block would be the identity.
fn model(config: &DitConfig, kind: Kind, device: Device) -> Outcome<Dit> {
    let params = tch::no_grad(|| {
        let draw = |spec: &ParamSpec| {
            let mut tensor = Tensor::f_empty(spec.shape.as_slice(), (kind, device))?;
            let _ = match spec.init {
                Init::Ones => tensor.f_fill_(1.0)?,
                _ => tensor.f_normal_(0.0, STD)?,
            };
            Ok((spec.name.clone(), tensor))
        };
        Dit::specs(config).iter().map(draw).collect::<Result<ParamSet, tch::TchError>>()
    })?;
    let mut dit = Dit::new(config.clone(), params, "a random transformer")?;
    dit.set_recompute(true);
    Ok(dit)
}

/// What is sampled and how.
struct Inputs {
    embeds: Tensor,
    negative: Tensor,
    /// Latents before the window and after each of its steps.
    kept: Tensor,
    render: RenderOptions,
    shape: [i64; 3],
    grid: (i64, i64),
    window: Window,
    device: Device,
}

impl Inputs {
    fn new(options: &Options, device: Device) -> Outcome<Inputs> {
        let side = options.size / (PIXELS_PER_LATENT * options.config.patch_size);
        let shape = [options.leaves, side * side, options.config.in_channels];
        let text = [options.text, options.config.joint_attention_dim];
        let kept = [shape[0], i64::from(WINDOW) + 1, shape[1], shape[2]];
        Ok(Inputs {
            embeds: Tensor::f_randn(text, (options.kind, device))?,
            negative: Tensor::f_randn(text, (options.kind, device))?,
            kept: Tensor::f_randn(kept, (Kind::Float, device))?,
            render: RenderOptions {
                steps: options.steps,
                guidance: 4.0,
                sde: SdeKind::FlowGrpo,
                noise_level: 0.8,
                width: options.size,
                height: options.size,
            },
            shape,
            grid: (side, side),
            window: Window { start: u32::from(options.steps > WINDOW as usize), len: WINDOW },
            device,
        })
    }

    fn sampler<'a>(&'a self, dit: &'a Dit) -> Outcome<Sampler<'a>> {
        let tokens = self.grid.0 * self.grid.1;
        let schedule = FlowSchedule::new(&FlowConfig::default(), self.render.steps, tokens)?;
        let condition = Condition { embeds: &self.embeds, negative: Some(&self.negative) };
        let size = (self.shape[0], self.grid);
        Ok(Sampler::new(dit, schedule, condition, size, self.window, &self.render)?)
    }

    fn noise(&self) -> Outcome<Tensor> {
        Ok(Tensor::f_randn(self.shape, (Kind::Float, self.device))?)
    }

    /// All steps under both branches of guidance, as `render` takes them; no autoencoder.
    fn sample(&self, dit: &Dit) -> Outcome<String> {
        tch::no_grad(|| {
            let sampler = self.sampler(dit)?;
            let mut x = self.noise()?;
            for index in 0..self.render.steps {
                let coefficients = sampler.coefficients(index);
                let velocity = sampler.velocity(&x, index)?;
                let eps = coefficients.is_random().then(|| self.noise()).transpose()?;
                x = step(&coefficients, &x, &velocity, eps.as_ref()).next;
            }
            if x.isfinite().all().int64_value(&[]) == 0 {
                return Err("a latent is not finite after sampling".into());
            }
            let shape: Vec<String> = x.size().iter().map(i64::to_string).collect();
            Ok(shape.join("x"))
        })
    }
}

/// The adapter and its optimiser. Its tensors are fp32: they are the masters.
struct Tuned {
    params: Tensors,
    optimiser: AdamW,
}

impl Tuned {
    fn new(dit: &mut Dit) -> Outcome<Tuned> {
        let targets = LoraConfig::dit_targets();
        let config = LoraConfig { rank: RANK, alpha: 2.0 * RANK as f64, targets };
        let lora = Lora::attach(dit, config, &Seed::root(3))?;
        lora.params().set_trainable(|_| true);
        let params = lora.params().to_map();
        let optimiser = AdamW::new(AdamWOptions::default(), &params)?;
        Ok(Tuned { params, optimiser })
    }

    /// The window again with gradients, then a clipped step of the optimiser.
    fn update(&mut self, dit: &Dit, inputs: &Inputs) -> Outcome<String> {
        let sampler = inputs.sampler(dit)?;
        let found = replay(&sampler, &inputs.kept, 0..WINDOW)?;
        (-found.log_probs.mean(Kind::Float)).f_backward()?;
        // The last block's text leads nowhere, so its layers have no gradient.
        let grad = |param: &Tensor| match param.grad() {
            grad if grad.defined() => grad.detach(),
            _ => param.zeros_like(),
        };
        let grads: Tensors =
            self.params.iter().map(|(name, param)| (name.clone(), grad(param))).collect();
        let norm = clip_grad_norm(&grads, 1.0)?;
        if !norm.is_finite() || norm == 0.0 {
            return Err(format!("the gradient's norm is {norm}").into());
        }
        self.optimiser.step(LEARNING_RATE, &self.params, &grads)?;
        for param in self.params.values() {
            param.shallow_clone().zero_grad();
        }
        Ok(self.params.values().map(Tensor::numel).sum::<usize>().to_string())
    }
}

/// Waits for what a GPU still has to do, so that the clock covers it.
fn settle(device: Device) {
    if let Device::Cuda(index) = device {
        tch::Cuda::synchronize(index as i64);
    }
}

fn main() -> Outcome<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let options = Options::parse(&arguments)?;
    let runtime = duet_torch::init(options.threads)?;
    let device = match (options.cuda, runtime.gpus) {
        (false, _) => Device::Cpu,
        (true, 0) => {
            let library = runtime.library.display();
            return Err(format!("no GPU can be used with the libtorch in {library}").into());
        }
        (true, _) => Device::Cuda(0),
    };
    tch::manual_seed(1);
    let mut dit = model(&options.config, options.kind, device)?;
    let inputs = Inputs::new(&options, device)?;
    let mut tuned: Option<Tuned> = None;
    settle(device);
    let mut out = std::io::stdout();
    writeln!(out, "ready {}", dit.params().numel())?;
    for line in std::io::stdin().lock().lines() {
        let name = line?;
        if name == "train" && tuned.is_none() {
            tuned = Some(Tuned::new(&mut dit)?);
        }
        let start = Instant::now();
        let found = match (name.as_str(), &mut tuned) {
            ("sample", _) => inputs.sample(&dit)?,
            ("train", Some(tuned)) => tuned.update(&dit, &inputs)?,
            _ => return Err(format!("there is no piece called `{name}`").into()),
        };
        settle(device);
        writeln!(out, "{name} {} {found}", start.elapsed().as_secs_f64())?;
    }
    Ok(())
}
