//! `duet plan`: from a configuration and the `config.json` files of its model alone, what a run
//! needs on each GPU, what an iteration computes and stores, and whether it fits.

mod activations;
pub mod bytes;
mod flops;
mod sampling;
pub mod shapes;

use crate::CliError;
use crate::args::PlanArgs;
use bytes::{Role, latent};
use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{Cell, CellAlignment, Table};
use duet_config::{Config, DitObjective};
use duet_core::schedule::WindowSpec;
use serde_json::json;
use shapes::Shapes;

/// Tokens of the question that a trace answers and of a refined prompt: an estimate of what depends
/// on the prompts.
const PROMPT_TOKENS: u64 = 128;
const GIB: f64 = (1u64 << 30) as f64;

/// The shapes of an iteration's work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Work {
    /// P.
    pub prompts: u64,
    /// J.
    pub traces: u64,
    /// K.
    pub leaves: u64,
    /// Most new tokens of a trace.
    pub new_tokens: u64,
    /// Tokens of a question with its answer.
    pub sequence: u64,
    /// Tokens of the text that an image is drawn from.
    pub text_tokens: u64,
    /// Tokens of an image.
    pub image_tokens: u64,
    /// Pixels of an image.
    pub pixels: u64,
    /// Denoising steps.
    pub steps: u64,
    /// Steps that are trained.
    pub window: u64,
    /// Passes of the transformer at a step: two with guidance.
    pub passes: u64,
}

impl Work {
    /// The work of a configuration; `prompt` is how long prompts are.
    pub fn new(config: &Config, shapes: &Shapes, prompt: u64) -> Result<Work, CliError> {
        let rollout = &config.rollout;
        let (width, height) = (u64::from(rollout.width), u64::from(rollout.height));
        let side = shapes.vae.scale() * shapes.dit.patch;
        if side == 0 || !width.is_multiple_of(side) || !height.is_multiple_of(side) {
            return Err(CliError::Usage(format!(
                "rollout.width and rollout.height: {width} x {height} pixels are not multiples of \
                 {side}, which this model wants"
            )));
        }
        let window = match (config.dit.objective, config.window) {
            (DitObjective::Nft, _) => config.dit.nft_times,
            (_, WindowSpec::All) => rollout.steps.saturating_sub(1),
            (
                _,
                WindowSpec::Fixed { len, .. }
                | WindowSpec::Random { len, .. }
                | WindowSpec::Progressive { len, .. },
            ) => len.min(rollout.steps),
        };
        let new_tokens = u64::from(rollout.max_new_tokens);
        Ok(Work {
            prompts: u64::from(rollout.prompts_per_iteration),
            traces: u64::from(rollout.traces),
            leaves: u64::from(rollout.images_per_trace),
            new_tokens,
            sequence: prompt + new_tokens,
            text_tokens: prompt,
            image_tokens: (width / side) * (height / side),
            pixels: width * height,
            steps: u64::from(rollout.steps),
            window: u64::from(window),
            passes: if rollout.guidance_scale == 1.0 { 1 } else { 2 },
        })
    }

    /// Tokens that the transformer sees of an image.
    pub fn dit_tokens(&self) -> u64 {
        self.image_tokens + self.text_tokens
    }

    /// Artifact bytes of an iteration: latents of the window in fp32, raw images, embeddings.
    fn artifacts(&self, shapes: &Shapes) -> u64 {
        let leaf = (self.window + 1) * latent(shapes, self) + 3 * self.pixels;
        let trace = 4 * (self.text_tokens * shapes.dit.text + 2 * self.sequence);
        self.prompts * self.traces * (self.leaves * leaf + trace)
    }
}

/// `duet plan`: prints the plan; the exit code is 1 where a GPU size is given and a role does not fit.
///
/// # Errors
/// The configuration, or a `config.json` of the model, is wrong.
pub fn run(args: &PlanArgs) -> Result<u8, CliError> {
    let config = crate::launch::load(&args.config.config, &args.config.set)?;
    let folder = config.model_path();
    let there = folder.join("transformer/config.json").is_file();
    let shapes = match there {
        true => Shapes::read(&folder)?,
        false if args.published => Shapes::published(),
        false => {
            return Err(CliError::Usage(format!(
                "model.path: {} is no pipeline folder; fetch the model's config.json files, or give \
                 --published for the sizes of Qwen/Qwen-Image",
                folder.display()
            )));
        }
    };
    let work = Work::new(&config, &shapes, args.prompt_tokens.unwrap_or(PROMPT_TOKENS))?;
    let roles = bytes::roles(&config, &shapes, &work);
    let flops = flops::of(&config, &shapes, &work);
    let unfit: Vec<&Role> =
        roles.iter().filter(|r| Some(r.bytes) > args.gpu_memory.or(Some(u64::MAX))).collect();
    if args.json {
        let plan = json!({
            "sizes": shapes.origin,
            "parameters": {"llm": shapes.lm.params(), "dit": shapes.dit.params(), "vae": shapes.vae.params()},
            "trained": {"llm": bytes::trained(&config, &shapes)[0], "dit": bytes::trained(&config, &shapes)[1]},
            "roles": roles,
            "flops": flops,
            "artifact_bytes": work.artifacts(&shapes),
            "fits": args.gpu_memory.map(|_| unfit.is_empty()),
        });
        println!("{plan:#}");
        return Ok(u8::from(!unfit.is_empty()));
    }
    show(&config, &shapes, &work, &roles, &flops);
    for role in &roles {
        if let Some(memory) = args.gpu_memory {
            verdict(&config, role, memory);
        }
    }
    Ok(u8::from(!unfit.is_empty()))
}

