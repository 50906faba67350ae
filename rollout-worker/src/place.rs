//! Where a model lies: a folder of this machine, or a URL that is fetched into the user's cache.

use crate::progress::Progress;
use duet_store::blocking::BlockingStore;
use duet_store::folder::{self, Fetching, FolderError, Sums};
use duet_store::{Store, StoreError};
use std::path::{Path, PathBuf};

/// Bytes of a unit that the bar counts in.
const MIB: u64 = 1 << 20;

/// A model cannot be found, fetched or verified.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    /// It could not be fetched, or is not what it should be.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// The store cannot be opened.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// There is no such folder.
    #[error("{what} {}: there is no such folder", path.display())]
    Missing {
        /// What was looked for.
        what: &'static str,
        /// Where.
        path: PathBuf,
    },
    /// There is no place for a cache.
    #[error("{url} cannot be cached: set XDG_CACHE_HOME or HOME")]
    NoCache {
        /// What was to be fetched.
        url: String,
    },
    /// The runtime that waits for the store cannot be started.
    #[error("cannot start fetching: {0}")]
    Runtime(std::io::Error),
}

/// A model on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Model {
    /// Its folder.
    pub folder: PathBuf,
    /// Hash of its files' hashes, as `duet digest` prints it.
    pub digest: String,
}

/// The model at a path or a URL, hashed; what a URL names is fetched and verified first.
///
/// # Errors
/// [`PlaceError`] naming the folder, the store or the file.
pub fn model(place: &str, progress: &Progress) -> Result<Model, PlaceError> {
    let Some((scheme, path)) = place.split_once("://") else {
        let folder = existing("model", Path::new(place))?;
        return Ok(Model { digest: Sums::of(&folder)?.digest().to_string(), folder });
    };
    if scheme == "file" {
        // Opening a store makes its folder.
        existing("model", Path::new(path))?;
    }
    let cache = cache().ok_or_else(|| PlaceError::NoCache { url: place.to_owned() })?;
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    let runtime = builder.worker_threads(1).enable_all().build().map_err(PlaceError::Runtime)?;
    let store = BlockingStore::new(Store::open(place)?, runtime.handle().clone());
    store.wait(store.store().reach())?;
    let mut begun = false;
    let fetched = folder::fetch(&store, &cache, &mut |state| match state {
        Fetching::Verifying => progress.say("comparing what is cached with its hashes"),
        Fetching::Bytes { done, all } => {
            if !begun {
                let more = format!("{} MiB into {}", all.div_ceil(MIB), cache.display());
                progress.begin("fetching", all.div_ceil(MIB) as usize, &more);
                begun = true;
            }
            progress.at((done / MIB) as usize);
        }
    });
    progress.end();
    let (folder, sums) = fetched?;
    Ok(Model { folder, digest: sums.digest().to_string() })
}

/// The hash of an adapter's folder.
///
/// # Errors
/// There is no such folder, or a file in it cannot be read.
pub fn adapter(path: &Path) -> Result<String, PlaceError> {
    Ok(Sums::of(&existing("--adapter", path)?)?.digest().to_string())
}

/// The hash of a file.
///
/// # Errors
/// It cannot be read.
pub fn file(path: &Path) -> Result<String, PlaceError> {
    Ok(folder::hash(path)?.to_string())
}

fn existing(what: &'static str, path: &Path) -> Result<PathBuf, PlaceError> {
    match path.is_dir() {
        true => Ok(path.to_owned()),
        false => Err(PlaceError::Missing { what, path: path.to_owned() }),
    }
}

/// `$XDG_CACHE_HOME/duet/models`, or below `~/.cache`.
fn cache() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let base = set("XDG_CACHE_HOME").or_else(|| Some(set("HOME")?.join(".cache")))?;
    Some(base.join("duet/models"))
}
