//! The files of `configs/`: those that must work do, those that must not are refused for the reason
//! that they state.

use duet_config::Config;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

fn files(folder: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs").join(folder);
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "toml"));
    files.sort();
    files
}

#[test]
fn every_shipped_file_is_valid_and_survives_being_printed() {
    let shipped = files("");
    assert!(shipped.len() >= 4, "{shipped:?}");
    for path in shipped {
        let config = Config::load(&path, &BTreeMap::new(), &[]).unwrap_or_else(|e| panic!("{e}"));
        let spec = config.run_spec();
        spec.check(100_000).unwrap();
        let printed = config.to_toml();
        let again = Config::from_text("printed", &printed, &BTreeMap::new(), &[]);
        let again = again.unwrap_or_else(|e| panic!("{}: {e}\n{printed}", path.display()));
        assert_eq!(again, config, "{}", path.display());
        assert_eq!(again.digest(), config.digest());
    }
}

#[test]
fn every_invalid_file_is_refused_with_the_error_that_it_states() {
    let invalid = files("invalid");
    assert!(invalid.len() >= 40, "{} files", invalid.len());
    let mut wrong = Vec::new();
    for path in invalid {
        let text = std::fs::read_to_string(&path).unwrap();
        let first = text.lines().next().unwrap_or_default();
        let expected = first.strip_prefix("# error: ").expect("the first line states the error");
        match Config::load(&path, &BTreeMap::new(), &[]) {
            Ok(_) => wrong.push(format!("{}: accepted", path.display())),
            Err(error) => {
                let said = error.to_string();
                if !said.contains(expected) {
                    wrong
                        .push(format!("{}:\n  must say {expected}\n  says {said}", path.display()));
                }
                assert!(said.contains("invalid/"), "the file is named: {said}");
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
