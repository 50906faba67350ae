//! Which role each worker registered with, for calls in its name.

use duet_core::WorkerId;
use duet_service::access::{Refusals, Role};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use tonic::Status;

/// Names that one coordinator takes.
const WORKERS: usize = 65_536;

/// The roles of workers that registered since this coordinator started. Without TLS nobody shows a
/// role, and nothing is refused here.
#[derive(Clone)]
pub struct Roles {
    registered: Arc<Mutex<BTreeMap<WorkerId, duet_core::Role>>>,
    refusals: Arc<Refusals>,
}

impl Roles {
    /// Nobody yet.
    pub fn new(refusals: Arc<Refusals>) -> Roles {
        Roles { registered: Arc::default(), refusals }
    }

    fn known(&self, worker: &WorkerId) -> Option<duet_core::Role> {
        self.registered.lock().unwrap_or_else(PoisonError::into_inner).get(worker).copied()
    }

    fn refused(&self, role: Role, what: &str, why: String) -> Status {
        self.refusals.note(None, &format!("{what} as {role}"), "role", &why);
        Status::permission_denied(why)
    }

    /// A worker registers as what its certificate says.
    pub(super) fn may_register(
        &self,
        shown: Option<Role>,
        claimed: duet_core::Role,
    ) -> Result<(), Status> {
        match shown {
            Some(role) if role.worker() != Some(claimed) => Err(self.refused(
                role,
                &format!("to register as a {claimed} worker"),
                format!(
                    "role `{role}` may not register as a {claimed} worker: give it the certificate of \
                     role `{claimed}`; `duet certs` makes them"
                ),
            )),
            _ => Ok(()),
        }
    }

    /// Whether one more name can be taken.
    pub(super) fn has_room(&self, worker: &WorkerId) -> Result<(), Status> {
        let known = self.registered.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() < WORKERS || known.contains_key(worker) {
            return Ok(());
        }
        Err(Status::resource_exhausted(format!(
            "{WORKERS} names have registered: give a restarted worker its old name"
        )))
    }

    pub(super) fn registered(&self, worker: WorkerId, role: duet_core::Role) {
        self.registered.lock().unwrap_or_else(PoisonError::into_inner).insert(worker, role);
    }

    /// Nobody speaks for a worker of another role.
    pub(super) fn is_own(&self, shown: Option<Role>, worker: &WorkerId) -> Result<(), Status> {
        let (Some(role), Some(theirs)) = (shown, self.known(worker)) else { return Ok(()) };
        if role.worker() == Some(theirs) {
            return Ok(());
        }
        Err(self.refused(
            role,
            &format!("to speak for a {theirs} worker"),
            format!("role `{role}` may not speak for {worker}, which is a {theirs} worker"),
        ))
    }

    /// A worker may send those of its own role home, as its node does before it goes; operators all.
    pub(super) fn may_drain(&self, shown: Option<Role>, worker: &WorkerId) -> Result<(), Status> {
        match shown {
            Some(Role::Operator) | None => Ok(()),
            Some(role) if role.worker().is_some() && role.worker() == self.known(worker) => Ok(()),
            Some(role) => Err(self.refused(
                role,
                "to drain a worker of another role",
                format!(
                    "role `{role}` may drain workers of its own role, and {worker} is none: use the \
                     certificate of an operator"
                ),
            )),
        }
    }
}
