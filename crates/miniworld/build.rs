//! Tells the tests of this crate where libtorch lies.

fn main() {
    if let Ok(lib) = std::env::var("DEP_DUET_TORCH_LIB") {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{lib}");
    }
}
