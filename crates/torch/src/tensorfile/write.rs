use super::{Dtype, TensorFileError, dtype_of};
use crate::{Tensors, bytes};
use serde::Serialize;
use serde::ser::{SerializeMap, Serializer};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use tch::Tensor;

/// The `__metadata__` of a file: text by name.
pub type Metadata = BTreeMap<String, String>;

/// What to write under a name.
pub enum Content<'a> {
    /// A tensor.
    Tensor(&'a Tensor),
    /// Elements as they lie in another file, carried through untouched.
    Raw {
        /// Element type.
        dtype: Dtype,
        /// Shape.
        shape: Vec<i64>,
        /// Elements, little-endian, row-major.
        data: &'a [u8],
    },
}

/// A whole file in memory. Equal tensors and metadata give equal bytes.
///
/// # Errors
/// [`TensorFileError::Unsupported`] for an element type that the format lacks.
pub fn encode(tensors: &Tensors, metadata: &Metadata) -> Result<Vec<u8>, TensorFileError> {
    let contents = tensors.iter().map(|(name, t)| (name.clone(), Content::Tensor(t))).collect();
    encode_contents(&contents, metadata)
}

/// As [`encode`], in memory that was used before: what is there is overwritten.
///
/// # Errors
/// As [`encode`].
pub fn encode_into(
    tensors: &Tensors,
    metadata: &Metadata,
    out: &mut Vec<u8>,
) -> Result<(), TensorFileError> {
    let contents = tensors.iter().map(|(name, t)| (name.clone(), Content::Tensor(t))).collect();
    let size = |tensor: &Tensor| tensor.numel() * tensor.kind().elt_size_in_bytes();
    out.clear();
    out.reserve_exact(tensors.values().map(size).sum());
    stream(&contents, metadata, "a new file", out, Path::new("memory"))
}

/// As [`encode`], for tensors and raw contents together.
///
/// # Errors
/// As [`encode`].
pub fn encode_contents(
    contents: &BTreeMap<String, Content<'_>>,
    metadata: &Metadata,
) -> Result<Vec<u8>, TensorFileError> {
    let mut out = Vec::new();
    stream(contents, metadata, "a new file", &mut out, Path::new("memory"))?;
    Ok(out)
}

/// Writes a file: made beside its place, synced, then renamed, so that a reader sees all of it or
/// nothing.
///
/// # Errors
/// [`TensorFileError`] when the system refuses; then the place is as it was.
pub fn write(
    path: impl AsRef<Path>,
    contents: &BTreeMap<String, Content<'_>>,
    metadata: &Metadata,
) -> Result<(), TensorFileError> {
    let path = path.as_ref();
    replace(path, |file| stream(contents, metadata, &path.display().to_string(), file, path))
}

/// Writes any bytes the way [`write`] does.
///
/// # Errors
/// As [`write`].
pub fn write_bytes(path: impl AsRef<Path>, data: &[u8]) -> Result<(), TensorFileError> {
    let path = path.as_ref();
    replace(path, |file| file.write_all(data).map_err(|e| io(path, e)))
}

fn replace(
    path: &Path,
    fill: impl FnOnce(&mut std::io::BufWriter<File>) -> Result<(), TensorFileError>,
) -> Result<(), TensorFileError> {
    let part = beside(path);
    let made = (|| {
        let file = File::create(&part).map_err(|e| io(&part, e))?;
        let mut file = std::io::BufWriter::with_capacity(1 << 20, file);
        fill(&mut file)?;
        let file = file.into_inner().map_err(|e| io(&part, e.into_error()))?;
        file.sync_all().map_err(|e| io(&part, e))?;
        fs::rename(&part, path).map_err(|e| io(path, e))
    })();
    if made.is_err() {
        let _ = fs::remove_file(&part);
    }
    made
}

/// A name beside `path` that no other writer of this or another process takes.
fn beside(path: &Path) -> PathBuf {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    path.with_file_name(format!(".{name}.{}-{number}.part", std::process::id()))
}

