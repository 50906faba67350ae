//! The rewards: what the small world's scorers think of an image.

use crate::digits::{GLYPH_SIDE, SIDE};
use crate::error::{Result, WorldError};
use crate::facts::{COLOURS, PLACES};
use crate::files::{read_nets, write_nets};
use crate::nets::{Build, Net};
use crate::prompts::Target;
use duet_core::work::{LeafScores, PromptRow, Score};
use duet_models::vae::from_bytes;
use std::path::Path;
use tch::{Kind, Tensor};

/// Where the scorers lie in a pipeline folder.
pub const FILE: &str = "miniworld/scorers.safetensors";

/// What the recogniser tells apart.
pub(crate) const RECOGNISER: [(&str, i64); 3] = [("digit", 10), ("colour", 6), ("place", 4)];
/// What the critic tells apart: spoilt (0) from drawn by hand (1).
pub(crate) const CRITIC: [(&str, i64); 1] = [("real", 2)];

/// The components of the reward.
pub const COMPONENTS: [&str; 3] = ["semantic", "aesthetic", "consistency"];

/// The small world's image scorers.
#[derive(Debug)]
pub struct Scorers {
    recogniser: Net,
    critic: Net,
}

impl Scorers {
    pub(crate) fn new(recogniser: Net, critic: Net) -> Scorers {
        Scorers { recogniser, critic }
    }

    /// Loads the scorers of a pipeline folder that the bootstrap made.
    ///
    /// # Errors
    /// The file is missing, damaged or of another architecture.
    pub fn load(folder: &Path) -> Result<Scorers> {
        let path = folder.join(FILE);
        let params = read_nets(&path)?;
        Ok(Scorers {
            recogniser: Net::from_params(Build::Deep, &RECOGNISER, &params, "recogniser.", &path)?,
            critic: Net::from_params(Build::Deep, &CRITIC, &params, "critic.", &path)?,
        })
    }

    pub(crate) fn save(&self, folder: &Path) -> Result<()> {
        let nets = [("recogniser.", &self.recogniser), ("critic.", &self.critic)];
        write_nets(&folder.join(FILE), &nets)
    }

    /// Names of the components, in order.
    pub fn components(&self) -> &'static [&'static str] {
        &COMPONENTS
    }

    /// Scores images `[K, 32, 32, 3]` u8 of one trace. All scores are in [0, 1]:
    /// - `semantic`: probability that the image shows the prompt's true digit in its true colour;
    /// - `aesthetic`: probability that it was drawn by hand;
    /// - `consistency`: probability that the digit is where the prompt wants it, times the share of
    ///   the image's light that falls there.
    ///
    /// The refined prompt is not looked at: a reward for agreeing with it would pay for refined
    /// prompts that are easy instead of right.
    ///
    /// # Errors
    /// The prompt is not of this world, or the images have another size.
    pub fn score(
        &self,
        images: &Tensor,
        prompt: &PromptRow,
        _refined: &str,
    ) -> Result<Vec<LeafScores>> {
        let target = target_of(prompt)?;
        let size = images.size();
        let side = SIDE as i64;
        if size.len() != 4 || size[1..] != [side, side, 3] {
            return Err(WorldError::BadInput(format!(
                "images of shape {size:?} cannot be scored; the small world's are [K, {side}, {side}, 3]; \
                 set rollout.width and rollout.height to {side}"
            )));
        }
        let columns = tch::no_grad(|| self.columns(images, &target))?;
        let leaf = |k: usize| {
            let scores = COMPONENTS.iter().zip(&columns);
            let named = scores.map(|(name, column)| {
                let score = match column[k] {
                    value if value.is_finite() => Score::Scored(value),
                    value => Score::Failed(format!("the {name} score is {value}")),
                };
                ((*name).to_owned(), score)
            });
            named.collect()
        };
        Ok((0..size[0] as usize).map(leaf).collect())
    }

    /// One list of K numbers for each component.
    fn columns(&self, images: &Tensor, target: &Labels) -> Result<[Vec<f64>; 3]> {
        let images = from_bytes(images);
        let seen = self.recogniser.forward(&images);
        let chance = |head: usize, label: u8| {
            seen[head].softmax(-1, Kind::Float).select(1, i64::from(label))
        };
        let semantic = chance(0, target.digit) * chance(1, target.colour);
        let real = self.critic.forward(&images)[0].softmax(-1, Kind::Float).select(1, 1);
        let there = chance(2, target.place) * light_at(&images, target.place);
        let list = |x: Tensor| Vec::<f64>::try_from(x.to_kind(Kind::Double));
        Ok([list(semantic)?, list(real)?, list(there)?])
    }
}

/// The share of each image's light that falls into a quadrant; zero for a black image.
fn light_at(images: &Tensor, place: u8) -> Tensor {
    let half = GLYPH_SIDE;
    let light = (images / 2.0 + 0.5).sum_dim_intlist([1i64].as_slice(), false, Kind::Float);
    let (top, left) = (i64::from(place) / 2 * half, i64::from(place) % 2 * half);
    let inside = light.narrow(1, top, half).narrow(2, left, half);
    let sum = |x: &Tensor| x.sum_dim_intlist([1i64, 2].as_slice(), false, Kind::Float);
    sum(&inside) / (sum(&light) + 1e-3)
}

/// A target as label numbers.
struct Labels {
    digit: u8,
    colour: u8,
    place: u8,
}

fn target_of(prompt: &PromptRow) -> Result<Labels> {
    let fail = |reason: String| WorldError::Target { row: prompt.row, reason };
    let target: Target =
        serde_json::from_str(&prompt.meta).map_err(|error| fail(error.to_string()))?;
    let index = |names: &[&str], name: &str, what: &str| {
        let at = names.iter().position(|known| *known == name);
        at.map(|at| at as u8).ok_or_else(|| fail(format!("`{name}` is no {what}")))
    };
    if target.digit > 9 {
        return Err(fail(format!("{} is no digit", target.digit)));
    }
    Ok(Labels {
        digit: target.digit,
        colour: index(&COLOURS, &target.colour, "colour")?,
        place: index(&PLACES, &target.place, "place")?,
    })
}
