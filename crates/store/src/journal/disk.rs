//! Segments on a disk of this machine: several to a file, each synced by itself.
//!
//! A store makes an object appear whole: it writes a file aside, syncs it, links it to its name and
//! syncs the folder, which costs a file system many times what it costs to add to a file that is there.
//! A segment need not appear whole, since a reader tells one that is not, and declares the newest one
//! void if it is cut off. So the first segment after an opening or a snapshot is written into a new file
//! at its own name, and the ones after it are added to that file: into zeros that were written there
//! before, so that syncing a segment changes nothing of the file but its bytes.
//!
//! ```text
//! first    create n (it must not exist) -> write -> sync the bytes -> sync the folder -> is there a G + 1?
//! others                                   write -> sync the bytes                    -> is there a G + 1?
//! ```
//! Where another machine may be looking at the same time this would not do: it could find a segment
//! half-written and declare it void, and the writer could be shown a folder without the other's claim,
//! out of a cache. So [`Disk::of`] wants a file system that only this machine can have mounted. Here
//! everybody sees the same folder: who reads a file has claimed the next generation before, so whatever
//! its writer adds after that, the writer finds the claim and tells nobody that it is durable. What it
//! added ends where the next file begins.

use crate::error::StoreError;
use crate::store::Store;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

/// A file to which segments are added is left for a new one when it has this many bytes.
const FULL: u64 = 16 << 20;
/// Zeros that are written ahead of the segments.
const AHEAD: usize = 256 << 10;

/// A journal's folders on a disk of this machine.
#[derive(Clone, Debug)]
pub(super) struct Disk {
    place: Arc<str>,
    root: Arc<Path>,
    /// The folder of the segments, open to be synced.
    folder: Arc<File>,
    /// The file to add to.
    open: Option<Tail>,
}

/// A file that is being added to.
#[derive(Clone, Debug)]
struct Tail {
    file: Arc<File>,
    /// Where its segments end.
    end: u64,
    /// Where the zeros after them end.
    room: u64,
}

impl Tail {
    /// Adds bytes and syncs them.
    fn add(&mut self, bytes: &[u8]) -> io::Result<()> {
        let end = self.end + bytes.len() as u64;
        if end > self.room {
            let zeros = vec![0; AHEAD];
            while self.room < end {
                self.file.write_all_at(&zeros, self.room)?;
                self.room += zeros.len() as u64;
            }
        }
        self.file.write_all_at(bytes, self.end)?;
        self.file.sync_data()?;
        self.end = end;
        Ok(())
    }
}

/// What became of a segment.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Written {
    /// It is durable, and nobody has taken the journal over.
    Durable,
    /// There is one of that number.
    Exists,
    /// It is written, but somebody else has claimed the journal.
    Claimed,
}

impl Disk {
    /// The disk that a store's folder of segments lies on; `None` where segments are to be made as
    /// other objects are. The folder must be there.
    pub(super) fn of(store: &Store, segments: &str) -> Option<Disk> {
        let root = store.local_root()?;
        let folder = File::open(root.join(segments)).ok()?;
        is_of_this_machine(&folder).then(|| Disk {
            place: store.place().into(),
            root: root.into(),
            folder: Arc::new(folder),
            open: None,
        })
    }

    /// The next segment begins a file.
    pub(super) fn close(&mut self) {
        if let Some(Tail { file, end, .. }) = self.open.take()
            && let Err(error) = file.set_len(end)
        {
            // The zeros do no harm.
            tracing::debug!(%error, "a journal file keeps its spare room");
        }
    }

    /// Makes a segment durable; `next` is the claim that ends this writer. Blocks its thread.
    ///
    /// # Errors
    /// The system refuses. There may be a segment, or half of one: nothing may be written after it.
    pub(super) fn write(
        &mut self,
        key: &str,
        bytes: &[u8],
        next: &str,
    ) -> Result<Written, StoreError> {
        let is_new = self.open.is_none();
        let mut tail = match self.open.take() {
            Some(tail) => tail,
            None => {
                let mut new = OpenOptions::new();
                let file = match new.write(true).create_new(true).open(self.root.join(key)) {
                    Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                        return Ok(Written::Exists);
                    }
                    made => made.map_err(|error| self.named(key, error))?,
                };
                Tail { file: Arc::new(file), end: 0, room: 0 }
            }
        };
        let added = tail.add(bytes);
        let synced = added.and_then(|()| if is_new { self.folder.sync_all() } else { Ok(()) });
        synced.map_err(|error| self.named(key, error))?;
        let is_full = tail.end >= FULL;
        self.open = Some(tail);
        if is_full {
            self.close();
        }
        match std::fs::symlink_metadata(self.root.join(next)) {
            Ok(_) => Ok(Written::Claimed),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Written::Durable),
            Err(error) => Err(self.named(next, error)),
        }
    }

    fn named(&self, key: &str, error: io::Error) -> StoreError {
        let (place, key) = (self.place.to_string(), key.to_owned());
        match error.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => StoreError::Full { place, key },
            ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => {
                StoreError::Denied { place, key, reason: error.to_string() }
            }
            _ => {
                let source =
                    object_store::Error::Generic { store: "disk", source: Box::new(error) };
                StoreError::Backend { place, key, operation: "create", source }
            }
        }
    }
}

/// Whether a folder is on a file system that other machines cannot have mounted at the same time, as
/// they can NFS, Lustre and whatever is behind FUSE.
#[cfg(target_os = "linux")]
fn is_of_this_machine(folder: &File) -> bool {
    use nix::sys::statfs;
    const OWN: [statfs::FsType; 5] = [
        // ext2 and ext3 have the same number.
        statfs::EXT4_SUPER_MAGIC,
        statfs::XFS_SUPER_MAGIC,
        statfs::BTRFS_SUPER_MAGIC,
        statfs::F2FS_SUPER_MAGIC,
        statfs::TMPFS_MAGIC,
    ];
    statfs::fstatfs(folder).is_ok_and(|found| OWN.contains(&found.filesystem_type()))
}

#[cfg(not(target_os = "linux"))]
fn is_of_this_machine(_: &File) -> bool {
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_share_a_file_until_it_is_closed_and_a_claim_is_seen() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().display().to_string()).unwrap();
        std::fs::create_dir_all(folder.path().join("j/segments")).unwrap();
        // Elsewhere than on the file systems above there is nothing to be tested.
        let Some(mut disk) = Disk::of(&store, "j/segments") else { return };
        let mut other = disk.clone();
        let write = |disk: &mut Disk, number: u32, bytes: &[u8]| {
            disk.write(&format!("j/segments/{number}"), bytes, "j/next").unwrap()
        };
        assert_eq!(write(&mut disk, 1, b"one"), Written::Durable);
        assert_eq!(write(&mut other, 1, b"other"), Written::Exists);
        assert_eq!(write(&mut disk, 2, b"two"), Written::Durable);
        disk.close();
        assert_eq!(write(&mut disk, 3, b"three"), Written::Durable);
        disk.close();
        let held = |number: u32| std::fs::read(folder.path().join(format!("j/segments/{number}")));
        assert_eq!((held(1).unwrap(), held(3).unwrap()), (b"onetwo".to_vec(), b"three".to_vec()));
        assert!(held(2).is_err());
        std::fs::write(folder.path().join("j/next"), "").unwrap();
        assert_eq!(write(&mut disk, 4, b"four"), Written::Claimed);
        disk.close();
        let error = disk.write("j/none/1", b"", "j/next").unwrap_err();
        assert!(error.to_string().contains("j/none/1"), "{error}");
        assert!(Disk::of(&Store::memory(), "j/segments").is_none());
    }
}
