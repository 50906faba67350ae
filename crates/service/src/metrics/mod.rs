//! Numbers for Prometheus: a table of names, the values, and `/metrics`.

mod serve;
pub mod table;

pub use serve::{Scraped, ServeError, bind};
pub use table::{Kind, Metric};

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::{Family, MetricConstructor};
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// What a scrape is answered with: the format of OpenMetrics, which Prometheus asks for.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// A millisecond to an hour: from an append to a step.
const BUCKETS: [f64; 16] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0,
    3600.0,
];

type Labels = Vec<(String, String)>;

/// Builds histograms with the buckets of this crate.
#[derive(Clone, Copy)]
struct Seconds;

impl MetricConstructor<Histogram> for Seconds {
    fn new_metric(&self) -> Histogram {
        Histogram::new(BUCKETS)
    }
}

#[derive(Clone)]
enum Instrument {
    Counter(Family<Labels, Counter<f64, AtomicU64>>),
    Gauge(Family<Labels, Gauge<f64, AtomicU64>>),
    Histogram(Family<Labels, Histogram, Seconds>),
}

/// The metrics of one process. Cheap to clone.
#[derive(Clone)]
pub struct Metrics {
    registry: Arc<Registry>,
    instruments: Arc<BTreeMap<&'static str, Instrument>>,
}

impl Metrics {
    /// Those of a coordinator or of a worker, without values.
    pub fn new(place: table::Place) -> Metrics {
        let mut registry = Registry::default();
        let mut instruments = BTreeMap::new();
        for metric in table::ALL.iter().filter(|metric| metric.place == place) {
            // The format puts the end of counters' names itself.
            let name = metric.name.strip_suffix("_total").unwrap_or(metric.name);
            let instrument = match metric.kind {
                Kind::Counter => {
                    let family = Family::default();
                    registry.register(name, metric.help, family.clone());
                    Instrument::Counter(family)
                }
                Kind::Gauge => {
                    let family = Family::default();
                    registry.register(name, metric.help, family.clone());
                    Instrument::Gauge(family)
                }
                Kind::Histogram => {
                    let family = Family::new_with_constructor(Seconds);
                    registry.register(name, metric.help, family.clone());
                    Instrument::Histogram(family)
                }
            };
            instruments.insert(metric.name, instrument);
        }
        Metrics { registry: Arc::new(registry), instruments: Arc::new(instruments) }
    }

    /// Gives a gauge its value, or a counter that is counted elsewhere its count.
    pub fn set(&self, metric: &Metric, values: &[&str], value: f64) {
        match self.instruments.get(metric.name) {
            Some(Instrument::Gauge(family)) => {
                family.get_or_create(&labels(metric, values)).set(value);
            }
            Some(Instrument::Counter(family)) => {
                let counter = family.get_or_create(&labels(metric, values));
                counter.inner().store(value.to_bits(), Ordering::Relaxed);
            }
            _ => {}
        }
    }

    /// Adds to a counter.
    pub fn add(&self, metric: &Metric, values: &[&str], by: f64) {
        if let Some(Instrument::Counter(family)) = self.instruments.get(metric.name) {
            family.get_or_create(&labels(metric, values)).inc_by(by);
        }
    }

    /// Puts an observation into a histogram.
    pub fn observe(&self, metric: &Metric, values: &[&str], took: Duration) {
        if let Some(Instrument::Histogram(family)) = self.instruments.get(metric.name) {
            family.get_or_create(&labels(metric, values)).observe(took.as_secs_f64());
        }
    }

    /// Forgets all values of a gauge, before those that hold now are set.
    pub fn clear(&self, metric: &Metric) {
        if let Some(Instrument::Gauge(family)) = self.instruments.get(metric.name) {
            family.clear();
        }
    }

    /// All values, as [`CONTENT_TYPE`] says.
    pub fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = encode(&mut text, &self.registry);
        text
    }
}

