//! NCCL and the CUDA driver, loaded at run time: a build needs neither. Declarations follow NVIDIA's
//! `nccl.h` (2.18 and later) and `cuda.h`.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::Path;
use std::sync::OnceLock;

/// A communicator.
pub type Comm = *mut c_void;
/// A stream; null: the one that libtorch computes on.
pub type Stream = *mut c_void;
/// An event.
pub type Event = *mut c_void;

/// `ncclUniqueId`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct UniqueId(pub [u8; 128]);

/// `ncclConfig_t` as of version 2.18; newer libraries read older forms by their size and version.
#[repr(C)]
pub struct Config {
    size: usize,
    magic: u32,
    version: u32,
    blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: *const c_char,
    split_share: c_int,
}

/// "Leave it to the library."
const UNSET: c_int = c_int::MIN;

impl Config {
    /// Calls return at once; what is under way is asked for.
    pub fn non_blocking() -> Config {
        Config {
            size: size_of::<Config>(),
            magic: 0xcafe_beef,
            version: OLDEST as u32,
            blocking: 0,
            cga_cluster_size: UNSET,
            min_ctas: UNSET,
            max_ctas: UNSET,
            net_name: std::ptr::null(),
            split_share: UNSET,
        }
    }
}

/// `ncclSuccess`
pub const SUCCESS: c_int = 0;
/// `ncclInProgress`
pub const IN_PROGRESS: c_int = 7;
/// `ncclSum`
pub const SUM: c_int = 0;
/// The oldest version whose interface this is: 2.18.0.
const OLDEST: c_int = 21800;
/// `CU_STREAM_NON_BLOCKING`
const NON_BLOCKING: u32 = 1;
/// `CU_EVENT_DISABLE_TIMING`
const NO_TIMING: u32 = 2;
/// `CUDA_ERROR_NOT_READY`
const NOT_READY: c_int = 600;

