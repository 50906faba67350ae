//! What can go wrong with a store, by name.

use std::time::Duration;

/// A result of this crate.
pub type Result<T> = std::result::Result<T, StoreError>;

/// A failed operation: which store, which key, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The place cannot be a store.
    #[error("store `{url}`: {reason}")]
    Url {
        /// As it was given, without credentials.
        url: String,
        /// Why not, and what would do.
        reason: String,
    },
    /// The key cannot name an object.
    #[error("`{key}` cannot be a key of store {place}: {reason}")]
    Key {
        /// The store.
        place: String,
        /// The key.
        key: String,
        /// Why not.
        reason: String,
    },
    /// There is no such object.
    #[error("store {place} has no `{key}`")]
    Missing {
        /// The store.
        place: String,
        /// The key.
        key: String,
    },
    /// Somebody created the object before.
    #[error("`{key}` exists already in store {place}; objects are written once")]
    Exists {
        /// The store.
        place: String,
        /// The key.
        key: String,
    },
    /// Other bytes lie under the key (DU-9).
    #[error(
        "`{key}` in store {place} holds other bytes than those that were to be written (DU-9): \
         is the folder used by another run? take a new `run.name`"
    )]
    Conflict {
        /// The store.
        place: String,
        /// The key.
        key: String,
    },
    /// The bytes are not what they must be (DU-9).
    #[error("`{key}` in store {place} is corrupt (DU-9): {reason}")]
    Corrupt {
        /// The store.
        place: String,
        /// The key.
        key: String,
        /// How that shows.
        reason: String,
    },
    /// An object is larger than what is read.
    #[error("`{key}` in store {place} has {bytes} bytes; at most {limit} are read")]
    TooLarge {
        /// The store.
        place: String,
        /// The key.
        key: String,
        /// How many it has.
        bytes: u64,
        /// How many it may have.
        limit: u64,
    },
    /// The disk or quota is full.
    #[error(
        "no space left in store {place} to write `{key}`: free some and resume the run; \
         nothing half-written counts"
    )]
    Full {
        /// The store.
        place: String,
        /// The key.
        key: String,
    },
    /// Files that were to be synced later could not be.
    #[error(
        "the disk of store {place} failed to keep what was written ({reason}): no checkpoint is made \
         any more; see to the disk and resume the run, which writes it again"
    )]
    Unsynced {
        /// The store.
        place: String,
        /// Which file or folder, and what the system said.
        reason: String,
    },
    /// Not allowed.
    #[error("store {place} refuses access to `{key}`: {reason}; check owner, mode or credentials")]
    Denied {
        /// The store.
        place: String,
        /// The key.
        key: String,
        /// What it said.
        reason: String,
    },
    /// No answer in time, all retries counted.
    #[error("store {place} did not answer to {operation} `{key}` within {} s", after.as_secs())]
    Timeout {
        /// The store.
        place: String,
        /// The key.
        key: String,
        /// `get`, `put`, ...
        operation: &'static str,
        /// How long it had.
        after: Duration,
    },
    /// A store behind a network gives no answer at the start.
    #[error("store {place} cannot be reached: {reason}; {remedy}")]
    Unreachable {
        /// The store.
        place: String,
        /// What happened.
        reason: String,
        /// What to look after.
        remedy: String,
    },
    /// Any other failure of the backend, after all retries.
    #[error("store {place}: cannot {operation} `{key}`: {source}")]
    Backend {
        /// The store.
        place: String,
        /// The key.
        key: String,
        /// `get`, `put`, ...
        operation: &'static str,
        /// What it said.
        source: object_store::Error,
    },
    /// Rows do not fit their table.
    #[error("table `{key}` in store {place}: {reason}")]
    Table {
        /// The store.
        place: String,
        /// The file.
        key: String,
        /// What is wrong.
        reason: String,
    },
}

impl StoreError {
    /// Whether the same call may work later.
    pub fn is_transient(&self) -> bool {
        matches!(
            self,
            StoreError::Timeout { .. }
                | StoreError::Unreachable { .. }
                | StoreError::Backend { .. }
                | StoreError::Full { .. }
        )
    }

    /// What happened, without the store and the key.
    pub(crate) fn reason(&self) -> String {
        match self {
            StoreError::Backend { source, .. } => root(source),
            StoreError::Timeout { after, .. } => format!("no answer within {} s", after.as_secs()),
            other => other.to_string(),
        }
    }

    /// A short class for counters: `missing`, `corrupt`, `full`, ...
    pub fn kind(&self) -> &'static str {
        match self {
            StoreError::Url { .. } => "url",
            StoreError::Key { .. } => "key",
            StoreError::Missing { .. } => "missing",
            StoreError::Exists { .. } => "exists",
            StoreError::Conflict { .. } => "conflict",
            StoreError::Corrupt { .. } => "corrupt",
            StoreError::TooLarge { .. } => "too-large",
            StoreError::Full { .. } => "full",
            StoreError::Unsynced { .. } => "unsynced",
            StoreError::Denied { .. } => "denied",
            StoreError::Timeout { .. } => "timeout",
            StoreError::Unreachable { .. } => "unreachable",
            StoreError::Backend { .. } => "backend",
            StoreError::Table { .. } => "table",
        }
    }
}

/// Gives a backend's error its name. `None`: worth another try.
pub(crate) fn name(
    place: &str,
    key: &str,
    operation: &'static str,
    error: &object_store::Error,
) -> Option<StoreError> {
    let (place, key) = (place.to_owned(), key.to_owned());
    match error {
        object_store::Error::NotFound { .. } => Some(StoreError::Missing { place, key }),
        object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. } => {
            Some(StoreError::Exists { place, key })
        }
        object_store::Error::PermissionDenied { .. }
        | object_store::Error::Unauthenticated { .. } => {
            Some(StoreError::Denied { place, key, reason: root(error) })
        }
        object_store::Error::InvalidPath { .. } => {
            Some(StoreError::Key { place, key, reason: root(error) })
        }
        object_store::Error::NotSupported { .. } | object_store::Error::NotImplemented { .. } => {
            let reason = format!("it cannot {operation} objects as a run needs: {}", root(error));
            Some(StoreError::Url { url: place, reason })
        }
        other => match io_kind(other) {
            Some(std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded) => {
                Some(StoreError::Full { place, key })
            }
            Some(
                std::io::ErrorKind::PermissionDenied
                | std::io::ErrorKind::ReadOnlyFilesystem
                | std::io::ErrorKind::NotADirectory
                | std::io::ErrorKind::IsADirectory,
            ) => Some(StoreError::Denied { place, key, reason: root(other) }),
            _ => None,
        },
    }
}

fn chain(error: &object_store::Error) -> impl Iterator<Item = &(dyn std::error::Error + 'static)> {
    let first: &(dyn std::error::Error + 'static) = error;
    std::iter::successors(Some(first), |error| error.source())
}

fn io_kind(error: &object_store::Error) -> Option<std::io::ErrorKind> {
    chain(error).find_map(|error| error.downcast_ref::<std::io::Error>()).map(std::io::Error::kind)
}

/// The innermost message: the system's own words.
fn root(error: &object_store::Error) -> String {
    chain(error).last().map(ToString::to_string).unwrap_or_default()
}
