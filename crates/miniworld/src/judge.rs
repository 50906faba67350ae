//! The judge: it measures and never rewards. Another architecture than the scorers', trained on
//! other people's handwriting.

use crate::error::Result;
use crate::files::{read_nets, write_nets};
use crate::nets::{Build, Net};
use duet_models::vae::from_bytes;
use std::path::Path;
use tch::{Kind, Tensor};

/// Where the judge lies in a pipeline folder.
pub const FILE: &str = "miniworld/judge.safetensors";

/// What the judge tells apart.
pub(crate) const HEADS: [(&str, i64); 2] = [("digit", 10), ("colour", 6)];

/// What the judge sees in an image.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Verdict {
    /// The digit.
    pub digit: u8,
    /// The colour, an index into [`crate::facts::COLOURS`].
    pub colour: u8,
    /// How sure it is of both, in [0, 1].
    pub confidence: f64,
}

/// The judge.
#[derive(Debug)]
pub struct Judge {
    net: Net,
}

impl Judge {
    pub(crate) fn new(net: Net) -> Judge {
        Judge { net }
    }

    /// Loads the judge of a pipeline folder that the bootstrap made.
    ///
    /// # Errors
    /// The file is missing, damaged or of another architecture.
    pub fn load(folder: &Path) -> Result<Judge> {
        let path = folder.join(FILE);
        let params = read_nets(&path)?;
        Ok(Judge { net: Net::from_params(Build::Wide, &HEADS, &params, "judge.", &path)? })
    }

    pub(crate) fn save(&self, folder: &Path) -> Result<()> {
        write_nets(&folder.join(FILE), &[("judge.", &self.net)])
    }

    /// Looks at images `[K, 32, 32, 3]` u8.
    ///
    /// # Errors
    /// libtorch refuses.
    pub fn verdicts(&self, images: &Tensor) -> Result<Vec<Verdict>> {
        tch::no_grad(|| self.read(&from_bytes(images)))
    }

    /// Digit and colour of images `[K, 32, 32, 3]` u8: labels as [`crate::prompts::named`] has them.
    ///
    /// # Errors
    /// libtorch refuses.
    pub fn see(&self, images: &Tensor) -> Result<Vec<(u8, u8)>> {
        let seen = self.verdicts(images)?;
        Ok(seen.into_iter().map(|verdict| (verdict.digit, verdict.colour)).collect())
    }

    fn read(&self, images: &Tensor) -> Result<Vec<Verdict>> {
        let logits = self.net.forward(images);
        let best = |head: usize| -> Result<(Vec<i64>, Vec<f64>)> {
            let (chance, label) = logits[head].softmax(-1, Kind::Float).max_dim(-1, false);
            Ok((label.try_into()?, Vec::try_from(chance.to_kind(Kind::Double))?))
        };
        let (digits, sure) = best(0)?;
        let (colours, sure_too) = best(1)?;
        let both = digits.into_iter().zip(colours).zip(sure.into_iter().zip(sure_too));
        Ok(both
            .map(|((digit, colour), (a, b))| Verdict {
                digit: digit as u8,
                colour: colour as u8,
                confidence: a * b,
            })
            .collect())
    }
}
