//! What rollouts leave in the artifact store for rewards and trainers: safetensors files with
//! checked shapes.
//!
//! ```text
//! think, one trace:       tokens i64 [P+R], log_probs f32 [R], embeds f32 [T, D],
//!                         negative_embeds f32 [N, D]                     prompt_len = P
//! render, one sub-tree:   latents f32 [K, w+1, S, C], log_probs f32 [K, w],
//!                         images u8 [K, H, W, 3], last f32 [K, S, C] (for NFT only)
//!                                                                        window_start
//! ```
//! Equal tensors give equal bytes, so that a lease done twice leaves the same content hash.

use duet_torch::tensorfile::{Metadata, TensorFile, TensorFileError, TensorSource, encode};
use duet_torch::{NonFinite, Tensors, require_finite};
use tch::{Device, Kind, Tensor};

/// Metadata key that says which of the two a file is.
const FORMAT: &str = "format";
/// [`FORMAT`] of a [`ThinkArtifact`].
const THINK: &str = "duet-think-1";
/// [`FORMAT`] of a [`RenderArtifact`].
const RENDER: &str = "duet-render-1";

/// An artifact that is not what it should be.
#[derive(Debug, thiserror::Error)]
pub enum ArtifactError {
    /// Its bytes are no such file.
    #[error(transparent)]
    File(#[from] TensorFileError),
    /// A number in it is not finite.
    #[error("{file}: {source}")]
    NotFinite {
        /// The artifact.
        file: String,
        /// Which tensor.
        source: NonFinite,
    },
    /// Its tensors or metadata contradict each other.
    #[error("{file}: {reason}")]
    Inconsistent {
        /// The artifact.
        file: String,
        /// What does not fit.
        reason: String,
    },
}

/// One sampled trace.
#[derive(Debug)]
pub struct ThinkArtifact {
    /// Prompt and response tokens, `i64 [P+R]`.
    pub tokens: Tensor,
    /// `P`.
    pub prompt_len: usize,
    /// Log-probability of each response token under the policy that sampled it, `f32 [R]`.
    pub log_probs: Tensor,
    /// The refined prompt's embeddings without padding, `f32 [T, D]`.
    pub embeds: Tensor,
    /// The negative prompt's, `f32 [N, D]`.
    pub negative_embeds: Tensor,
}

/// The images of one trace.
#[derive(Debug)]
pub struct RenderArtifact {
    /// Packed latents before the window and after each of its `w` steps, `f32 [K, w+1, S, C]`;
    /// `[K, 0, S, C]` when nothing is trained on.
    pub latents: Tensor,
    /// Log-probability of each step of the window, `f32 [K, w]`.
    pub log_probs: Tensor,
    /// RGB, `u8 [K, H, W, 3]`.
    pub images: Tensor,
    /// Final packed latents, `f32 [K, S, C]`, where training starts from them.
    pub last: Option<Tensor>,
    /// First step of the window.
    pub window_start: u32,
}

impl ThinkArtifact {
    /// The file.
    ///
    /// # Errors
    /// A tensor has another shape than it should, or a number is not finite: nothing that a trainer
    /// would refuse is ever stored.
    pub fn encode(&self) -> Result<Vec<u8>, ArtifactError> {
        self.check("a new think artifact")?;
        let metadata = [(FORMAT, THINK.to_owned()), ("prompt_len", self.prompt_len.to_string())];
        Ok(encode(&self.tensors(), &text(metadata))?)
    }

    /// Reads a file to `device`; `label` names it in errors.
    ///
    /// # Errors
    /// It is no such file, or its parts do not fit together.
    pub fn decode(label: &str, data: Vec<u8>, device: Device) -> Result<Self, ArtifactError> {
        let file = open(label, data, THINK)?;
        let artifact = ThinkArtifact {
            tokens: load(&file, "tokens", Kind::Int64, device)?,
            prompt_len: number(&file, "prompt_len")?,
            log_probs: load(&file, "log_probs", Kind::Float, device)?,
            embeds: load(&file, "embeds", Kind::Float, device)?,
            negative_embeds: load(&file, "negative_embeds", Kind::Float, device)?,
        };
        artifact.check(label)?;
        Ok(artifact)
    }

    fn tensors(&self) -> Tensors {
        named([
            ("tokens", &self.tokens),
            ("log_probs", &self.log_probs),
            ("embeds", &self.embeds),
            ("negative_embeds", &self.negative_embeds),
        ])
    }

