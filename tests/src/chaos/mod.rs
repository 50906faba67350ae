//! Scenarios of failure, each against one undisturbed run: the run must end, its audit must show each
//! tree exactly once, and the weights must be the same bit for bit.

mod launched;
mod objects;
mod storage;
mod supervised;

use crate::{Run, bin, text, wait_until};
use duet_store::journal::segments_in;
use serde_json::Value;
use std::fs::DirEntry;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// Overrides of every run here, disturbed or not: silence is noticed sooner, and the journal stays
/// whole for the audit.
pub const SET: [&str; 2] =
    ["coordinator.heartbeat_timeout_ms=3000", "checkpoint.keep_journal=true"];

/// What a scenario does to a run until it has ended; what it found on the way.
type Attack = fn(&World) -> Result<String, Skip>;

/// A scenario cannot be played here, and why.
pub struct Skip(pub String);

/// A scenario.
pub struct Scenario {
    /// Its name.
    pub name: &'static str,
    /// What happens, for the table.
    pub what: &'static str,
    attack: Attack,
    /// What the audit must show besides: that the blow was felt.
    felt: fn(&Value) -> bool,
}

/// A run to be attacked.
pub struct World<'a> {
    /// The run.
    pub run: Run,
    /// Its folder.
    pub folder: &'a Path,
    /// Chooses the moment.
    seed: u64,
}

/// How a scenario went.
pub struct Result_ {
    /// The scenario.
    pub scenario: &'static Scenario,
    /// A remark, or why it was skipped.
    pub note: String,
    /// Whether it was played.
    pub played: bool,
    /// The audit.
    pub audit: Value,
    /// Whether the audit finds nothing wrong.
    pub clean: bool,
    /// Whether the weights are those of the undisturbed run.
    pub equal: bool,
    /// Whether the blow shows.
    pub felt: bool,
    /// How long it took.
    pub seconds: f64,
}

impl Result_ {
    /// Whether nothing is to complain about.
    pub fn passed(&self) -> bool {
        !self.played || self.clean && self.equal && self.felt
    }
}

/// All scenarios.
pub fn scenarios() -> impl Iterator<Item = &'static Scenario> {
    let first = launched::SCENARIOS.iter().chain(supervised::SCENARIOS);
    first.chain(storage::SCENARIOS).chain(objects::SCENARIOS)
}

/// The undisturbed run: version and digest of its weights, and its journal's length.
fn undisturbed() -> &'static (u64, String, u64) {
    static ONCE: OnceLock<(u64, String, u64)> = OnceLock::new();
    ONCE.get_or_init(|| {
        let folder = tempfile::tempdir().expect("a folder");
        let run = Run::new(folder.path(), &SET);
        let out = run.finish(false);
        assert!(out.status.success(), "{}", text(&out));
        let audit = audit(&run);
        assert_eq!(audit["violations"], Value::Array(Vec::new()), "{audit}");
        assert_eq!(audit["coordinators"], 1);
        let (version, digest) = run.digest();
        (version, digest, segments(&run))
    })
}

/// Plays a scenario.
///
/// # Panics
/// When the run does not come to its end.
pub fn play(scenario: &'static Scenario, seed: u64) -> Result_ {
    let (version, digest, _) = undisturbed();
    let began = Instant::now();
    let folder = tempfile::tempdir().expect("a folder");
    let run = Run::new(folder.path(), &SET);
    let world = World { run, folder: folder.path(), seed: mix(seed, scenario.name) };
    let mut result = Result_ {
        scenario,
        note: String::new(),
        played: true,
        audit: Value::Null,
        clean: false,
        equal: false,
        felt: false,
        seconds: 0.0,
    };
    match (scenario.attack)(&world) {
        Ok(note) => {
            result.note = note;
            result.audit = audit(&world.run);
            let wrong = result.audit["violations"].as_array();
            result.clean = wrong.is_some_and(Vec::is_empty);
            result.felt = (scenario.felt)(&result.audit);
            result.equal = world.run.digest() == (*version, digest.clone());
        }
        Err(Skip(why)) => (result.played, result.note) = (false, why),
    }
    storage::unmount(&world);
    result.seconds = began.elapsed().as_secs_f64();
    result
}

/// What `duet audit` says of a run.
///
/// # Panics
/// When it says nothing.
pub fn audit(run: &Run) -> Value {
    let out = run.program("duet").args(["audit", "--json"]).arg(&run.store).output();
    let out = out.expect("duet starts");
    serde_json::from_slice(&out.stdout).unwrap_or_else(|_| panic!("no audit: {}", text(&out)))
}

/// What `duet status` says of a run; `None` when nobody answers.
pub fn status(address: &str) -> Option<Value> {
    let out = std::process::Command::new(bin("duet")).args(["status", "--json", address]).output();
    serde_json::from_slice(&out.ok()?.stdout).ok()
}

