//! Ranks connected by NCCL.

mod library;

use super::roster::{GroupOptions, Roster};
use super::{AbortHandle, Begun, Collective, CollectiveError, Operation, Pending, Store};
use library::{Comm, Config, Event, IN_PROGRESS, Library, SUCCESS, SUM, Stream, UniqueId, driver};
use std::ffi::{c_int, c_void};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};
use tch::{Device, Kind, Tensor};

/// What to do where NCCL cannot be loaded.
const FIX: &str = "install NVIDIA's driver and NCCL 2.18 or newer (PyTorch's CUDA wheels bring it), or \
                   set trainer.collective to `gloo`";
/// Between two looks at an operation.
const LOOK: Duration = Duration::from_micros(200);

/// Ranks connected by NCCL, each with a GPU of its own. Tensors of that GPU; for others a copy is made
/// there. Operations run on a stream of their own, after all that the calling thread has put on the
/// default stream, on which libtorch computes; [`Pending::wait`] returns when they are over.
///
/// Sums are the same bits on all ranks; a reduce-scatter may differ from an all-reduce in rounding.
pub struct Nccl {
    library: &'static Library,
    device: usize,
    context: Raw,
    stream: Raw,
    /// Used by one thread at a time; null when aborted.
    comm: Mutex<(Raw, u64)>,
    roster: Roster,
}

/// A handle of a C library that any thread may use.
#[derive(Clone, Copy)]
struct Raw(*mut c_void);

// SAFETY: handles of contexts, streams, events and communicators have no thread affinity. NCCL wants one
// thread at a time in a communicator: it is behind a lock.
unsafe impl Send for Raw {}
// SAFETY: as above.
unsafe impl Sync for Raw {}

impl Nccl {
    /// Whether NCCL and the driver can be loaded; NCCL's version.
    ///
    /// # Errors
    /// [`CollectiveError::Unavailable`] with what is missing.
    pub fn version(libtorch: &Path) -> Result<i32, CollectiveError> {
        Ok(load(libtorch)?.version)
    }

    /// Forms a group of `options.world` ranks that share `store`, this one on CUDA device `device`;
    /// `libtorch` is the folder that it was loaded from. Blocks until all are connected.
    ///
    /// # Errors
    /// [`CollectiveError::Unavailable`], [`CollectiveError::TimedOut`] naming the ranks that did not
    /// come, or [`CollectiveError::Aborted`].
    pub fn connect(
        store: Arc<Store>,
        options: GroupOptions,
        (device, libtorch): (usize, &Path),
        abort: AbortHandle,
    ) -> Result<Nccl, CollectiveError> {
        let library = load(libtorch)?;
        let roster = Roster { store, options, abort };
        roster.announce()?;
        let failed = |reason| roster.failed(Operation::Rendezvous, 0, reason);
        let deadline = Instant::now() + roster.options.deadline;
        let context = library.context(device).map_err(failed)?;
        library.enter(context).map_err(failed)?;
        let stream = library.new_stream().map_err(failed)?;
        let id = exchange_id(library, &roster, deadline)?;
        let (rank, world) = (roster.options.rank as c_int, roster.options.world as c_int);
        let (mut comm, mut config) = (std::ptr::null_mut(), Config::non_blocking());
        // SAFETY: `id` came from ncclGetUniqueId, `config` is laid out as its version says, and the
        // device's context is current.
        let status = unsafe { (library.nccl.init)(&mut comm, world, id, rank, &mut config) };
        let (context, stream) = (Raw(context), Raw(stream));
        let comm = Mutex::new((Raw(comm), 0));
        let nccl = Nccl { library, device, context, stream, comm, roster };
        nccl.settle((Operation::Rendezvous, 0), status, deadline)?;
        Ok(nccl)
    }

    /// Waits until NCCL has taken a call up, which it may do in the background.
    fn settle(
        &self,
        operation: (Operation, u64),
        status: c_int,
        deadline: Instant,
    ) -> Result<(), CollectiveError> {
        let mut status = status;
        let settled = self.roster.await_end(operation, deadline, |wait| {
            let end = Instant::now() + wait;
            while status == IN_PROGRESS && Instant::now() < end {
                thread::sleep(LOOK);
                status = self.state()?;
            }
            match status {
                SUCCESS => Ok(true),
                IN_PROGRESS => Ok(false),
                other => Err(self.library.text(other)),
            }
        });
        settled.inspect_err(|_| self.give_up())
    }