fn labels(metric: &Metric, values: &[&str]) -> Labels {
    debug_assert_eq!(metric.labels.len(), values.len(), "{}", metric.name);
    let pairs = metric.labels.iter().zip(values);
    pairs.map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

#[cfg(test)]
mod tests {
    use super::table::{ALL, Place};
    use super::*;

    #[test]
    fn names_follow_the_conventions_and_stand_once() {
        let mut seen = std::collections::BTreeSet::new();
        for metric in ALL {
            let name = metric.name;
            assert!(seen.insert(name), "{name} stands twice");
            let plain = |c: char| c.is_ascii_lowercase() || c == '_';
            assert!(name.starts_with("duet_") && name.chars().all(plain), "{name}");
            assert_eq!(name.ends_with("_total"), metric.kind == Kind::Counter, "{name}");
            assert!(metric.kind != Kind::Histogram || name.ends_with("_seconds"), "{name}");
            assert!(!metric.help.ends_with('.') && !metric.help.contains('|'), "{name}");
            let personal = |label: &&str| matches!(*label, "worker" | "prompt" | "tree");
            assert!(
                metric.kind == Kind::Gauge || !metric.labels.iter().any(personal),
                "{name}: a series for each worker would be too many"
            );
        }
    }

    #[test]
    fn every_metric_can_be_given_a_value_and_is_then_shown_under_its_name() {
        for place in [Place::Coordinator, Place::Worker] {
            let metrics = Metrics::new(place);
            for metric in ALL.iter().filter(|metric| metric.place == place) {
                let values: Vec<&str> = metric.labels.iter().map(|_| "a \"b\"\n").collect();
                match metric.kind {
                    Kind::Counter => metrics.add(metric, &values, 2.0),
                    Kind::Gauge => metrics.set(metric, &values, 2.0),
                    Kind::Histogram => metrics.observe(metric, &values, Duration::from_millis(20)),
                }
            }
            let text = metrics.text();
            for metric in ALL {
                let shown = text.lines().any(|line| {
                    let rest = line.strip_prefix(metric.name).unwrap_or_default();
                    rest.starts_with(['{', ' ']) || rest.starts_with("_count")
                });
                assert_eq!(shown, metric.place == place, "{}\n{text}", metric.name);
            }
            assert!(text.ends_with("# EOF\n"));
            assert!(!text.contains("a \"b\""), "labels are escaped");
        }
    }

    #[test]
    fn gauges_that_no_longer_hold_are_forgotten() {
        let metrics = Metrics::new(Place::Coordinator);
        metrics.set(&table::WORKERS, &["rollout", "idle"], 2.0);
        metrics.clear(&table::WORKERS);
        metrics.set(&table::WORKERS, &["rollout", "busy"], 2.0);
        let text = metrics.text();
        assert!(text.contains("state=\"busy\"") && !text.contains("state=\"idle\""), "{text}");
    }

    #[test]
    fn the_page_in_the_documentation_is_this_table() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/metrics.md");
        let written = std::fs::read_to_string(path).unwrap_or_default();
        assert!(
            written == table::page(),
            "run `cargo run -p duet-service --example metrics > docs/metrics.md`"
        );
    }

    /// Names that a text mentions, as they stand in the table.
    fn mentioned(text: &str) -> impl Iterator<Item = &str> {
        let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let words = text.split(move |c| !word(c)).filter(|word| word.starts_with("duet_"));
        words.map(|word| {
            let series = ["_bucket", "_sum", "_count"];
            series.iter().find_map(|end| word.strip_suffix(end)).unwrap_or(word)
        })
    }

    #[test]
    fn every_query_of_the_dashboard_asks_for_a_metric_of_the_table() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../deploy/grafana/duet.json");
        let text = std::fs::read_to_string(path).unwrap();
        let board: serde_json::Value = serde_json::from_str(&text).unwrap();
        let panels = board["panels"].as_array().unwrap();
        let mut asked = std::collections::BTreeSet::new();
        for panel in panels.iter().filter(|panel| panel["type"] != "row") {
            for target in panel["targets"].as_array().unwrap() {
                let query = target["expr"].as_str().unwrap();
                let names: Vec<&str> = mentioned(query).collect();
                assert!(!names.is_empty(), "{query}");
                for name in names {
                    let metric = ALL.iter().find(|metric| metric.name == name);
                    let metric = metric.unwrap_or_else(|| panic!("{name} in `{query}`"));
                    assert_eq!(metric.kind == Kind::Histogram, query.contains(&format!("{name}_")));
                    asked.insert(name.to_owned());
                }
            }
        }
        let left = ALL.iter().filter(|m| m.place == Place::Coordinator && !asked.contains(m.name));
        let left: Vec<&str> = left.map(|metric| metric.name).collect();
        // The variable of the dashboard, incarnations, a number beside its age.
        let told = [
            "duet_run_info",
            "duet_coordinator_generation",
            "duet_trainer_epoch",
            "duet_leases_granted_total",
            "duet_journal_records_total",
            "duet_checkpoint_bytes",
            "duet_checkpoint_version",
        ];
        assert_eq!(left, told);
    }
}
