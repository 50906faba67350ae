use super::CollectiveError;
use crate::ffi;
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

/// The key-value store through which the ranks of a group find each other: libtorch's `TCPStore`,
/// served by rank 0.
pub struct Store {
    // One request at a time; the lock is held for as long as one takes.
    inner: Mutex<Handle>,
    address: String,
}

struct Handle(*mut ffi::DuetStore);

// SAFETY: c10d::TCPStore locks around each request and has no thread affinity.
unsafe impl Send for Handle {}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: made by duet_store_new, freed once.
        unsafe { ffi::duet_store_free(self.0) }
    }
}

impl Store {
    /// Serves a store on a free port of `host`, the address under which the other ranks reach
    /// this machine.
    ///
    /// # Errors
    /// [`CollectiveError::Store`] when no port can be opened.
    pub fn serve(host: &str, timeout: Duration) -> Result<Store, CollectiveError> {
        Store::open(host, 0, true, timeout)
    }

    /// Connects to a store at `address` (`host:port`).
    ///
    /// # Errors
    /// [`CollectiveError::Store`] when it is not reached within `timeout`.
    pub fn connect(address: &str, timeout: Duration) -> Result<Store, CollectiveError> {
        let parts =
            address.rsplit_once(':').and_then(|(host, port)| Some((host, port.parse().ok()?)));
        let Some((host, port)) = parts else {
            let reason = "not an address of the form host:port".to_owned();
            return Err(CollectiveError::Store { address: address.to_owned(), reason });
        };
        Store::open(host.trim_matches(['[', ']']), port, false, timeout)
    }

    fn open(
        host: &str,
        port: u16,
        server: bool,
        timeout: Duration,
    ) -> Result<Store, CollectiveError> {
        let name = ffi::text(host);
        // SAFETY: a valid string and numbers; null is checked.
        let raw = unsafe { ffi::duet_store_new(name.as_ptr(), port, server, millis(timeout)) };
        if raw.is_null() {
            let address = format!("{host}:{port}");
            return Err(CollectiveError::Store { address, reason: ffi::last_error() });
        }
        let handle = Handle(raw);
        // SAFETY: a live store.
        let port = unsafe { ffi::duet_store_port(raw) };
        let host = if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
        Ok(Store { inner: Mutex::new(handle), address: format!("{host}:{port}") })
    }

    /// Where it listens: `host:port`.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Sets a key.
    ///
    /// # Errors
    /// [`CollectiveError::Store`] when the server is gone.
    pub fn set(&self, key: &str, value: &[u8]) -> Result<(), CollectiveError> {
        let (handle, key) = (self.lock(), ffi::text(key));
        // SAFETY: a live store; `value` is read only during the call.
        let status =
            unsafe { ffi::duet_store_set(handle.0, key.as_ptr(), value.as_ptr(), value.len()) };
        if status < 0 { Err(self.failed()) } else { Ok(()) }
    }

    /// Whether a key is there, without waiting for it.
    ///
    /// # Errors
    /// [`CollectiveError::Store`] when the server is gone.
    pub fn has(&self, key: &str) -> Result<bool, CollectiveError> {
        let (handle, key) = (self.lock(), ffi::text(key));
        // SAFETY: a live store.
        let status = unsafe { ffi::duet_store_has(handle.0, key.as_ptr()) };
        if status < 0 { Err(self.failed()) } else { Ok(status == 1) }
    }

    /// Waits for a key and gives its value.
    ///
    /// # Errors
    /// [`CollectiveError::Store`] when it is not there within `timeout` or the server is gone.
    pub fn get(&self, key: &str, timeout: Duration) -> Result<Vec<u8>, CollectiveError> {
        let (handle, key) = (self.lock(), ffi::text(key));
        let mut value = vec![0u8; 64 << 10];
        // SAFETY: a live store; at most `len` bytes are written.
        let len = unsafe {
            let out = value.as_mut_ptr();
            ffi::duet_store_get(handle.0, key.as_ptr(), millis(timeout), out, value.len())
        };
        let len = usize::try_from(len).map_err(|_| self.failed())?;
        value.truncate(len);
        Ok(value)
    }

    /// Gives the raw store to `body`, alone.
    pub(super) fn with_raw<T>(&self, body: impl FnOnce(*mut ffi::DuetStore) -> T) -> T {
        body(self.lock().0)
    }

    fn lock(&self) -> MutexGuard<'_, Handle> {
        self.inner.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn failed(&self) -> CollectiveError {
        CollectiveError::Store { address: self.address.clone(), reason: ffi::last_error() }
    }
}

pub(super) fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}