fn show(config: &Config, shapes: &Shapes, work: &Work, roles: &[Role], flops: &flops::Flops) {
    let billions = |params: u64| format!("{:.4} G", params as f64 / 1e9);
    let [llm, dit] = bytes::trained(config, shapes);
    println!("sizes of {}", shapes.origin);
    println!("  language model {}, trained {}", billions(shapes.lm.params()), billions(llm));
    println!("  transformer    {}, trained {}", billions(shapes.dit.params()), billions(dit));
    println!("  autoencoder    {}", billions(shapes.vae.params()));
    for role in roles {
        println!("{}", table(role));
        if let Some(other) = role.other_recompute {
            let (set, bytes) = (!config.trainer.recompute, gib(other));
            println!("  with trainer.recompute = {set} the activations would take {bytes}");
        }
    }
    println!(
        "an iteration: {} prompts x {} traces x {} images",
        work.prompts, work.traces, work.leaves
    );
    let count = work.prompts * work.traces;
    println!("  new tokens, at most {}; images {}", count * work.new_tokens, count * work.leaves);
    for (name, value) in flops.rows() {
        println!("  {name:<15} {:.4} PFLOP", value / 1e15);
    }
    println!("  artifacts       {}", gib(work.artifacts(shapes)));
    println!("texts of {} tokens are assumed (--prompt-tokens)", work.text_tokens);
}

fn table(role: &Role) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED);
    table.set_header([format!("{} (of {})", role.name, role.count), "on each GPU".to_owned()]);
    let right = |text: String| Cell::new(text).set_alignment(CellAlignment::Right);
    for kind in &role.kinds {
        table.add_row([Cell::new(kind.name), right(gib(kind.bytes))]);
    }
    table.add_row([Cell::new("sum"), right(gib(role.bytes))]);
    table
}

fn verdict(config: &Config, role: &Role, memory: u64) {
    if role.bytes <= memory {
        println!("{} fits into {}: {} are left", role.name, gib(memory), gib(memory - role.bytes));
        return;
    }
    println!("{} does not fit: {} more than {}", role.name, gib(role.bytes - memory), gib(memory));
    let bytes_of = |name: &str| role.kinds.iter().find(|k| k.name == name).map_or(0, |k| k.bytes);
    let mut keys: Vec<&str> = Vec::new();
    let trainer = role.other_recompute.is_some();
    if trainer && config.llm.branch.lora.is_none() && bytes_of("moments") > 0 {
        keys.push("[llm.lora], an adapter in place of all weights");
    }
    if trainer && config.dit.branch.lora.is_none() && bytes_of("moments") > 0 {
        keys.push("[dit.lora]");
    }
    if trainer && !config.trainer.recompute {
        keys.push("trainer.recompute = true");
    }
    if bytes::element(config) == 4 {
        keys.push("model.dtype = \"bfloat16\"");
    }
    if bytes_of("activations").max(bytes_of("workspace")) > role.bytes / 10 {
        keys.push("rollout.images_per_trace, rollout.width and rollout.height");
        keys.push("rollout.traces and rollout.max_new_tokens");
    }
    match keys.is_empty() {
        true => println!("  no key of the configuration makes it fit: take a larger GPU"),
        false => println!("  keys to change: {}", keys.join("; ")),
    }
}

fn gib(bytes: u64) -> String {
    match bytes as f64 / GIB {
        gib if gib >= 0.1 => format!("{gib:.2} GiB"),
        gib => format!("{:.2} MiB", gib * 1024.0),
    }
}

/// `80GiB`, `80GB`, `80` (GiB).
///
/// # Errors
/// It is no size.
pub fn memory(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" | "gib" | "g" => GIB,
        "mib" => (1u64 << 20) as f64,
        "gb" => 1e9,
        "mb" => 1e6,
        _ => return Err("a size such as 80GiB, 80GB or 512MiB expected".to_owned()),
    };
    let count: f64 =
        digits.trim().parse().map_err(|_| "a size such as 80GiB expected".to_owned())?;
    let bytes = count * unit;
    match (1.0..1e18).contains(&bytes) {
        true => Ok(bytes as u64),
        false => Err("a size above zero expected, such as 80GiB".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn memory_has_units() {
        assert_eq!(super::memory("80GiB"), Ok(80 << 30));
        assert_eq!(super::memory("80"), Ok(80 << 30));
        assert_eq!(super::memory("1.5GB"), Ok(1_500_000_000));
        for bad in ["", "GiB", "-1GiB", "80 parsecs", "nan", "1e99GiB"] {
            assert!(super::memory(bad).is_err(), "{bad}");
        }
    }
}
