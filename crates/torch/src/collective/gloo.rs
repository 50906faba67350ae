use super::store::millis;
use super::{AbortHandle, Collective, CollectiveError, Operation, Pending, Store};
use crate::ffi;
use std::cell::Cell;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};
use tch::{Device, Tensor};

/// How a group is formed.
#[derive(Clone, Debug)]
pub struct GlooOptions {
    /// This rank.
    pub rank: u32,
    /// How many ranks there are.
    pub world: u32,
    /// Name of this incarnation of the group; keys of different incarnations never meet.
    pub group: String,
    /// The address of this machine that the other ranks reach.
    pub host: String,
    /// The deadline of each operation, and of finding each other.
    pub deadline: Duration,
    /// Gloo's threads: how many operations run at a time.
    pub threads: u32,
}

/// How often a waiting rank looks for an abort.
const ABORT_POLL: Duration = Duration::from_millis(20);
/// How often a waiting rank asks the store whether another rank gave up.
const FAILURE_POLL: Duration = Duration::from_millis(250);
/// How long a rank that failed waits for the others to say that they are alive.
const GRACE: Duration = Duration::from_millis(1500);

/// Ranks connected by libtorch's Gloo, over TCP. CPU tensors; for others a copy is made.
///
/// All-reduce is Gloo's ring: each element is summed in an order that depends only on the world
/// size and the element's place, so equal inputs give equal bits, on all ranks and each time.
pub struct Gloo {
    group: GroupHandle,
    store: Arc<Store>,
    options: GlooOptions,
    abort: AbortHandle,
    begun: Cell<u64>,
}

struct GroupHandle(*mut ffi::DuetGroup);

// SAFETY: a process group has no thread affinity; `Gloo` is not `Sync`, so one thread uses it.
unsafe impl Send for GroupHandle {}

impl Drop for GroupHandle {
    fn drop(&mut self) {
        // SAFETY: made by duet_group_new, freed once.
        unsafe { ffi::duet_group_free(self.0) }
    }
}

impl Gloo {
    /// Forms a group of `options.world` ranks that share `store`. Blocks until all are connected.
    ///
    /// # Errors
    /// [`CollectiveError::TimedOut`] naming the ranks that did not come, or
    /// [`CollectiveError::Aborted`].
    pub fn connect(
        store: Arc<Store>,
        options: GlooOptions,
        abort: AbortHandle,
    ) -> Result<Gloo, CollectiveError> {
        let prefix = ffi::text(&options.group);
        announce(&store, &options, &abort)?;
        let host = ffi::text(&options.host);
        // SAFETY: a live store, which the group shares by reference count; null is checked.
        let raw = store.with_raw(|store| unsafe {
            ffi::duet_group_new(
                store,
                prefix.as_ptr(),
                host.as_ptr(),
                options.rank as i32,
                options.world as i32,
                options.threads.max(1) as i32,
                millis(options.deadline),
            )
        });
        if raw.is_null() {
            return Err(CollectiveError::Failed {
                operation: Operation::Rendezvous,
                number: 0,
                rank: options.rank,
                reason: ffi::last_error(),
                missing: missing(&store, &options, "here"),
            });
        }
        Ok(Gloo { group: GroupHandle(raw), store, options, abort, begun: Cell::new(0) })
    }

    fn begin(
        &self,
        operation: Operation,
        start: impl FnOnce(*mut ffi::DuetGroup) -> *mut ffi::DuetWork,
    ) -> Result<Running<'_>, CollectiveError> {
        let number = self.begun.get() + 1;
        self.begun.set(number);
        if self.abort.is_aborted() {
            return Err(CollectiveError::Aborted { operation, rank: self.options.rank });
        }
        let work = start(self.group.0);
        if work.is_null() {
            return Err(self.failed(operation, number, ffi::last_error()));
        }
        let deadline = Instant::now() + self.options.deadline;
        Ok(Running { group: self, work: WorkHandle(work), operation, number, deadline, back: None })
    }

    fn failed(&self, operation: Operation, number: u64, reason: String) -> CollectiveError {
        let missing = self.post_mortem();
        CollectiveError::Failed { operation, number, rank: self.options.rank, reason, missing }
    }

    /// Tells the others that this rank gave up, and lists those that do not answer.
    fn post_mortem(&self) -> Vec<u32> {
        // A store that cannot be reached is rank 0's: then everybody but this rank is unknown, and
        // rank 0 is what is missing.
        let said = self.store.set(&self.key("failed"), b"1").and_then(|()| {
            self.store.set(&self.key(&format!("stuck/{}", self.options.rank)), b"1")
        });
        match said {
            Ok(()) => missing(&self.store, &self.options, "stuck"),
            Err(_) => vec![0],
        }
    }

    fn somebody_failed(&self) -> bool {
        self.store.has(&self.key("failed")).unwrap_or(true)
    }

    fn key(&self, name: &str) -> String {
        key(&self.options, name)
    }
}

