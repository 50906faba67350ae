//! Judges: who says what is in an image.

use super::record::Subject;
use duet_miniworld::facts::COLOURS;
use std::path::Path;
use tch::Tensor;

/// Something that says what is in an image.
pub trait Judge {
    /// What each of `u8 [K, H, W, 3]` shows.
    ///
    /// # Errors
    /// Why it cannot say.
    fn see(&self, images: &Tensor) -> Result<Vec<Subject>, String>;
}

/// The small world's judge.
#[derive(Debug)]
pub struct WorldJudge(duet_miniworld::judge::Judge);

impl WorldJudge {
    /// The judge of a pipeline folder; `None` where the folder is not of the small world.
    ///
    /// # Errors
    /// The folder has a judge that cannot be used.
    pub fn load(folder: &Path) -> Result<Option<WorldJudge>, String> {
        if !folder.join(duet_miniworld::judge::FILE).exists() {
            return Ok(None);
        }
        let judge = duet_miniworld::judge::Judge::load(folder);
        judge.map(|judge| Some(WorldJudge(judge))).map_err(|error| error.to_string())
    }
}

impl Judge for WorldJudge {
    fn see(&self, images: &Tensor) -> Result<Vec<Subject>, String> {
        let seen = self.0.see(images).map_err(|error| error.to_string())?;
        let subject = |(digit, colour): (u8, u8)| {
            let name = COLOURS.get(usize::from(colour));
            let colour = (*name.ok_or_else(|| format!("colour {colour} has no name"))?).to_owned();
            Ok(Subject { digit, colour })
        };
        seen.into_iter().map(subject).collect()
    }
}
