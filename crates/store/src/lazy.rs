//! Files of a local store that are written now and synced later, many at once.
//!
//! A sync of each file and of each folder above it costs more than all else that a small file takes.
//! What can be written again until some later point need not be on the disk before that point.

use crate::error::{Result, StoreError};
use object_store::local::LocalFileSystem;
use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Syncs that a disk is asked for at the same time.
const AT_ONCE: usize = 8;

/// The files of one store that are not synced yet.
#[derive(Debug)]
pub(crate) struct Lazy {
    root: PathBuf,
    backend: LocalFileSystem,
    owed: Mutex<Owed>,
}

#[derive(Debug, Default)]
struct Owed {
    keys: BTreeSet<String>,
    /// What a sync said that failed. A second one may succeed although the bytes are gone, so there is
    /// none.
    lost: Option<String>,
}

impl Lazy {
    pub(crate) fn new(root: PathBuf) -> object_store::Result<Lazy> {
        let backend = LocalFileSystem::new_with_prefix(&root)?.with_automatic_cleanup(true);
        Ok(Lazy { root, backend, owed: Mutex::default() })
    }

    /// Writes without syncing.
    pub(crate) fn backend(&self) -> &LocalFileSystem {
        &self.backend
    }

    /// Whatever lies at this key is to be synced: who wrote it may have ended before that.
    pub(crate) fn owe(&self, key: &str) {
        self.owed().keys.insert(key.to_owned());
    }

    pub(crate) fn count(&self) -> usize {
        self.owed().keys.len()
    }

    /// Syncs what is owed. Blocks.
    pub(crate) fn settle(self: &Arc<Lazy>, place: &str) -> Result<()> {
        let keys = {
            let owed = self.owed();
            if let Some(reason) = &owed.lost {
                return Err(StoreError::Unsynced {
                    place: place.to_owned(),
                    reason: reason.clone(),
                });
            }
            owed.keys.clone()
        };
        let files: Vec<PathBuf> = keys.iter().map(|key| self.root.join(key)).collect();
        let above = |file: &PathBuf| -> Vec<PathBuf> {
            let folders = file.ancestors().skip(1);
            folders.take_while(|f| f.starts_with(&self.root)).map(Path::to_owned).collect()
        };
        let folders: BTreeSet<PathBuf> = files.iter().flat_map(above).collect();
        let folders: Vec<&Path> = folders.iter().map(PathBuf::as_path).collect();
        let files: Vec<&Path> = files.iter().map(PathBuf::as_path).collect();
        let synced = sync_all(&files).and_then(|()| sync_all(&folders));
        let mut owed = self.owed();
        match synced {
            Ok(()) => {
                owed.keys.retain(|key| !keys.contains(key));
                Ok(())
            }
            Err((path, error)) => {
                let reason = format!("{}: {error}", path.display());
                owed.lost = Some(reason.clone());
                Err(StoreError::Unsynced { place: place.to_owned(), reason })
            }
        }
    }

    fn owed(&self) -> MutexGuard<'_, Owed> {
        self.owed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Syncs these, several at once: a disk writes them together.
fn sync_all(paths: &[&Path]) -> std::result::Result<(), (PathBuf, io::Error)> {
    let some = |paths: &[&Path]| {
        paths.iter().try_for_each(|path| match File::open(path).and_then(|f| f.sync_all()) {
            // Deleted since.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            done => done.map_err(|error| (path.to_path_buf(), error)),
        })
    };
    std::thread::scope(|scope| {
        let share = paths.len().div_ceil(AT_ONCE).max(1);
        let threads: Vec<_> =
            paths.chunks(share).map(|paths| scope.spawn(move || some(paths))).collect();
        threads.into_iter().try_for_each(|thread| match thread.join() {
            Ok(done) => done,
            Err(panic) => std::panic::resume_unwind(panic),
        })
    })
}

/// Whether `found` is what a loss of power leaves of `whole`: shorter, or with blocks of zeros.
pub(crate) fn torn(found: &[u8], whole: &[u8]) -> bool {
    const BLOCK: usize = 512;
    found.len() <= whole.len()
        && found
            .chunks(BLOCK)
            .zip(whole.chunks(BLOCK))
            .all(|(found, whole)| whole.starts_with(found) || found.iter().all(|byte| *byte == 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_torn_file_is_told_from_another() {
        let whole: Vec<u8> = (0..2000u32).map(|at| (at % 251 + 1) as u8).collect();
        assert!(torn(&whole, &whole) && torn(&[], &whole) && torn(&whole[..700], &whole));
        let mut holes = whole.clone();
        holes[512..1024].fill(0);
        assert!(torn(&holes, &whole));
        holes[1500] ^= 1;
        assert!(!torn(&holes, &whole), "other bytes");
        assert!(!torn(&[whole.clone(), vec![0]].concat(), &whole), "longer");
    }
}
