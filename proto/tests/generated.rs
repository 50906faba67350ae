//! The generated code that is checked in is what the `.proto` files give.
//!
//! `DUET_REGENERATE=1 cargo test -p duet-proto --test generated` rewrites it.

use std::path::Path;

const FILES: [&str; 3] = ["duet/v1/worker.proto", "duet/v1/status.proto", "duet/v1/control.proto"];

/// (file name, bytes) of everything that is generated.
fn generate() -> Vec<(&'static str, Vec<u8>)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("proto");
    let mut compiler = protox::Compiler::new([&root]).expect("the proto folder opens");
    compiler.include_imports(true).include_source_info(true);
    compiler.open_files(FILES).expect("the proto files compile");
    let with_comments = compiler.file_descriptor_set();

    let out = tempfile::tempdir().expect("a temporary folder");
    tonic_prost_build::configure()
        .build_client(true)
        .build_server(true)
        .out_dir(out.path())
        .compile_fds(with_comments)
        .expect("code is generated");
    let code = std::fs::read(out.path().join("duet.v1.rs")).expect("the generated file is there");

    vec![("duet.v1.rs", code), ("duet.bin", compiler.encode_file_descriptor_set())]
}

#[test]
fn checked_in_code_is_current() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/gen");
    let rewrite = std::env::var_os("DUET_REGENERATE").is_some_and(|value| value == "1");
    for (name, fresh) in generate() {
        let path = folder.join(name);
        if rewrite {
            std::fs::write(&path, &fresh).expect("generated code is written");
        }
        let kept = std::fs::read(&path).unwrap_or_default();
        assert!(
            kept == fresh,
            "src/gen/{name} is not what the .proto files give: run `DUET_REGENERATE=1 cargo test \
             -p duet-proto --test generated` and commit the result"
        );
    }
}