fn key(options: &GlooOptions, name: &str) -> String {
    format!("duet/{}/{name}", options.group)
}

/// Waits until every rank has said that it is here, so that a rank that never comes is named.
fn announce(
    store: &Store,
    options: &GlooOptions,
    abort: &AbortHandle,
) -> Result<(), CollectiveError> {
    store.set(&key(options, &format!("here/{}", options.rank)), b"1")?;
    let end = Instant::now() + options.deadline;
    let mut waiting: Vec<u32> = (0..options.world).collect();
    loop {
        let mut still = Vec::new();
        for rank in waiting {
            if !store.has(&key(options, &format!("here/{rank}")))? {
                still.push(rank);
            }
        }
        waiting = still;
        if waiting.is_empty() {
            return Ok(());
        }
        let (operation, rank) = (Operation::Rendezvous, options.rank);
        if abort.is_aborted() {
            return Err(CollectiveError::Aborted { operation, rank });
        }
        if Instant::now() >= end {
            let (number, after, missing) = (0, options.deadline, waiting);
            return Err(CollectiveError::TimedOut { operation, number, rank, after, missing });
        }
        thread::sleep(ABORT_POLL);
    }
}

/// Ranks without the key `name/RANK`, after a while.
fn missing(store: &Store, options: &GlooOptions, name: &str) -> Vec<u32> {
    let end = Instant::now() + GRACE;
    loop {
        let silent: Vec<u32> = (0..options.world)
            .filter(|rank| *rank != options.rank)
            .filter(|rank| !store.has(&key(options, &format!("{name}/{rank}"))).unwrap_or(false))
            .collect();
        if silent.is_empty() || Instant::now() >= end {
            return silent;
        }
        thread::sleep(ABORT_POLL);
    }
}

struct WorkHandle(*mut ffi::DuetWork);

impl Drop for WorkHandle {
    fn drop(&mut self) {
        // SAFETY: made by an operation, freed once; the operation itself lives on in the group.
        unsafe { ffi::duet_work_free(self.0) }
    }
}

/// An operation under way.
struct Running<'a> {
    group: &'a Gloo,
    work: WorkHandle,
    operation: Operation,
    number: u64,
    deadline: Instant,
    /// A tensor elsewhere and the CPU copy that was sent in its place.
    back: Option<(Tensor, Tensor)>,
}

impl Running<'_> {
    fn finish(self) -> Result<(), CollectiveError> {
        let (operation, number) = (self.operation, self.number);
        let rank = self.group.options.rank;
        let mut ask_at = Instant::now() + FAILURE_POLL;
        loop {
            // SAFETY: a live handle.
            match unsafe { ffi::duet_work_wait(self.work.0, millis(ABORT_POLL)) } {
                1 => break,
                0 => {}
                _ => return Err(self.group.failed(operation, number, ffi::last_error())),
            }
            let now = Instant::now();
            if self.group.abort.is_aborted() {
                return Err(CollectiveError::Aborted { operation, rank });
            }
            if now >= self.deadline {
                let (after, missing) = (self.group.options.deadline, self.group.post_mortem());
                return Err(CollectiveError::TimedOut { operation, number, rank, after, missing });
            }
            if now >= ask_at {
                ask_at = now + FAILURE_POLL;
                if self.group.somebody_failed() {
                    let reason = "another rank gave up".to_owned();
                    return Err(self.group.failed(operation, number, reason));
                }
            }
        }
        match self.back {
            Some((to, from)) => tch::no_grad(|| to.shallow_clone().f_copy_(&from))
                .map_err(|e| self.group.failed(operation, number, e.to_string())),
            None => Ok(()),
        }
    }
}

impl Pending for Running<'_> {
    fn wait(self: Box<Self>) -> Result<(), CollectiveError> {
        self.finish()
    }
}

