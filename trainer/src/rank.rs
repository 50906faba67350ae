//! What a rank's device thread owns: the engine, and the group it is part of.

use crate::engine::batch::StepInput;
use crate::engine::layout::Seat;
use crate::engine::{Engine, Settings, WeightFiles, checkpoint};
use crate::error::TrainError;
use duet_core::{Digest, PolicyVersion, TrainerEpoch};
use duet_torch::collective::{AbortHandle, Collective, Gloo, GroupOptions, Nccl, Solo, Store};
use duet_torch::tensorfile::TensorFile;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// A rank's place in a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The group.
    pub epoch: TrainerEpoch,
    /// This rank.
    pub rank: u32,
    /// How many ranks there are.
    pub world: u32,
    /// This machine's address, as the other ranks reach it.
    pub host: String,
    /// Bound on forming the group and on each collective operation.
    pub deadline: Duration,
}

/// The state of the device thread.
pub struct RankState {
    settings: Settings,
    /// `None` when what it holds must not be used any more.
    engine: Option<Engine>,
    store: Option<Arc<Store>>,
    group: Option<Box<dyn Collective>>,
}

/// What a step leaves behind, besides the new weights in memory.
#[derive(Debug)]
pub struct Stepped {
    /// The version it led to.
    pub version: PolicyVersion,
    /// Hash over all trained tensors.
    pub digest: Digest,
    /// Equal on all ranks.
    pub metrics: BTreeMap<String, f64>,
    /// To publish, if so asked.
    pub weights: Option<WeightFiles>,
}

impl RankState {
    /// Sets libtorch up and loads the base model, so that what cannot work ends the process at its
    /// start.
    ///
    /// # Errors
    /// [`TrainError`] naming the file or setting that does not fit.
    pub fn new(settings: Settings, threads: u32) -> Result<RankState, TrainError> {
        let library = duet_torch::init(threads)?.library;
        if settings.nccl.is_some() {
            let version = Nccl::version(&library)?;
            tracing::info!(version, "nccl");
        }
        let engine = Some(Engine::load(settings.clone())?);
        Ok(RankState { settings, engine, store: None, group: None })
    }

    /// Leaves the group, if any.
    pub fn leave(&mut self) {
        self.group = None;
        self.store = None;
    }

    /// Opens the store that the other ranks of a new group come to, and gives its address.
    ///
    /// # Errors
    /// No port can be opened.
    pub fn serve(&mut self, place: &Place) -> Result<String, TrainError> {
        self.leave();
        let store = Store::serve(&place.host, place.deadline)?;
        let address = store.address().to_owned();
        self.store = Some(Arc::new(store));
        Ok(address)
    }

    /// Joins a group: through the store that this rank serves, or the one at `address`.
    ///
    /// # Errors
    /// [`TrainError::Collective`] naming the ranks that did not come.
    pub fn join(
        &mut self,
        place: &Place,
        address: Option<&str>,
        abort: AbortHandle,
    ) -> Result<(), TrainError> {
        self.group = None;
        if place.world == 1 {
            self.group = Some(Box::new(Solo::with_abort(abort)));
            return Ok(());
        }
        let store = match address {
            Some(address) => Arc::new(Store::connect(address, place.deadline)?),
            None => self.store.clone().ok_or_else(|| {
                TrainError::Protocol("rank 0 was told to join a group before it served".to_owned())
            })?,
        };
        self.store = Some(store.clone());
        let options = GroupOptions {
            rank: place.rank,
            world: place.world,
            group: format!("epoch-{}", place.epoch.0),
            host: place.host.clone(),
            deadline: place.deadline,
            threads: 2,
        };
        self.group = Some(match self.settings.nccl {
            Some(device) => {
                let library = duet_torch::init(1)?.library;
                Box::new(Nccl::connect(store, options, (device, &library), abort)?)
            }
            None => Box::new(Gloo::connect(store, options, abort)?),
        });
        Ok(())
    }

    /// Sets models and optimisers to a checkpoint, or to the base model when there are no shards.
    ///
    /// # Errors
    /// [`TrainError`] naming what does not fit.
    pub fn restore(
        &mut self,
        shards: Vec<TensorFile>,
    ) -> Result<(PolicyVersion, Digest), TrainError> {
        let mut engine = match self.engine.take() {
            // As loaded: nothing has been trained or restored.
            Some(engine) if engine.version() == 0 => engine,
            other => {
                // What there was goes before its successor comes.
                drop(other);
                Engine::load(self.settings.clone())?
            }
        };
        let group = self.group.as_deref();
        engine.sit(
            group.map_or(Seat::ALONE, |group| Seat { rank: group.rank(), world: group.world() }),
        )?;
        if !shards.is_empty() {
            checkpoint::restore(&mut engine, shards)?;
        }
        let held = (PolicyVersion(engine.version()), engine.digest()?);
        self.engine = Some(engine);
        Ok(held)
    }

    /// Takes a step with the other ranks.
    ///
    /// # Errors
    /// [`TrainError`]; the group must then form anew and restore.
    pub fn step(&mut self, input: StepInput) -> Result<Stepped, TrainError> {
        let group = self.group.as_deref().ok_or_else(no_group)?;
        // Taken: whatever goes wrong, what is half done is not used again.
        let mut engine = self.engine.take().ok_or_else(no_group)?;
        let (publish, rank) = (input.step.publish, group.rank());
        let metrics = engine.step(input, group)?;
        let stepped = Stepped {
            version: PolicyVersion(engine.version()),
            digest: engine.digest()?,
            metrics,
            weights: (publish && rank == 0).then(|| engine.weight_files()).transpose()?,
        };
        self.engine = Some(engine);
        Ok(stepped)
    }

    /// This rank's shard of a checkpoint, as it is now, copied into memory that was used before.
    ///
    /// # Errors
    /// There is no group, or libtorch refuses.
    pub fn shard(&self, mut image: Vec<u8>) -> Result<Vec<u8>, TrainError> {
        let group = self.group.as_deref().ok_or_else(no_group)?;
        let engine = self.engine.as_ref().ok_or_else(no_group)?;
        checkpoint::shard_into(engine, (group.rank(), group.world()), &mut image)?;
        Ok(image)
    }
}

fn no_group() -> TrainError {
    TrainError::Protocol("asked for a step without a group; it must form anew".to_owned())
}
