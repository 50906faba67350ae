//! A made-up run from its files to its report: structure, not pixels.

use super::canvas::{Canvas, Type, Weight, palette};
use super::*;
use serde_json::json;
use std::collections::BTreeMap;

/// Colours of the made-up world.
const COLOURS: [(&str, [u8; 3]); 4] = [
    ("red", [230, 60, 50]),
    ("green", [60, 190, 80]),
    ("yellow", [240, 210, 60]),
    ("blue", [70, 120, 240]),
];

const PROMPTS: [(&str, &str); 4] = [
    ("arithmetic", "seven minus three, in the colour of grass"),
    ("facts", "how many legs a spider has, in the colour of a ripe tomato"),
    ("sequence", "the number that comes after two, four and six, in the colour of the clear sky"),
    ("counting", "as many as there are letters in the word lemon, in the colour of a lemon"),
];

/// A 32 x 32 picture of a digit.
fn digit(number: usize, colour: usize) -> RgbImage {
    let faces = Type::load().unwrap();
    let mut canvas = Canvas::over(RgbImage::new(32, 32), 1.0, &faces);
    let ink = image::Rgb(COLOURS[colour % 4].1);
    canvas.text(9.0, 25.0, &(number % 10).to_string(), 24.0, Weight::Bold, ink);
    canvas.into_pixels()
}

/// Writes an evaluation of `count` prompts in which every `good`-th is right.
fn evaluation(folder: &Path, count: usize, good: usize) {
    std::fs::create_dir_all(folder.join("images")).unwrap();
    let mut prompts = Vec::new();
    for row in 0..count {
        let (category, text) = PROMPTS[row % 4];
        let right = row % good == 0;
        let (seen, colour) = if right { (row, row) } else { (row + 3, row + 1) };
        let file = format!("images/{row:05}-0.png");
        std::fs::write(folder.join(&file), png(folder, &digit(seen, colour)).unwrap()).unwrap();
        prompts.push(json!({
            "row": row, "prompt": text, "category": category,
            "target": { "digit": row % 10, "colour": COLOURS[row % 4].0 }, "trace": "…", "well_formed": true,
            "refined_prompt": format!("A {} handwritten digit {} in the middle.",
                COLOURS[colour % 4].0, seen % 10),
            "images": [{ "file": file, "semantic": right, "render": true,
                "judged": { "digit": seen % 10, "colour": COLOURS[colour % 4].0 } }],
        }));
    }
    let share = 1.0 / good as f64;
    let totals =
        json!({ "semantic_accuracy": share, "trace_accuracy": share, "render_accuracy": 1.0 });
    let categories: BTreeMap<&str, _> = PROMPTS.iter().map(|p| (p.0, totals.clone())).collect();
    let all = json!({ "totals": totals, "categories": categories, "prompts": prompts });
    std::fs::write(folder.join("eval.json"), all.to_string()).unwrap();
}

fn metrics_file(path: &Path, iterations: u32) {
    let lines = (0..iterations).map(|i| {
        let wobble = f64::from(i * 7919 % 97) / 97.0 - 0.5;
        let part = f64::from(i) / f64::from(iterations);
        let line = json!({
            "iteration": i, "time_ms": 1_790_000_000_000u64 + u64::from(i) * 2000,
            "reward/llm": 0.3 + 0.4 * part + 0.1 * wobble,
            "reward/dit": 0.4 + 0.3 * part + 0.06 * wobble,
            "rewards/semantic/mean": 0.3 + 0.4 * part + 0.1 * wobble,
            "rewards/aesthetic/mean": 0.5 + 0.1 * part - 0.08 * wobble,
            "rewards/consistency/mean": 0.6 + 0.1 * part + 0.05 * wobble,
            "completions/well_formed": 0.8 + 0.2 * part,
            "completions/clipped_ratio": 0.1 * (1.0 - part),
            "frac_reward_zero_std/llm": 0.2 + 0.1 * wobble,
            "llm/grad_norm": 0.7 + 0.5 * wobble, "dit/grad_norm": 0.05 + 0.02 * wobble,
            "llm/kl": 1e-3 * (1.0 + part + wobble), "dit/clip_ratio/low_mean": 0.01 * (0.6 + wobble), "dit/clip_ratio/high_mean": 0.01,
        });
        format!("{line}\n")
    });
    std::fs::write(path, lines.collect::<String>()).unwrap();
}

