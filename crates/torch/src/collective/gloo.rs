use super::roster::{GroupOptions, Roster};
use super::store::millis;
use super::{AbortHandle, Begun, Collective, CollectiveError, Operation, Pending, Store};
use crate::ffi;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;
use tch::{Device, Tensor};

/// Ranks connected by libtorch's Gloo, over TCP. CPU tensors; for others a copy is made.
///
/// All-reduce is Gloo's ring: each element is summed in an order that depends only on the world
/// size and the element's place, so equal inputs give equal bits, on all ranks and each time.
pub struct Gloo {
    group: GroupHandle,
    roster: Roster,
    /// How many operations were begun; held while one begins, since order is what they meet by.
    begun: Mutex<u64>,
}

struct GroupHandle(*mut ffi::DuetGroup);

// SAFETY: a process group has no thread affinity, and `Gloo::begin` lets one thread in at a time.
unsafe impl Send for GroupHandle {}
// SAFETY: as above.
unsafe impl Sync for GroupHandle {}

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
        options: GroupOptions,
        abort: AbortHandle,
    ) -> Result<Gloo, CollectiveError> {
        let roster = Roster { store, options, abort };
        roster.announce()?;
        let options = &roster.options;
        let (prefix, host) = (ffi::text(&options.group), ffi::text(&options.host));
        // SAFETY: a live store, which the group shares by reference count; null is checked.
        let raw = roster.store.with_raw(|store| unsafe {
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
                missing: roster.missing("here"),
            });
        }
        Ok(Gloo { group: GroupHandle(raw), roster, begun: Mutex::new(0) })
    }

    fn begin(
        &self,
        operation: Operation,
        start: impl FnOnce(*mut ffi::DuetGroup) -> *mut ffi::DuetWork,
    ) -> Result<Running<'_>, CollectiveError> {
        let mut begun = self.begun.lock().unwrap_or_else(PoisonError::into_inner);
        *begun += 1;
        let number = *begun;
        self.roster.alive(operation)?;
        let work = start(self.group.0);
        drop(begun);
        if work.is_null() {
            return Err(self.roster.failed(operation, number, ffi::last_error()));
        }
        let deadline = Instant::now() + self.roster.options.deadline;
        Ok(Running { group: self, work: WorkHandle(work), operation, number, deadline, back: None })
    }

    fn begin_sum(
        &self,
        operation: Operation,
        tensor: &Tensor,
    ) -> Result<Begun<'_>, CollectiveError> {
        let staged = staged(operation, tensor)?;
        // SAFETY: a live group and tensor; the operation holds a reference of its own.
        let start = |group| unsafe { ffi::duet_all_reduce(group, ffi::raw(&staged)) };
        let mut running = self.begin(operation, start)?;
        running.back = way_back(tensor, &staged);
        Ok(Box::new(running))
    }
}

struct WorkHandle(*mut ffi::DuetWork);

// SAFETY: a work has no thread affinity; its completion is behind a lock.
unsafe impl Send for WorkHandle {}

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
        let roster = &self.group.roster;
        roster.await_end((operation, number), self.deadline, |wait| {
            // SAFETY: a live handle.
            match unsafe { ffi::duet_work_wait(self.work.0, millis(wait)) } {
                1 => Ok(true),
                0 => Ok(false),
                _ => Err(ffi::last_error()),
            }
        })?;
        match self.back {
            Some((to, from)) => tch::no_grad(|| to.shallow_clone().f_copy_(&from))
                .map_err(|e| roster.failed(operation, number, e.to_string())),
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

impl Collective for Gloo {
    fn rank(&self) -> u32 {
        self.roster.options.rank
    }

    fn world(&self) -> u32 {
        self.roster.options.world
    }

    fn begin_all_reduce(&self, tensor: &Tensor) -> Result<Begun<'_>, CollectiveError> {
        self.begin_sum(Operation::AllReduce, tensor)
    }

    /// An all-reduce, as in libtorch's own Gloo, and the reason that the bits are those of one.
    fn begin_reduce_scatter(&self, flat: &Tensor) -> Result<Begun<'_>, CollectiveError> {
        let operation = Operation::ReduceScatter;
        if !flat.numel().is_multiple_of(self.roster.options.world as usize) {
            let expected = format!("a multiple of {} elements", self.roster.options.world);
            return Err(CollectiveError::Argument { operation, expected });
        }
        self.begin_sum(operation, flat)
    }

    fn all_gather(&self, output: &Tensor, input: &Tensor) -> Result<(), CollectiveError> {
        let operation = Operation::AllGather;
        super::parts(operation, output, input, self.roster.options.world)?;
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
        let timeout = millis(self.roster.options.deadline);
        // SAFETY: a live group.
        self.begin(Operation::Barrier, |group| unsafe { ffi::duet_barrier(group, timeout) })?
            .finish()
    }

    fn abort_handle(&self) -> AbortHandle {
        self.roster.abort.clone()
    }
}
