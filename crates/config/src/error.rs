//! What can be wrong with a configuration.

use std::fmt;
use std::path::PathBuf;

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The key, as `section.key`.
    pub key: String,
    /// What is wrong with it, and the fix.
    pub problem: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.key, self.problem)
    }
}

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// It is no TOML.
    #[error("{name} is not TOML: {reason}")]
    Syntax {
        /// The file.
        name: String,
        /// Where and what.
        reason: String,
    },
    /// An override is none.
    #[error("`{text}` overrides nothing: {reason}")]
    Override {
        /// What was given.
        text: String,
        /// Why not, and the fix.
        reason: String,
    },
    /// Keys, types, values or combinations are wrong.
    #[error("{name} cannot be used:{}", list(problems))]
    Invalid {
        /// The file.
        name: String,
        /// All that is wrong, at least one.
        problems: Vec<Problem>,
    },
}

fn list(problems: &[Problem]) -> String {
    problems.iter().map(|problem| format!("\n  {problem}")).collect()
}

/// Collects problems.
#[derive(Debug, Default)]
pub(crate) struct Problems(pub Vec<Problem>);

impl Problems {
    /// Notes a problem.
    pub fn add(&mut self, key: impl Into<String>, problem: impl Into<String>) {
        self.0.push(Problem { key: key.into(), problem: problem.into() });
    }

    /// Notes a problem unless `holds`.
    pub fn check(&mut self, holds: bool, key: &str, problem: impl FnOnce() -> String) {
        if !holds {
            self.add(key, problem());
        }
    }
}

/// What may have been meant, as ` (did you mean ...?)`; empty when nothing is near.
pub(crate) fn did_you_mean<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> String {
    let near = |candidate: &&str| distance(word, candidate) <= 1 + word.len().max(3) / 4;
    let mut known: Vec<&str> = known.into_iter().filter(near).collect();
    known.sort_by_key(|candidate| distance(word, candidate));
    known.first().map(|word| format!("; did you mean `{word}`?")).unwrap_or_default()
}

/// Levenshtein's distance, in bytes.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_words_are_offered_and_far_ones_are_not() {
        assert_eq!(
            did_you_mean("itertions", ["iterations", "seed"]),
            "; did you mean `iterations`?"
        );
        assert_eq!(did_you_mean("sed", ["iterations", "seed"]), "; did you mean `seed`?");
        assert_eq!(did_you_mean("colour", ["iterations", "seed"]), "");
    }
}
