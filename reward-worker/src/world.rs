//! The small world's scorers as a [`Scorer`].

use crate::scorer::{Job, Scorer};
use duet_core::work::LeafScores;
use duet_miniworld::WorldError;
use duet_miniworld::scorers::Scorers;
use std::path::Path;

/// The scorers that the bootstrap trained: `semantic`, `aesthetic`, `consistency`.
#[derive(Debug)]
pub struct WorldScorer(Scorers);

impl WorldScorer {
    /// Loads the scorers of a pipeline folder.
    ///
    /// # Errors
    /// The folder has none, or they cannot be used.
    pub fn load(folder: &Path) -> Result<WorldScorer, WorldError> {
        Scorers::load(folder).map(WorldScorer)
    }
}

impl Scorer for WorldScorer {
    fn components(&self) -> Vec<String> {
        self.0.components().iter().map(|name| (*name).to_owned()).collect()
    }

    fn score(&mut self, job: &Job) -> Result<Vec<LeafScores>, String> {
        let scores = self.0.score(&job.images, &job.prompt, &job.refined_prompt);
        scores.map_err(|error| error.to_string())
    }
}
