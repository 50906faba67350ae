//! Elements of a tensor as little-endian bytes and back, by one copy of memory.

use crate::ffi;
use std::convert::Infallible;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::thread;
use tch::{Device, Kind, TchError, Tensor};

/// Least bytes that a thread copies.
const SHARE: usize = 4 << 20;
/// Bytes that are asked of the system and then filled, while they are in the second cache.
const CHUNK: usize = 256 << 10;

/// Bytes and shape do not fit together.
#[derive(Debug, thiserror::Error)]
pub enum BytesError {
    /// Too few or too many bytes.
    #[error("{kind:?} of shape {shape:?} takes {expected} bytes, {found} are there")]
    Length {
        /// The shape.
        shape: Vec<i64>,
        /// The element type.
        kind: Kind,
        /// What it takes.
        expected: usize,
        /// What there is.
        found: usize,
    },
    /// libtorch refused.
    #[error("libtorch: {0}")]
    Torch(#[from] TchError),
    /// The file could not be read.
    #[error("cannot read: {0}")]
    Io(#[from] io::Error),
}

/// The elements of `tensor` in row-major order, whatever its layout and device.
///
/// # Errors
/// When libtorch cannot copy it to the CPU.
pub fn to_bytes(tensor: &Tensor) -> Result<Vec<u8>, TchError> {
    let host = on_host(tensor)?;
    Ok(with_bytes(&host, <[u8]>::to_vec))
}

/// Gives the elements of `tensor` to `read` without a copy where it already is contiguous and on
/// the CPU.
///
/// # Errors
/// When libtorch cannot copy it to the CPU.
pub fn read_bytes<T>(tensor: &Tensor, read: impl FnOnce(&[u8]) -> T) -> Result<T, TchError> {
    let host = on_host(tensor)?;
    Ok(with_bytes(&host, read))
}

/// A CPU tensor with these elements, in memory that libtorch aligned itself (kernels choose their
/// path by alignment, so a tensor over foreign memory could differ in the last bit).
///
/// # Errors
/// [`BytesError::Length`] when the bytes are not exactly those of `shape` and `kind`.
pub fn from_bytes(data: &[u8], shape: &[i64], kind: Kind) -> Result<Tensor, BytesError> {
    let tensor = fresh(data.len(), shape, kind)?;
    fill(&tensor, data);
    Ok(tensor)
}

/// As [`from_bytes`], with the `len` bytes at `offset` of `file`, which are read straight into the
/// tensor. A map of the file would cost a fault for every few of its pages, and count as memory of
/// this process.
///
/// # Errors
/// As [`from_bytes`], and [`BytesError::Io`].
pub(crate) fn from_file(
    file: &File,
    offset: u64,
    len: usize,
    shape: &[i64],
    kind: Kind,
) -> Result<Tensor, BytesError> {
    let tensor = fresh(len, shape, kind)?;
    let read = |at: usize, to: &mut [u8]| file.read_exact_at(to, offset + at as u64);
    fill_with(&tensor, &read)?;
    Ok(tensor)
}

/// Memory for a tensor of this shape and kind, which must take `found` bytes.
fn fresh(found: usize, shape: &[i64], kind: Kind) -> Result<Tensor, BytesError> {
    let count = shape.iter().try_fold(1usize, |n, dim| n.checked_mul(usize::try_from(*dim).ok()?));
    let expected =
        count.and_then(|n| n.checked_mul(kind.elt_size_in_bytes())).unwrap_or(usize::MAX);
    if expected != found {
        return Err(BytesError::Length { shape: shape.to_vec(), kind, expected, found });
    }
    Ok(Tensor::f_empty(shape, (kind, Device::Cpu))?)
}

fn on_host(tensor: &Tensor) -> Result<Tensor, TchError> {
    tensor.f_detach()?.f_to_device(Device::Cpu)?.f_contiguous()
}

fn with_bytes<T>(host: &Tensor, read: impl FnOnce(&[u8]) -> T) -> T {
    let mut len = 0usize;
    // SAFETY: `host` is a live, contiguous CPU tensor (made so by `on_host`).
    let data = unsafe { ffi::duet_cpu_data(ffi::raw(host), &mut len) };
    if data.is_null() || len == 0 {
        return read(&[]);
    }
    // SAFETY: libtorch says that `len` bytes lie at `data`; `host` outlives the slice.
    read(unsafe { std::slice::from_raw_parts(data, len) })
}

/// Sets the elements of a contiguous CPU tensor that only its caller uses meanwhile. `data` is not part
/// of it.
pub(crate) fn fill(fresh: &Tensor, data: &[u8]) {
    let copy = |at: usize, to: &mut [u8]| {
        to.copy_from_slice(&data[at..at + to.len()]);
        Ok::<(), Infallible>(())
    };
    let Ok(()) = fill_with(fresh, &copy);
}

/// As [`fill`], with what `read` writes into each piece of it, told where the piece begins.
fn fill_with<E: Send>(
    fresh: &Tensor,
    read: &(impl Fn(usize, &mut [u8]) -> Result<(), E> + Sync),
) -> Result<(), E> {
    let mut len = 0usize;
    // SAFETY: `fresh` is a live, contiguous CPU tensor that nobody else uses (see above).
    let to = unsafe { ffi::duet_cpu_data(ffi::raw(fresh), &mut len) };
    if to.is_null() || len == 0 {
        return Ok(());
    }
    // SAFETY: libtorch says that `len` bytes lie at `to`; nobody else has the tensor.
    let to = unsafe { std::slice::from_raw_parts_mut(to, len) };
    // First touch costs more than the copy, and several threads share that cost.
    let threads = (tch::get_num_threads().max(1) as usize).min(len.div_ceil(SHARE));
    let share = len.div_ceil(threads);
    let read = |at: usize, to: &mut [u8]| {
        (at..).step_by(CHUNK).zip(to.chunks_mut(CHUNK)).try_for_each(|(at, to)| {
            populate(to);
            read(at, to)
        })
    };
    let read = &read;
    thread::scope(|scope| {
        let mut pieces = to.chunks_mut(share).enumerate();
        let own = pieces.next();
        let others: Vec<_> =
            pieces.map(|(at, to)| scope.spawn(move || read(at * share, to))).collect();
        let mine = own.map_or(Ok(()), |(_, to)| read(0, to));
        others.into_iter().fold(mine, |all, other| match other.join() {
            Ok(one) => all.and(one),
            Err(panic) => std::panic::resume_unwind(panic),
        })
    })
}

/// Asks for the pages of fresh memory at once, which costs less than a fault for each. (Large pages cost
/// still less where they are at hand, and several times more where a virtual machine has given them back
/// to its host.) Linux before 5.14 says no, and nothing changes.
fn populate(fresh: &mut [u8]) {
    const PAGE: usize = 4 << 10;
    let start = fresh.as_mut_ptr() as usize;
    let (first, end) = (start.next_multiple_of(PAGE), (start + fresh.len()) / PAGE * PAGE);
    if first < end {
        // SAFETY: the range lies inside `fresh`; its contents stay as they are.
        unsafe {
            libc::madvise(first as *mut libc::c_void, end - first, libc::MADV_POPULATE_WRITE)
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_survives_whatever_its_layout() {
        for kind in [
            Kind::Uint8,
            Kind::Int64,
            Kind::Float,
            Kind::Double,
            Kind::BFloat16,
            Kind::Half,
            Kind::Bool,
        ] {
            let tensor =
                Tensor::arange(24, (Kind::Float, Device::Cpu)).to_kind(kind).reshape([2, 3, 4]);
            let turned = tensor.permute([2, 0, 1]);
            let bytes = to_bytes(&turned).unwrap();
            assert_eq!(bytes.len(), 24 * kind.elt_size_in_bytes());
            let back = from_bytes(&bytes, &[4, 2, 3], kind).unwrap();
            assert_eq!(back, turned, "{kind:?}");
        }
    }

    #[test]
    fn floats_are_little_endian() {
        let bytes = to_bytes(&Tensor::from_slice(&[1.5f32, -2.0])).unwrap();
        assert_eq!(bytes, [1.5f32.to_le_bytes(), (-2.0f32).to_le_bytes()].concat());
    }

    #[test]
    fn wrong_lengths_are_refused() {
        let error = from_bytes(&[0; 7], &[2], Kind::Float).unwrap_err();
        assert_eq!(error.to_string(), "Float of shape [2] takes 8 bytes, 7 are there");
        assert!(from_bytes(&[], &[i64::MAX, 4], Kind::Float).is_err());
        assert!(from_bytes(&[], &[-1], Kind::Float).is_err());
        assert_eq!(from_bytes(&[], &[0, 3], Kind::Float).unwrap().size(), [0, 3]);
    }
}
