use super::write::{io, write_bytes};
use super::{Content, Metadata, Place, Spec, TensorFile, TensorFileError, TensorSource, write};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// What an index file's name ends with.
pub const INDEX_SUFFIX: &str = ".safetensors.index.json";

/// The index beside a split file.
#[derive(Serialize, Deserialize)]
struct Index {
    #[serde(default)]
    metadata: serde_json::Map<String, serde_json::Value>,
    weight_map: BTreeMap<String, String>,
}

/// Tensors of one model, in one file or in several with an index.
pub struct ShardedFile {
    label: String,
    files: Vec<TensorFile>,
    /// Which file each tensor is in.
    places: BTreeMap<String, usize>,
}

impl ShardedFile {
    /// Opens `folder/stem.safetensors`, or the files that `folder/stem.safetensors.index.json`
    /// names.
    ///
    /// # Errors
    /// [`TensorFileError`] when neither is there, or a file is broken, or lacks a tensor that the
    /// index promises.
    pub fn open(folder: impl AsRef<Path>, stem: &str) -> Result<ShardedFile, TensorFileError> {
        let folder = folder.as_ref();
        let index = folder.join(format!("{stem}{INDEX_SUFFIX}"));
        if !index.exists() {
            let file = TensorFile::open(folder.join(format!("{stem}.safetensors")))?;
            let label = file.label().to_owned();
            let places = file.names().into_iter().map(|name| (name.to_owned(), 0)).collect();
            return Ok(ShardedFile { label, files: vec![file], places });
        }
        ShardedFile::open_index(folder, &index)
    }

    fn open_index(folder: &Path, path: &Path) -> Result<ShardedFile, TensorFileError> {
        let label = path.display().to_string();
        let invalid = |reason: String| TensorFileError::Header { file: label.clone(), reason };
        let text = fs::read(path).map_err(|e| io(path, e))?;
        let index: Index = serde_json::from_slice(&text).map_err(|e| invalid(e.to_string()))?;
        let mut numbers = BTreeMap::new();
        let (mut files, mut places) = (Vec::new(), BTreeMap::new());
        for (name, file) in index.weight_map {
            if Path::new(&file).components().count() != 1 || file.starts_with("..") {
                return Err(invalid(format!("`{file}` is not the name of a file beside it")));
            }
            let number = match numbers.get(&file) {
                Some(number) => *number,
                None => {
                    files.push(TensorFile::open(folder.join(&file))?);
                    numbers.insert(file, files.len() - 1);
                    files.len() - 1
                }
            };
            files[number].raw(&name)?;
            places.insert(name, number);
        }
        Ok(ShardedFile { label, files, places })
    }

    fn file(&self, name: &str) -> Result<&TensorFile, TensorFileError> {
        self.places.get(name).map(|number| &self.files[*number]).ok_or_else(|| {
            TensorFileError::Missing { file: self.label.clone(), name: name.to_owned() }
        })
    }

    /// The metadata of the first file.
    pub fn metadata(&self) -> Metadata {
        self.files.first().map(|file| file.metadata().clone()).unwrap_or_default()
    }
}

impl TensorSource for ShardedFile {
    fn names(&self) -> Vec<&str> {
        self.places.keys().map(String::as_str).collect()
    }

    fn spec(&self, name: &str) -> Option<Spec> {
        self.file(name).ok()?.spec(name)
    }

    fn raw(&self, name: &str) -> Result<(Spec, &[u8]), TensorFileError> {
        self.file(name)?.raw(name)
    }

    fn place(&self, name: &str) -> Result<(Spec, Place<'_>), TensorFileError> {
        self.file(name)?.place(name)
    }

    fn label(&self) -> &str {
        &self.label
    }
}

/// Writes `contents` as `stem.safetensors`, or, where they are larger than `max_bytes`, as
/// `stem-00001-of-0000N.safetensors` and an index, tensors in name order. Gives the files' paths;
/// the index is written last.
///
/// # Errors
/// [`TensorFileError`] when the system refuses.
pub fn write_sharded(
    folder: impl AsRef<Path>,
    stem: &str,
    contents: BTreeMap<String, Content<'_>>,
    metadata: &Metadata,
    max_bytes: u64,
) -> Result<Vec<PathBuf>, TensorFileError> {
    let folder = folder.as_ref();
    fs::create_dir_all(folder).map_err(|e| io(folder, e))?;
    let total = contents.values().map(size).sum::<u64>();
    if total <= max_bytes {
        let path = folder.join(format!("{stem}.safetensors"));
        write(&path, &contents, metadata)?;
        return Ok(vec![path]);
    }
    let mut shards: Vec<BTreeMap<String, Content<'_>>> = Vec::new();
    let mut room = 0u64;
    for (name, content) in contents {
        let bytes = size(&content);
        if shards.is_empty() || bytes > room {
            shards.push(BTreeMap::new());
            room = max_bytes;
        }
        room = room.saturating_sub(bytes);
        if let Some(shard) = shards.last_mut() {
            shard.insert(name, content);
        }
    }
    write_index(folder, stem, &shards, metadata, total)
}

fn write_index(
    folder: &Path,
    stem: &str,
    shards: &[BTreeMap<String, Content<'_>>],
    metadata: &Metadata,
    total: u64,
) -> Result<Vec<PathBuf>, TensorFileError> {
    let (mut paths, mut weight_map) = (Vec::new(), BTreeMap::new());
    for (number, shard) in shards.iter().enumerate() {
        let file = format!("{stem}-{:05}-of-{:05}.safetensors", number + 1, shards.len());
        weight_map.extend(shard.keys().map(|name| (name.clone(), file.clone())));
        paths.push(folder.join(file));
        write(&paths[number], shard, metadata)?;
    }
    let path = folder.join(format!("{stem}{INDEX_SUFFIX}"));
    let metadata = serde_json::Map::from_iter([("total_size".to_owned(), total.into())]);
    let text = serde_json::to_vec_pretty(&Index { metadata, weight_map })
        .map_err(|e| io(&path, e.into()))?;
    write_bytes(&path, &text)?;
    paths.push(path);
    Ok(paths)
}

fn size(content: &Content<'_>) -> u64 {
    match content {
        Content::Raw { data, .. } => data.len() as u64,
        Content::Tensor(tensor) => (tensor.numel() * tensor.kind().elt_size_in_bytes()) as u64,
    }
}
