//! The models of Duet, at any size that their published `config.json` gives: the language model of
//! Qwen2.5-VL, the Qwen-Image diffusion transformer and the Qwen-Image VAE, with their samplers,
//! log-probabilities and losses.
//!
//! Parameter names are those of the published checkpoints, and a pipeline folder written here loads
//! in diffusers and transformers. Nothing in this crate knows the network; everything in it runs on
//! the thread that owns the device.

#![forbid(unsafe_code)]

pub mod artifact;
pub mod decoder;
pub mod defaults;
pub mod dit;
pub mod embed;
pub mod error;
pub mod flow;
pub mod generate;
pub mod lm;
pub mod logprob;
pub mod lora;
pub mod loss;
pub mod nn;
pub mod params;
pub mod pipeline;
pub mod render;
pub mod sde;
pub mod sft;
pub mod template;
pub mod tokenizer;
pub mod vae;
mod weights;

pub use error::{ModelError, Result};
