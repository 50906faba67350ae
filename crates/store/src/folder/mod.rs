//! Whole folders of files on a store, such as models: fetched once into a cache, verified at every
//! use.
//!
//! A folder on a store holds `B3SUMS`, the BLAKE3 hash of each of its files in the format of the
//! program `b3sum`. The hash of that list names the folder as a whole, and is the name of its place in
//! the cache; so a folder that was changed on the store is another folder here, and what lies in the
//! cache is never wrong, only incomplete.

mod sums;

pub use sums::{SUMS, Sums, hash};

use crate::blocking::BlockingStore;
use crate::error::StoreError;
use duet_core::Digest;
use futures::StreamExt;
use std::fs::{File, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Longest list of hashes that is read.
const MAX_SUMS: u64 = 32 << 20;
/// Bytes that are asked for at once.
const PIECE: u64 = 16 << 20;
/// Pieces on their way at the same time.
const AT_ONCE: usize = 8;
/// How long another process may be fetching the same folder.
const OTHER: Duration = Duration::from_secs(3600);
/// How often that is looked after.
const LOOK: Duration = Duration::from_millis(200);

/// A folder that cannot be hashed or fetched.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    /// The store refused.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The folder on the store does not say what its files must hash to.
    #[error(
        "store {place} has no `B3SUMS`, so what is fetched from it cannot be verified: \
         `duet digest FOLDER --write` makes it; upload it with the folder"
    )]
    NoSums {
        /// The store.
        place: String,
    },
    /// A list of hashes cannot be used.
    #[error("{origin}, line {line}: {reason}: `{shown}`")]
    Sums {
        /// The list.
        origin: String,
        /// Its line, from one.
        line: usize,
        /// The beginning of the line.
        shown: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A list names no file.
    #[error("{origin} names no files; `duet digest FOLDER --write` makes it anew")]
    Empty {
        /// The list.
        origin: String,
    },
    /// The bytes are not those that the list promises (DU-9).
    #[error(
        "`{key}` in store {place} hashes to {}, `B3SUMS` says {} (DU-9): upload the file again, or \
         `B3SUMS` where the file was meant to change", found.short(), expected.short()
    )]
    Hash {
        /// The store.
        place: String,
        /// The file.
        key: String,
        /// What it hashes to.
        found: Digest,
        /// What the list says.
        expected: Digest,
    },
    /// A file lies in the cache that is not of the folder.
    #[error("{} is no part of the model that is cached there: remove it", path.display())]
    Stranger {
        /// The file.
        path: PathBuf,
    },
    /// Another process has been at it for too long.
    #[error(
        "another process has been fetching into {} for an hour; end it and try again",
        path.display()
    )]
    Busy {
        /// The place in the cache.
        path: PathBuf,
    },
    /// The system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// A file's name cannot stand in a list.
    #[error("{}: `{name}`: {reason}", folder.display())]
    Name {
        /// The folder it is in.
        folder: PathBuf,
        /// Its name.
        name: String,
        /// Why not, and the fix.
        reason: &'static str,
    },
}

/// How far a fetch has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fetching {
    /// Files in the cache are compared with their hashes.
    Verifying,
    /// So many bytes of so many are there.
    Bytes {
        /// Fetched.
        done: u64,
        /// To be fetched in all.
        all: u64,
    },
}