/// Facts of the made-up run.
fn facts() -> Facts {
    Facts {
        name: "demo".to_owned(),
        seed: 17,
        iterations: 60,
        images: 7680,
        images_per_second: 21.4,
        wall_seconds: 512.0,
        phases: [("bootstrap".to_owned(), 131.0), ("train".to_owned(), 358.0)].into(),
        peak_rss_mib: 2311.4,
        workers: [("rollout".to_owned(), 2), ("trainer".to_owned(), 2)].into(),
        weights_digest: "ab".repeat(32),
    }
}

/// Makes a run's files in `run` and reports on them.
fn report(run: &Path) -> Summary {
    let places = Places {
        run: run.to_owned(),
        metrics: run.join("metrics.jsonl"),
        before: run.join("eval/before"),
        after: run.join("eval/after"),
    };
    evaluation(&places.before, 10, 3);
    evaluation(&places.after, 10, 1);
    metrics_file(&places.metrics, 60);
    write(&places, facts(), &[("model", "model")]).unwrap()
}

#[test]
fn a_run_becomes_a_summary_two_pictures_and_an_event_file() {
    let folder = tempfile::tempdir().unwrap();
    let summary = report(folder.path());
    assert_eq!(Summary::read(folder.path()).unwrap(), summary);
    for file in summary.files.values().filter(|file| *file != "model") {
        assert!(folder.path().join(file).exists(), "{file}");
    }
    let value: serde_json::Value =
        serde_json::from_slice(&std::fs::read(folder.path().join("summary.json")).unwrap())
            .unwrap();
    for side in ["before", "after"] {
        for key in ["semantic_accuracy", "trace_accuracy", "render_accuracy"] {
            assert!(value["held_out"][side][key].is_f64(), "held_out.{side}.{key}");
        }
    }
    for key in ["iterations", "images", "images_per_second", "wall_seconds", "peak_rss_mib", "seed"]
    {
        assert!(value[key].is_number(), "{key}");
    }
    assert!(value["workers"].is_object() && value["weights_digest"].is_string());
    assert_eq!(value["held_out"]["after"]["semantic_accuracy"], 1.0);
}

#[test]
fn a_report_made_twice_is_the_same_bytes() {
    let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    report(a.path());
    report(b.path());
    for file in ["grid.png", "curves.png", "summary.json"] {
        let bytes = |folder: &tempfile::TempDir| std::fs::read(folder.path().join(file)).unwrap();
        assert!(bytes(&a) == bytes(&b), "{file}");
    }
}

#[test]
fn the_grid_takes_the_categories_in_turn_whatever_the_outcome() {
    let folder = tempfile::tempdir().unwrap();
    report(folder.path());
    let before = Evaluation::read(&folder.path().join("eval/before")).unwrap();
    let after = Evaluation::read(&folder.path().join("eval/after")).unwrap();
    let rows: Vec<u64> = grid::choose(&before, &after, 6).iter().map(|(was, _)| was.row).collect();
    assert_eq!(rows, [0, 3, 1, 2, 4, 7]);
    let grid = grid::of_run(&before, &after, 6).unwrap();
    assert!(
        grid.rows.iter().all(|row| row.after.as_ref().unwrap().verdict == grid::Verdict::Right)
    );
}

#[test]
fn a_grid_shows_each_image_enlarged_in_the_frame_of_its_verdict() {
    let mut picture = RgbImage::new(32, 32);
    picture.put_pixel(31, 31, image::Rgb([9, 200, 9]));
    let cell = |verdict| {
        let (caption, seen) = ("a caption".to_owned(), "judge sees: red 3".to_owned());
        Some(grid::Cell { image: picture.clone(), caption, verdict, seen })
    };
    let row = grid::Row {
        prompt: "word ".repeat(100),
        category: "facts".to_owned(),
        target: "green 4".to_owned(),
        before: cell(grid::Verdict::Wrong),
        after: cell(grid::Verdict::Right),
    };
    let title = || "title".to_owned();
    let one = grid::Grid { title: title(), subtitle: title(), rows: vec![row.clone()] };
    let two = grid::Grid { title: title(), subtitle: title(), rows: vec![row.clone(), row] };
    let (one, two) = (grid::draw(&one).unwrap(), grid::draw(&two).unwrap());
    assert_eq!(one.width(), two.width());
    let count = |picture: &RgbImage, colour| picture.pixels().filter(|p| **p == colour).count();
    for picture in [&one, &two] {
        let wide = picture.width() as usize;
        for colour in [palette::BLUE, palette::VERMILION] {
            // The frame alone is 4 x 262 pixels long and 6 wide.
            assert!(count(picture, colour) > 6000 && count(picture, colour) < 40 * wide);
        }
    }
    // One pixel of the picture is 8 x 8 pixels of the page, in both columns.
    assert_eq!(count(&one, image::Rgb([9, 200, 9])), 2 * 64);
    assert_eq!(count(&two, image::Rgb([9, 200, 9])), 4 * 64);
}

