use super::{AbortHandle, Begun, Collective, CollectiveError, Operation, Pending};
use tch::Tensor;

/// A group of one: every operation is the identity.
#[derive(Debug, Default)]
pub struct Solo {
    abort: AbortHandle,
}

impl Solo {
    /// A group of one.
    pub fn new() -> Solo {
        Solo::default()
    }

    /// A group of one that `abort` ends.
    pub fn with_abort(abort: AbortHandle) -> Solo {
        Solo { abort }
    }

    fn alive(&self, operation: Operation) -> Result<(), CollectiveError> {
        if self.abort.is_aborted() {
            return Err(CollectiveError::Aborted { operation, rank: 0 });
        }
        Ok(())
    }
}

struct Finished;

impl Pending for Finished {
    fn wait(self: Box<Self>) -> Result<(), CollectiveError> {
        Ok(())
    }
}

fn copy(operation: Operation, to: &Tensor, from: &Tensor) -> Result<(), CollectiveError> {
    to.detach().f_copy_(&from.detach()).map_err(|_| CollectiveError::Argument {
        operation,
        expected: "an output of the input's shape in a group of one".to_owned(),
    })
}

impl Collective for Solo {
    fn rank(&self) -> u32 {
        0
    }

    fn world(&self) -> u32 {
        1
    }

    fn begin_all_reduce(&self, _: &Tensor) -> Result<Begun<'_>, CollectiveError> {
        self.alive(Operation::AllReduce)?;
        Ok(Box::new(Finished))
    }

    fn begin_reduce_scatter(&self, _: &Tensor) -> Result<Begun<'_>, CollectiveError> {
        self.alive(Operation::ReduceScatter)?;
        Ok(Box::new(Finished))
    }

    fn all_gather(&self, output: &Tensor, input: &Tensor) -> Result<(), CollectiveError> {
        self.alive(Operation::AllGather)?;
        copy(Operation::AllGather, output, input)
    }

    fn broadcast(&self, _: &Tensor, root: u32) -> Result<(), CollectiveError> {
        self.alive(Operation::Broadcast)?;
        if root == 0 {
            return Ok(());
        }
        let expected = "root 0 in a group of one".to_owned();
        Err(CollectiveError::Argument { operation: Operation::Broadcast, expected })
    }

    fn barrier(&self) -> Result<(), CollectiveError> {
        self.alive(Operation::Barrier)
    }

    fn abort_handle(&self) -> AbortHandle {
        self.abort.clone()
    }
}