    /// The communicator's own word on how it is.
    fn state(&self) -> Result<c_int, String> {
        let comm = self.comm();
        let mut state = SUCCESS;
        if comm.0.0.is_null() {
            return Err("the group was given up".to_owned());
        }
        // SAFETY: a live communicator, of one thread at a time.
        let status = unsafe { (self.library.nccl.async_error)(comm.0.0, &mut state) };
        if status == SUCCESS { Ok(state) } else { Err(self.library.text(status)) }
    }

    fn comm(&self) -> std::sync::MutexGuard<'_, (Raw, u64)> {
        self.comm.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends whatever is under way; the group is of no use afterwards.
    fn give_up(&self) {
        let mut comm = self.comm();
        let raw = std::mem::replace(&mut comm.0, Raw(std::ptr::null_mut()));
        if !raw.0.is_null() {
            // SAFETY: a live communicator, which nobody uses any more.
            unsafe { (self.library.nccl.abort)(raw.0) };
        }
    }

    /// Starts an operation on `tensors`, which stay alive until it is over.
    fn begin(
        &self,
        operation: Operation,
        tensors: Vec<Tensor>,
        back: Option<(Tensor, Tensor)>,
        start: impl FnOnce(Comm, Stream) -> c_int,
    ) -> Result<Running<'_>, CollectiveError> {
        self.roster.alive(operation)?;
        let deadline = Instant::now() + self.roster.options.deadline;
        let (library, stream) = (self.library, self.stream.0);
        let (started, number) = {
            let mut comm = self.comm();
            comm.1 += 1;
            let started = || -> Result<c_int, String> {
                library.enter(self.context.0)?;
                // After what was computed, and what is written here before it is read.
                let ready = Recorded::new(library, std::ptr::null_mut())?;
                // SAFETY: a live stream and event.
                let waits = unsafe { (library.cuda.stream_wait)(stream, ready.event.0, 0) };
                driver("cuStreamWaitEvent", waits)?;
                match comm.0.0.is_null() {
                    true => Err("the group was given up".to_owned()),
                    false => Ok(start(comm.0.0, stream)),
                }
            };
            (started(), comm.1)
        };
        let failed = |reason| self.roster.failed(operation, number, reason);
        let status = started.map_err(failed)?;
        self.settle((operation, number), status, deadline)?;
        let over = Recorded::new(library, stream).map_err(failed)?;
        Ok(Running { group: self, over, operation, number, deadline, _held: tensors, back })
    }

    /// A contiguous tensor on this rank's GPU with the elements of `tensor`: itself where it is one.
    fn staged(&self, operation: Operation, tensor: &Tensor) -> Result<Tensor, CollectiveError> {
        let device = Device::Cuda(self.device);
        let copy = || tensor.f_detach()?.f_to_device(device)?.f_contiguous();
        copy().map_err(|error| refused(operation, &error))
    }

    /// What must be copied back after an in-place operation on `staged`.
    fn way_back(&self, tensor: &Tensor, staged: &Tensor) -> Option<(Tensor, Tensor)> {
        let in_place = tensor.device() == Device::Cuda(self.device) && tensor.is_contiguous();
        (!in_place).then(|| (tensor.detach(), staged.shallow_clone()))
    }

    fn in_place(
        &self,
        operation: Operation,
        tensor: &Tensor,
        start: impl FnOnce(*mut c_void, usize, c_int, Comm, Stream) -> c_int,
    ) -> Result<Running<'_>, CollectiveError> {
        let kind = data_type(operation, tensor.kind())?;
        let staged = self.staged(operation, tensor)?;
        let (data, count) = (staged.data_ptr(), staged.numel());
        let back = self.way_back(tensor, &staged);
        self.begin(operation, vec![staged], back, |comm, stream| {
            start(data, count, kind, comm, stream)
        })
    }
}

impl Drop for Nccl {
    fn drop(&mut self) {
        self.give_up();
        // SAFETY: the stream is this group's, and all operations are over or aborted.
        unsafe { (self.library.cuda.free_stream)(self.stream.0) };
    }
}

fn load(libtorch: &Path) -> Result<&'static Library, CollectiveError> {
    Library::get(libtorch).map_err(|reason| CollectiveError::Unavailable {
        engine: "NCCL",
        reason,
        fix: FIX,
    })
}

