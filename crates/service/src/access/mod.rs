//! Who may call what: roles in certificates, the table of calls, and the guard that holds both
//! against each other before a service sees a request.

mod bucket;
mod guard;
mod refusals;
mod role;
pub mod table;

pub use guard::{Guard, Guarded, Meter};
pub use refusals::Refusals;
pub use role::{Role, URI};

use std::net::SocketAddr;
use tonic::{Request, Status};

/// Who is at the other end of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Where it is.
    pub address: SocketAddr,
    /// What it showed.
    pub shown: Shown,
}

/// What a peer showed when it connected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Shown {
    /// Nothing: this server listens without TLS.
    Nothing,
    /// A certificate with this role.
    Role(Role),
    /// A certificate of the authority that gives no role, and why.
    NoRole(String),
}

impl Shown {
    fn name(&self) -> String {
        match self {
            Shown::Nothing => "nobody".to_owned(),
            Shown::Role(role) => role.to_string(),
            Shown::NoRole(_) => "no role".to_owned(),
        }
    }
}

/// The role that a request's certificate gives; `None` without TLS, where nobody shows one.
pub fn role<T>(request: &Request<T>) -> Option<Role> {
    match request.extensions().get::<Peer>()?.shown {
        Shown::Role(role) => Some(role),
        // The guard lets nobody without a role pass.
        Shown::Nothing | Shown::NoRole(_) => None,
    }
}

/// Counts the messages of a request that has many; `None` where no guard stands before the service.
pub fn meter<T>(request: &Request<T>) -> Option<Meter> {
    request.extensions().get::<Meter>().cloned()
}

/// Where a request comes from.
pub fn address<T>(request: &Request<T>) -> Option<SocketAddr> {
    request.extensions().get::<Peer>().map(|peer| peer.address)
}

/// Whether a peer may make a call.
///
/// # Errors
/// `PERMISSION_DENIED`, which names the role, the call and the fix.
pub fn allowed(shown: &Shown, path: &str) -> Result<(), Status> {
    let role = match shown {
        Shown::Nothing => return Ok(()),
        Shown::NoRole(why) => {
            return Err(Status::permission_denied(format!(
                "the certificate gives no role ({why}), so it may not call {path}: make one with \
                 `duet certs`"
            )));
        }
        Shown::Role(role) => *role,
    };
    let roles = table::find(path).map(|call| call.roles).unwrap_or_default();
    if roles.contains(&role) {
        return Ok(());
    }
    let who: Vec<&str> = roles.iter().map(|role| role.as_str()).collect();
    let who = if who.is_empty() { "nobody may".to_owned() } else { who.join(", ") + " may" };
    Err(Status::permission_denied(format!(
        "role `{role}` may not call {path} ({who}): use the certificate of such a role; `duet certs` \
         makes them"
    )))
}