/// Brings the folder that a store's root is into `cache/DIGEST` and gives that path with the hashes.
/// Files that lie there and are right stay; others are fetched and, once they hash to what the list
/// says, moved to their names. Processes that fetch the same folder wait for each other.
///
/// # Errors
/// [`FolderError`] naming the store and the file. What was verified before stays in the cache.
pub fn fetch(
    store: &BlockingStore,
    cache: &Path,
    tell: &mut dyn FnMut(Fetching),
) -> Result<(PathBuf, Sums), FolderError> {
    let sums = remote_sums(store)?;
    let into = cache.join(sums.digest().to_string());
    let make = |path: &Path| {
        std::fs::create_dir_all(path)
            .map_err(|source| FolderError::Io { path: path.to_owned(), source })
    };
    make(&into)?;
    let _lock = lock(&into)?;
    tell(Fetching::Verifying);
    if let Some(name) = sums::names(&into)?.iter().find(|name| !sums.has(name)) {
        return Err(FolderError::Stranger { path: into.join(name) });
    }
    let mut wanted = Vec::new();
    for (name, digest) in sums.iter() {
        let path = into.join(name);
        if !path.is_file() || hash(&path)? != *digest {
            let size = store.wait(store.store().size(name))?;
            let size = size.ok_or_else(|| store.store().missing(name))?;
            wanted.push((name, *digest, path, size));
        }
    }
    let all = wanted.iter().map(|(.., size)| size).sum();
    let mut done = 0;
    for (name, digest, path, size) in wanted {
        make(path.parent().unwrap_or(&into))?;
        let mut count = |bytes| {
            done += bytes;
            tell(Fetching::Bytes { done, all });
        };
        file(store, (name, size, digest), &path, &mut count)?;
    }
    Ok((into, sums))
}

fn remote_sums(store: &BlockingStore) -> Result<Sums, FolderError> {
    let place = store.store().place().to_owned();
    let text = match store.wait(store.store().get_at_most(SUMS, MAX_SUMS)) {
        Err(StoreError::Missing { .. }) => return Err(FolderError::NoSums { place }),
        text => text?,
    };
    let origin = format!("`{SUMS}` in store {place}");
    let sums = Sums::parse(&origin, &String::from_utf8_lossy(&text))?;
    if sums.is_empty() {
        return Err(FolderError::Empty { origin });
    }
    Ok(sums)
}

/// Keeps other processes away from a place in the cache as long as the file lives.
fn lock(place: &Path) -> Result<File, FolderError> {
    let path = place.with_extension("lock");
    let io = |source| FolderError::Io { path: path.clone(), source };
    let file = File::create(&path).map_err(io)?;
    let until = Instant::now() + OTHER;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::Error(error)) => return Err(io(error)),
            Err(TryLockError::WouldBlock) if Instant::now() < until => std::thread::sleep(LOOK),
            Err(TryLockError::WouldBlock) => {
                return Err(FolderError::Busy { path: place.to_owned() });
            }
        }
    }
}

/// Fetches one file beside its place, verifies it and moves it there.
fn file(
    store: &BlockingStore,
    (key, size, expected): (&str, u64, Digest),
    path: &Path,
    count: &mut dyn FnMut(u64),
) -> Result<(), FolderError> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let beside = path.with_file_name(format!(".{name}.part"));
    let io = |source| FolderError::Io { path: beside.clone(), source };
    let mut out = File::create(&beside).map_err(io)?;
    let mut hasher = blake3::Hasher::new();
    let starts = (0..size.div_ceil(PIECE)).map(|piece| piece * PIECE);
    let fetched = store.wait(async {
        let pieces = futures::stream::iter(starts)
            .map(|start| store.store().get_range(key, start..size.min(start + PIECE)));
        let mut pieces = pieces.buffered(AT_ONCE);
        while let Some(piece) = pieces.next().await {
            let piece = piece?;
            hasher.update(&piece);
            out.write_all(&piece).map_err(io)?;
            count(piece.len() as u64);
        }
        Ok(Digest(*hasher.finalize().as_bytes()))
    });
    let settled = fetched.and_then(|found: Digest| match found == expected {
        true => out.sync_all().and_then(|()| std::fs::rename(&beside, path)).map_err(io),
        false => {
            let (place, key) = (store.store().place().to_owned(), key.to_owned());
            Err(FolderError::Hash { place, key, found, expected })
        }
    });
    if settled.is_err() {
        // The error that is told is the first one.
        let _ = std::fs::remove_file(&beside);
    }
    settled
}
