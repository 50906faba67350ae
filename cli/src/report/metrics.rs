//! `metrics.jsonl`: one JSON object per iteration, as the coordinator writes it.

use super::ReportError;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;

/// The numbers of one iteration by their names (`reward/llm`, `rewards/semantic/mean`, ...).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metrics {
    /// The iteration, from zero.
    pub iteration: u32,
    /// When it was committed, in seconds since 1970; zero when the file does not say.
    pub at: f64,
    /// Every finite number of the line.
    pub values: BTreeMap<String, f64>,
}

/// Key of the iteration number.
const ITERATION: &str = "iteration";
/// Key of the moment of commit, in milliseconds since 1970.
const TIME_MS: &str = "time_ms";

/// Reads the file. An iteration that stands in it twice (the run was resumed) counts as it was last
/// written; a last line that was cut off by a crash is passed over.
///
/// # Errors
/// The file is missing, or a line that is not the last is not a JSON object with an `iteration`.
pub fn read(path: &Path) -> Result<Vec<Metrics>, ReportError> {
    let text =
        std::fs::read_to_string(path).map_err(|source| ReportError::io("read", path, source))?;
    let lines: Vec<&str> = text.lines().collect();
    let mut found = BTreeMap::new();
    for (i, line) in lines.iter().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let torn = i + 1 == lines.len() && !text.ends_with('\n');
        match serde_json::from_str::<BTreeMap<String, Value>>(line) {
            Ok(object) => match parse(&object) {
                Some(metrics) => drop(found.insert(metrics.iteration, metrics)),
                None => {
                    return Err(ReportError::NoIteration { path: path.to_owned(), line: i + 1 });
                }
            },
            Err(_) if torn => {}
            Err(source) => {
                return Err(ReportError::Json { path: path.to_owned(), line: i + 1, source });
            }
        }
    }
    Ok(found.into_values().collect())
}

fn parse(object: &BTreeMap<String, Value>) -> Option<Metrics> {
    let iteration = u32::try_from(object.get(ITERATION)?.as_u64()?).ok()?;
    let at = object.get(TIME_MS).and_then(Value::as_f64).map_or(0.0, |ms| ms / 1000.0);
    let values = object
        .iter()
        .filter(|(name, _)| *name != ITERATION && *name != TIME_MS)
        .filter_map(|(name, value)| Some((name.clone(), value.as_f64()?)))
        .filter(|(_, value)| value.is_finite())
        .collect();
    Some(Metrics { iteration, at, values })
}

/// `(iteration, value)` of every iteration that has `name`.
pub fn series(metrics: &[Metrics], name: &str) -> Vec<(f64, f64)> {
    let point = |row: &Metrics| Some((f64::from(row.iteration), *row.values.get(name)?));
    metrics.iter().filter_map(point).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_text(text: &str) -> Result<Vec<Metrics>, ReportError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        std::fs::write(&path, text).unwrap();
        read(&path)
    }

    #[test]
    fn the_last_word_on_an_iteration_counts_and_a_torn_tail_is_passed_over() {
        let text = "{\"iteration\":0,\"reward\":0.1}\n{\"iteration\":1,\"reward\":0.2}\n\
                    {\"iteration\":1,\"reward\":0.3,\"note\":\"x\",\"kl\":null}\n{\"iterat";
        let rows = read_text(text).unwrap();
        assert_eq!(series(&rows, "reward"), [(0.0, 0.1), (1.0, 0.3)]);
        assert_eq!(rows[1].values.len(), 1);
    }

    #[test]
    fn a_broken_line_in_the_middle_is_named() {
        let error = read_text("{\"iteration\":0}\nnot json\n{\"iteration\":2}\n").unwrap_err();
        assert!(error.to_string().contains("line 2"), "{error}");
        let error = read_text("{\"iteration\":0}\n{\"reward\":1}\n").unwrap_err();
        assert!(error.to_string().contains("line 2"), "{error}");
    }
}
