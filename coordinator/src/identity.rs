//! Whose run a store holds: `run.json`, created once, before anything else.

use crate::clock;
use crate::error::CoordinatorError;
use crate::options::Options;
use bytes::Bytes;
use duet_core::Digest;
use duet_store::{StoreError, keys};
use serde::{Deserialize, Serialize};

/// Largest file that is read.
const MAX_BYTES: u64 = 1 << 20;
/// What the file calls itself.
const FORMAT: &str = "duet-run/1";

/// What makes two coordinators coordinators of the same run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Identity {
    /// The kind of file.
    pub format: String,
    /// The run's name.
    pub run: String,
    /// Hash over the configuration that decides results.
    pub config: Digest,
    /// Hash over all prompts in order: the same configuration with other prompts is another run.
    pub prompts: Digest,
    /// When it was begun, in milliseconds since 1970.
    pub created_unix_ms: u64,
}

impl Identity {
    /// The identity that these options ask for.
    pub fn of(options: &Options) -> Identity {
        let mut text = Vec::new();
        for row in options.prompts.iter() {
            for part in [&row.text, &row.meta] {
                text.extend((part.len() as u64).to_le_bytes());
                text.extend(part.as_bytes());
            }
        }
        Identity {
            format: FORMAT.to_owned(),
            run: options.run.clone(),
            config: options.config,
            prompts: Digest::of(&text),
            created_unix_ms: clock::unix_now().0,
        }
    }

    /// The identity that the store holds; `None`: no run was begun there.
    ///
    /// # Errors
    /// The store fails, or the file is not one.
    pub async fn load(options: &Options) -> Result<Option<Identity>, CoordinatorError> {
        let bytes = match options.store.get_at_most(keys::RUN, MAX_BYTES).await {
            Ok(bytes) => bytes,
            Err(StoreError::Missing { .. }) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let read = serde_json::from_slice(&bytes);
        read.map(Some).map_err(|error| CoordinatorError::Unreadable {
            place: options.store.place().to_owned(),
            key: keys::RUN.to_owned(),
            reason: error.to_string(),
        })
    }

    /// Claims an empty store for this run, or checks that it holds this run and that going on with it
    /// is wished. Returns whether the run is new.
    ///
    /// # Errors
    /// [`CoordinatorError::Occupied`], [`CoordinatorError::OtherRun`], or the store fails.
    pub async fn claim(options: &Options) -> Result<bool, CoordinatorError> {
        let ours = Identity::of(options);
        if let Some(theirs) = Identity::load(options).await? {
            return theirs.check(&ours, options).map(|()| false);
        }
        let text = serde_json::to_vec_pretty(&ours).unwrap_or_default();
        match options.store.create(keys::RUN, Bytes::from(text)).await {
            Ok(()) => {
                // For people and replays; nothing of the run depends on it.
                let text = Bytes::from(options.config_text.clone());
                match options.store.create(keys::CONFIG, text).await {
                    Ok(()) | Err(StoreError::Exists { .. }) => Ok(true),
                    Err(error) => Err(error.into()),
                }
            }
            // Another coordinator was faster; its run may be ours.
            Err(StoreError::Exists { .. }) => {
                let theirs = Identity::load(options).await?;
                theirs.map_or(Ok(()), |theirs| theirs.check(&ours, options)).map(|()| false)
            }
            Err(error) => Err(error.into()),
        }
    }

    fn check(&self, ours: &Identity, options: &Options) -> Result<(), CoordinatorError> {
        let (place, run) = (options.store.place().to_owned(), self.run.clone());
        if !options.resume {
            return Err(CoordinatorError::Occupied { place, run });
        }
        let pairs = [
            ("name", self.run.clone(), ours.run.clone()),
            ("prompt file", self.prompts.short(), ours.prompts.short()),
            ("configuration", self.config.short(), ours.config.short()),
        ];
        match pairs.into_iter().find(|(_, theirs, ours)| theirs != ours) {
            Some((what, theirs, ours)) => {
                Err(CoordinatorError::OtherRun { place, run, what, theirs, ours })
            }
            None => Ok(()),
        }
    }
}