/// Has all ranks know the id that rank 0 made.
fn exchange_id(
    library: &Library,
    roster: &Roster,
    deadline: Instant,
) -> Result<UniqueId, CollectiveError> {
    let key = roster.key("nccl-id");
    let mut id = UniqueId([0; 128]);
    if roster.options.rank == 0 {
        // SAFETY: writes one id.
        let status = unsafe { (library.nccl.unique_id)(&mut id) };
        if status != SUCCESS {
            return Err(roster.failed(Operation::Rendezvous, 0, library.text(status)));
        }
        roster.store.set(&key, &id.0)?;
        return Ok(id);
    }
    id.0 = received_id(roster, &key, deadline)?;
    Ok(id)
}

/// The id that rank 0 put into the store.
fn received_id(
    roster: &Roster,
    key: &str,
    deadline: Instant,
) -> Result<[u8; 128], CollectiveError> {
    let operation = (Operation::Rendezvous, 0);
    roster.await_end(operation, deadline, |wait| {
        let there = roster.store.has(key).map_err(|error| error.to_string())?;
        if !there {
            thread::sleep(wait);
        }
        Ok(there)
    })?;
    let bytes = roster.store.get(key, roster.options.deadline)?;
    bytes.try_into().map_err(|bytes: Vec<u8>| {
        let reason = format!("rank 0 sent an id of {} bytes, not 128", bytes.len());
        roster.failed(operation.0, operation.1, reason)
    })
}

/// `ncclDataType_t`.
fn data_type(operation: Operation, kind: Kind) -> Result<c_int, CollectiveError> {
    match kind {
        Kind::Int8 => Ok(0),
        Kind::Uint8 | Kind::Bool => Ok(1),
        Kind::Int => Ok(2),
        Kind::Int64 => Ok(4),
        Kind::Half => Ok(6),
        Kind::Float => Ok(7),
        Kind::Double => Ok(8),
        Kind::BFloat16 => Ok(9),
        other => {
            let expected = format!("numbers that NCCL knows, not {other:?}");
            Err(CollectiveError::Argument { operation, expected })
        }
    }
}

fn refused(operation: Operation, error: &tch::TchError) -> CollectiveError {
    CollectiveError::Argument { operation, expected: error.to_string() }
}

/// An event, freed with its owner.
struct Recorded {
    library: &'static Library,
    event: Raw,
}

impl Recorded {
    fn new(library: &'static Library, stream: Stream) -> Result<Recorded, String> {
        let event: Event = library.recorded(stream)?;
        Ok(Recorded { library, event: Raw(event) })
    }
}

impl Drop for Recorded {
    fn drop(&mut self) {
        // SAFETY: made by cuEventCreate, freed once; the driver keeps it while it is in use.
        unsafe { (self.library.cuda.free_event)(self.event.0) };
    }
}

/// An operation under way.
struct Running<'a> {
    group: &'a Nccl,
    over: Recorded,
    operation: Operation,
    number: u64,
    deadline: Instant,
    _held: Vec<Tensor>,
    /// A tensor elsewhere and the copy that was computed with in its place.
    back: Option<(Tensor, Tensor)>,
}

impl Running<'_> {
    fn finish(self) -> Result<(), CollectiveError> {
        let (group, operation) = (self.group, self.operation);
        let end = group.roster.await_end((operation, self.number), self.deadline, |wait| {
            let until = Instant::now() + wait;
            group.library.enter(group.context.0)?;
            loop {
                if group.library.is_over(self.over.event.0)? {
                    return Ok(true);
                }
                match group.state()? {
                    SUCCESS | IN_PROGRESS => {}
                    other => return Err(group.library.text(other)),
                }
                if Instant::now() >= until {
                    return Ok(false);
                }
                thread::sleep(LOOK);
            }
        });
        end.inspect_err(|_| group.give_up())?;
        match self.back {
            Some((to, from)) => tch::no_grad(|| to.shallow_clone().f_copy_(&from))
                .map_err(|error| refused(operation, &error)),
            None => Ok(()),
        }
    }
}

impl Pending for Running<'_> {
    fn wait(self: Box<Self>) -> Result<(), CollectiveError> {
        self.finish()
    }
}

impl Collective for Nccl {
    fn rank(&self) -> u32 {
        self.roster.options.rank
    }

    fn world(&self) -> u32 {
        self.roster.options.world
    }

