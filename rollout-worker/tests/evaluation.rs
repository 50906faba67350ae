//! `eval` and `sample`, on a model that knows nothing.

mod common;

use common::engine;
use duet_core::work::PromptRow;
use duet_rollout_worker::engine::Adapters;
use duet_rollout_worker::evaluate::{EvalError, Judge, Options, Subject, evaluate};
use std::path::Path;
use tch::Tensor;

/// Sees a green four in the first image and red sevens in the others.
struct Fixed;

impl Judge for Fixed {
    fn see(&self, images: &Tensor) -> Result<Vec<Subject>, String> {
        let see = |k| match k {
            0 => Subject { digit: 4, colour: "green".to_owned() },
            _ => Subject { digit: 7, colour: "red".to_owned() },
        };
        Ok((0..images.size()[0]).map(see).collect())
    }
}

fn rows() -> Vec<PromptRow> {
    let meta = r#"{"digit":4,"colour":"green","category":"counts","place":"top left"}"#;
    let row = |row, text: &str, meta: &str| PromptRow {
        row,
        text: text.to_owned(),
        meta: meta.to_owned(),
    };
    vec![
        row(0, "a green four", meta),
        row(7, "a red seven", ""),
        row(9, "The number after three", meta),
    ]
}

fn options(think: bool) -> Options {
    Options { seed: 3, think, images_per_prompt: 2 }
}

/// Names and contents of all files below a folder.
fn files(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap().flatten() {
        match entry.path().is_dir() {
            true => all.extend(files(&entry.path())),
            false => {
                let name = entry.file_name().to_string_lossy().into_owned();
                all.push((name, std::fs::read(entry.path()).unwrap()));
            }
        }
    }
    all.sort();
    all
}

#[test]
fn without_thinking_the_raw_prompt_is_drawn_and_judged() {
    let out = tempfile::tempdir().unwrap();
    let mut engine = engine(Adapters::default());
    let done = &mut Vec::new();
    let tell = |n| done.push(n);
    let got =
        evaluate(&mut engine, Some(&Fixed), &rows(), &options(false), out.path(), tell).unwrap();
    assert_eq!(*done, [1, 2, 3]);
    assert_eq!(got.totals.prompts, 3);
    assert_eq!(got.totals.images, 6);
    // Of the two prompts with a target, the first image of each is right.
    assert_eq!(got.totals.semantic_accuracy, Some(0.5));
    // The raw prompt of row 0 names the target; that of row 9 names a number but no colour.
    assert_eq!(got.totals.trace_accuracy, Some(0.5));
    // Row 0: one of two; row 7: the red seven, one of two; row 9 names nothing to agree with.
    assert_eq!(got.totals.render_accuracy, Some(2.0 / 6.0));
    assert_eq!(got.categories.keys().collect::<Vec<_>>(), ["counts"]);
    assert_eq!(files(out.path()).len(), 7);
}

#[test]
fn a_second_evaluation_writes_the_same_bytes_and_prompts_do_not_depend_on_each_other() {
    let (a, b, c) =
        (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let run = |rows: &[PromptRow], out: &Path| {
        let mut engine = engine(Adapters::default());
        evaluate(&mut engine, Some(&Fixed), rows, &options(true), out, |_| ()).unwrap()
    };
    let first = run(&rows(), a.path());
    run(&rows(), b.path());
    assert_eq!(files(a.path()), files(b.path()));
    let alone = run(&rows()[2..], c.path());
    assert_eq!(alone.prompts[0], first.prompts[2]);
    let image = "images/00009-1.png";
    let read = |folder: &Path| std::fs::read(folder.join(image)).unwrap();
    assert_eq!(read(a.path()), read(c.path()));
}

#[test]
fn without_a_judge_there_are_images_and_no_verdicts() {
    let out = tempfile::tempdir().unwrap();
    let mut engine = engine(Adapters::default());
    let got = evaluate(&mut engine, None, &rows(), &options(false), out.path(), |_| ()).unwrap();
    assert_eq!(got.totals.semantic_accuracy, None);
    assert_eq!(got.totals.trace_accuracy, Some(0.5));
    assert!(got.prompts.iter().flat_map(|p| &p.images).all(|i| i.render.is_none()));
}

#[test]
fn a_folder_that_cannot_be_written_is_named() {
    let out = tempfile::tempdir().unwrap();
    let file = out.path().join("taken");
    std::fs::write(&file, b"").unwrap();
    let mut engine = engine(Adapters::default());
    let error = evaluate(&mut engine, None, &rows(), &options(false), &file, |_| ()).unwrap_err();
    assert!(
        matches!(error, EvalError::Io { .. }) && error.to_string().contains("taken"),
        "{error}"
    );
}
