//! Fine-tuning, evaluation and the experiment, as a person runs them: real processes, a real model.

use duet_tests::{Run, base_model, bin, text, wait_until};
use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output};

/// The first worked examples of the base model, in a file of their own.
fn examples(folder: &Path, count: usize) -> String {
    let all = std::fs::read_to_string(base_model().join("miniworld/sft.jsonl")).expect("examples");
    let path = folder.join("examples.jsonl");
    let few: String = all.lines().take(count).map(|line| format!("{line}\n")).collect();
    std::fs::write(&path, few).expect("a file");
    format!("sft.data=\"{}\"", path.display())
}

fn json(path: &Path) -> Value {
    let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_slice(&bytes).expect("JSON")
}

/// The launch command with another verb in its place.
fn sft(run: &Run, resume: bool) -> Command {
    let launch = run.command(resume);
    let mut command = Command::new(bin("duet"));
    command.current_dir(launch.get_current_dir().expect("a folder"));
    command.arg("sft").args(launch.get_args().skip(1));
    command
}

fn finished(mut command: Command) -> Output {
    let out = command.output().expect("duet starts");
    assert!(out.status.success(), "{}", text(&out));
    out
}

#[test]
fn a_killed_fine_tuning_resumes_to_the_same_weights() {
    let folder = tempfile::tempdir().expect("a folder");
    let data = examples(folder.path(), 40);
    let set = [&data, "sft.batch=4", "sft.lr=1e-3", "sft.checkpoint_every=2", "sft.epochs=2"];
    let run = |name: &str| {
        let folder = folder.path().join(name);
        std::fs::create_dir(&folder).expect("a folder");
        Run::new(&folder, &set)
    };
    let undisturbed = run("a");
    finished(sft(&undisturbed, false));
    let summary = json(&undisturbed.store.join("sft/summary.json"));
    assert_eq!((summary["steps"].as_u64(), summary["world"].as_u64()), (Some(20), Some(2)));
    assert!(summary["last_loss"].as_f64() < summary["first_loss"].as_f64(), "{summary}");
    assert!(undisturbed.store.join("sft/model/model_index.json").is_file());

    let killed = run("b");
    let mut child = sft(&killed, false).spawn().expect("duet starts");
    let lines = killed.store.join("sft/metrics.jsonl");
    wait_until("five steps", || {
        std::fs::read_to_string(&lines).is_ok_and(|text| text.lines().count() >= 5)
    });
    child.kill().expect("SIGKILL");
    child.wait().expect("its end");
    let refused = sft(&killed, false).output().expect("duet starts");
    assert!(!refused.status.success() && text(&refused).contains("--resume"), "{refused:?}");
    finished(sft(&killed, true));
    let resumed = json(&killed.store.join("sft/summary.json"));
    assert_eq!(resumed["weights"], summary["weights"]);
    let text = std::fs::read_to_string(&lines).expect("metrics");
    assert_eq!(text.lines().count(), 20, "each step stands there once");
}

#[test]
fn a_launch_with_sft_fine_tunes_first() {
    let folder = tempfile::tempdir().expect("a folder");
    let data = examples(folder.path(), 8);
    let run = Run::new(folder.path(), &[&data, "sft.batch=4", "sft.epochs=1", "run.iterations=1"]);
    let out = run.finish(false);
    assert!(out.status.success(), "{}", text(&out));
    assert_eq!(json(&run.store.join("sft/summary.json"))["steps"], 2);
    assert_eq!(run.digest().0, 1);
    let logs = run.store.join("logs/trainer-0.log");
    let log = std::fs::read_to_string(&logs).expect("a log");
    assert!(log.contains("sft/model"), "it starts from what was fine-tuned: {log}");
}

#[test]
fn fine_tuning_says_what_is_wrong() {
    let folder = tempfile::tempdir().expect("a folder");
    let out = sft(&Run::new(folder.path(), &[]), false).output().expect("duet starts");
    assert!(!out.status.success() && text(&out).contains("[sft]"), "{}", text(&out));
    let run = Run::new(folder.path(), &["sft.data=\"nowhere.jsonl\""]);
    let out = sft(&run, false).output().expect("duet starts");
    assert!(
        out.status.code() == Some(78) && text(&out).contains("nowhere.jsonl"),
        "{}",
        text(&out)
    );
}

