use super::{Metadata, TensorFileError, kind_of};
use crate::{Tensors, bytes};
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::path::Path;
use tch::{Device, Kind, Tensor};

/// What a file says of a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spec {
    /// Element type, as in the file.
    pub dtype: Dtype,
    /// Shape.
    pub shape: Vec<i64>,
}

/// Where the elements of a tensor lie.
#[derive(Clone, Copy, Debug)]
pub enum Place<'a> {
    /// In memory.
    Memory(&'a [u8]),
    /// In a file: the first byte, and how many there are.
    File(&'a File, u64, usize),
}

/// Anything tensors can be read from by name: one file, several, or bytes in memory.
pub trait TensorSource {
    /// All names, in order.
    fn names(&self) -> Vec<&str>;
    /// Type and shape, if it is there.
    fn spec(&self, name: &str) -> Option<Spec>;
    /// The elements as they lie in the file, and what they are.
    ///
    /// # Errors
    /// [`TensorFileError::Missing`].
    fn raw(&self, name: &str) -> Result<(Spec, &[u8]), TensorFileError>;
    /// Where the elements lie, and what they are.
    ///
    /// # Errors
    /// [`TensorFileError::Missing`].
    fn place(&self, name: &str) -> Result<(Spec, Place<'_>), TensorFileError>;
    /// What this source is called in errors.
    fn label(&self) -> &str;

    /// One tensor, copied from the file to `device`, in the file's element type.
    ///
    /// # Errors
    /// [`TensorFileError`] when it is not there or its type cannot be computed with.
    fn load(&self, name: &str, device: Device) -> Result<Tensor, TensorFileError> {
        let (spec, place) = self.place(name)?;
        let Some(kind) = kind_of(spec.dtype) else {
            let (file, name) = (self.label().to_owned(), name.to_owned());
            return Err(TensorFileError::Unsupported {
                file,
                name,
                dtype: format!("{:?}", spec.dtype),
            });
        };
        let host = match place {
            Place::Memory(data) => bytes::from_bytes(data, &spec.shape, kind),
            Place::File(file, at, len) => bytes::from_file(file, at, len, &spec.shape, kind),
        };
        host.and_then(|tensor| Ok(tensor.f_to_device(device)?))
            .map_err(|e| self.refused(name, e.to_string()))
    }

    /// As [`load`](Self::load), converted to `kind`.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    fn load_as(&self, name: &str, device: Device, kind: Kind) -> Result<Tensor, TensorFileError> {
        let tensor = self.load(name, device)?;
        tensor.f_to_kind(kind).map_err(|e| self.refused(name, e.to_string()))
    }

    /// As [`load`](Self::load), refusing any other element type or shape than these.
    ///
    /// # Errors
    /// [`TensorFileError::Kind`] and [`TensorFileError::Shape`] besides those of `load`.
    fn load_exact(
        &self,
        name: &str,
        device: Device,
        kind: Kind,
        shape: &[i64],
    ) -> Result<Tensor, TensorFileError> {
        let tensor = self.load(name, device)?;
        let (file, name) = (self.label().to_owned(), name.to_owned());
        if tensor.kind() != kind {
            return Err(TensorFileError::Kind { file, name, found: tensor.kind(), expected: kind });
        }
        if tensor.size() != shape {
            let (found, expected) = (tensor.size(), shape.to_vec());
            return Err(TensorFileError::Shape { file, name, found, expected });
        }
        Ok(tensor)
    }

    /// Every tensor.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    fn load_all(&self, device: Device) -> Result<Tensors, TensorFileError> {
        self.names()
            .into_iter()
            .map(|name| Ok((name.to_owned(), self.load(name, device)?)))
            .collect()
    }

    #[doc(hidden)]
    fn refused(&self, name: &str, reason: String) -> TensorFileError {
        TensorFileError::Torch { file: self.label().to_owned(), name: name.to_owned(), reason }
    }
}

enum Backing {
    Mapped(Mmap, File),
    Owned(Vec<u8>),
    Empty,
}

impl Backing {
    fn bytes(&self) -> &[u8] {
        match self {
            Backing::Mapped(map, _) => map,
            Backing::Owned(bytes) => bytes,
            Backing::Empty => &[],
        }
    }
}

/// One safetensors file, its header read and checked, its tensors read when asked for.
pub struct TensorFile {
    label: String,
    data: Backing,
    metadata: Metadata,
    entries: BTreeMap<String, (Spec, Range<usize>)>,
}