/// How many failures of a kind a status counts.
fn failures(status: Option<Value>, kind: &str) -> u64 {
    status.and_then(|status| status["failures"][kind].as_u64()).unwrap_or(0)
}

/// The newest journal segment's number.
fn segments(run: &Run) -> u64 {
    newest(run).map_or(0, |(_, _, last)| last)
}

/// The files of the journal's segments, each with the number of its first one, in order.
fn files(run: &Run) -> Vec<(u64, PathBuf)> {
    let entries = std::fs::read_dir(run.store.join("journal/segments")).into_iter().flatten();
    let named = |entry: DirEntry| Some((entry.file_name().to_str()?.parse().ok()?, entry.path()));
    let mut files: Vec<(u64, PathBuf)> = entries.flatten().filter_map(named).collect();
    files.sort();
    files
}

/// The newest file of journal segments, what it holds, and its last segment's number.
fn newest(run: &Run) -> Option<(PathBuf, Vec<u8>, u64)> {
    let (first, path) = files(run).pop()?;
    let bytes = std::fs::read(&path).ok()?;
    // None is whole while the first is being written.
    let last = segments_in(&bytes, first).last().map_or(first - 1, |(number, _)| *number);
    Some((path, bytes, last))
}

impl World<'_> {
    /// A moment, as a number of journal segments: somewhere between a sixth and a half of the
    /// undisturbed run's, the later the more blows fell before.
    fn moment(&self, blow: u64) -> u64 {
        let whole = undisturbed().2;
        let (first, span) = (whole / 6, (whole / 3).max(1));
        first + mix(self.seed, &blow.to_string()) % span + blow * whole / 8
    }

    /// Waits for a moment of a launched run.
    ///
    /// # Panics
    /// When the run ends before.
    fn wait(&self, launcher: &mut Child, blow: u64) -> u64 {
        let moment = self.moment(blow);
        self.wait_for_segment(launcher, moment);
        moment
    }

    fn wait_for_segment(&self, launcher: &mut Child, number: u64) {
        wait_until(&format!("journal segment {number}"), || {
            self.goes_on(launcher);
            segments(&self.run) >= number
        });
    }

    /// Waits until the journal gives a lease to a worker from now on; in which segment.
    ///
    /// # Panics
    /// When the run ends before.
    fn wait_for_lease(&self, launcher: &mut Child, worker: &str) -> u64 {
        let named = format!("\"worker\":\"{worker}\"");
        let words = ["\"leased\"", named.as_str()];
        self.wait_for_record(segments(&self.run) + 1, &words, || self.goes_on(launcher))
    }

    /// Waits for a trainer group, then for a moment.
    ///
    /// # Panics
    /// When the run ends before.
    fn wait_for_group(&self, launcher: &mut Child) -> u64 {
        self.wait_for_record(1, &["\"epoch-started\""], || self.goes_on(launcher));
        self.wait(launcher, 0);
        segments(&self.run)
    }

    /// Fails with the launcher's words when a launched run has ended.
    fn goes_on(&self, launcher: &mut Child) {
        let over = launcher.try_wait().expect("a status").is_some();
        assert!(!over, "the run ended early: {}", self.run.log());
    }

    /// Waits for a journal segment from `next` on of which a record contains all these words; its number.
    fn wait_for_record(&self, mut next: u64, words: &[&str], mut check: impl FnMut()) -> u64 {
        let has = |record: &[u8], word: &str| {
            record.windows(word.len()).any(|found| found == word.as_bytes())
        };
        loop {
            let files = files(&self.run);
            let begin = files.partition_point(|(first, _)| *first <= next).saturating_sub(1);
            for (first, path) in &files[begin..] {
                let bytes = std::fs::read(path).unwrap_or_default();
                for (number, records) in segments_in(&bytes, *first) {
                    let holds = |record: &Vec<u8>| words.iter().all(|word| has(record, word));
                    if number >= next && records.iter().any(holds) {
                        return number;
                    }
                    next = next.max(number + 1);
                }
            }
            check();
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// The launched run's end.
    ///
    /// # Panics
    /// When it ends badly.
    fn finish(&self, mut launcher: Child) {
        wait_until("the end of the run", || launcher.try_wait().expect("a status").is_some());
        let status = launcher.wait().expect("a status");
        assert!(status.success(), "{status}: {}", self.run.log());
    }

    /// Its address for `duet status`.
    fn place(&self) -> String {
        self.run.store.display().to_string()
    }
}

/// A number from a seed and a name (FNV-1a, finished as in MurmurHash3).
pub(crate) fn mix(seed: u64, name: &str) -> u64 {
    let step = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    let bytes = seed.to_le_bytes().into_iter().chain(name.bytes());
    let mut hash = bytes.fold(0xcbf2_9ce4_8422_2325, step);
    for factor in [0xff51_afd7_ed55_8ccd_u64, 0xc4ce_b9fe_1a85_ec53] {
        hash = (hash ^ (hash >> 33)).wrapping_mul(factor);
    }
    hash ^ (hash >> 33)
}
