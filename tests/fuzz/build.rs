//! Passes libtorch's folder on as the run path.
fn main() {
    if let Ok(lib) = std::env::var("DEP_DUET_TORCH_LIB") {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{lib}");
    }
}
