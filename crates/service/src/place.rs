//! Which of its kind a process is, and which GPU is its own: from flags, else from what its launcher
//! put into the environment.
//!
//! | looked at, in this order | number in the run | number on the machine |
//! |---|---|---|
//! | flags | `--rank` | `--local-rank` |
//! | Duet | `DUET_RANK` | `DUET_LOCAL_RANK` |
//! | torchrun | `RANK` | `LOCAL_RANK` |
//! | Kubeflow Trainer | `PET_NODE_RANK` | |
//! | a Kubernetes Job | `JOB_COMPLETION_INDEX` | |
//! | Slurm | `SLURM_PROCID` | `SLURM_LOCALID` |
//! | LeaderWorkerSet | `LWS_WORKER_INDEX`, after the groups before | |
//!
//! Each of the two numbers is taken from the first that gives it. The number in the run makes the
//! worker's name, so that a process that is started again in the same place has the same name; which
//! rank a trainer becomes is the coordinator's to say.

use crate::exit;
use clap::Args;
use duet_config::Device;
use duet_core::Role;
use std::collections::BTreeMap;

/// Duet's own variables.
pub const DUET_RANK: &str = "DUET_RANK";
/// See [`DUET_RANK`].
pub const DUET_LOCAL_RANK: &str = "DUET_LOCAL_RANK";
/// How many there are; only checked against [`DUET_RANK`].
pub const DUET_WORLD_SIZE: &str = "DUET_WORLD_SIZE";

/// The flags of a worker.
#[derive(Clone, Debug, Default, Args)]
pub struct PlaceArgs {
    /// This worker's name, unique in the run. Default: its role and its rank, such as `trainer-3`.
    #[arg(long)]
    pub id: Option<String>,
    /// The worker's number among its kind, from 0. Default: what torchrun, Kubernetes or Slurm say in
    /// the environment (docs/deploy.md has the list).
    #[arg(long, value_name = "N")]
    pub rank: Option<u32>,
    /// The number of the GPU to use, where several can be seen. Default: as `--rank`.
    #[arg(long, value_name = "N")]
    pub local_rank: Option<u32>,
}

/// A number, and who gave it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Given {
    /// The number.
    pub value: u32,
    /// The flag or variable.
    pub by: &'static str,
}

/// Where a process stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// Number among the processes of its kind.
    pub rank: Option<Given>,
    /// Number among the processes on its machine.
    pub local: Option<Given>,
}

/// A place that makes no sense.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlaceError {
    /// Not a number.
    #[error("{variable}={value} in the environment is not a number from 0")]
    Number {
        /// The variable.
        variable: &'static str,
        /// What it says.
        value: String,
    },
    /// More than there are.
    #[error("{variable}={rank}, but {of}={world}: ranks are counted from 0")]
    Beyond {
        /// The variable.
        variable: &'static str,
        /// Its number.
        rank: u32,
        /// The variable that says how many there are.
        of: &'static str,
        /// How many.
        world: u32,
    },
    /// A launcher that was not used as one.
    #[error(
        "PET_NPROC_PER_NODE={0}, but nothing says which of the {0} processes of its node this is: start it with \
         torchrun, or set DUET_RANK and DUET_LOCAL_RANK"
    )]
    Process(u32),
    /// Names of several groups would be the same.
    #[error(
        "LWS_LEADER_ADDRESS={0} does not begin with a name that ends in the number of the group: set DUET_RANK"
    )]
    Group(String),
    /// Nothing says who this is.
    #[error(
        "nothing says which {0} worker this is: give --id or --rank, or set DUET_RANK (RANK, PET_NODE_RANK, \
         JOB_COMPLETION_INDEX, SLURM_PROCID and LWS_WORKER_INDEX are looked at too)"
    )]
    Unknown(&'static str),
    /// None at all.
    #[error("workers.device: there is no GPU that libtorch can use; set it to `cpu`")]
    NoGpu,
    /// No such GPU.
    #[error(
        "{by}={local}, but {gpus} GPUs can be seen, numbered from 0: start no more processes on a machine than it has GPUs, \
         or show each its own (CUDA_VISIBLE_DEVICES)"
    )]
    Gpu {
        /// Who gave the number.
        by: &'static str,
        /// The number.
        local: u32,
        /// How many can be seen.
        gpus: u32,
    },
}

impl PlaceError {
    /// The exit code of a process that has no place.
    pub fn exit_code(&self) -> u8 {
        match self {
            PlaceError::Unknown(_) => exit::USAGE,
            _ => exit::CONFIG,
        }
    }
}

