//! Files of a local store that are written now and synced later, many at once.
//!
//! A sync of each file and of each folder above it costs more than all else that a small file takes.
//! What can be written again until some later point need not be on the disk before that point.

use crate::error::{Result, StoreError};
use bytes::Bytes;
use futures::FutureExt;
use object_store::local::LocalFileSystem;
use object_store::path::Path as Key;
use object_store::{ObjectStore, PutMode, PutPayload};
use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use tokio::sync::oneshot;

/// Syncs that a disk is asked for at the same time.
const AT_ONCE: usize = 8;

/// The files of one store that are not synced yet.
#[derive(Debug)]
pub(crate) struct Lazy {
    root: PathBuf,
    backend: LocalFileSystem,
    owed: Mutex<Owed>,
    scribe: Scribe,
}

/// What a thread is to do.
type Task = Box<dyn FnOnce() + Send>;

/// A thread outside every runtime, where the backend does at once what it is asked for; on a runtime it
/// hands each file to another thread. Begun with the first task.
#[derive(Debug, Default)]
struct Scribe(Mutex<Option<mpsc::Sender<Task>>>);

impl Scribe {
    /// Whether the thread will do this.
    fn takes(&self, task: Task) -> bool {
        let mut tasks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if tasks.is_none() {
            let (to, from) = mpsc::channel::<Task>();
            let thread = std::thread::Builder::new().name("tables".to_owned());
            // A task that panics ends the thread: nobody is told what became of it.
            let begun = thread.spawn(move || from.into_iter().for_each(|task| task()));
            *tasks = begun.is_ok().then_some(to);
        }
        let done = tasks.as_ref().is_some_and(|tasks| tasks.send(task).is_ok());
        if !done {
            *tasks = None;
        }
        done
    }
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
        Ok(Lazy { root, backend, owed: Mutex::default(), scribe: Scribe::default() })
    }

    /// Writes without syncing.
    pub(crate) fn backend(&self) -> &LocalFileSystem {
        &self.backend
    }

    /// Creates objects, one after the other, on a thread of the store. Whether there were any and all of
    /// them are there now; what hinders one, it shows to whoever creates it again.
    pub(crate) async fn create_all(self: &Arc<Lazy>, objects: Vec<(String, Bytes)>) -> bool {
        let (tell, told) = oneshot::channel();
        let lazy = Arc::downgrade(self);
        let task = move || {
            let all = |lazy: Arc<Lazy>| {
                !objects.is_empty()
                    && objects.into_iter().all(|(key, bytes)| lazy.create(&key, bytes))
            };
            let _ = tell.send(lazy.upgrade().is_some_and(all));
        };
        self.scribe.takes(Box::new(task)) && told.await.unwrap_or(false)
    }

    /// Whether a new object is there now. Only for the thread that is on no runtime.
    fn create(&self, key: &str, bytes: Bytes) -> bool {
        let Ok(path) = Key::parse(key) else { return false };
        self.owe(key);
        let payload = PutPayload::from_bytes(bytes);
        let put = self.backend.put_opts(&path, payload, PutMode::Create.into());
        put.now_or_never().is_some_and(|done| done.is_ok())
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
        let failed = [sync_all(&files), sync_all(&folders)].concat();
        let mut owed = self.owed();
        let Some((path, error)) = failed.first() else {
            owed.keys.retain(|key| !keys.contains(key));
            return Ok(());
        };
        let reason = format!("{}: {error}", path.display());
        owed.lost = Some(reason.clone());
        // Who resumes the run must not find them as if they were whole, but write them again.
        for file in files.iter().filter(|file| failed.iter().any(|(at, _)| file.starts_with(at))) {
            if let Err(error) = std::fs::remove_file(file) {
                tracing::warn!(file = %file.display(), %error, "could not be taken away");
            }
        }
        Err(StoreError::Unsynced { place: place.to_owned(), reason })
    }

    fn owed(&self) -> MutexGuard<'_, Owed> {
        self.owed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Syncs these, several at once: a disk writes them together. Gives those that failed, and why.
fn sync_all(paths: &[&Path]) -> Vec<(PathBuf, String)> {
    let one = |path: &&Path| match File::open(path).and_then(|file| file.sync_all()) {
        // Deleted since.
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        done => done.err().map(|error| (path.to_path_buf(), error.to_string())),
    };
    let some = |paths: &[&Path]| paths.iter().filter_map(one).collect::<Vec<_>>();
    std::thread::scope(|scope| {
        let share = paths.len().div_ceil(AT_ONCE).max(1);
        let threads: Vec<_> =
            paths.chunks(share).map(|paths| scope.spawn(move || some(paths))).collect();
        let failed = |thread: std::thread::ScopedJoinHandle<'_, _>| match thread.join() {
            Ok(failed) => failed,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        threads.into_iter().flat_map(failed).collect()
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
    fn what_could_not_be_synced_is_taken_away_and_no_later_sync_helps() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().canonicalize().unwrap();
        let lazy = Arc::new(Lazy::new(root.clone()).unwrap());
        std::fs::write(root.join("whole"), "a").unwrap();
        // A socket cannot be opened as a file.
        drop(std::os::unix::net::UnixListener::bind(root.join("odd")).unwrap());
        lazy.owe("whole");
        lazy.settle("here").unwrap();
        assert_eq!(lazy.count(), 0);
        lazy.owe("whole");
        lazy.owe("odd");
        for _ in 0..2 {
            let error = lazy.settle("here").unwrap_err().to_string();
            assert!(error.contains("odd") && error.contains("resume the run"), "{error}");
        }
        assert!(root.join("whole").exists() && !root.join("odd").exists());
    }

    #[tokio::test]
    async fn objects_are_created_in_order_up_to_one_that_is_there() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().canonicalize().unwrap();
        let lazy = Arc::new(Lazy::new(root.clone()).unwrap());
        let named =
            |keys: &[&str]| keys.iter().map(|key| ((*key).to_owned(), "a".into())).collect();
        assert!(lazy.create_all(named(&["t/1", "t/2"])).await);
        assert_eq!((lazy.count(), std::fs::read(root.join("t/2")).unwrap()), (2, b"a".to_vec()));
        assert!(!lazy.create_all(named(&["t/3", "t/1", "t/4"])).await);
        assert!(root.join("t/3").exists() && !root.join("t/4").exists());
        assert!(!lazy.create_all(Vec::new()).await);
    }

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
