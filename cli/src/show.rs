//! Small pieces of terminal output: colour, times, configuration, storage.

use crate::CliError;
use crate::args::{ConfigArgs, DigestArgs};
use std::io::IsTerminal;

/// Whether errors and progress may be coloured.
pub fn colour() -> bool {
    std::env::var_os("NO_COLOR").is_none() && std::io::stderr().is_terminal()
}

fn painted(code: &str, text: &str) -> String {
    if colour() { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
}

/// Bold red, for errors.
pub fn red(text: &str) -> String {
    painted("1;31", text)
}

/// Bold, for headings.
pub fn bold(text: &str) -> String {
    painted("1", text)
}

/// Dim, for what matters less.
pub fn dim(text: &str) -> String {
    painted("2", text)
}

/// `75` is `1 min 15 s`.
pub fn span(seconds: f64) -> String {
    let whole = seconds.max(0.0).round() as u64;
    match (whole / 3600, whole / 60 % 60, whole % 60) {
        (0, 0, s) => format!("{s} s"),
        (0, m, s) => format!("{m} min {s:02} s"),
        (h, m, _) => format!("{h} h {m:02} min"),
    }
}

/// `1536` is `1.5 KiB`.
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    let (mut value, mut unit) = (bytes as f64, "B");
    for next in UNITS {
        if value < 1024.0 {
            break;
        }
        (value, unit) = (value / 1024.0, next);
    }
    if unit == "B" { format!("{bytes} B") } else { format!("{value:.1} {unit}") }
}

/// `duet config`: checks a configuration and prints all of it.
///
/// # Errors
/// The configuration is wrong.
pub fn config(args: &ConfigArgs) -> Result<(), CliError> {
    print!("{}", crate::launch::load(&args.config, &args.set)?.to_toml());
    Ok(())
}

/// `duet digest`: the hash of a folder's hashes; with `--write` these go into the folder.
///
/// # Errors
/// A file cannot be read, or the list not be written.
pub fn digest(args: &DigestArgs) -> Result<(), CliError> {
    let sums = duet_store::folder::Sums::of(&args.folder)?;
    if args.write {
        sums.write(&args.folder)?;
    }
    println!("{}", sums.digest());
    Ok(())
}

/// `duet doctor storage`: what a store can be trusted with.
///
/// # Errors
/// The store cannot be opened.
pub async fn storage(url: &str) -> Result<u8, CliError> {
    let usage = |error: duet_store::StoreError| CliError::Usage(error.to_string());
    let store = duet_store::Store::open(url).map_err(usage)?;
    let report = duet_store::doctor::probe(&store).await.map_err(usage)?;
    println!("{report}");
    Ok(u8::from(!report.is_fit()))
}

#[cfg(test)]
mod tests {
    #[test]
    fn spans_are_for_people() {
        assert_eq!(super::span(4.6), "5 s");
        assert_eq!(super::span(75.0), "1 min 15 s");
        assert_eq!(super::span(7260.0), "2 h 01 min");
    }

    #[test]
    fn sizes_are_for_people() {
        assert_eq!(super::size(1023), "1023 B");
        assert_eq!(super::size(1536), "1.5 KiB");
        assert_eq!(super::size(3 << 30), "3.0 GiB");
    }
}