    fn check(&self, label: &str) -> Result<(), ArtifactError> {
        let (tokens, log_probs) = (self.tokens.size(), self.log_probs.size());
        let (embeds, negative) = (self.embeds.size(), self.negative_embeds.size());
        let fits = tokens.len() == 1
            && log_probs.len() == 1
            && tokens[0] == self.prompt_len as i64 + log_probs[0]
            && embeds.len() == 2
            && negative.len() == 2
            && embeds[1] == negative[1]
            && embeds[0] > 0;
        let reason = || {
            format!(
                "prompt_len {}, tokens {tokens:?}, log_probs {log_probs:?}, embeds {embeds:?} and \
                 negative_embeds {negative:?} do not belong to one trace",
                self.prompt_len
            )
        };
        consistent(label, fits, reason, &self.tensors())
    }
}

impl RenderArtifact {
    /// The file.
    ///
    /// # Errors
    /// As [`ThinkArtifact::encode`].
    pub fn encode(&self) -> Result<Vec<u8>, ArtifactError> {
        self.check("a new render artifact")?;
        let metadata =
            [(FORMAT, RENDER.to_owned()), ("window_start", self.window_start.to_string())];
        Ok(encode(&self.tensors(), &text(metadata))?)
    }

    /// Reads a file to `device`; `label` names it in errors.
    ///
    /// # Errors
    /// As [`ThinkArtifact::decode`].
    pub fn decode(label: &str, data: Vec<u8>, device: Device) -> Result<Self, ArtifactError> {
        let file = open(label, data, RENDER)?;
        let artifact = RenderArtifact {
            latents: load(&file, "latents", Kind::Float, device)?,
            log_probs: load(&file, "log_probs", Kind::Float, device)?,
            images: load(&file, "images", Kind::Uint8, device)?,
            last: match file.spec("last") {
                Some(_) => Some(load(&file, "last", Kind::Float, device)?),
                None => None,
            },
            window_start: number(&file, "window_start")?,
        };
        artifact.check(label)?;
        Ok(artifact)
    }

    /// K.
    pub fn leaves(&self) -> usize {
        usize::try_from(self.images.size()[0]).unwrap_or(0)
    }

    fn tensors(&self) -> Tensors {
        let mut all = named([
            ("latents", &self.latents),
            ("log_probs", &self.log_probs),
            ("images", &self.images),
        ]);
        all.extend(self.last.iter().map(|last| ("last".to_owned(), last.shallow_clone())));
        all
    }

