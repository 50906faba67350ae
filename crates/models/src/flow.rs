//! The flow-matching Euler schedule (diffusers `FlowMatchEulerDiscreteScheduler`) with dynamic shift
//! and terminal stretch.
//!
//! Convention: time 1 is noise, time 0 data; `x_t = (1 - t) x_0 + t eps`; the velocity is
//! `eps - x_0`; sampling runs with `dt < 0`.

use crate::error::{ModelError, Result};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

/// What the schedule needs to know of `scheduler/scheduler_config.json`.
#[derive(Clone, Debug, PartialEq)]
pub struct FlowConfig {
    /// Timesteps are sigmas times this.
    pub num_train_timesteps: i64,
    /// Fixed shift, used when the shift is not dynamic.
    pub shift: f64,
    /// Whether the shift depends on the image size.
    pub use_dynamic_shifting: bool,
    /// Shift `mu` at `base_image_seq_len` tokens.
    pub base_shift: f64,
    /// Shift `mu` at `max_image_seq_len` tokens.
    pub max_shift: f64,
    /// Tokens of a small image.
    pub base_image_seq_len: i64,
    /// Tokens of a large image.
    pub max_image_seq_len: i64,
    /// The last sigma before zero, if the schedule is stretched to one.
    pub shift_terminal: Option<f64>,
    /// Whether `mu` is exponentiated (`exponential`) or used as it is (`linear`).
    pub exponential: bool,
}

impl Default for FlowConfig {
    /// The values published with Qwen-Image.
    fn default() -> Self {
        FlowConfig {
            num_train_timesteps: 1000,
            shift: 1.0,
            use_dynamic_shifting: true,
            base_shift: 0.5,
            max_shift: 0.9,
            base_image_seq_len: 256,
            max_image_seq_len: 8192,
            shift_terminal: Some(0.02),
            exponential: true,
        }
    }
}

impl FlowConfig {
    /// Reads a `scheduler_config.json`; `origin` names it in errors.
    pub fn from_json(config: &Value, origin: &str) -> Result<FlowConfig> {
        for key in [
            "invert_sigmas",
            "stochastic_sampling",
            "use_karras_sigmas",
            "use_exponential_sigmas",
            "use_beta_sigmas",
        ] {
            if config.get(key).and_then(Value::as_bool).unwrap_or(false) {
                let reason = "not implemented; set it to false";
                return Err(ModelError::bad_config(origin, key, reason));
            }
        }
        // Absent keys mean diffusers' own defaults, not Qwen-Image's.
        let int = |key: &str, or: i64| config.get(key).and_then(Value::as_i64).unwrap_or(or);
        let real = |key: &str, or: f64| config.get(key).and_then(Value::as_f64).unwrap_or(or);
        let kind = config.get("time_shift_type").and_then(Value::as_str).unwrap_or("exponential");
        if kind != "exponential" && kind != "linear" {
            let reason = format!("`{kind}`; `exponential` or `linear` expected");
            return Err(ModelError::bad_config(origin, "time_shift_type", reason));
        }
        Ok(FlowConfig {
            num_train_timesteps: int("num_train_timesteps", 1000),
            shift: real("shift", 1.0),
            use_dynamic_shifting: config
                .get("use_dynamic_shifting")
                .and_then(Value::as_bool)
                .unwrap_or(false),
            base_shift: real("base_shift", 0.5),
            max_shift: real("max_shift", 1.15),
            base_image_seq_len: int("base_image_seq_len", 256),
            max_image_seq_len: int("max_image_seq_len", 4096),
            shift_terminal: config.get("shift_terminal").and_then(Value::as_f64),
            exponential: kind == "exponential",
        })
    }

    /// A `scheduler_config.json` that diffusers reads.
    pub fn to_json(&self) -> Value {
        json!({
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "_diffusers_version": "0.37.0",
            "num_train_timesteps": self.num_train_timesteps,
            "shift": self.shift,
            "use_dynamic_shifting": self.use_dynamic_shifting,
            "base_shift": self.base_shift,
            "max_shift": self.max_shift,
            "base_image_seq_len": self.base_image_seq_len,
            "max_image_seq_len": self.max_image_seq_len,
            "shift_terminal": self.shift_terminal,
            "time_shift_type": if self.exponential { "exponential" } else { "linear" },
            "invert_sigmas": false,
            "stochastic_sampling": false,
            "use_karras_sigmas": false,
            "use_exponential_sigmas": false,
            "use_beta_sigmas": false,
        })
    }

    /// The shift for an image of `tokens` packed tokens.
    pub fn mu(&self, tokens: i64) -> f64 {
        let span = (self.max_image_seq_len - self.base_image_seq_len) as f64;
        let slope = (self.max_shift - self.base_shift) / span;
        tokens as f64 * slope + (self.base_shift - slope * self.base_image_seq_len as f64)
    }
}

/// Sigmas of a sampling run: `steps + 1` of them, from one to zero.
#[derive(Clone, Debug, PartialEq)]
pub struct FlowSchedule {
    sigmas: Vec<f32>,
    scale: f32,
}