#[test]
fn panels_sort_the_metrics_and_an_empty_run_is_drawn_too() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("metrics.jsonl");
    metrics_file(&path, 30);
    let panels = panels::panels(&metrics::read(&path).unwrap());
    let counts = panels.each_ref().map(|panel| panel.series.len());
    assert_eq!(counts, [2, 3, 3, 4]);
    let labels = panels[3].series.iter().map(|line| line.label.as_str());
    let expected = ["LLM gradient norm", "DiT gradient norm", "LLM KL", "DiT clipped share"];
    assert!(labels.eq(expected));
    assert!(panels.iter().flat_map(|p| &p.series).all(|line| line.points.len() == 30));
    let size = curves::draw("demo", &panels).unwrap().dimensions();
    std::fs::write(&path, "").unwrap();
    let empty = panels::panels(&metrics::read(&path).unwrap());
    assert_eq!(curves::draw("demo", &empty).unwrap().dimensions(), size);
    std::fs::write(&path, "{\"iteration\":0,\"reward/llm\":0.5,\"llm/kl\":0}\n").unwrap();
    let one = panels::panels(&metrics::read(&path).unwrap());
    assert_eq!(curves::draw("demo", &one).unwrap().dimensions(), size);
}

#[test]
fn smoothing_starts_at_the_first_value_and_keeps_a_constant() {
    let constant: Vec<(f64, f64)> = (0..50).map(|i| (f64::from(i), 3.0)).collect();
    assert!(curves::smooth(&constant, 0.9).iter().all(|(_, y)| (y - 3.0).abs() < 1e-12));
    assert_eq!(curves::smooth(&[(0.0, 5.0), (1.0, 1.0)], 0.85)[0].1, 5.0);
}

#[test]
fn the_table_says_what_changed() {
    let folder = tempfile::tempdir().unwrap();
    let text = table(&report(folder.path()));
    for part in ["33.3 %", "100.0 %", "+66.7", "7680 (21.4 a second)", "2 rollout, 2 trainer", "17"]
    {
        assert!(text.contains(part), "{part} is missing in\n{text}");
    }
}

#[test]
fn missing_and_broken_files_are_named() {
    let folder = tempfile::tempdir().unwrap();
    report(folder.path());
    let eval = folder.path().join("eval/after");
    let before = Evaluation::read(&folder.path().join("eval/before")).unwrap();
    let after = Evaluation::read(&eval).unwrap();
    std::fs::write(eval.join("images/00003-0.png"), b"not a png").unwrap();
    let error = grid::of_run(&before, &after, 6).unwrap_err().to_string();
    assert!(error.contains("images/00003-0.png"), "{error}");
    std::fs::write(eval.join("eval.json"), b"{}").unwrap();
    let error = Evaluation::read(&eval).unwrap_err().to_string();
    assert!(error.contains("eval.json") && error.contains("totals"), "{error}");
    std::fs::remove_file(eval.join("eval.json")).unwrap();
    let error = Evaluation::read(&eval).unwrap_err().to_string();
    assert!(error.starts_with("cannot read") && error.contains("eval.json"), "{error}");
}

/// The worker that writes evaluations holds itself to the same file.
#[test]
fn an_evaluation_as_the_worker_writes_it_can_be_read() {
    let folder = tempfile::tempdir().unwrap();
    let golden = include_str!("../../../rollout-worker/tests/golden/eval.json");
    std::fs::write(folder.path().join("eval.json"), golden).unwrap();
    let evaluation = Evaluation::read(folder.path()).unwrap();
    assert_eq!(evaluation.totals.semantic_accuracy, 0.5);
    assert_eq!(evaluation.categories["facts"].render_accuracy, 1.0);
    let first = &evaluation.prompts[0];
    assert_eq!(first.target.as_ref().unwrap().to_string(), "green 4");
    assert_eq!(first.images[0].semantic, Some(true));
}