macro_rules! library {
    ($(#[$doc:meta])* $table:ident { $($name:ident = $symbol:literal: fn($($arg:ty),*);)* }) => {
        $(#[$doc])*
        pub struct $table {
            $(pub $name: unsafe extern "C" fn($($arg),*) -> c_int,)*
        }

        impl $table {
            fn load(handle: &Handle) -> Result<$table, String> {
                $(
                    let found = handle.symbol($symbol)?;
                    // SAFETY: the symbol of this name has this type in the headers named above.
                    let $name = unsafe {
                        std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($arg),*) -> c_int>(found)
                    };
                )*
                Ok($table { $($name,)* })
            }
        }
    };
}

library! {
    /// What is used of NCCL.
    Calls {
        version = "ncclGetVersion": fn(*mut c_int);
        unique_id = "ncclGetUniqueId": fn(*mut UniqueId);
        init = "ncclCommInitRankConfig": fn(*mut Comm, c_int, UniqueId, c_int, *mut Config);
        async_error = "ncclCommGetAsyncError": fn(Comm, *mut c_int);
        abort = "ncclCommAbort": fn(Comm);
        all_reduce = "ncclAllReduce": fn(*const c_void, *mut c_void, usize, c_int, c_int, Comm, Stream);
        reduce_scatter = "ncclReduceScatter": fn(*const c_void, *mut c_void, usize, c_int, c_int, Comm, Stream);
        all_gather = "ncclAllGather": fn(*const c_void, *mut c_void, usize, c_int, Comm, Stream);
        broadcast = "ncclBroadcast": fn(*const c_void, *mut c_void, usize, c_int, c_int, Comm, Stream);
    }
}

library! {
    /// What is used of the CUDA driver.
    Driver {
        init = "cuInit": fn(u32);
        device = "cuDeviceGet": fn(*mut c_int, c_int);
        retain = "cuDevicePrimaryCtxRetain": fn(*mut *mut c_void, c_int);
        set_context = "cuCtxSetCurrent": fn(*mut c_void);
        stream = "cuStreamCreate": fn(*mut Stream, u32);
        free_stream = "cuStreamDestroy_v2": fn(Stream);
        stream_wait = "cuStreamWaitEvent": fn(Stream, Event, u32);
        event = "cuEventCreate": fn(*mut Event, u32);
        free_event = "cuEventDestroy_v2": fn(Event);
        record = "cuEventRecord": fn(Event, Stream);
        query = "cuEventQuery": fn(Event);
    }
}

/// Both libraries.
pub struct Library {
    /// NCCL.
    pub nccl: Calls,
    /// The driver.
    pub cuda: Driver,
    /// NCCL's version, such as 22705.
    pub version: c_int,
    text: unsafe extern "C" fn(c_int) -> *const c_char,
}

struct Handle(*mut c_void);

impl Handle {
    fn open(name: &str) -> Result<Handle, String> {
        let file = CString::new(name).map_err(|_| "a name with a NUL".to_owned())?;
        // SAFETY: a valid string; the library stays loaded for the life of the process.
        let handle = unsafe { libc::dlopen(file.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        if handle.is_null() { Err(loader_error()) } else { Ok(Handle(handle)) }
    }

    fn symbol(&self, name: &str) -> Result<*mut c_void, String> {
        let text = CString::new(name).map_err(|_| "a name with a NUL".to_owned())?;
        // SAFETY: a library that is loaded, and a valid string.
        let found = unsafe { libc::dlsym(self.0, text.as_ptr()) };
        if found.is_null() { Err(loader_error()) } else { Ok(found) }
    }
}

fn loader_error() -> String {
    // SAFETY: null, or a valid string of this thread.
    unsafe {
        let text = libc::dlerror();
        match text.is_null() {
            true => "unknown reason".to_owned(),
            false => CStr::from_ptr(text).to_string_lossy().into_owned(),
        }
    }
}

impl Library {
    /// Loads both, once: NCCL as the loader finds it (libtorch_cuda has loaded its own), else from
    /// NVIDIA's wheel beside the libtorch in `folder`.
    ///
    /// # Errors
    /// What is missing.
    pub fn get(folder: &Path) -> Result<&'static Library, String> {
        static ONCE: OnceLock<Result<Library, String>> = OnceLock::new();
        ONCE.get_or_init(|| Library::load(folder)).as_ref().map_err(Clone::clone)
    }

    fn load(folder: &Path) -> Result<Library, String> {
        let cuda = Driver::load(&Handle::open("libcuda.so.1")?)?;
        let wheel = folder.join("../../nvidia/nccl/lib/libnccl.so.2");
        let handle = Handle::open("libnccl.so.2")
            .or_else(|first| Handle::open(&wheel.to_string_lossy()).map_err(|_| first))?;
        let nccl = Calls::load(&handle)?;
        let text = handle.symbol("ncclGetErrorString")?;
        // SAFETY: the symbol has this type.
        let text = unsafe {
            std::mem::transmute::<*mut c_void, unsafe extern "C" fn(c_int) -> *const c_char>(text)
        };
        let mut version = 0;
        // SAFETY: writes one number.
        let status = unsafe { (nccl.version)(&mut version) };
        if status != SUCCESS || version < OLDEST {
            return Err(format!("libnccl.so.2 has version {version}, older than {OLDEST}"));
        }
        // SAFETY: no argument but flags, of which there are none.
        driver("cuInit", unsafe { (cuda.init)(0) })?;
        Ok(Library { nccl, cuda, version, text })
    }

    /// NCCL's words for a status.
    pub fn text(&self, status: c_int) -> String {
        // SAFETY: gives a static string for any number.
        unsafe { CStr::from_ptr((self.text)(status)) }.to_string_lossy().into_owned()
    }

    /// A primary context, the one that libtorch uses.
    pub fn context(&self, device: usize) -> Result<*mut c_void, String> {
        let (mut number, mut context) = (0, std::ptr::null_mut());
        // SAFETY: writes one number.
        driver("cuDeviceGet", unsafe { (self.cuda.device)(&mut number, device as c_int) })?;
        // SAFETY: a device that exists; kept for the life of the process.
        driver("cuDevicePrimaryCtxRetain", unsafe { (self.cuda.retain)(&mut context, number) })?;
        Ok(context)
    }

    /// Makes a context the calling thread's.
    pub fn enter(&self, context: *mut c_void) -> Result<(), String> {
        // SAFETY: a context that is never released.
        driver("cuCtxSetCurrent", unsafe { (self.cuda.set_context)(context) })
    }

    /// A stream that waits for no other.
    pub fn new_stream(&self) -> Result<Stream, String> {
        let mut stream = std::ptr::null_mut();
        // SAFETY: a context is current.
        driver("cuStreamCreate", unsafe { (self.cuda.stream)(&mut stream, NON_BLOCKING) })?;
        Ok(stream)
    }

    /// An event, recorded on a stream.
    pub fn recorded(&self, stream: Stream) -> Result<Event, String> {
        let mut event = std::ptr::null_mut();
        // SAFETY: a context is current.
        driver("cuEventCreate", unsafe { (self.cuda.event)(&mut event, NO_TIMING) })?;
        // SAFETY: a live event and stream.
        driver("cuEventRecord", unsafe { (self.cuda.record)(event, stream) })?;
        Ok(event)
    }

    /// Whether what was on the stream before an event is done.
    pub fn is_over(&self, event: Event) -> Result<bool, String> {
        // SAFETY: a live event.
        match unsafe { (self.cuda.query)(event) } {
            NOT_READY => Ok(false),
            status => driver("cuEventQuery", status).map(|()| true),
        }
    }
}

/// A status of the driver as a result.
pub fn driver(call: &str, status: c_int) -> Result<(), String> {
    if status == 0 { Ok(()) } else { Err(format!("{call} gave error {status}")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_is_laid_out_as_in_the_header() {
        use std::mem::offset_of;
        assert_eq!(size_of::<Config>(), 48);
        assert_eq!(offset_of!(Config, blocking), 16);
        assert_eq!(offset_of!(Config, net_name), 32);
        assert_eq!(offset_of!(Config, split_share), 40);
    }
}
