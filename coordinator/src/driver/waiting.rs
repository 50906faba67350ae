//! Polls that wait for an answer.

use super::request::Polled;
use duet_core::WorkerId;
use duet_core::work::Assignment;
use std::collections::BTreeMap;
use tokio::sync::oneshot;

struct Waiter {
    session: u64,
    ticket: u64,
    reply: oneshot::Sender<Polled>,
}

/// At most one waiting poll of each worker: a newer one ends an older one.
#[derive(Default)]
pub(super) struct Waiting {
    polls: BTreeMap<WorkerId, Waiter>,
}

impl Waiting {
    pub(super) fn wait(
        &mut self,
        worker: WorkerId,
        session: u64,
        ticket: u64,
        reply: oneshot::Sender<Polled>,
    ) {
        let old = self.polls.insert(worker, Waiter { session, ticket, reply });
        if let Some(old) = old {
            drop(old.reply.send(Polled::Nothing));
        }
    }

    pub(super) fn holds(&self, worker: &WorkerId, ticket: u64) -> bool {
        self.polls.get(worker).is_some_and(|waiter| waiter.ticket == ticket)
    }

    /// Answers with work. Nobody there to take it: the worker's next poll hands it back.
    pub(super) fn assign(&mut self, worker: &WorkerId, session: u64, assignment: Assignment) {
        match self.polls.remove(worker) {
            Some(waiter) if waiter.session == session => {
                drop(waiter.reply.send(Polled::Assigned(Box::new(assignment))));
            }
            Some(waiter) => drop(self.polls.insert(worker.clone(), waiter)),
            None => {}
        }
    }

    /// Answers polls that ran out and got nothing.
    pub(super) fn over(&mut self, polls: Vec<(WorkerId, u64)>) {
        for (worker, ticket) in polls {
            if self.holds(&worker, ticket)
                && let Some(waiter) = self.polls.remove(&worker)
            {
                drop(waiter.reply.send(Polled::Nothing));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leave() -> Assignment {
        Assignment::Leave { reason: "test".to_owned() }
    }

    #[test]
    fn a_newer_poll_ends_an_older_one() {
        let mut waiting = Waiting::default();
        let ((first, mut old), (second, mut new)) = (oneshot::channel(), oneshot::channel());
        waiting.wait("a".into(), 1, 1, first);
        waiting.wait("a".into(), 1, 2, second);
        assert_eq!(old.try_recv(), Ok(Polled::Nothing));
        waiting.over(vec![("a".into(), 1)]);
        assert!(new.try_recv().is_err(), "the end of the old poll must not end the new one");
        waiting.assign(&"a".into(), 1, leave());
        assert_eq!(new.try_recv(), Ok(Polled::Assigned(Box::new(leave()))));
    }

    #[test]
    fn work_for_an_old_process_does_not_reach_the_new_one() {
        let mut waiting = Waiting::default();
        let (reply, mut answer) = oneshot::channel();
        waiting.wait("a".into(), 2, 1, reply);
        waiting.assign(&"a".into(), 1, leave());
        assert!(answer.try_recv().is_err());
        assert!(waiting.holds(&"a".into(), 1));
    }
}
