//! Segments on a disk of this machine: the same objects as everywhere, made with fewer writes.
//!
//! A store makes an object appear whole: it writes a file aside, syncs it, links it to its name and
//! syncs the folder, which a file system with a log answers by writing its log twice. A segment need
//! not appear whole, since a reader tells one that is not, and declares the newest one void if it is
//! cut off. So its file is created at its name at once (and refused if there is one), written, and
//! synced together with the folder: the log is written once.
//!
//! ```text
//! create n (it must not exist) -> write -> sync the bytes -> sync the folder -> is there a G + 1?
//! ```
//! Where another machine may be looking at the same time this would not do: it could find a segment
//! half-written and declare it void, and the writer could be shown a folder without the other's claim,
//! out of a cache. So [`Disk::of`] wants a file system that only this machine can have mounted. Here
//! everybody sees the same folder: who finds half a segment has claimed its generation before, and the
//! writer looks for that claim after it has written.

use crate::error::StoreError;
use crate::store::Store;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::path::Path;
use std::sync::Arc;

/// A journal's folders on a disk of this machine.
#[derive(Clone, Debug)]
pub(super) struct Disk {
    place: Arc<str>,
    root: Arc<Path>,
    /// The folder of the segments, open to be synced.
    folder: Arc<File>,
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
        })
    }

    /// Makes a segment durable; `next` is the claim that ends this writer. Blocks its thread.
    ///
    /// # Errors
    /// The system refuses. There may be a segment, or half of one.
    pub(super) fn write(&self, key: &str, bytes: &[u8], next: &str) -> Result<Written, StoreError> {
        let made = OpenOptions::new().write(true).create_new(true).open(self.root.join(key));
        let mut file = match made {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => return Ok(Written::Exists),
            made => made.map_err(|error| self.named(key, error))?,
        };
        let synced = file.write_all(bytes).and_then(|()| file.sync_data());
        synced.and_then(|()| self.folder.sync_all()).map_err(|error| self.named(key, error))?;
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
    fn a_segment_is_written_once_and_a_claim_is_seen() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().display().to_string()).unwrap();
        std::fs::create_dir_all(folder.path().join("j/segments")).unwrap();
        // Elsewhere than on the file systems above there is nothing to be tested.
        let Some(disk) = Disk::of(&store, "j/segments") else { return };
        let write = |number: u32, bytes: &[u8]| {
            disk.write(&format!("j/segments/{number}"), bytes, "j/next").unwrap()
        };
        assert_eq!(write(1, b"one"), Written::Durable);
        assert_eq!(write(1, b"other"), Written::Exists);
        assert_eq!(std::fs::read(folder.path().join("j/segments/1")).unwrap(), b"one");
        std::fs::write(folder.path().join("j/next"), "").unwrap();
        assert_eq!(write(2, b"two"), Written::Claimed);
        let error = disk.write("j/none/1", b"", "j/next").unwrap_err();
        assert!(error.to_string().contains("j/none/1"), "{error}");
        assert!(Disk::of(&Store::memory(), "j/segments").is_none());
    }
}
