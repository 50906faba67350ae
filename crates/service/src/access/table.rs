//! Which role may make which call. The only place that says so; a test compares it with the
//! descriptors of the services, and `docs/security.md` with it.

use super::Role::{self, Coordinator, Operator, Reward, Rollout, Trainer, Viewer};

/// A call, and who may make it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    /// Its path, `/package.Service/Method`.
    pub path: &'static str,
    /// Who may.
    pub roles: &'static [Role],
    /// What else must hold; checked where the message is known.
    pub only: &'static str,
    /// Whether its answer may be long in coming: a poll is held until there is work.
    pub held: bool,
}

const WORKERS: &[Role] = &[Rollout, Reward, Trainer];
// A coordinator's own host asks it with its own certificate.
const READERS: &[Role] = &[Coordinator, Rollout, Reward, Trainer, Operator, Viewer];
const DRAINERS: &[Role] = &[Rollout, Reward, Trainer, Operator];
const OPERATORS: &[Role] = &[Operator];
const ITSELF: &str = "as itself: the worker's role is the certificate's";
const FELLOWS: &str = "workers: those of their own role";

const fn call(path: &'static str, roles: &'static [Role], only: &'static str) -> Call {
    Call { path, roles, only, held: false }
}

const fn held(path: &'static str, roles: &'static [Role], only: &'static str) -> Call {
    Call { path, roles, only, held: true }
}

/// Every call of the coordinator. What does not stand here is refused.
pub const CALLS: &[Call] = &[
    call("/duet.v1.WorkerService/Register", WORKERS, ITSELF),
    held("/duet.v1.WorkerService/Poll", WORKERS, ITSELF),
    call("/duet.v1.WorkerService/Report", WORKERS, ITSELF),
    call("/duet.v1.WorkerService/Exchange", WORKERS, ITSELF),
    call("/duet.v1.WorkerService/Attend", WORKERS, ITSELF),
    call("/duet.v1.WorkerService/Heartbeat", WORKERS, ITSELF),
    call("/duet.v1.WorkerService/Leave", WORKERS, ITSELF),
    call("/duet.v1.StatusService/Get", READERS, ""),
    call("/duet.v1.StatusService/Watch", READERS, ""),
    call("/duet.v1.ControlService/Pause", OPERATORS, ""),
    call("/duet.v1.ControlService/Resume", OPERATORS, ""),
    call("/duet.v1.ControlService/Drain", DRAINERS, FELLOWS),
    call("/duet.v1.ControlService/Stop", OPERATORS, ""),
    call("/grpc.health.v1.Health/Check", READERS, ""),
    call("/grpc.health.v1.Health/Watch", READERS, ""),
    held("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", OPERATORS, ""),
    held("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", OPERATORS, ""),
];

/// The call of a path.
pub fn find(path: &str) -> Option<&'static Call> {
    CALLS.iter().find(|call| call.path == path)
}

/// The table of `docs/security.md`.
pub fn page() -> String {
    let mut page = String::from("| call | who may | only |\n|---|---|---|\n");
    for call in CALLS {
        let roles: Vec<&str> = call.roles.iter().map(|role| role.as_str()).collect();
        let path = call.path.trim_start_matches('/');
        page.push_str(&format!("| `{path}` | {} | {} |\n", roles.join(", "), call.only));
    }
    page
}
