//! Tensors that several files hold together: each file holds whole tensors, and stretches of others.
//!
//! ```text
//! NAME              a whole tensor
//! NAME[START..END]  elements START..END of the flattened tensor NAME, one-dimensional; the file's
//!                   metadata says the whole one's shape: "shape:NAME" = "[3,4]"
//! ```
//! Who reads them need not know who wrote what: all files together must hold every element of every
//! tensor once.

use super::{Metadata, Spec, TensorFile, TensorFileError, TensorSource, kind_of};
use crate::{Tensors, bytes};
use std::collections::BTreeMap;
use std::ops::Range;
use tch::{Device, Kind, Tensor};

/// Before a tensor's name, the metadata's key of its shape.
const SHAPE: &str = "shape:";

/// A tensor to write, or a stretch of one.
#[derive(Debug)]
pub struct Piece {
    /// The tensor's name.
    pub name: String,
    /// Shape of the whole tensor.
    pub shape: Vec<i64>,
    /// Which elements of the flattened tensor these are; `None`: all.
    pub range: Option<Range<i64>>,
    /// The elements: of the whole shape, or one-dimensional and as long as the range.
    pub tensor: Tensor,
}

impl Piece {
    /// A whole tensor.
    pub fn whole(name: impl Into<String>, tensor: Tensor) -> Piece {
        Piece { name: name.into(), shape: tensor.size(), range: None, tensor }
    }

    /// Elements `range` of the flattened tensor `name` of shape `shape`.
    pub fn part(
        name: impl Into<String>,
        shape: &[i64],
        range: Range<i64>,
        tensor: Tensor,
    ) -> Piece {
        Piece { name: name.into(), shape: shape.to_vec(), range: Some(range), tensor }
    }

    /// Bytes of the elements.
    pub fn bytes(&self) -> usize {
        self.tensor.numel() * self.tensor.kind().elt_size_in_bytes()
    }
}

/// The names under which a file holds these pieces, and, added to its metadata, what a reader must
/// know to put them together. Pieces without elements are left out.
///
/// # Errors
/// [`TensorFileError::Pieces`] when a piece contradicts itself or is there twice.
pub fn lay_pieces(
    pieces: impl IntoIterator<Item = Piece>,
    metadata: &mut Metadata,
) -> Result<Tensors, TensorFileError> {
    let mut tensors = Tensors::new();
    for Piece { name, shape, range, tensor } in pieces {
        let bad = |reason: String| Err(TensorFileError::Pieces { name: name.clone(), reason });
        let key = match range {
            None if split(&name).1.is_some() => {
                return bad("its name ends as that of a piece does".to_owned());
            }
            None => name.clone(),
            Some(range) => {
                let total: i64 = shape.iter().product();
                if range.start < 0 || range.start > range.end || range.end > total {
                    return bad(format!("{range:?} is not within its {total} elements"));
                }
                if tensor.size() != [range.end - range.start] {
                    return bad(format!("its piece {range:?} has shape {:?}", tensor.size()));
                }
                if range.is_empty() {
                    continue;
                }
                metadata.insert(format!("{SHAPE}{name}"), format!("{shape:?}"));
                format!("{name}[{}..{}]", range.start, range.end)
            }
        };
        if tensors.insert(key, tensor).is_some() {
            return bad("the same piece of it is there twice".to_owned());
        }
    }
    Ok(tensors)
}

/// The tensor that a name in a file belongs to, and which of its elements, if not all.
fn split(key: &str) -> (&str, Option<Range<i64>>) {
    let number = |text: &str| {
        let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        digits.then(|| text.parse::<i64>().ok()).flatten()
    };
    let part =
        key.strip_suffix(']').and_then(|rest| rest.rsplit_once('[')).and_then(|(name, range)| {
            let (start, end) = range.split_once("..")?;
            Some((name, number(start)?..number(end)?))
        });
    part.map_or((key, None), |(name, range)| (name, Some(range)))
}

/// A tensor, and where its elements lie.
struct Whole {
    spec: Spec,
    parts: Vec<Part>,
}

/// Elements of a tensor, in one file.
struct Part {
    range: Range<i64>,
    file: usize,
    key: String,
}

/// Tensors that several files hold together, checked to be complete.
pub struct Assembly {
    files: Vec<TensorFile>,
    wholes: BTreeMap<String, Whole>,
}