impl FlowSchedule {
    /// The schedule of `steps` steps for an image of `tokens` packed tokens, in fp32 as diffusers
    /// computes it.
    pub fn new(config: &FlowConfig, steps: usize, tokens: i64) -> Result<FlowSchedule> {
        if steps == 0 {
            return Err(ModelError::BadInput("a schedule needs at least one step".to_owned()));
        }
        let count = steps as f64;
        let last = 1.0 / count;
        let start: Vec<f32> = (0..steps)
            .map(|i| match steps {
                1 => 1.0,
                _ => (1.0 + i as f64 * ((last - 1.0) / (count - 1.0))) as f32,
            })
            .collect();
        Ok(FlowSchedule::shifted(config, start, config.mu(tokens)))
    }

    /// The schedule whose sigmas are `start` before the shift: what the scheduler makes of sigmas
    /// that it is given. `mu` is not read where the shift is fixed.
    pub fn shifted(config: &FlowConfig, start: Vec<f32>, mu: f64) -> FlowSchedule {
        let mut sigmas = start;
        if config.use_dynamic_shifting {
            let power = if config.exponential { mu.exp() } else { mu } as f32;
            sigmas.iter_mut().for_each(|s| *s = power / (power + (1.0 / *s - 1.0)));
        } else {
            let shift = config.shift as f32;
            sigmas.iter_mut().for_each(|s| *s = shift * *s / (1.0 + (shift - 1.0) * *s));
        }
        if let (Some(terminal), Some(smallest)) = (config.shift_terminal, sigmas.last()) {
            // One step alone starts at one, which cannot be stretched.
            let scale = (1.0 - smallest) / (1.0 - terminal as f32);
            if scale > 0.0 {
                sigmas.iter_mut().for_each(|s| *s = 1.0 - (1.0 - *s) / scale);
            }
        }
        sigmas.push(0.0);
        FlowSchedule { sigmas, scale: config.num_train_timesteps as f32 }
    }

    /// Number of steps.
    pub fn steps(&self) -> usize {
        self.sigmas.len() - 1
    }

    /// All sigmas, from one to zero: one more than there are steps.
    pub fn sigmas(&self) -> &[f32] {
        &self.sigmas
    }

    /// Sigma before step `index` and after it.
    pub fn pair(&self, index: usize) -> (f64, f64) {
        (f64::from(self.sigmas[index]), f64::from(self.sigmas[index + 1]))
    }

    /// What the transformer is told of the time at each step, `[steps]` fp32 in [0, 1]:
    /// `sigma * 1000 / 1000`, rounded as diffusers' pipeline rounds it.
    pub fn times(&self, device: Device) -> Tensor {
        let times: Vec<f32> =
            self.sigmas[..self.steps()].iter().map(|s| s * self.scale / self.scale).collect();
        Tensor::from_slice(&times).to_kind(Kind::Float).to_device(device)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(got: &[f32], want: &[f64]) {
        for (index, (got, want)) in got.iter().zip(want).enumerate() {
            assert!((f64::from(*got) - want).abs() < 1e-6, "sigma {index}: {got} != {want}");
        }
    }

    /// Computed in float64 from the scheduler's formulas.
    #[test]
    fn sigmas_match_float64_values() {
        let config = FlowConfig::default();
        assert!((config.mu(1024) - 0.538710).abs() < 1e-6);
        assert!((config.mu(4096) - 0.693548).abs() < 1e-6);
        assert!((config.mu(6889) - 0.834325).abs() < 1e-6);
        let small = FlowSchedule::new(&config, 10, 1024).unwrap();
        assert_eq!(small.steps(), 10);
        near(
            small.sigmas(),
            &[
                1.0,
                0.928969635,
                0.851484794,
                0.766623831,
                0.673280860,
                0.570117298,
                0.455497256,
                0.327400146,
                0.183300542,
                0.02,
                0.0,
            ],
        );
        let large = FlowSchedule::new(&config, 10, 4096).unwrap();
        near(
            large.sigmas(),
            &[
                1.0, 0.936978, 0.866951, 0.788682, 0.700624, 0.600818, 0.486747, 0.355115,
                0.201530, 0.02, 0.0,
            ],
        );
        let fine = FlowSchedule::new(&config, 50, 4096).unwrap();
        near(&fine.sigmas()[..4], &[1.0, 0.989701, 0.979192, 0.968465]);
    }

    #[test]
    fn a_config_reads_back() {
        let config = FlowConfig::default();
        assert_eq!(FlowConfig::from_json(&config.to_json(), "x").unwrap(), config);
    }

    #[test]
    fn one_step_goes_from_noise_to_data() {
        let schedule = FlowSchedule::new(&FlowConfig::default(), 1, 16).unwrap();
        assert_eq!(schedule.sigmas(), [1.0, 0.0]);
        assert!(FlowSchedule::new(&FlowConfig::default(), 0, 16).is_err());
    }
}