/// What a worker is called, and where it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Worker {
    /// Its name.
    pub id: String,
    /// Its place.
    pub place: Place,
}

impl PlaceArgs {
    /// Name and place of a worker of `role`.
    ///
    /// # Errors
    /// [`PlaceError`] when the environment contradicts itself or nothing gives a name.
    pub fn worker(
        &self,
        role: Role,
        environment: &BTreeMap<String, String>,
    ) -> Result<Worker, PlaceError> {
        let place = Place::find(self, environment)?;
        let id = match (&self.id, place.rank) {
            (Some(id), _) => id.clone(),
            (None, Some(rank)) => format!("{}-{}", role.as_str(), rank.value),
            (None, None) => return Err(PlaceError::Unknown(role.as_str())),
        };
        Ok(Worker { id, place })
    }
}

impl Worker {
    /// Logs the name, and who gave the numbers.
    pub fn announce(&self) {
        let by = |given: Option<Given>| given.map_or("nobody", |given| given.by);
        let number = |given: Option<Given>| given.map(|given| given.value);
        let Place { rank, local } = self.place;
        tracing::info!(
            worker = self.id,
            rank = number(rank),
            rank_by = by(rank),
            local_rank = number(local),
            local_rank_by = by(local),
            "place"
        );
    }
}

impl Place {
    /// The place that flags or the environment give; see the table of this module.
    ///
    /// # Errors
    /// [`PlaceError`] when a variable that is looked at contradicts itself or another.
    pub fn find(
        flags: &PlaceArgs,
        environment: &BTreeMap<String, String>,
    ) -> Result<Place, PlaceError> {
        let env = Environment(environment);
        let ranks: [&dyn Fn() -> Result<Option<Given>, PlaceError>; 7] = [
            &|| Ok(flags.rank.map(|value| Given { value, by: "--rank" })),
            &|| env.below(DUET_RANK, DUET_WORLD_SIZE),
            &|| env.below("RANK", "WORLD_SIZE"),
            &|| env.node(),
            &|| env.number("JOB_COMPLETION_INDEX"),
            // Not checked: in a heterogeneous job SLURM_NTASKS may be that of another component.
            &|| env.number("SLURM_PROCID"),
            &|| env.group(),
        ];
        let locals: [&dyn Fn() -> Result<Option<Given>, PlaceError>; 4] = [
            &|| Ok(flags.local_rank.map(|value| Given { value, by: "--local-rank" })),
            &|| env.number(DUET_LOCAL_RANK),
            &|| env.number("LOCAL_RANK"),
            &|| env.number("SLURM_LOCALID"),
        ];
        let first = |sources: &[&dyn Fn() -> Result<Option<Given>, PlaceError>]| {
            sources.iter().find_map(|source| source().transpose()).transpose()
        };
        Ok(Place { rank: first(&ranks)?, local: first(&locals)? })
    }

    /// The GPU that this process computes on, of so many that libtorch can use; `None`: the processor.
    ///
    /// # Errors
    /// [`PlaceError`] when a GPU is wanted and there is none, or not this process's.
    pub fn device(&self, wanted: Device, gpus: u32) -> Result<Option<u32>, PlaceError> {
        match (wanted, gpus) {
            (Device::Cpu, _) => Ok(None),
            (Device::Cuda, 0) => Err(PlaceError::NoGpu),
            (Device::Cuda, gpus) => {
                let gpu = self.gpu(gpus)?;
                tracing::info!(gpu, gpus, "GPU");
                Ok(Some(gpu))
            }
        }
    }

    /// Which of the GPUs that can be seen is this process's own: its local number where there are
    /// several, the only one where there is one. Without a local number, the first.
    fn gpu(&self, gpus: u32) -> Result<u32, PlaceError> {
        match self.local {
            Some(Given { value, by }) if gpus > 1 && value >= gpus => {
                Err(PlaceError::Gpu { by, local: value, gpus })
            }
            Some(Given { value, .. }) if gpus > 1 => Ok(value),
            _ => Ok(0),
        }
    }
}

/// The variables of a process; an empty one counts as not set.
struct Environment<'a>(&'a BTreeMap<String, String>);

