//! What the whole-system tests share: real binaries, a real small model, real folders.
#![forbid(unsafe_code)]

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
    let test = std::env::current_exe().expect("a path");
    let folder = test.ancestors().nth(2).expect("target/debug");
    let path = folder.join(name);
    assert!(path.is_file(), "{} is missing: run `cargo build --workspace --bins`", path.display());
    path
}

/// A cache folder for base models, kept between runs of the tests.
pub fn cache() -> PathBuf {
    let test = std::env::current_exe().expect("a path");
    test.ancestors().nth(3).expect("target").join("test-cache")
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

    /// The launch command.
    pub fn command(&self, resume: bool) -> Command {
        let mut command = Command::new(bin("duet"));
        command.current_dir(self.store.parent().expect("a folder"));
        command.arg("launch").arg(root().join("configs/test.toml"));
        for set in &self.set {
            command.args(["--set", set]);
        }
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
        let log = std::fs::File::create(self.store.with_extension("log")).expect("a log");
        let twin = log.try_clone().expect("a log");
        self.command(false)
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

    fn log(&self) -> String {
        std::fs::read_to_string(self.store.with_extension("log")).unwrap_or_default()
    }

    /// Digest of the trained weights in the newest checkpoint, and its version.
    ///
    /// # Panics
    /// When there is none.
    pub fn digest(&self) -> (u64, String) {
        let folder = self.store.join("checkpoints");
        let steps = std::fs::read_dir(&folder).expect("checkpoints").flatten();
        let manifests = steps.map(|step| step.path().join("manifest.json")).filter(|p| p.is_file());
        let newest = manifests.max().expect("a manifest");
        let text = std::fs::read(&newest).expect("a manifest");
        let sealed: serde_json::Value = serde_json::from_slice(&text).expect("JSON");
        let manifest = &sealed["manifest"];
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