    fn check(&self, label: &str) -> Result<(), ArtifactError> {
        let (latents, log_probs) = (self.latents.size(), self.log_probs.size());
        let images = self.images.size();
        let fits = latents.len() == 4
            && log_probs.len() == 2
            && images.len() == 4
            && images[3] == 3
            && images[0] > 0
            && latents[0] == images[0]
            && log_probs[0] == images[0]
            && self.last.as_ref().is_none_or(|last| {
                let size = last.size();
                size.len() == 3 && size[0] == images[0] && size[1..] == latents[2..]
            })
            && (latents[1] == log_probs[1] + 1 || (latents[1] == 0 && log_probs[1] == 0));
        let reason = || {
            format!(
                "latents {latents:?}, log_probs {log_probs:?} and images {images:?} do not belong \
                 to one sub-tree"
            )
        };
        consistent(label, fits, reason, &self.tensors())
    }
}

fn text<const N: usize>(pairs: [(&str, String); N]) -> Metadata {
    pairs.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
}

fn named<const N: usize>(tensors: [(&str, &Tensor); N]) -> Tensors {
    tensors.into_iter().map(|(name, tensor)| (name.to_owned(), tensor.shallow_clone())).collect()
}

fn open(label: &str, data: Vec<u8>, format: &str) -> Result<TensorFile, ArtifactError> {
    let file = TensorFile::from_bytes(label, data)?;
    match file.metadata().get(FORMAT).map(String::as_str) {
        Some(found) if found == format => Ok(file),
        found => Err(ArtifactError::Inconsistent {
            file: label.to_owned(),
            reason: format!("format `{}`, expected `{format}`", found.unwrap_or("unknown")),
        }),
    }
}

fn load(
    file: &TensorFile,
    name: &str,
    kind: Kind,
    device: Device,
) -> Result<Tensor, ArtifactError> {
    let tensor = file.load(name, device)?;
    if tensor.kind() != kind {
        return Err(TensorFileError::Kind {
            file: file.label().to_owned(),
            name: name.to_owned(),
            found: tensor.kind(),
            expected: kind,
        }
        .into());
    }
    Ok(tensor)
}

fn number<T: std::str::FromStr>(file: &TensorFile, key: &str) -> Result<T, ArtifactError> {
    let found = file.metadata().get(key);
    found.and_then(|value| value.parse().ok()).ok_or_else(|| ArtifactError::Inconsistent {
        file: file.label().to_owned(),
        reason: format!("metadata `{key}` is {found:?}, expected a whole number"),
    })
}

fn consistent(
    label: &str,
    fits: bool,
    reason: impl FnOnce() -> String,
    tensors: &Tensors,
) -> Result<(), ArtifactError> {
    if !fits {
        return Err(ArtifactError::Inconsistent { file: label.to_owned(), reason: reason() });
    }
    require_finite(tensors)
        .map_err(|source| ArtifactError::NotFinite { file: label.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn floats(shape: &[i64]) -> Tensor {
        let count: i64 = shape.iter().product();
        (Tensor::arange(count, (Kind::Float, Device::Cpu)) / 7).reshape(shape)
    }

    fn think() -> ThinkArtifact {
        ThinkArtifact {
            tokens: Tensor::arange(9, (Kind::Int64, Device::Cpu)),
            prompt_len: 4,
            log_probs: -floats(&[5]),
            embeds: floats(&[7, 3]),
            negative_embeds: floats(&[6, 3]),
        }
    }

    fn render(window: i64) -> RenderArtifact {
        RenderArtifact {
            latents: floats(&[2, if window == 0 { 0 } else { window + 1 }, 4, 3]),
            log_probs: -floats(&[2, window]),
            images: Tensor::arange(2 * 8 * 8 * 3, (Kind::Uint8, Device::Cpu)).reshape([2, 8, 8, 3]),
            last: None,
            window_start: 3,
        }
    }

    #[test]
    fn a_trace_comes_back_bit_for_bit() {
        let bytes = think().encode().unwrap();
        assert_eq!(bytes, think().encode().unwrap());
        let back = ThinkArtifact::decode("x", bytes, Device::Cpu).unwrap();
        assert_eq!(back.tensors(), think().tensors());
        assert_eq!(back.prompt_len, 4);
    }

    #[test]
    fn a_sub_tree_comes_back_bit_for_bit_with_and_without_a_window() {
        for window in [0, 1, 2] {
            let bytes = render(window).encode().unwrap();
            let back = RenderArtifact::decode("x", bytes, Device::Cpu).unwrap();
            assert_eq!(back.tensors(), render(window).tensors());
            assert_eq!((back.window_start, back.leaves()), (3, 2));
        }
        let ended = RenderArtifact { last: Some(floats(&[2, 4, 3])), ..render(0) };
        let bytes = ended.encode().unwrap();
        let back = RenderArtifact::decode("x", bytes, Device::Cpu).unwrap();
        assert_eq!(back.last, ended.last);
        let other = RenderArtifact { last: Some(floats(&[2, 5, 3])), ..render(0) };
        assert!(other.encode().is_err());
    }

    #[test]
    fn what_does_not_fit_is_never_written() {
        let short = ThinkArtifact { log_probs: floats(&[4]), ..think() };
        assert!(short.encode().unwrap_err().to_string().contains("do not belong to one trace"));
        let bad = ThinkArtifact { embeds: floats(&[7, 3]).log().neg() / 0.0, ..think() };
        assert!(bad.encode().unwrap_err().to_string().contains("`embeds` has"));
        let grey = RenderArtifact { images: render(1).images.narrow(3, 0, 1), ..render(1) };
        assert!(grey.encode().unwrap_err().to_string().contains("one sub-tree"));
    }

    #[test]
    fn one_is_not_taken_for_the_other_and_a_cut_file_is_refused() {
        let bytes = think().encode().unwrap();
        let error = RenderArtifact::decode("t0/think.st", bytes.clone(), Device::Cpu).unwrap_err();
        assert_eq!(
            error.to_string(),
            "t0/think.st: format `duet-think-1`, expected `duet-render-1`"
        );
        for len in [0, 7, 40, bytes.len() - 1] {
            assert!(ThinkArtifact::decode("x", bytes[..len].to_vec(), Device::Cpu).is_err());
        }
    }
}
