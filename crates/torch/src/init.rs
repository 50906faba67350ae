//! Process-wide set-up of libtorch, once, before the first tensor.

use crate::ffi;
use std::ffi::CString;
use std::path::PathBuf;
use std::sync::OnceLock;

/// What this process found.
#[derive(Clone, Debug)]
pub struct Runtime {
    /// The folder libtorch was loaded from.
    pub library: PathBuf,
    /// GPUs that can be used, numbered from 0.
    pub gpus: u32,
    /// Threads of one operation.
    pub threads: u32,
}

/// libtorch could not be set up.
#[derive(Clone, Debug, thiserror::Error)]
pub enum InitError {
    /// libtorch itself refused.
    #[error("cannot set up libtorch: {0}")]
    Libtorch(String),
    /// A CUDA build is there but cannot be loaded.
    #[error(
        "cannot load {path}: {reason}; install the CUDA libraries that this PyTorch was built for"
    )]
    Cuda {
        /// The library.
        path: PathBuf,
        /// The loader's words.
        reason: String,
    },
}

/// Sets libtorch up for this process: `threads` threads per operation, one operation at a time,
/// deterministic algorithms only, denormals kept (PyTorch's default, so that results can be
/// compared with its), `libtorch_cuda` loaded where it lies beside `libtorch_cpu`.
///
/// The first call decides; later ones return what it found. Bit-identity is claimed for equal
/// `threads`, since a reduction is split over them.
///
/// # Errors
/// [`InitError`] when libtorch refuses or a CUDA build cannot be loaded.
pub fn init(threads: u32) -> Result<Runtime, InitError> {
    static ONCE: OnceLock<Result<Runtime, InitError>> = OnceLock::new();
    ONCE.get_or_init(|| first(threads.max(1))).clone()
}

/// Bytes of freed memory that the process keeps for the next tensors.
#[cfg(target_env = "gnu")]
const KEPT: i32 = 512 << 20;

/// libtorch has no allocator of its own on the CPU: each tensor is a `malloc`. By default, glibc gives
/// the memory of large tensors back to the system at once, and takes it page by page again for the
/// next operation. One arena, because threads that are not the first would otherwise get memory
/// in pieces of 64 MiB that are given back as soon as they are empty.
fn keep_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: numbers only; a value that is refused changes nothing.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_MMAP_THRESHOLD, 32 << 20);
        libc::mallopt(libc::M_TRIM_THRESHOLD, KEPT);
    }
}

fn first(threads: u32) -> Result<Runtime, InitError> {
    keep_memory();
    tch::set_num_threads(i32::try_from(threads).unwrap_or(i32::MAX));
    tch::set_num_interop_threads(1);
    // SAFETY: no arguments beyond a flag.
    if unsafe { ffi::duet_deterministic(true) } < 0 {
        return Err(InitError::Libtorch(ffi::last_error()));
    }
    let library = library_folder()?;
    load_cuda(&library)?;
    let gpus = if tch::Cuda::is_available() { tch::Cuda::device_count() } else { 0 };
    Ok(Runtime { library, gpus: u32::try_from(gpus).unwrap_or(0), threads })
}

fn library_folder() -> Result<PathBuf, InitError> {
    let mut buffer = vec![0u8; 4096];
    // SAFETY: the shim writes at most `len` bytes into the buffer.
    let len = unsafe { ffi::duet_library_folder(buffer.as_mut_ptr().cast(), buffer.len()) };
    let len = usize::try_from(len).map_err(|_| InitError::Libtorch(ffi::last_error()))?;
    buffer.truncate(len);
    Ok(PathBuf::from(String::from_utf8_lossy(&buffer).into_owned()))
}

/// Nothing in this program refers to a symbol of libtorch_cuda, so the linker leaves it out; its
/// kernels register themselves when it is loaded.
fn load_cuda(folder: &std::path::Path) -> Result<(), InitError> {
    let path = folder.join("libtorch_cuda.so");
    if !path.exists() {
        return Ok(());
    }
    let name = CString::new(path.to_string_lossy().as_bytes()).unwrap_or_default();
    // SAFETY: a valid path; the library stays loaded for the life of the process.
    let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
    if !handle.is_null() {
        return Ok(());
    }
    // SAFETY: dlerror returns null or a valid string for this thread.
    let reason = unsafe {
        let text = libc::dlerror();
        if text.is_null() {
            "unknown reason".to_owned()
        } else {
            std::ffi::CStr::from_ptr(text).to_string_lossy().into_owned()
        }
    };
    Err(InitError::Cuda { path, reason })
}