fn stream(
    contents: &BTreeMap<String, Content<'_>>,
    metadata: &Metadata,
    label: &str,
    out: &mut impl Write,
    path: &Path,
) -> Result<(), TensorFileError> {
    let order = layout(contents, label)?;
    let header = header(&order, metadata, label)?;
    let put = |out: &mut dyn Write, data: &[u8]| out.write_all(data).map_err(|e| io(path, e));
    put(out, &(header.len() as u64).to_le_bytes())?;
    put(out, header.as_bytes())?;
    for entry in order {
        match entry.content {
            Content::Raw { data, .. } => put(out, data)?,
            Content::Tensor(tensor) => bytes::read_bytes(tensor, |data| put(out, data))
                .map_err(|e| torch(label, entry.name, e))??,
        }
    }
    Ok(())
}

struct Entry<'a> {
    name: &'a str,
    content: &'a Content<'a>,
    dtype: Dtype,
    shape: Vec<i64>,
    bytes: usize,
}

/// Widest elements first, then by name: the order of the reference implementation, in which every
/// tensor lies aligned to its own elements.
fn layout<'a>(
    contents: &'a BTreeMap<String, Content<'a>>,
    label: &str,
) -> Result<Vec<Entry<'a>>, TensorFileError> {
    let mut order = Vec::with_capacity(contents.len());
    for (name, content) in contents {
        let (dtype, shape) = match content {
            Content::Raw { dtype, shape, .. } => (*dtype, shape.clone()),
            Content::Tensor(tensor) => {
                let dtype =
                    dtype_of(tensor.kind()).ok_or_else(|| TensorFileError::Unsupported {
                        file: label.to_owned(),
                        name: name.clone(),
                        dtype: format!("{:?}", tensor.kind()),
                    })?;
                (dtype, tensor.size())
            }
        };
        let bytes = match content {
            Content::Raw { data, .. } => data.len(),
            Content::Tensor(_) => shape.iter().product::<i64>() as usize * dtype.bitsize() / 8,
        };
        order.push(Entry { name, content, dtype, shape, bytes });
    }
    order.sort_by(|a, b| b.dtype.bitsize().cmp(&a.dtype.bitsize()).then(a.name.cmp(b.name)));
    Ok(order)
}

/// The header's JSON, in the order of the elements. Made by hand since `serde_json`'s own map may
/// or may not keep an order, depending on features that other crates ask for.
struct Header<'a> {
    order: &'a [Entry<'a>],
    metadata: &'a Metadata,
}

#[derive(Serialize)]
struct Place<'a> {
    dtype: Dtype,
    shape: &'a [i64],
    data_offsets: [usize; 2],
}

impl Serialize for Header<'_> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let mut map = to.serialize_map(None)?;
        if !self.metadata.is_empty() {
            map.serialize_entry("__metadata__", self.metadata)?;
        }
        let mut at = 0;
        for Entry { name, dtype, shape, bytes, .. } in self.order {
            let data_offsets = [at, at + bytes];
            map.serialize_entry(name, &Place { dtype: *dtype, shape, data_offsets })?;
            at += bytes;
        }
        map.end()
    }
}

/// The header, padded with spaces so that the elements begin at a multiple of eight.
fn header(
    order: &[Entry<'_>],
    metadata: &Metadata,
    label: &str,
) -> Result<String, TensorFileError> {
    let mut text = serde_json::to_string(&Header { order, metadata })
        .map_err(|e| TensorFileError::Header { file: label.to_owned(), reason: e.to_string() })?;
    text.extend(std::iter::repeat_n(' ', text.len().next_multiple_of(8) - text.len()));
    Ok(text)
}

pub(super) fn io(path: &Path, source: std::io::Error) -> TensorFileError {
    TensorFileError::Io { file: path.to_path_buf(), source }
}

fn torch(label: &str, name: &str, error: tch::TchError) -> TensorFileError {
    TensorFileError::Torch {
        file: label.to_owned(),
        name: name.to_owned(),
        reason: error.to_string(),
    }
}
