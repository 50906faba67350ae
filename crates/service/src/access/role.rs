//! The roles that a certificate can give its holder.

use std::fmt;

/// How a role is written into a certificate, as a URI among its alternative names; the role follows.
pub const URI: &str = "spiffe://duet/role/";

/// What a certificate makes of its holder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Schedules the run; the only one that workers and operators obey.
    Coordinator,
    /// Thinks and renders.
    Rollout,
    /// Scores.
    Reward,
    /// Trains.
    Trainer,
    /// Reads and controls.
    Operator,
    /// Reads.
    Viewer,
}

impl Role {
    /// Every role.
    pub const ALL: [Role; 6] = [
        Role::Coordinator,
        Role::Rollout,
        Role::Reward,
        Role::Trainer,
        Role::Operator,
        Role::Viewer,
    ];

    /// As it stands in a certificate, in file names and in messages.
    pub fn as_str(self) -> &'static str {
        match self {
            Role::Coordinator => "coordinator",
            Role::Rollout => "rollout",
            Role::Reward => "reward",
            Role::Trainer => "trainer",
            Role::Operator => "operator",
            Role::Viewer => "viewer",
        }
    }

    /// The role of that name.
    pub fn named(name: &str) -> Option<Role> {
        Role::ALL.into_iter().find(|role| role.as_str() == name)
    }

    /// That of a worker.
    pub fn of(worker: duet_core::Role) -> Role {
        match worker {
            duet_core::Role::Rollout => Role::Rollout,
            duet_core::Role::Reward => Role::Reward,
            duet_core::Role::Trainer => Role::Trainer,
        }
    }

    /// What a worker with this role can register as.
    pub fn worker(self) -> Option<duet_core::Role> {
        match self {
            Role::Rollout => Some(duet_core::Role::Rollout),
            Role::Reward => Some(duet_core::Role::Reward),
            Role::Trainer => Some(duet_core::Role::Trainer),
            Role::Coordinator | Role::Operator | Role::Viewer => None,
        }
    }

    /// The URI of the role.
    pub fn uri(self) -> String {
        format!("{URI}{}", self.as_str())
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
