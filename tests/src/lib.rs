//! What the whole-system tests share: real binaries, a real small model, real folders.
#![forbid(unsafe_code)]

pub mod chaos;
pub mod fleet;
pub mod objects;
pub mod proxy;
pub mod signals;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// Longest wait for anything; a breach fails the test with the name of what was waited for.
pub const DEADLINE: Duration = Duration::from_secs(240);

/// The repository.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").to_path_buf()
}

/// A binary of the workspace.
///
/// # Panics
/// When it was not built: cargo builds a package's own binaries for its tests, but not others'.
pub fn bin(name: &str) -> PathBuf {
    // A test lies in `deps` below the binaries, `duet-chaos` beside them.
    let own = std::env::current_exe().expect("a path");
    let path =
        own.ancestors().skip(1).take(2).map(|folder| folder.join(name)).find(|p| p.is_file());
    path.unwrap_or_else(|| panic!("{name} is missing: run `cargo build --workspace --bins`"))
}

/// A cache folder for base models, kept between runs of the tests.
pub fn cache() -> PathBuf {
    let folder = bin("duet-coordinator");
    folder.ancestors().nth(2).expect("target").join("test-cache")
}

/// The small base model of seed 1, made once.
pub fn base_model() -> &'static Path {
    static MADE: OnceLock<PathBuf> = OnceLock::new();
    MADE.get_or_init(|| {
        let out = cache().join("duet/miniworld/test-seed1");
        let made = Command::new(bin("duet-trainer"))
            .args(["bootstrap", "--seed", "1", "--profile", "test", "--out"])
            .arg(&out)
            .output()
            .expect("duet-trainer starts");
        assert!(made.status.success(), "{}", text(&made));
        out
    })
}

/// What a process printed.
pub fn text(output: &Output) -> String {
    let all = [&output.stdout[..], &output.stderr[..]].concat();
    String::from_utf8_lossy(&all).into_owned()
}

/// A run of `duet launch configs/test.toml` in a folder of its own.
pub struct Run {
    /// Where its store lies.
    pub store: PathBuf,
    set: Vec<String>,
}

impl Run {
    /// A run in `folder`, with overrides.
    pub fn new(folder: &Path, set: &[&str]) -> Run {
        let store = folder.join("run");
        let base = base_model().display();
        let own = [
            format!("run.store=\"{}\"", store.display()),
            format!("model.path=\"{base}\""),
            format!("data.prompts=\"{base}/miniworld/prompts-train.jsonl\""),
        ];
        let set = own.into_iter().chain(set.iter().map(|s| (*s).to_owned())).collect();
        Run { store, set }
    }

    /// The same run with one more override.
    pub fn with(&self, set: &str) -> Run {
        let set = self.set.iter().cloned().chain([set.to_owned()]).collect();
        Run { store: self.store.clone(), set }
    }

    /// A program of the run, in its folder.
    pub fn program(&self, name: &str) -> Command {
        let mut command = Command::new(bin(name));
        command.current_dir(self.store.parent().expect("a folder"));
        command
    }

    /// The overrides, as arguments.
    pub fn overrides(&self) -> impl Iterator<Item = &str> {
        self.set.iter().flat_map(|set| ["--set", set])
    }

    /// The launch command.
    pub fn command(&self, resume: bool) -> Command {
        let mut command = self.program("duet");
        command.arg("launch").arg(root().join("configs/test.toml")).args(self.overrides());
        if resume {
            command.arg("--resume");
        }
        command
    }

    /// Runs it to its end.
    pub fn finish(&self, resume: bool) -> Output {
        self.command(resume).output().expect("duet starts")
    }

    /// Starts it.
    pub fn start(&self) -> Child {
        self.begin(false)
    }

    /// Starts it, or goes on with it.
    pub fn begin(&self, resume: bool) -> Child {
        let path = self.store.with_extension("log");
        let log = { std::fs::OpenOptions::new() }.create(true).append(true).open(path);
        let log = log.expect("a log");
        let twin = log.try_clone().expect("a log");
        self.command(resume)
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(twin)
            .spawn()
            .expect("it starts")
    }

    /// Waits until so many iterations are committed.
    ///
    /// # Panics
    /// When that takes longer than [`DEADLINE`], or the process ends first.
    pub fn wait_for_iterations(&self, child: &mut Child, count: usize) {
        let path = self.store.join("metrics.jsonl");
        wait_until(&format!("{count} iterations"), || {
            assert!(
                child.try_wait().expect("its status").is_none(),
                "it ended early: {}",
                self.log()
            );
            std::fs::read_to_string(&path).is_ok_and(|text| text.lines().count() >= count)
        });
    }

    /// What the launcher said.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.store.with_extension("log")).unwrap_or_default()
    }

    /// The newest checkpoint's manifest.
    fn manifest(&self) -> Option<serde_json::Value> {
        let steps = std::fs::read_dir(self.store.join("checkpoints")).ok()?.flatten();
        let manifests = steps.map(|step| step.path().join("manifest.json")).filter(|p| p.is_file());
        let text = std::fs::read(manifests.max()?).ok()?;
        let sealed: serde_json::Value = serde_json::from_slice(&text).ok()?;
        Some(sealed["manifest"].clone())
    }

    /// Version of the newest checkpoint.
    pub fn newest_checkpoint(&self) -> Option<u64> {
        self.manifest()?["version"].as_u64()
    }

    /// Digest of the trained weights in the newest checkpoint, and its version.
    ///
    /// # Panics
    /// When there is none.
    pub fn digest(&self) -> (u64, String) {
        let manifest = self.manifest().expect("a manifest");
        let version = manifest["version"].as_u64().expect("a version");
        (version, manifest["weights"]["digest"].as_str().expect("a digest").to_owned())
    }
}

/// Waits for a condition; there is no event to wait on across processes but the file system.
///
/// # Panics
/// When it does not come true in time.
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let until = Instant::now() + DEADLINE;
    while !condition() {
        assert!(Instant::now() < until, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