    fn begin_all_reduce(&self, tensor: &Tensor) -> Result<Begun<'_>, CollectiveError> {
        let call = self.library.nccl.all_reduce;
        let running =
            self.in_place(Operation::AllReduce, tensor, |data, count, kind, comm, on| {
                // SAFETY: `count` elements at `data`, which outlive the operation; a live communicator.
                unsafe { call(data, data, count, kind, SUM, comm, on) }
            })?;
        Ok(Box::new(running))
    }

    fn begin_reduce_scatter(&self, flat: &Tensor) -> Result<Begun<'_>, CollectiveError> {
        let operation = Operation::ReduceScatter;
        let (rank, world) = (self.rank() as usize, self.world() as usize);
        if !flat.numel().is_multiple_of(world) {
            let expected = format!("a multiple of {world} elements");
            return Err(CollectiveError::Argument { operation, expected });
        }
        let (call, size) = (self.library.nccl.reduce_scatter, flat.kind().elt_size_in_bytes());
        let running = self.in_place(operation, flat, |data, count, kind, comm, on| {
            let part = count / world;
            // SAFETY: as above; in place where the output is this rank's part of the input.
            unsafe {
                let own = data.cast::<u8>().add(rank * part * size).cast();
                call(data, own, part, kind, SUM, comm, on)
            }
        })?;
        Ok(Box::new(running))
    }

    fn all_gather(&self, output: &Tensor, input: &Tensor) -> Result<(), CollectiveError> {
        let operation = Operation::AllGather;
        super::parts(operation, output, input, self.world())?;
        let kind = data_type(operation, input.kind())?;
        let (to, from) = (self.staged(operation, output)?, self.staged(operation, input)?);
        let (out, data, count) = (to.data_ptr(), from.data_ptr(), from.numel());
        let back = self.way_back(output, &to);
        let call = self.library.nccl.all_gather;
        let running = self.begin(operation, vec![to, from], back, |comm, on| {
            // SAFETY: `count` elements at `data` and `world` times as many at `out`.
            unsafe { call(data, out, count, kind, comm, on) }
        })?;
        running.finish()
    }

    fn broadcast(&self, tensor: &Tensor, root: u32) -> Result<(), CollectiveError> {
        let call = self.library.nccl.broadcast;
        let running =
            self.in_place(Operation::Broadcast, tensor, |data, count, kind, comm, on| {
                // SAFETY: as for an all-reduce.
                unsafe { call(data, data, count, kind, root as c_int, comm, on) }
            })?;
        running.finish()
    }

    fn barrier(&self) -> Result<(), CollectiveError> {
        let operation = Operation::Barrier;
        let one = Tensor::f_zeros([1], (Kind::Int, Device::Cuda(self.device)));
        let one = one.map_err(|error| refused(operation, &error))?;
        let call = self.library.nccl.all_reduce;
        let running = self.in_place(operation, &one, |data, count, kind, comm, on| {
            // SAFETY: as for an all-reduce.
            unsafe { call(data, data, count, kind, SUM, comm, on) }
        })?;
        running.finish()
    }

    fn abort_handle(&self) -> AbortHandle {
        self.roster.abort.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn roster(store: &Arc<Store>, rank: u32, deadline: Duration) -> Roster {
        let (group, host) = ("test".to_owned(), "127.0.0.1".to_owned());
        let options = GroupOptions { rank, world: 2, group, host, deadline, threads: 1 };
        Roster { store: store.clone(), options, abort: AbortHandle::default() }
    }

    #[test]
    fn the_id_reaches_the_other_ranks_and_its_absence_is_told() {
        let store = Arc::new(Store::serve("127.0.0.1", Duration::from_secs(20)).unwrap());
        let late = roster(&store, 1, Duration::from_millis(200));
        let key = late.key("nccl-id");
        let error = received_id(&late, &key, Instant::now() + late.options.deadline).unwrap_err();
        assert!(matches!(&error, CollectiveError::TimedOut { missing, .. } if missing == &[0]));

        let store = Arc::new(Store::serve("127.0.0.1", Duration::from_secs(20)).unwrap());
        let other = roster(&store, 1, Duration::from_secs(20));
        let id: [u8; 128] = std::array::from_fn(|at| at as u8);
        let (sender, name) = (store.clone(), key.clone());
        let rank_0 = thread::spawn(move || sender.set(&name, &id).unwrap());
        let end = Instant::now() + other.options.deadline;
        assert_eq!(received_id(&other, &key, end).unwrap(), id);
        rank_0.join().unwrap();

        store.set("short", &[1; 5]).unwrap();
        let error = received_id(&other, "short", end).unwrap_err().to_string();
        assert!(error.contains("5 bytes"), "{error}");
    }

    #[test]
    fn where_it_cannot_be_loaded_the_error_says_what_to_do() {
        let Err(error) = Nccl::version(Path::new("/nowhere")) else { return };
        let text = error.to_string();
        assert!(text.starts_with("collectives by NCCL cannot be used here: lib"), "{text}");
        assert!(text.contains("trainer.collective"), "{text}");
    }
}