impl Assembly {
    /// Finds every tensor's pieces.
    ///
    /// # Errors
    /// [`TensorFileError::Pieces`] naming a tensor whose pieces leave a gap, overlap, or differ in type
    /// or shape.
    pub fn new(files: Vec<TensorFile>) -> Result<Assembly, TensorFileError> {
        let mut wholes: BTreeMap<String, Whole> = BTreeMap::new();
        for (number, file) in files.iter().enumerate() {
            for key in file.names() {
                let (spec, _) = file.raw(key)?;
                let (name, spec, range) = place(file, key, spec)?;
                let whole = wholes
                    .entry(name.to_owned())
                    .or_insert_with(|| Whole { spec: spec.clone(), parts: Vec::new() });
                if whole.spec != spec {
                    let reason = format!("one piece says {:?}, another {spec:?}", whole.spec);
                    return Err(TensorFileError::Pieces { name: name.to_owned(), reason });
                }
                whole.parts.push(Part { range, file: number, key: key.to_owned() });
            }
        }
        for (name, whole) in &mut wholes {
            whole.parts.sort_by_key(|part| (part.range.start, part.range.end));
            complete(whole)
                .map_err(|reason| TensorFileError::Pieces { name: name.clone(), reason })?;
        }
        Ok(Assembly { files, wholes })
    }

    /// All names, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.wholes.keys().map(String::as_str)
    }

    /// Type and shape of a tensor, if it is there.
    pub fn spec(&self, name: &str) -> Option<&Spec> {
        self.wholes.get(name).map(|whole| &whole.spec)
    }

    /// A whole tensor, on the CPU.
    ///
    /// # Errors
    /// [`TensorFileError::Missing`]; its type cannot be computed with.
    pub fn load(&self, name: &str) -> Result<Tensor, TensorFileError> {
        let (whole, kind) = self.find(name)?;
        let total = whole.spec.shape.iter().product();
        self.gather(name, whole, kind, 0..total)?
            .f_view(whole.spec.shape.as_slice())
            .map_err(|error| refused(name, &error))
    }

    /// Elements `range` of the flattened tensor, one-dimensional, on the CPU.
    ///
    /// # Errors
    /// As [`Assembly::load`]; [`TensorFileError::Pieces`] when it has fewer elements.
    pub fn load_range(&self, name: &str, range: Range<i64>) -> Result<Tensor, TensorFileError> {
        let (whole, kind) = self.find(name)?;
        let total: i64 = whole.spec.shape.iter().product();
        if range.start < 0 || range.start > range.end || range.end > total {
            let reason = format!("{range:?} is not within its {total} elements");
            return Err(TensorFileError::Pieces { name: name.to_owned(), reason });
        }
        self.gather(name, whole, kind, range)
    }

    /// Copies a whole tensor into one that only the caller uses: straight from the files where that one is
    /// contiguous, on the CPU and of the same type.
    ///
    /// # Errors
    /// As [`Assembly::load`]; [`TensorFileError::Shape`] when the shapes differ.
    pub fn copy_into(&self, name: &str, into: &Tensor) -> Result<(), TensorFileError> {
        let (whole, kind) = self.find(name)?;
        let (found, expected) = (whole.spec.shape.clone(), into.size());
        if found != expected {
            let file = self.files[whole.parts[0].file].label().to_owned();
            return Err(TensorFileError::Shape { file, name: name.to_owned(), found, expected });
        }
        let bad = |error| refused(name, &error);
        let into = into.detach();
        if into.device() == Device::Cpu && into.kind() == kind && into.is_contiguous() {
            let flat = into.f_view([-1]).map_err(bad)?;
            return self.scatter(name, whole, kind, 0..flat.numel() as i64, &flat);
        }
        let loaded = self.load(name)?;
        tch::no_grad(|| into.shallow_clone().f_copy_(&loaded)).map_err(bad).map(drop)
    }

    /// Every tensor, whole.
    ///
    /// # Errors
    /// As [`Assembly::load`].
    pub fn load_all(&self) -> Result<Tensors, TensorFileError> {
        self.names().map(|name| Ok((name.to_owned(), self.load(name)?))).collect()
    }

    fn find(&self, name: &str) -> Result<(&Whole, Kind), TensorFileError> {
        let label = || self.files.first().map_or("no file", |file| file.label()).to_owned();
        let whole = self
            .wholes
            .get(name)
            .ok_or_else(|| TensorFileError::Missing { file: label(), name: name.to_owned() })?;
        let kind = kind_of(whole.spec.dtype).ok_or_else(|| TensorFileError::Unsupported {
            file: label(),
            name: name.to_owned(),
            dtype: format!("{:?}", whole.spec.dtype),
        })?;
        Ok((whole, kind))
    }

    /// The pieces' elements that lie in `range`, copied once.
    fn gather(
        &self,
        name: &str,
        whole: &Whole,
        kind: Kind,
        range: Range<i64>,
    ) -> Result<Tensor, TensorFileError> {
        let out = Tensor::f_empty([range.end - range.start], (kind, Device::Cpu))
            .map_err(|error| refused(name, &error))?;
        self.scatter(name, whole, kind, range, &out)?;
        Ok(out)
    }

    /// Copies the pieces' elements that lie in `range` to `out`, one-dimensional and as long.
    fn scatter(
        &self,
        name: &str,
        whole: &Whole,
        kind: Kind,
        range: Range<i64>,
        out: &Tensor,
    ) -> Result<(), TensorFileError> {
        let width = kind.elt_size_in_bytes();
        let bad = |error| refused(name, &error);
        for part in &whole.parts {
            let (start, end) = (part.range.start.max(range.start), part.range.end.min(range.end));
            if start >= end {
                continue;
            }
            let (_, data) = self.files[part.file].raw(&part.key)?;
            let within = |at: i64| (at - part.range.start) as usize * width;
            let view = out.f_narrow(0, start - range.start, end - start).map_err(bad)?;
            bytes::fill(&view, &data[within(start)..within(end)]);
        }
        Ok(())
    }
}

