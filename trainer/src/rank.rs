//! What a rank's device thread owns: the engine, and the group it is part of.

use crate::engine::batch::StepInput;
use crate::engine::layout::Seat;
use crate::engine::{Engine, Settings, WeightFiles, checkpoint};
use crate::error::TrainError;
use duet_core::work::Held;
use duet_core::{Digest, PolicyVersion, TrainerEpoch};
use duet_torch::collective::{AbortHandle, Collective, Gloo, GroupOptions, Nccl, Solo, Store};
use duet_torch::tensorfile::TensorFile;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tch::{Device, Kind, Tensor};

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

    /// Leaves the group and gives everything of libtorch back; nothing can be asked of it any more.
    pub fn end(&mut self) {
        self.engine = None;
        self.leave();
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

    /// Goes on from the newest committed version, if ranks of the group still hold it: all of them their
    /// own share, or one of them all of it, which the others take from there. `None`: there is nobody,
    /// and a checkpoint must be restored. The same on all ranks.
    ///
    /// # Errors
    /// [`TrainError`]; who held it before, holds it still if only others failed.
    pub fn go_on(
        &mut self,
        newest: Option<Held>,
    ) -> Result<Option<(PolicyVersion, Digest)>, TrainError> {
        let Some(newest) = newest else { return Ok(None) };
        let group = self.group.as_deref().ok_or_else(no_group)?;
        let seat = Seat { rank: group.rank(), world: group.world() };
        let engine = self.engine.take();
        let holds = match &engine {
            Some(engine) if engine.is_whole() && engine.version() == newest.version.0 => {
                engine.digest()? == newest.digest
            }
            _ => false,
        };
        let share = engine.as_ref().filter(|_| holds).and_then(Engine::share);
        // What an only rank had whole is not what one of several needs, where these share it out.
        let shares = self.settings.sharing.zero > 0 && seat.world > 1;
        let holds = holds && share.is_some() == shares;
        let source = source(group, Holding::of(holds, share));
        let (mut engine, source) = match (engine, source) {
            (engine, Err(error)) => {
                self.engine = engine;
                return Err(error);
            }
            (engine, Ok(Source::Checkpoint)) => {
                self.engine = engine;
                return Ok(None);
            }
            (Some(engine), Ok(source)) if holds => (engine, source),
            (engine, Ok(source)) => (self.as_loaded(engine)?, source),
        };
        engine.stay(seat)?;
        let done = match source {
            Source::Peer(root) => engine.take_from(group, root, holds),
            Source::Own | Source::Checkpoint => Ok(()),
        };
        if let Err(error) = done {
            self.engine = Some(engine).filter(Engine::is_whole);
            return Err(error);
        }
        let digest = engine.digest()?;
        if digest != newest.digest {
            let version = newest.version;
            let reason = format!(
                "the state of {version} that rank {} of {} went on from has weights {digest}; \
                 committed were {}",
                seat.rank, seat.world, newest.digest
            );
            return Err(TrainError::Checkpoint(reason));
        }
        match source {
            Source::Peer(root) if !holds => {
                tracing::info!(version = %newest.version, from = root, "state taken from a rank");
            }
            _ => tracing::info!(version = %newest.version, "state kept"),
        }
        self.engine = Some(engine);
        Ok(Some((newest.version, digest)))
    }

    /// The base model: as it was loaded, where nothing has been trained or restored since.
    fn as_loaded(&self, engine: Option<Engine>) -> Result<Engine, TrainError> {
        match engine {
            Some(engine) if engine.version() == 0 && engine.is_whole() => Ok(engine),
            other => {
                // What there was goes before its successor comes.
                drop(other);
                Engine::load(self.settings.clone())
            }
        }
    }

    /// Sets models and optimisers to a checkpoint, or to the base model when there are no shards.
    ///
    /// # Errors
    /// [`TrainError`] naming what does not fit.
    pub fn restore(
        &mut self,
        shards: Vec<TensorFile>,
    ) -> Result<(PolicyVersion, Digest), TrainError> {
        let engine = self.engine.take();
        let mut engine = self.as_loaded(engine)?;
        let group = self.group.as_deref();
        engine.stay(
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
        // Taken: what is half done is not used again.
        let mut engine = self.engine.take().ok_or_else(no_group)?;
        let (publish, rank) = (input.step.publish, group.rank());
        let metrics = match engine.step(input, group) {
            Ok(metrics) => metrics,
            Err(error) => {
                // Another rank's failure leaves this one at the version before.
                let others = matches!(error, TrainError::Collective(_) | TrainError::Peer { .. });
                self.engine = Some(engine).filter(|engine| others && engine.is_whole());
                return Err(error);
            }
        };
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

/// Where a group's state comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    /// Every rank holds what it needs.
    Own,
    /// This rank gives it to the others.
    Peer(u32),
    /// Nobody can give it.
    Checkpoint,
}

/// What a rank says of the newest version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Holding {
    /// It is at another one, or at none.
    Nothing,
    /// It holds all of it.
    All,
    /// It holds the share of this rank of so many.
    Share(Seat),
}

impl Holding {
    fn of(holds: bool, share: Option<Seat>) -> Holding {
        match share {
            _ if !holds => Holding::Nothing,
            Some(seat) => Holding::Share(seat),
            None => Holding::All,
        }
    }

    fn encode(self) -> [i64; 2] {
        match self {
            Holding::Nothing => [0, 0],
            Holding::All => [0, 1],
            Holding::Share(Seat { rank, world }) => [i64::from(rank), i64::from(world) + 1],
        }
    }

    fn decode(said: &[i64]) -> Holding {
        let number = |at: usize| said.get(at).and_then(|n| u32::try_from(*n).ok()).unwrap_or(0);
        match (number(0), number(1)) {
            (_, 0) => Holding::Nothing,
            (_, 1) => Holding::All,
            (rank, world) => Holding::Share(Seat { rank, world: world - 1 }),
        }
    }
}

/// What all ranks make of what each of them holds.
fn source(group: &dyn Collective, own: Holding) -> Result<Source, TrainError> {
    let world = group.world();
    let all = Tensor::f_zeros([2 * i64::from(world)], (Kind::Int64, Device::Cpu))?;
    group.all_gather(&all, &Tensor::from_slice(&own.encode()))?;
    let said: Vec<i64> = Vec::try_from(&all)?;
    let held: Vec<Holding> = said.chunks(2).map(Holding::decode).collect();
    Ok(choose(&held))
}

fn choose(held: &[Holding]) -> Source {
    let world = held.len() as u32;
    let seated = |(rank, held): (u32, &Holding)| *held == Holding::Share(Seat { rank, world });
    if (0..).zip(held).all(seated) || held.iter().all(|held| *held == Holding::All) {
        return Source::Own;
    }
    let whole = held.iter().position(|held| *held == Holding::All);
    whole.map_or(Source::Checkpoint, |rank| Source::Peer(rank as u32))
}

fn no_group() -> TrainError {
    TrainError::Protocol("asked for a step without a group; it must form anew".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_comes_from_whoever_has_all_of_it_or_from_all_who_have_their_own_share() {
        let share = |rank, world| Holding::Share(Seat { rank, world });
        let (all, nothing) = (Holding::All, Holding::Nothing);
        for (held, source) in [
            (vec![all], Source::Own),
            (vec![all, all], Source::Own),
            (vec![nothing, all, all], Source::Peer(1)),
            (vec![nothing, nothing], Source::Checkpoint),
            (vec![share(0, 2), share(1, 2)], Source::Own),
            // A share is lost, or sits elsewhere, or is one of more.
            (vec![share(0, 2), nothing], Source::Checkpoint),
            (vec![share(1, 2), share(0, 2)], Source::Checkpoint),
            (vec![share(0, 3), share(1, 3)], Source::Checkpoint),
        ] {
            let heard: Vec<Holding> = held.iter().map(|h| Holding::decode(&h.encode())).collect();
            assert_eq!(heard, held);
            assert_eq!(choose(&held), source, "{held:?}");
        }
    }
}