/// A contiguous CPU tensor with the elements of `tensor`: itself where it is one already.
fn staged(operation: Operation, tensor: &Tensor) -> Result<Tensor, CollectiveError> {
    let copy = || tensor.f_detach()?.f_to_device(Device::Cpu)?.f_contiguous();
    copy().map_err(|e| CollectiveError::Argument { operation, expected: e.to_string() })
}

/// What must be copied back after an in-place operation on `staged`.
fn way_back(tensor: &Tensor, staged: &Tensor) -> Option<(Tensor, Tensor)> {
    let in_place = tensor.device() == Device::Cpu && tensor.is_contiguous();
    (!in_place).then(|| (tensor.detach(), staged.shallow_clone()))
}

fn parts(
    operation: Operation,
    whole: &Tensor,
    part: &Tensor,
    world: u32,
) -> Result<(), CollectiveError> {
    let fits = whole.numel() == part.numel() * world as usize && whole.kind() == part.kind();
    if fits {
        return Ok(());
    }
    let expected = format!("a whole that is {world} times as large as its part");
    Err(CollectiveError::Argument { operation, expected })
}

impl Collective for Gloo {
    fn rank(&self) -> u32 {
        self.options.rank
    }

    fn world(&self) -> u32 {
        self.options.world
    }

    fn begin_all_reduce(&self, tensor: &Tensor) -> Result<Box<dyn Pending + '_>, CollectiveError> {
        let operation = Operation::AllReduce;
        let staged = staged(operation, tensor)?;
        // SAFETY: a live group and tensor; the operation holds a reference of its own.
        let start = |group| unsafe { ffi::duet_all_reduce(group, ffi::raw(&staged)) };
        let mut running = self.begin(operation, start)?;
        running.back = way_back(tensor, &staged);
        Ok(Box::new(running))
    }

    /// An all-reduce of a copy, of which this rank keeps its part: what libtorch's own Gloo does,
    /// and the reason that the bits are those of an all-reduce.
    fn reduce_scatter(&self, output: &Tensor, input: &Tensor) -> Result<(), CollectiveError> {
        let operation = Operation::ReduceScatter;
        parts(operation, input, output, self.options.world)?;
        let refused =
            |e: tch::TchError| CollectiveError::Argument { operation, expected: e.to_string() };
        let scratch = staged(operation, input)?.copy();
        // SAFETY: as above.
        let start = |group| unsafe { ffi::duet_all_reduce(group, ffi::raw(&scratch)) };
        self.begin(operation, start)?.finish()?;
        let len = output.numel() as i64;
        let part = scratch.view(-1).f_narrow(0, i64::from(self.options.rank) * len, len);
        let part = part.and_then(|p| p.f_view(output.size().as_slice())).map_err(refused)?;
        output.detach().f_copy_(&part).map_err(refused)
    }

    fn all_gather(&self, output: &Tensor, input: &Tensor) -> Result<(), CollectiveError> {
        let operation = Operation::AllGather;
        parts(operation, output, input, self.options.world)?;
        let (to, from) = (staged(operation, output)?, staged(operation, input)?);
        let (flat_to, flat_from) = (to.view(-1), from.view(-1));
        // SAFETY: as above.
        let start = |group| unsafe {
            ffi::duet_all_gather(group, ffi::raw(&flat_to), ffi::raw(&flat_from))
        };
        let mut running = self.begin(operation, start)?;
        running.back = way_back(output, &to);
        running.finish()
    }

    fn broadcast(&self, tensor: &Tensor, root: u32) -> Result<(), CollectiveError> {
        let operation = Operation::Broadcast;
        let staged = staged(operation, tensor)?;
        // SAFETY: as above.
        let start = |group| unsafe { ffi::duet_broadcast(group, ffi::raw(&staged), root as i32) };
        let mut running = self.begin(operation, start)?;
        running.back = way_back(tensor, &staged);
        running.finish()
    }

    fn barrier(&self) -> Result<(), CollectiveError> {
        let timeout = millis(self.options.deadline);
        // SAFETY: a live group.
        self.begin(Operation::Barrier, |group| unsafe { ffi::duet_barrier(group, timeout) })?
            .finish()
    }

    fn abort_handle(&self) -> AbortHandle {
        self.abort.clone()
    }
}