impl TensorFile {
    /// Opens a file through a memory map. Nothing may write to it meanwhile: files of this project
    /// are made elsewhere and renamed into place, never changed.
    ///
    /// # Errors
    /// [`TensorFileError`] when it cannot be read, is truncated or its header is wrong.
    pub fn open(path: impl AsRef<Path>) -> Result<TensorFile, TensorFileError> {
        let path = path.as_ref();
        let io = |source| TensorFileError::Io { file: path.to_path_buf(), source };
        let file = File::open(path).map_err(io)?;
        let len = file.metadata().map_err(io)?.len();
        // SAFETY: the map is read-only and private; see above for who may write.
        let data = if len == 0 {
            Backing::Empty
        } else {
            // SAFETY: as above.
            let map = unsafe { Mmap::map(&file) }.map_err(io)?;
            Backing::Mapped(map, file)
        };
        TensorFile::parse(path.display().to_string(), data)
    }

    /// Takes a whole file from memory; `label` names it in errors.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn from_bytes(
        label: impl Into<String>,
        data: Vec<u8>,
    ) -> Result<TensorFile, TensorFileError> {
        TensorFile::parse(label.into(), Backing::Owned(data))
    }

    fn parse(label: String, data: Backing) -> Result<TensorFile, TensorFileError> {
        let all = data.bytes();
        check_length(&label, all)?;
        let header = |e: safetensors::SafeTensorError| TensorFileError::Header {
            file: label.clone(),
            reason: e.to_string(),
        };
        let (header_len, parsed) = SafeTensors::read_metadata(all).map_err(header)?;
        let start = header_len + 8;
        let mut entries = BTreeMap::new();
        for (name, info) in parsed.tensors() {
            let shape =
                info.shape.iter().map(|dim| i64::try_from(*dim).unwrap_or(i64::MAX)).collect();
            let range = start + info.data_offsets.0..start + info.data_offsets.1;
            if range.end > all.len() {
                let (found, expected) = (all.len() as u64, range.end as u64);
                return Err(TensorFileError::Truncated { file: label, found, expected });
            }
            entries.insert(name, (Spec { dtype: info.dtype, shape }, range));
        }
        let metadata = parsed.metadata().clone().unwrap_or_default().into_iter().collect();
        Ok(TensorFile { label, data, metadata, entries })
    }

    /// The whole file.
    pub fn bytes(&self) -> &[u8] {
        self.data.bytes()
    }

    fn entry(&self, name: &str) -> Result<&(Spec, Range<usize>), TensorFileError> {
        self.entries.get(name).ok_or_else(|| TensorFileError::Missing {
            file: self.label.clone(),
            name: name.to_owned(),
        })
    }

    /// The `__metadata__` of the header.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }
}

/// The library reports a short file as a header whose offsets do not cover it; a person wants to
/// read that the file is truncated.
fn check_length(label: &str, all: &[u8]) -> Result<(), TensorFileError> {
    let found = all.len() as u64;
    let truncated =
        |expected| TensorFileError::Truncated { file: label.to_owned(), found, expected };
    let Some((len, rest)) = all.split_first_chunk::<8>() else {
        return Err(truncated(8));
    };
    let header_len = u64::from_le_bytes(*len);
    if header_len > safetensors_limit() {
        let reason = format!("a header of {header_len} bytes");
        return Err(TensorFileError::Header { file: label.to_owned(), reason });
    }
    let Some(header) = rest.get(..header_len as usize) else {
        return Err(truncated(header_len + 8));
    };
    // Only to find the promised end; all other checks are the library's.
    let Ok(header) = serde_json::from_slice::<BTreeMap<String, serde_json::Value>>(header) else {
        return Ok(());
    };
    let end =
        header.values().filter_map(|v| v.get("data_offsets")?.get(1)?.as_u64()).max().unwrap_or(0);
    let expected = end.saturating_add(header_len + 8);
    if expected > found { Err(truncated(expected)) } else { Ok(()) }
}

/// The largest header the format allows.
fn safetensors_limit() -> u64 {
    100_000_000
}

impl TensorSource for TensorFile {
    fn names(&self) -> Vec<&str> {
        self.entries.keys().map(String::as_str).collect()
    }

    fn spec(&self, name: &str) -> Option<Spec> {
        self.entries.get(name).map(|(spec, _)| spec.clone())
    }

    fn raw(&self, name: &str) -> Result<(Spec, &[u8]), TensorFileError> {
        let (spec, range) = self.entry(name)?;
        Ok((spec.clone(), &self.data.bytes()[range.clone()]))
    }

    fn place(&self, name: &str) -> Result<(Spec, Place<'_>), TensorFileError> {
        let (spec, range) = self.entry(name)?;
        let place = match &self.data {
            Backing::Mapped(_, file) => Place::File(file, range.start as u64, range.len()),
            _ => Place::Memory(&self.data.bytes()[range.clone()]),
        };
        Ok((spec.clone(), place))
    }

    fn label(&self) -> &str {
        &self.label
    }
}
