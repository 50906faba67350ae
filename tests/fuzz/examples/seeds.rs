//! Writes the examples of each decoder as files, from which libFuzzer starts.
#![forbid(unsafe_code)]

use std::path::PathBuf;

fn main() -> std::io::Result<()> {
    let to = PathBuf::from(std::env::args_os().nth(1).unwrap_or_else(|| "corpus".into()));
    for target in &duet_fuzz::TARGETS {
        let folder = to.join(target.name);
        std::fs::create_dir_all(&folder)?;
        for (index, seed) in (target.seeds)().iter().enumerate() {
            std::fs::write(folder.join(format!("example-{index}")), seed)?;
        }
        println!("{}", target.name);
    }
    Ok(())
}
