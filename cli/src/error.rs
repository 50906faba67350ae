//! What goes wrong on the command line, and the exit code of each.

use crate::report::ReportError;
use duet_config::ConfigError;
use std::path::{Path, PathBuf};

/// An error for a person: it names the thing and, where there is one, the fix.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// The configuration is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A report cannot be made.
    #[error(transparent)]
    Report(#[from] ReportError),
    /// A store cannot be used, or something in it.
    #[error(transparent)]
    Store(Box<duet_store::StoreError>),
    /// A folder cannot be hashed.
    #[error(transparent)]
    Folder(#[from] duet_store::folder::FolderError),
    /// A file or folder cannot be used.
    #[error("cannot {what} {}: {source}", path.display())]
    Io {
        /// `create`, `read`, ...
        what: &'static str,
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A program of Duet is not where it should be.
    #[error("{name} is not beside {}: build it with `cargo build --bins`", folder.display())]
    NoProgram {
        /// Its name.
        name: &'static str,
        /// Where it was looked for.
        folder: PathBuf,
    },
    /// A child process failed.
    #[error("{name} failed with {status}; its log is {}{tail}", log.display())]
    Child {
        /// Which.
        name: String,
        /// How it ended.
        status: String,
        /// Where it wrote what happened.
        log: PathBuf,
        /// The last lines of the log.
        tail: String,
        /// Its exit code.
        code: u8,
    },
    /// A coordinator cannot be reached.
    #[error("no coordinator answers at {address}: {reason}")]
    Unreachable {
        /// Where.
        address: String,
        /// Why.
        reason: String,
    },
    /// The coordinator said no.
    #[error("the coordinator refused: {0}")]
    Refused(String),
    /// Something else that the user can mend.
    #[error("{0}")]
    Usage(String),
}

impl From<duet_store::StoreError> for CliError {
    fn from(error: duet_store::StoreError) -> CliError {
        CliError::Store(Box::new(error))
    }
}

impl CliError {
    /// An `Io` error.
    pub fn io(what: &'static str, path: &Path, source: std::io::Error) -> CliError {
        CliError::Io { what, path: path.to_owned(), source }
    }

    /// The process's exit code (sysexits where one fits).
    pub fn code(&self) -> u8 {
        match self {
            CliError::Config(_) => 78,
            CliError::Report(_)
            | CliError::Store(_)
            | CliError::Folder(_)
            | CliError::Io { .. } => 74,
            CliError::Unreachable { .. } => 75,
            CliError::Usage(_) => 64,
            CliError::Child { code, .. } => *code,
            CliError::NoProgram { .. } | CliError::Refused(_) => 1,
        }
    }
}