/// Which tensor, of which type and shape, and which of its elements lie under a file's key.
fn place<'a>(
    file: &TensorFile,
    key: &'a str,
    spec: Spec,
) -> Result<(&'a str, Spec, Range<i64>), TensorFileError> {
    let (name, range) = split(key);
    let bad = |reason: String| TensorFileError::Pieces {
        name: name.to_owned(),
        reason: format!("{}: {reason}", file.label()),
    };
    let count = |shape: &[i64]| shape.iter().try_fold(1i64, |n, dim| n.checked_mul(*dim));
    let own = count(&spec.shape).ok_or_else(|| bad("its shape is too large".to_owned()))?;
    let Some(range) = range else { return Ok((name, spec, 0..own)) };
    let shape = file.metadata().get(&format!("{SHAPE}{name}"));
    let shape: Vec<i64> = shape
        .and_then(|text| serde_json::from_str(text).ok())
        .filter(|shape: &Vec<i64>| shape.iter().all(|dim| *dim >= 0))
        .ok_or_else(|| bad("it does not say the whole tensor's shape".to_owned()))?;
    let total = count(&shape).ok_or_else(|| bad("its shape is too large".to_owned()))?;
    if spec.shape.len() != 1 || range.start > range.end || own != range.end - range.start {
        return Err(bad(format!("its piece {range:?} has shape {:?}", spec.shape)));
    }
    if range.end > total {
        return Err(bad(format!("{range:?} is not within its {total} elements")));
    }
    Ok((name, Spec { dtype: spec.dtype, shape }, range))
}

/// Whether sorted pieces hold each element once.
fn complete(whole: &Whole) -> Result<(), String> {
    let total: i64 = whole.spec.shape.iter().product();
    let mut at = 0;
    for (number, part) in whole.parts.iter().enumerate() {
        if number > 0 && (part.range.start < at || total == 0) {
            let start = part.range.start;
            return Err(format!("pieces overlap at element {start} (`{}`)", part.key));
        }
        if part.range.start > at {
            return Err(format!("elements {at}..{} are missing", part.range.start));
        }
        at = part.range.end;
    }
    if at < total { Err(format!("elements {at}..{total} are missing")) } else { Ok(()) }
}

fn refused(name: &str, error: &tch::TchError) -> TensorFileError {
    TensorFileError::Torch {
        file: "pieces of a tensor".to_owned(),
        name: name.to_owned(),
        reason: error.to_string(),
    }
}
