//! How much memory tensors take: counted by libtorch's allocator, not read off the process.

use crate::ffi;
use std::marker::PhantomData;
use tch::TchError;

/// Counts what this thread allocates for tensors while it lives, and what of that is freed again.
///
/// Meant for CPU tensors, whose backward pass runs on the thread that asks for it.
pub struct Meter {
    raw: *mut ffi::DuetMeter,
    /// Belongs to the thread that made it.
    _thread: PhantomData<*const ()>,
}

/// Bytes of tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bytes {
    /// Held now.
    pub now: i64,
    /// Held at most, at one moment.
    pub peak: i64,
}

impl Meter {
    /// Starts to count.
    ///
    /// # Errors
    /// libtorch refuses.
    pub fn start() -> Result<Meter, TchError> {
        // SAFETY: no arguments.
        let raw = unsafe { ffi::duet_meter_new() };
        if raw.is_null() {
            return Err(TchError::Torch(ffi::last_error()));
        }
        Ok(Meter { raw, _thread: PhantomData })
    }

    /// What was counted so far.
    pub fn read(&self) -> Bytes {
        let mut bytes = Bytes { now: 0, peak: 0 };
        // SAFETY: the meter lives, and so do both numbers.
        unsafe { ffi::duet_meter_read(self.raw, &raw mut bytes.now, &raw mut bytes.peak) };
        bytes
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        // SAFETY: made by `duet_meter_new` on this thread, freed once.
        unsafe { ffi::duet_meter_free(self.raw) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind, Tensor};

    #[test]
    fn a_meter_counts_what_lives_and_what_lived() {
        let before = Tensor::zeros([1024], (Kind::Float, Device::Cpu));
        let meter = Meter::start().unwrap();
        let kept = Tensor::zeros([256], (Kind::Float, Device::Cpu));
        drop(Tensor::zeros([512], (Kind::Float, Device::Cpu)));
        assert_eq!(meter.read(), Bytes { now: 1024, peak: 1024 + 2048 });
        drop(kept);
        assert_eq!(meter.read().now, 0);
        drop(before);
    }
}
