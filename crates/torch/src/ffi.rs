//! Declarations of `csrc/duet_torch.h`. Nothing outside this crate sees them.

use std::ffi::{CStr, CString, c_char, c_void};

/// An `at::Tensor*`.
pub type DuetTensor = *mut c_void;

/// Computes outputs from inputs: context, inputs, their number, the list that outputs go to.
pub type DuetBody = unsafe extern "C" fn(*mut c_void, *const DuetTensor, usize, *mut c_void) -> i32;

/// Takes a leaf's gradient: context, the leaf's place, the gradient.
pub type DuetReady = unsafe extern "C" fn(*mut c_void, usize, DuetTensor) -> i32;

macro_rules! opaque {
    ($($name:ident),*) => {$(
        #[repr(C)]
        pub struct $name {
            _private: [u8; 0],
        }
    )*};
}
opaque!(DuetStore, DuetGroup, DuetWork, DuetMeter, DuetDecoder);

/// A decoder layer's weights.
#[repr(C)]
pub struct DuetDecodeLayer {
    pub input_norm: DuetTensor,
    pub qkv: DuetTensor,
    pub qkv_bias: DuetTensor,
    pub out: DuetTensor,
    pub post_norm: DuetTensor,
    pub gate: DuetTensor,
    pub up: DuetTensor,
    pub down: DuetTensor,
}

unsafe extern "C" {
    fn duet_last_error() -> *const c_char;

    pub fn duet_store_new(
        host: *const c_char,
        port: u16,
        server: bool,
        timeout_ms: i64,
    ) -> *mut DuetStore;
    pub fn duet_store_port(store: *mut DuetStore) -> i32;
    pub fn duet_store_set(
        store: *mut DuetStore,
        key: *const c_char,
        data: *const u8,
        len: usize,
    ) -> i32;
    pub fn duet_store_has(store: *mut DuetStore, key: *const c_char) -> i32;
    pub fn duet_store_get(
        store: *mut DuetStore,
        key: *const c_char,
        timeout_ms: i64,
        out: *mut u8,
        capacity: usize,
    ) -> i64;
    pub fn duet_store_free(store: *mut DuetStore);

    pub fn duet_group_new(
        store: *mut DuetStore,
        prefix: *const c_char,
        bind_host: *const c_char,
        rank: i32,
        world: i32,
        threads: i32,
        timeout_ms: i64,
    ) -> *mut DuetGroup;
    pub fn duet_group_free(group: *mut DuetGroup);

    pub fn duet_all_reduce(group: *mut DuetGroup, tensor: DuetTensor) -> *mut DuetWork;
    pub fn duet_broadcast(group: *mut DuetGroup, tensor: DuetTensor, root: i32) -> *mut DuetWork;
    pub fn duet_all_gather(
        group: *mut DuetGroup,
        output: DuetTensor,
        input: DuetTensor,
    ) -> *mut DuetWork;
    pub fn duet_barrier(group: *mut DuetGroup, timeout_ms: i64) -> *mut DuetWork;
    pub fn duet_work_wait(work: *mut DuetWork, timeout_ms: i64) -> i32;
    pub fn duet_work_free(work: *mut DuetWork);

    pub fn duet_adamw(
        param: DuetTensor,
        grad: DuetTensor,
        exp_avg: DuetTensor,
        exp_avg_sq: DuetTensor,
        lr: f64,
        beta1: f64,
        beta2: f64,
        eps: f64,
        weight_decay: f64,
        step: i64,
    ) -> i32;

    pub fn duet_list_push(list: *mut c_void, tensor: DuetTensor) -> i32;
    pub fn duet_recompute(
        call: DuetBody,
        drop: unsafe extern "C" fn(*mut c_void),
        context: *mut c_void,
        inputs: *const DuetTensor,
        count: usize,
        leaves: *const DuetTensor,
        leaf_count: usize,
        take: *mut c_void,
        give: unsafe extern "C" fn(*mut c_void, DuetTensor),
    ) -> i32;

    pub fn duet_gelu(x: DuetTensor) -> DuetTensor;

    pub fn duet_panels_linear(
        x: DuetTensor,
        panels: DuetTensor,
        bias: DuetTensor,
        out: i64,
    ) -> DuetTensor;

    pub fn duet_backward(
        loss: DuetTensor,
        leaves: *const DuetTensor,
        count: usize,
        ready: DuetReady,
        context: *mut c_void,
    ) -> i32;

    pub fn duet_decoder_new(
        layers: *const DuetDecodeLayer,
        count: usize,
        table: DuetTensor,
        norm: DuetTensor,
        head: DuetTensor,
        heads: i64,
        kv_heads: i64,
        eps: f64,
    ) -> *mut DuetDecoder;
    pub fn duet_decoder_step(
        decoder: *mut DuetDecoder,
        tokens: *const i64,
        n: usize,
        position: i64,
        keys: *const DuetTensor,
        values: *const DuetTensor,
        count: usize,
        cos: DuetTensor,
        sin: DuetTensor,
        logits: DuetTensor,
    ) -> i32;
    pub fn duet_decoder_free(decoder: *mut DuetDecoder);
    pub fn duet_choose(
        logits: DuetTensor,
        numbers: *const f64,
        n: usize,
        temperature: f64,
        tokens: *mut i64,
    ) -> i32;

    pub fn duet_meter_new() -> *mut DuetMeter;
    pub fn duet_meter_read(meter: *const DuetMeter, now: *mut i64, peak: *mut i64);
    pub fn duet_meter_free(meter: *mut DuetMeter);

    pub fn duet_deterministic(on: bool) -> i32;
    pub fn duet_library_folder(out: *mut c_char, capacity: usize) -> i64;
    pub fn duet_cpu_data(tensor: DuetTensor, bytes: *mut usize) -> *mut u8;
}

/// The reason of the last failed call on this thread.
pub fn last_error() -> String {
    // SAFETY: the shim returns a valid, NUL-terminated string owned by this thread.
    let text = unsafe { CStr::from_ptr(duet_last_error()) };
    let text = text.to_string_lossy();
    // libtorch appends hints on later lines; the first says what happened.
    text.lines().next().unwrap_or_default().trim().to_owned()
}

/// The `at::Tensor*` inside a `tch` tensor. The shim mutates only what its caller owns.
pub fn raw(tensor: &tch::Tensor) -> DuetTensor {
    tensor.as_ptr().cast_mut().cast()
}

/// A C string; bytes after an inner NUL are cut, since no key or host has one.
pub fn text(text: &str) -> CString {
    let clean: Vec<u8> = text.bytes().take_while(|byte| *byte != 0).collect();
    CString::new(clean).unwrap_or_default()
}
