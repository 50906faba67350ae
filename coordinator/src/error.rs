//! Why a coordinator ends other than in order.

use duet_core::scheduler::RestoreError;
use duet_service::exit;
use duet_store::{JournalError, StoreError};

/// What ends a coordinator. Each names the thing and, where there is one, the fix.
#[derive(Debug, thiserror::Error)]
pub enum CoordinatorError {
    /// The configuration cannot be used.
    #[error(transparent)]
    Config(#[from] duet_config::ConfigError),
    /// The prompts cannot be used.
    #[error(transparent)]
    Prompts(#[from] duet_config::prompts::PromptsError),
    /// The address cannot be had, or the server stopped by itself.
    #[error(transparent)]
    Server(#[from] duet_service::server::ServerError),
    /// The store already holds a run, and nobody asked to go on with it.
    #[error(
        "store {place} already holds run `{run}`: go on with it by --resume, or choose another `run.name` or `run.store`"
    )]
    Occupied {
        /// The store.
        place: String,
        /// The run in it.
        run: String,
    },
    /// The store holds another run than the configuration describes.
    #[error(
        "store {place} holds run `{run}`, whose {what} differs from this configuration's ({theirs} there, {ours} here): resume with the configuration it was started with, or choose another `run.name`"
    )]
    OtherRun {
        /// The store.
        place: String,
        /// The run in it.
        run: String,
        /// What differs.
        what: &'static str,
        /// The store's.
        theirs: String,
        /// This configuration's.
        ours: String,
    },
    /// A file of the run cannot be read as what it must be.
    #[error("`{key}` in store {place} is not what this program wrote: {reason}")]
    Unreadable {
        /// The store.
        place: String,
        /// Which.
        key: String,
        /// Why.
        reason: String,
    },
    /// The store failed.
    #[error(transparent)]
    Store(Box<StoreError>),
    /// The journal failed.
    #[error(transparent)]
    Journal(Box<JournalError>),
    /// The journal and the configuration do not belong together.
    #[error(transparent)]
    Restore(#[from] RestoreError),
    /// Metrics cannot be served.
    #[error(transparent)]
    Metrics(#[from] duet_service::metrics::ServeError),
    /// Traces cannot be sent.
    #[error(transparent)]
    Traces(#[from] duet_service::traces::TraceError),
    /// A local file could not be written.
    #[error("cannot write {path}: {source}")]
    File {
        /// Which.
        path: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The system gives no threads or signals.
    #[error("cannot start: {0}")]
    Runtime(std::io::Error),
    /// The disk hangs.
    #[error(
        "this process has been held up for {} s, most likely by the disk of `{place}`: see to it that \
         it can be written, then start the coordinator again with --resume",
        after.as_secs()
    )]
    HeldUp {
        /// The store.
        place: String,
        /// For how long.
        after: std::time::Duration,
    },
    /// The run cannot go on.
    #[error("the run failed: {0}")]
    RunFailed(String),
}

impl From<StoreError> for CoordinatorError {
    fn from(error: StoreError) -> Self {
        CoordinatorError::Store(Box::new(error))
    }
}

impl From<JournalError> for CoordinatorError {
    fn from(error: JournalError) -> Self {
        CoordinatorError::Journal(Box::new(error))
    }
}

impl CoordinatorError {
    /// What the process should exit with.
    pub fn exit_code(&self) -> u8 {
        match self {
            CoordinatorError::Config(_)
            | CoordinatorError::Prompts(_)
            | CoordinatorError::Occupied { .. }
            | CoordinatorError::OtherRun { .. }
            | CoordinatorError::Traces(_)
            | CoordinatorError::Restore(_) => exit::CONFIG,
            CoordinatorError::RunFailed(_) => exit::OTHER,
            CoordinatorError::HeldUp { .. } => exit::RETRY,
            CoordinatorError::Store(error) => store_code(error),
            CoordinatorError::Journal(error) => match &**error {
                JournalError::Store(error) => store_code(error),
                // Starting the one that was fenced again would fence its successor.
                JournalError::Fenced { .. } => exit::OTHER,
                _ => exit::IO,
            },
            CoordinatorError::Server(_)
            | CoordinatorError::Metrics(_)
            | CoordinatorError::Unreadable { .. }
            | CoordinatorError::Runtime(_)
            | CoordinatorError::File { .. } => exit::IO,
        }
    }
}

fn store_code(error: &StoreError) -> u8 {
    match error {
        StoreError::Url { .. } | StoreError::Conflict { .. } => exit::CONFIG,
        StoreError::Timeout { .. }
        | StoreError::Unreachable { .. }
        | StoreError::Backend { .. } => exit::RETRY,
        _ => exit::IO,
    }
}