fn eval(folder: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(bin("duet"));
    command.current_dir(folder).arg("eval").arg(base_model()).args(args);
    command.output().expect("duet starts")
}

#[test]
fn a_suite_is_drawn_scored_and_shown() {
    let folder = tempfile::tempdir().expect("a folder");
    let prompts = base_model().join("miniworld/prompts-test.jsonl").display().to_string();
    let args = ["--suite", &prompts, "--limit", "8", "--out", "out", "--images-per-prompt", "2"];
    let out = eval(folder.path(), &[&args[..], &["--", "--steps", "2"]].concat());
    assert!(out.status.success(), "{}", text(&out));
    for part in ["semantic", "arithmetic", "overall", "index.html"] {
        assert!(text(&out).contains(part), "{part}: {}", text(&out));
    }
    let report = json(&folder.path().join("out/report.json"));
    assert_eq!(report["settings"]["steps"], 2, "what stands after `--` reaches the sampler");
    let entries = report["entries"].as_array().expect("entries");
    assert_eq!(entries.len(), 8);
    let all: Vec<f64> = entries
        .iter()
        .flat_map(|entry| entry["images"].as_array().expect("images"))
        .map(|image| image["scores"]["semantic"].as_f64().expect("a score"))
        .collect();
    let mean = all.iter().sum::<f64>() / all.len() as f64;
    let told = report["totals"]["overall"]["means"]["semantic"].as_f64().expect("a mean");
    assert!(all.len() == 16 && (mean - told).abs() < 1e-9, "{mean} {told}");
    let page = std::fs::read_to_string(folder.path().join("out/index.html")).expect("a gallery");
    assert_eq!(page.matches("<article").count(), 8);
    assert_eq!(page.matches("src=\"data:image/png;base64,iVBOR").count(), 16, "nothing beside it");

    // The same images again, without a model.
    let again = eval(folder.path(), &[&args[..], &["--rescore"]].concat());
    assert!(again.status.success(), "{}", text(&again));
    assert_eq!(json(&folder.path().join("out/report.json"))["totals"], report["totals"]);
}

#[test]
fn what_nobody_can_score_is_an_error_and_no_zero() {
    let folder = tempfile::tempdir().expect("a folder");
    let wise =
        "[{\"Prompt\": \"a\", \"Explanation\": \"b\", \"Subcategory\": \"c\", \"prompt_id\": 1}]";
    std::fs::write(folder.path().join("wise.json"), wise).expect("a file");
    let out = eval(folder.path(), &["--suite", "wise.json", "--", "--steps", "1"]);
    assert!(!out.status.success(), "{}", text(&out));
    assert!(text(&out).contains("no image could be scored"), "{}", text(&out));
    let out = eval(folder.path(), &["--suite", "missing.json"]);
    assert!(out.status.code() == Some(74) && text(&out).contains("missing.json"), "{}", text(&out));
}

#[test]
fn the_experiment_fills_its_table_and_does_nothing_twice() {
    let folder = tempfile::tempdir().expect("a folder");
    let (runs, out) = (folder.path().join("runs"), folder.path().join("results"));
    let run = || {
        let mut command = Command::new(bin("duet"));
        command.current_dir(duet_tests::root());
        command.args(["experiment", "paper", "--small"]);
        command.args(["--row", "base", "--row", "sft", "--row", "dit-only"]);
        command.arg("--folder").arg(&runs).arg("--out").arg(&out);
        finished(command)
    };
    let first = run();
    assert!(text(&first).contains("SFT + GRPO, DiT only"), "{}", text(&first));
    let table = json(&out.join("table.json"));
    let rows: Vec<(&str, u64)> = table["rows"]
        .as_array()
        .expect("rows")
        .iter()
        .map(|row| {
            (
                row["row"].as_str().expect("a name"),
                row["training_images"].as_u64().expect("a number"),
            )
        })
        .collect();
    assert_eq!(rows, [("base", 0), ("sft", 0), ("dit-only", 16)]);
    for file in [
        "README.md",
        "commands.sh",
        "curves.png",
        "raw/rows.parquet",
        "raw/images.parquet",
        "raw/curves.parquet",
    ] {
        assert!(out.join(file).is_file(), "{file} is missing");
    }
    let again = run();
    assert_eq!(text(&again).matches("done before:").count(), 3, "{}", text(&again));
    assert_eq!(json(&out.join("table.json")), table);
}
