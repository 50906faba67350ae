//! Compiles the C++ shim against libtorch and tells dependents where libtorch lies.
//!
//! A crate that links a program or a test with libtorch reads `DEP_DUET_TORCH_LIB` in its own build
//! script and passes it on as the run path.

use std::path::{Path, PathBuf};
use std::{env, fs, process};

fn main() {
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    for path in ["csrc", "third_party", "build.rs"] {
        println!("cargo:rerun-if-changed={path}");
    }
    let Some(libtorch) = env::var_os("LIBTORCH").map(PathBuf::from) else {
        eprintln!("LIBTORCH is not set: run `make setup`");
        process::exit(1);
    };
    let include = libtorch.join("include");
    if !include.join("torch/csrc/distributed/c10d/ProcessGroupGloo.hpp").exists() {
        eprintln!("{} holds no libtorch: run `make setup`", libtorch.display());
        process::exit(1);
    }
    let lib = libtorch.join("lib");
    let threads = openmp(&lib);
    let mut shim = cc::Build::new();
    if threads.is_some() {
        // Makes `at::parallel_for` use libtorch's own threads.
        shim.flag("-fopenmp");
    }
    shim.cpp(true)
        .opt_level(3)
        .flag("-Wno-psabi")
        .pic(true)
        .std("c++17")
        .define("USE_C10D_GLOO", None)
        .define("GLOG_USE_GLOG_EXPORT", None)
        .include("csrc")
        .flag("-isystem")
        .flag("third_party/gloo")
        .flag("-isystem")
        .flag(&include)
        .flag("-isystem")
        .flag(include.join("torch/csrc/api/include"))
        .files([
            "csrc/activation.cpp",
            "csrc/backward.cpp",
            "csrc/error.cpp",
            "csrc/collective.cpp",
            "csrc/decode.cpp",
            "csrc/linear.cpp",
            "csrc/memory.cpp",
            "csrc/optim.cpp",
            "csrc/recompute.cpp",
            "csrc/runtime.cpp",
        ])
        .compile("duet_torch_shim");

    println!("cargo:rustc-link-search=native={}", lib.display());
    for name in ["torch_cpu", "c10"] {
        println!("cargo:rustc-link-lib={name}");
    }
    if let Some(name) = threads {
        println!("cargo:rustc-link-lib=dylib:+verbatim={name}");
    }
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", lib.display());
    println!("cargo:lib={}", lib.display());
}

/// The OpenMP library that lies beside libtorch and that libtorch uses. The system's own would start
/// a second set of threads.
fn openmp(lib: &Path) -> Option<String> {
    let names =
        fs::read_dir(lib).ok()?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    names.filter(|name| name.starts_with("libgomp") && name.contains(".so")).min()
}
