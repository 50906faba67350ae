//! Means over seeds, and how sure they are.

use serde::Serialize;

/// A mean over seeds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Mean {
    /// The mean.
    pub mean: f64,
    /// Its standard error: the sample standard deviation (ddof 1) by the root of the number of seeds.
    /// Absent with one seed.
    pub standard_error: Option<f64>,
    /// How many seeds.
    pub seeds: usize,
}

impl Mean {
    /// The mean of one value of each seed; absent where there is none.
    pub fn of(values: &[f64]) -> Option<Mean> {
        let count = values.len() as f64;
        if values.is_empty() {
            return None;
        }
        let mean = values.iter().sum::<f64>() / count;
        let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (count - 1.0);
        let error = (values.len() > 1).then(|| (variance / count).sqrt());
        Some(Mean { mean, standard_error: error, seeds: values.len() })
    }

    /// As `31.4 ± 2.0`, of 100.
    pub fn percent(&self) -> String {
        match self.standard_error {
            Some(error) => format!("{:.1} ± {:.1}", 100.0 * self.mean, 100.0 * error),
            None => format!("{:.1}", 100.0 * self.mean),
        }
    }
}

/// Whether the paper's order of two rows came out.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Comparison {
    /// The row that the paper has below.
    pub below: String,
    /// The row that it has above.
    pub above: String,
    /// The difference, seed by seed: the seeds' models have the same base.
    pub difference: Mean,
    /// `yes`: above by more than two standard errors; `no`: below by as much; else `within two standard
    /// errors`, or `one seed`.
    pub verdict: &'static str,
}

/// Compares two rows, seed by seed.
pub fn compare(names: (&str, &str), below: &[f64], above: &[f64]) -> Option<Comparison> {
    let differences: Vec<f64> = below.iter().zip(above).map(|(low, high)| high - low).collect();
    let difference = Mean::of(&differences)?;
    let verdict = match difference.standard_error {
        None => "one seed",
        Some(error) if difference.mean > 2.0 * error => "yes",
        Some(error) if difference.mean < -2.0 * error => "no",
        Some(_) => "within two standard errors",
    };
    let (below, above) = (names.0.to_owned(), names.1.to_owned());
    Some(Comparison { below, above, difference, verdict })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_standard_error_is_of_the_sample() {
        let mean = Mean::of(&[1.0, 2.0, 3.0]).unwrap();
        assert_eq!(mean.mean, 2.0);
        assert!((mean.standard_error.unwrap() - (1f64 / 3.0).sqrt()).abs() < 1e-12);
        assert_eq!(Mean::of(&[0.5]).unwrap().standard_error, None);
        assert!(Mean::of(&[]).is_none());
        assert_eq!(Mean::of(&[0.25, 0.35]).unwrap().percent(), "30.0 ± 5.0");
    }

    #[test]
    fn rows_are_compared_seed_by_seed() {
        let verdict = |low: &[f64], high: &[f64]| compare(("a", "b"), low, high).unwrap().verdict;
        // Far apart from seed to seed, but always by the same amount.
        assert_eq!(verdict(&[0.1, 0.5, 0.9], &[0.2, 0.6, 1.01]), "yes");
        assert_eq!(verdict(&[0.2, 0.6, 1.01], &[0.1, 0.5, 0.9]), "no");
        assert_eq!(verdict(&[0.1, 0.2, 0.3], &[0.2, 0.1, 0.35]), "within two standard errors");
        assert_eq!(verdict(&[0.1], &[0.2]), "one seed");
    }
}
