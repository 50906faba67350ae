//! Compiles the C++ shim against libtorch and tells dependents where libtorch lies.
//!
//! A crate that links a program or a test with libtorch reads `DEP_DUET_TORCH_LIB` in its own build
//! script and passes it on as the run path.

use std::path::PathBuf;
use std::{env, process};

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
    cc::Build::new()
        .cpp(true)
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
            "csrc/backward.cpp",
            "csrc/error.cpp",
            "csrc/collective.cpp",
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
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", lib.display());
    println!("cargo:lib={}", lib.display());
}
