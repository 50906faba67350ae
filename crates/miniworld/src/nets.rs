//! The small convolutional networks that look at images.

use crate::error::{Result, WorldError};
use duet_core::Seed;
use duet_models::params::{Init, ParamSet, ParamSpec};
use std::path::Path;
use tch::Tensor;

/// How a network is built. The judge's differs from the scorers', so that they do not err alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Build {
    /// Three 3 x 3 convolutions of stride 2, then a hidden layer.
    Deep,
    /// Two 5 x 5 convolutions, the largest response over the whole image, then linear.
    Wide,
}

/// A convolutional network with several heads.
#[derive(Debug)]
pub struct Net {
    build: Build,
    params: ParamSet,
    heads: Vec<(&'static str, i64)>,
}

impl Net {
    fn specs(build: Build, heads: &[(&'static str, i64)]) -> Vec<ParamSpec> {
        let (convolutions, features): (&[[i64; 3]], i64) = match build {
            Build::Deep => (&[[3, 16, 3], [16, 32, 3], [32, 48, 3]], 128),
            Build::Wide => (&[[3, 24, 5], [24, 64, 5], [64, 64, 3]], 64),
        };
        let mut specs = Vec::new();
        let mut add = |name: String, shape: &[i64]| {
            specs.push(ParamSpec::new(format!("{name}.weight"), shape, Init::He));
            specs.push(ParamSpec::new(format!("{name}.bias"), &shape[..1], Init::Zeros));
        };
        for (index, [from, to, size]) in convolutions.iter().enumerate() {
            add(format!("conv.{index}"), &[*to, *from, *size, *size]);
        }
        if build == Build::Deep {
            add("hidden".to_owned(), &[features, 48 * 4 * 4]);
        }
        for (head, classes) in heads {
            add(format!("head.{head}"), &[*classes, features]);
        }
        specs
    }

    /// A network with random weights.
    pub fn init(build: Build, heads: &[(&'static str, i64)], seed: &Seed) -> Net {
        let params = ParamSet::init(&Net::specs(build, heads), seed);
        Net { build, params, heads: heads.to_vec() }
    }

    /// The network whose weights are those of `params` under `prefix`.
    ///
    /// # Errors
    /// A tensor is missing or has another shape.
    pub fn from_params(
        build: Build,
        heads: &[(&'static str, i64)],
        params: &ParamSet,
        prefix: &str,
        origin: &Path,
    ) -> Result<Net> {
        let own: ParamSet = params
            .iter()
            .filter_map(|(name, tensor)| {
                Some((name.strip_prefix(prefix)?.to_owned(), tensor.shallow_clone()))
            })
            .collect();
        own.check(&Net::specs(build, heads), &origin.display().to_string())
            .map_err(WorldError::Model)?;
        Ok(Net { build, params: own, heads: heads.to_vec() })
    }

    /// Its parameters.
    pub fn params(&self) -> &ParamSet {
        &self.params
    }

    /// Logits of each head for images `[B, 3, 32, 32]` in [-1, 1]: `[B, classes]` each, in the order
    /// the heads were named.
    pub fn forward(&self, images: &Tensor) -> Vec<Tensor> {
        let get = |name: &str| self.params.get(name);
        let conv = |x: &Tensor, index: usize, stride: i64| {
            let (weight, bias) =
                (get(&format!("conv.{index}.weight")), get(&format!("conv.{index}.bias")));
            let Some(weight) = weight else { return x.shallow_clone() };
            let padding = weight.size()[2] / 2;
            x.conv2d(weight, bias, [stride, stride], [padding, padding], [1, 1], 1).relu()
        };
        let linear = |x: &Tensor, name: &str| {
            let (weight, bias) = (get(&format!("{name}.weight")), get(&format!("{name}.bias")));
            weight.map_or_else(|| x.shallow_clone(), |weight| x.linear(weight, bias))
        };
        let features = match self.build {
            Build::Deep => {
                let x = conv(&conv(&conv(images, 0, 2), 1, 2), 2, 2);
                linear(&x.flatten(1, -1), "hidden").relu()
            }
            Build::Wide => {
                let x = conv(&conv(&conv(images, 0, 2), 1, 2), 2, 1);
                x.amax([2, 3], false)
            }
        };
        self.heads.iter().map(|(head, _)| linear(&features, &format!("head.{head}"))).collect()
    }
}