impl Environment<'_> {
    fn text(&self, variable: &str) -> Option<&str> {
        self.0.get(variable).map(|text| text.trim()).filter(|text| !text.is_empty())
    }

    fn number(&self, variable: &'static str) -> Result<Option<Given>, PlaceError> {
        let Some(text) = self.text(variable) else { return Ok(None) };
        match text.parse() {
            Ok(value) => Ok(Some(Given { value, by: variable })),
            Err(_) => Err(PlaceError::Number { variable, value: text.to_owned() }),
        }
    }

    /// A number that must be below that of `of`, where that is set.
    fn below(&self, variable: &'static str, of: &'static str) -> Result<Option<Given>, PlaceError> {
        let Some(rank) = self.number(variable)? else { return Ok(None) };
        match self.number(of)? {
            Some(world) if rank.value >= world.value => {
                Err(PlaceError::Beyond { variable, rank: rank.value, of, world: world.value })
            }
            _ => Ok(Some(rank)),
        }
    }

    /// Kubeflow Trainer gives a node's number to torchrun; a process that was started in its stead is
    /// the node's only one.
    fn node(&self) -> Result<Option<Given>, PlaceError> {
        let Some(node) = self.number("PET_NODE_RANK")? else { return Ok(None) };
        // `auto`, `cpu` and `gpu` are allowed too, and mean nothing without torchrun.
        match self.text("PET_NPROC_PER_NODE").and_then(|text| text.parse().ok()) {
            Some(processes) if processes > 1 => Err(PlaceError::Process(processes)),
            _ => Ok(Some(node)),
        }
    }

    /// A LeaderWorkerSet counts within each group. The leader is called `SET-GROUP.SET.NAMESPACE`.
    fn group(&self) -> Result<Option<Given>, PlaceError> {
        let Some(within) = self.below("LWS_WORKER_INDEX", "LWS_GROUP_SIZE")? else {
            return Ok(None);
        };
        let before = match (self.number("LWS_GROUP_SIZE")?, self.text("LWS_LEADER_ADDRESS")) {
            (Some(size), Some(leader)) => {
                let name = leader.split('.').next().unwrap_or_default();
                let group = name.rsplit_once('-').and_then(|(_, group)| group.parse::<u32>().ok());
                let before = group.and_then(|group| group.checked_mul(size.value));
                before.ok_or_else(|| PlaceError::Group(leader.to_owned()))?
            }
            _ => 0,
        };
        let value = before.saturating_add(within.value);
        Ok(Some(Given { value, ..within }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `A=1 B=2`.
    fn env(text: &str) -> BTreeMap<String, String> {
        let pairs = text.split_whitespace().filter_map(|pair| pair.split_once('='));
        pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
    }

    const TORCHRUN: &str = "RANK=5 LOCAL_RANK=1 WORLD_SIZE=8 MASTER_ADDR=a MASTER_PORT=29500";
    const SLURM: &str = "SLURM_PROCID=7 SLURM_LOCALID=3 SLURM_NODEID=1 SLURM_NTASKS=8";
    const LWS: &str =
        "LWS_WORKER_INDEX=2 LWS_GROUP_SIZE=4 LWS_LEADER_ADDRESS=my-set-3.my-set.default";

    #[test]
    fn the_first_that_gives_a_number_is_taken() {
        type Found = Option<(u32, &'static str)>;
        let cases: [(&str, Found, Found); 13] = [
            ("", None, None),
            ("RANK=", None, None),
            (TORCHRUN, Some((5, "RANK")), Some((1, "LOCAL_RANK"))),
            (SLURM, Some((7, "SLURM_PROCID")), Some((3, "SLURM_LOCALID"))),
            (LWS, Some((14, "LWS_WORKER_INDEX")), None),
            ("LWS_WORKER_INDEX=2", Some((2, "LWS_WORKER_INDEX")), None),
            ("JOB_COMPLETION_INDEX=4", Some((4, "JOB_COMPLETION_INDEX")), None),
            ("PET_NODE_RANK=2 PET_NNODES=4", Some((2, "PET_NODE_RANK")), None),
            ("PET_NODE_RANK=2 PET_NPROC_PER_NODE=auto", Some((2, "PET_NODE_RANK")), None),
            // Each number by itself: a rank of one's own leaves the GPU to the launcher.
            (
                "DUET_RANK=1 SLURM_PROCID=7 SLURM_LOCALID=3",
                Some((1, "DUET_RANK")),
                Some((3, "SLURM_LOCALID")),
            ),
            (
                "DUET_LOCAL_RANK=2 RANK=5 LOCAL_RANK=1",
                Some((5, "RANK")),
                Some((2, "DUET_LOCAL_RANK")),
            ),
            // What comes later is not looked at.
            ("JOB_COMPLETION_INDEX=4 SLURM_PROCID=x", Some((4, "JOB_COMPLETION_INDEX")), None),
            (
                &format!("{TORCHRUN} PET_NODE_RANK=2 PET_NPROC_PER_NODE=4 {SLURM}"),
                Some((5, "RANK")),
                Some((1, "LOCAL_RANK")),
            ),
        ];
        for (text, rank, local) in cases {
            let found = Place::find(&PlaceArgs::default(), &env(text)).unwrap();
            let given =
                |pair: Option<(u32, &'static str)>| pair.map(|(value, by)| Given { value, by });
            assert_eq!(found, Place { rank: given(rank), local: given(local) }, "{text}");
        }
        let flags = PlaceArgs { id: None, rank: Some(9), local_rank: Some(0) };
        let found = Place::find(&flags, &env(TORCHRUN)).unwrap();
        assert_eq!(found.rank, Some(Given { value: 9, by: "--rank" }));
        assert_eq!(found.local, Some(Given { value: 0, by: "--local-rank" }));
    }

    #[test]
    fn the_order_is_that_of_the_table() {
        // From the last to the first: each new source takes over.
        let sources = [
            ("LWS_WORKER_INDEX", "LWS_WORKER_INDEX=6"),
            ("SLURM_PROCID", "SLURM_PROCID=5"),
            ("JOB_COMPLETION_INDEX", "JOB_COMPLETION_INDEX=4"),
            ("PET_NODE_RANK", "PET_NODE_RANK=3"),
            ("RANK", "RANK=2"),
            ("DUET_RANK", "DUET_RANK=1"),
        ];
        let mut all = BTreeMap::new();
        for (by, source) in sources {
            all.extend(env(source));
            let found = Place::find(&PlaceArgs::default(), &all).unwrap();
            assert_eq!(found.rank.map(|rank| rank.by), Some(by));
        }
    }

    #[test]
    fn contradictions_name_the_variables() {
        let cases = [
            ("RANK=two", "RANK=two in the environment is not a number"),
            ("DUET_RANK=-1", "DUET_RANK=-1"),
            ("LOCAL_RANK=1.5", "LOCAL_RANK=1.5"),
            ("RANK=8 WORLD_SIZE=8", "RANK=8, but WORLD_SIZE=8"),
            ("DUET_RANK=2 DUET_WORLD_SIZE=1", "DUET_RANK=2, but DUET_WORLD_SIZE=1"),
            ("PET_NODE_RANK=0 PET_NPROC_PER_NODE=4", "which of the 4 processes"),
            (
                "LWS_WORKER_INDEX=0 LWS_GROUP_SIZE=2 LWS_LEADER_ADDRESS=leader",
                "LWS_LEADER_ADDRESS=leader",
            ),
        ];
        for (text, part) in cases {
            let error = Place::find(&PlaceArgs::default(), &env(text)).unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn a_worker_is_called_by_its_role_and_rank_unless_it_has_a_name() {
        let flags =
            |id: Option<&str>| PlaceArgs { id: id.map(str::to_owned), ..PlaceArgs::default() };
        let name = |id, text| flags(id).worker(Role::Trainer, &env(text)).map(|worker| worker.id);
        assert_eq!(name(None, "RANK=3").as_deref(), Ok("trainer-3"));
        assert_eq!(name(Some("a"), "RANK=3").as_deref(), Ok("a"));
        assert_eq!(name(Some("a"), "").as_deref(), Ok("a"));
        let error = name(None, "").unwrap_err();
        assert_eq!(error, PlaceError::Unknown("trainer"));
        assert!(error.to_string().contains("--id"), "{error}");
    }

    #[test]
    fn a_gpu_is_ones_own_the_only_one_or_an_error() {
        let place = |local: Option<u32>| Place {
            rank: None,
            local: local.map(|value| Given { value, by: "LOCAL_RANK" }),
        };
        assert_eq!(place(Some(3)).gpu(4), Ok(3));
        assert_eq!(place(Some(3)).gpu(1), Ok(0), "the scheduler shows a process its own GPU only");
        assert_eq!(place(None).gpu(4), Ok(0));
        let error = place(Some(4)).gpu(4).unwrap_err().to_string();
        assert!(error.contains("LOCAL_RANK=4, but 4 GPUs"), "{error}");
        assert_eq!(place(Some(3)).device(Device::Cpu, 4), Ok(None));
        assert_eq!(place(Some(3)).device(Device::Cuda, 4), Ok(Some(3)));
        assert_eq!(place(None).device(Device::Cuda, 0), Err(PlaceError::NoGpu));
    }
}
