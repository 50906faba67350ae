//! The hashes of a folder's files.

use super::FolderError;
use duet_core::Digest;
use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

/// Name of the file that lists a folder's hashes.
pub const SUMS: &str = "B3SUMS";
/// Most files of a folder.
const MAX_FILES: usize = 100_000;
/// How deep folders may lie in folders; links that lead in circles end here.
const MAX_DEPTH: usize = 16;

/// The BLAKE3 hash of every file of a folder, by its path with `/` between parts. Hidden files (a
/// name that begins with a dot) and [`SUMS`] itself do not count.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sums(BTreeMap<String, Digest>);

impl Sums {
    /// Hashes a folder; links are followed.
    ///
    /// # Errors
    /// [`FolderError`] naming the file that cannot be read, or has a name that a list cannot hold.
    pub fn of(folder: &Path) -> Result<Sums, FolderError> {
        let hash = |name: String| Ok((name.clone(), hash(&folder.join(&name))?));
        Ok(Sums(names(folder)?.into_iter().map(hash).collect::<Result<_, FolderError>>()?))
    }

    /// Reads a list in the format of `b3sum`: 64 hexadecimal digits, two spaces, a path. `origin` is
    /// what errors call it.
    ///
    /// # Errors
    /// [`FolderError::Sums`] naming the line: among them paths that lead out of the folder.
    pub fn parse(origin: &str, text: &str) -> Result<Sums, FolderError> {
        let mut all = BTreeMap::new();
        for (number, line) in (1..).zip(text.lines()).filter(|(_, line)| !line.is_empty()) {
            let (origin, shown) = (origin.to_owned(), line.chars().take(200).collect::<String>());
            let bad = |reason| Err(FolderError::Sums { origin, line: number, shown, reason });
            let Some((Ok(digest), name)) =
                line.split_once("  ").map(|(digest, name)| (digest.parse::<Digest>(), name))
            else {
                return bad("expected 64 hexadecimal digits, two spaces and a path");
            };
            let name = name.strip_prefix("./").unwrap_or(name);
            if !is_inside(name) {
                return bad("the path is not one of a file inside the folder");
            }
            if all.len() == MAX_FILES || all.insert(name.to_owned(), digest).is_some() {
                return bad("the file is named twice, or there are more than 100,000");
            }
        }
        Ok(Sums(all))
    }

    /// The list as `b3sum` writes it, sorted by path.
    pub fn to_text(&self) -> String {
        self.0.iter().map(|(name, digest)| format!("{digest}  {name}\n")).collect()
    }

    /// What the folder as a whole is called by: the hash of [`Sums::to_text`].
    pub fn digest(&self) -> Digest {
        Digest::of(self.to_text().as_bytes())
    }

    /// Files and their hashes, sorted by path.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Digest)> {
        self.0.iter().map(|(name, digest)| (name.as_str(), digest))
    }

    /// Whether a file is listed.
    pub fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// How many files there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is no file.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Writes the list into the folder.
    ///
    /// # Errors
    /// The system refuses.
    pub fn write(&self, folder: &Path) -> Result<(), FolderError> {
        let (path, beside) = (folder.join(SUMS), folder.join(".B3SUMS.part"));
        let written = std::fs::write(&beside, self.to_text());
        written
            .and_then(|()| std::fs::rename(&beside, &path))
            .map_err(|source| FolderError::Io { path, source })
    }
}

/// Whether a path stays inside the folder that it is relative to, in the one way of writing it.
fn is_inside(name: &str) -> bool {
    let plain = |part: &str| !part.is_empty() && !part.starts_with('.');
    !name.contains(['\\', '\n', '\r', '\0']) && name.split('/').all(plain) && name != SUMS
}

/// The files of a folder, sorted.
///
/// # Errors
/// The system refuses, or a name is not one that a list can hold.
pub(super) fn names(folder: &Path) -> Result<Vec<String>, FolderError> {
    let (mut found, mut open) = (Vec::new(), vec![(String::new(), 0)]);
    while let Some((below, depth)) = open.pop() {
        let here = folder.join(&below);
        let io = |source| FolderError::Io { path: here.clone(), source };
        let odd = |name: String, reason| FolderError::Name { folder: here.clone(), name, reason };
        for entry in std::fs::read_dir(&here).map_err(io)? {
            let entry = entry.map_err(io)?;
            let name = entry.file_name().into_string().map_err(|name| {
                odd(name.to_string_lossy().into_owned(), "it is not UTF-8; rename it")
            })?;
            let path = if below.is_empty() { name.clone() } else { format!("{below}/{name}") };
            if name.starts_with('.') || path == SUMS {
                continue;
            }
            if !is_inside(&path) {
                return Err(odd(name, "its name has a backslash or a line break; rename it"));
            }
            let full = entry.path();
            let meta = std::fs::metadata(&full)
                .map_err(|source| FolderError::Io { path: full, source })?;
            if meta.is_dir() && depth == MAX_DEPTH {
                return Err(odd(name, "it lies too deep; does a link lead in a circle?"));
            }
            if meta.is_dir() {
                open.push((path, depth + 1));
            } else if meta.is_file() {
                found.push(path);
            }
            if found.len() > MAX_FILES {
                return Err(odd(String::new(), "it has more than 100,000 files"));
            }
        }
    }
    found.sort();
    Ok(found)
}

/// The hash of a file, read piece by piece.
///
/// # Errors
/// The system refuses.
pub fn hash(path: &Path) -> Result<Digest, FolderError> {
    let io = |source| FolderError::Io { path: path.to_owned(), source };
    let mut file = std::fs::File::open(path).map_err(io)?;
    let (mut hasher, mut piece) = (blake3::Hasher::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut piece) {
            Ok(0) => return Ok(Digest(*hasher.finalize().as_bytes())),
            Ok(read) => hasher.update(&piece[..read]),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(io(error)),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_s_list_comes_back_and_paths_stay_inside() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("vae")).unwrap();
        for (name, text) in [("vae/a b.json", "1"), ("z", "2"), (".hidden", "3")] {
            std::fs::write(folder.path().join(name), text).unwrap();
        }
        let sums = Sums::of(folder.path()).unwrap();
        assert_eq!(sums.iter().map(|(name, _)| name).collect::<Vec<_>>(), ["vae/a b.json", "z"]);
        assert_eq!(Sums::parse("list", &sums.to_text()).unwrap(), sums);
        sums.write(folder.path()).unwrap();
        assert_eq!(Sums::of(folder.path()).unwrap(), sums, "the list is no part of the folder");

        let digest = Digest::of(b"x");
        for bad in ["../x", "/etc/passwd", "a//b", "a/../b", ".hidden", "B3SUMS", "a\\b", ""] {
            let said = Sums::parse("list", &format!("\n{digest}  {bad}\n")).unwrap_err();
            assert!(said.to_string().contains("list, line 2"), "{said}");
        }
        let twice = format!("{digest}  a\n{digest}  a\n");
        assert!(Sums::parse("list", &twice).unwrap_err().to_string().contains("twice"));
    }
}
