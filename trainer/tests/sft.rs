//! Supervised fine-tuning: packing, ranks and crashes change nothing that is learned.

mod common;

use arrow::array::{ArrayRef, StringArray};
use arrow::record_batch::RecordBatch;
use common::pipeline;
use duet_config::Sft;
use duet_core::Seed;
use duet_models::embed::Embedder;
use duet_models::pipeline::{LoadOptions, Pipeline};
use duet_torch::collective::{AbortHandle, Collective, Gloo, GroupOptions, Solo, Store};
use duet_trainer::engine::gradient::Sharing;
use duet_trainer::sft::data::{Worked, read};
use duet_trainer::sft::{Checkpoints, Settings, StepDone, Tuner};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

const WORDS: [&str; 6] = ["three", "four", "red", "number", "after", "color"];

/// Examples of different lengths, in the words of the tiny tokenizer.
fn worked() -> Vec<Worked> {
    let word = |at: usize| WORDS[at % WORDS.len()];
    let words = |from: usize, n: usize| (0..n).map(|i| word(from + i * 5)).collect::<Vec<_>>();
    let one = |at: usize| Worked {
        prompt: words(at, 1 + at % 4).join(" "),
        response: format!("{}\nRevised Prompt:\n{}", words(at + 1, 1 + at % 7).join(" "), word(at)),
    };
    (0..22).map(one).collect()
}

fn settings(model: &Path) -> Settings {
    Settings {
        model: model.to_owned(),
        load: LoadOptions::default(),
        instruction: String::new(),
        seed: Seed::root(4),
        sft: Sft { epochs: 2, batch: 8, lr: 3e-3, warmup: 0.2, ..Sft::default() },
        max_grad_norm: 1.0,
        sharing: Sharing { zero: 0, each_micro_batch: false, overlap: true, bucket_bytes: 1 << 16 },
    }
}

fn base() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("base");
    pipeline().save(&path).unwrap();
    (folder, path)
}

fn finish(tuner: &mut Tuner, group: &dyn Collective) -> Vec<StepDone> {
    let mut steps = Vec::new();
    while tuner.step() < tuner.steps() {
        steps.push(tuner.advance(group).unwrap());
    }
    steps
}

fn whole(settings: Settings) -> (Vec<StepDone>, Tuner) {
    duet_torch::init(1).unwrap();
    let mut tuner = Tuner::load(settings, &worked()).unwrap();
    let steps = finish(&mut tuner, &Solo::new());
    (steps, tuner)
}

/// The largest difference between two models' weights.
fn apart(one: &Pipeline, other: &Pipeline) -> f64 {
    let pairs = one.lm.params().iter().zip(other.lm.params().iter());
    let apart = pairs.map(|((_, a), (_, b))| (a - b).abs().max().double_value(&[]));
    apart.fold(0.0, f64::max)
}

#[test]
fn the_loss_falls_and_the_transformer_stays() {
    let (folder, model) = base();
    let (steps, tuner) = whole(settings(&model));
    assert_eq!((steps.len(), tuner.steps()), (6, 6), "22 examples in batches of 8, twice");
    assert_eq!(steps[2].answer_tokens + steps[1].answer_tokens + steps[0].answer_tokens, {
        steps[3..].iter().map(|done| done.answer_tokens).sum::<u64>()
    });
    assert!(steps[5].loss < steps[0].loss - 0.1, "{steps:?}");
    let out = folder.path().join("out");
    tuner.pipeline().publish(&model, &out).unwrap();
    let (before, after) = (Pipeline::load(&model).unwrap(), Pipeline::load(&out).unwrap());
    assert!(apart(&before, &after) > 1e-3);
    assert_eq!(apart(&after, tuner.pipeline()), 0.0);
    for ((name, a), (_, b)) in before.dit.params().iter().zip(after.dit.params().iter()) {
        assert!(a.equal(b), "{name} changed");
    }
}

/// How far the states that condition images are from the base model's, for a prompt of the examples.
fn drift(base: &Pipeline, tuned: &Pipeline) -> f64 {
    let states = |pipeline: &Pipeline| {
        let embedder = Embedder::new(&pipeline.lm, &pipeline.tokenizer).unwrap();
        embedder.embed(WORDS[0]).unwrap()
    };
    (states(base) - states(tuned)).square().mean(tch::Kind::Float).double_value(&[])
}

#[test]
fn an_anchor_holds_the_states_that_condition_images() {
    let (_folder, model) = base();
    let before = Pipeline::load(&model).unwrap();
    let (free, loose) = whole(settings(&model));
    let mut held = settings(&model);
    held.sft.anchor = 100.0;
    let (anchored, held) = whole(held);
    assert_eq!(anchored[0].loss, free[0].loss, "the loss that is told is the examples' own");
    assert!(anchored[0].anchor == 0.0 && anchored[5].anchor > 0.0, "{anchored:?}");
    assert!(free.iter().all(|done| done.anchor == 0.0));
    assert!(anchored[5].loss < anchored[0].loss - 0.1, "it learns all the same: {anchored:?}");
    let (loose, held) = (drift(&before, loose.pipeline()), drift(&before, held.pipeline()));
    assert!(held < loose / 5.0, "{held} {loose}");
}

#[test]
fn packing_changes_no_more_than_rounding() {
    let (_folder, model) = base();
    let (packed, one) = whole(settings(&model));
    let mut alone = settings(&model);
    alone.sft.pack_tokens = 0;
    let (unpacked, other) = whole(alone);
    for (a, b) in packed.iter().zip(&unpacked) {
        assert!((a.loss - b.loss).abs() < 1e-3 * b.loss, "{a:?} {b:?}");
        assert_eq!((a.tokens, a.answer_tokens, a.lr), (b.tokens, b.answer_tokens, b.lr));
    }
    assert!((packed[0].loss - unpacked[0].loss).abs() < 1e-5 * packed[0].loss);
    assert!((packed[0].grad_norm - unpacked[0].grad_norm).abs() < 1e-4 * packed[0].grad_norm);
    // AdamW's first steps are signs: where a gradient is nothing but rounding, so is its sign.
    assert!(apart(one.pipeline(), other.pipeline()) < 2e-2);
}

#[test]
fn two_ranks_learn_what_one_learns() {
    let (_folder, model) = base();
    let (alone, one) = whole(settings(&model));
    let patient = Duration::from_secs(120);
    let server = Store::serve("127.0.0.1", patient).unwrap();
    let address = server.address().to_owned();
    let start = |rank: u32| {
        let (address, settings) = (address.clone(), settings(&model));
        thread::spawn(move || {
            let store = Arc::new(Store::connect(&address, patient).unwrap());
            let (group, host) = ("sft".to_owned(), "127.0.0.1".to_owned());
            let options =
                GroupOptions { rank, world: 2, group, host, deadline: patient, threads: 1 };
            let group = Gloo::connect(store, options, AbortHandle::default()).unwrap();
            duet_torch::init(1).unwrap();
            let mut tuner = Tuner::load(settings, &worked()).unwrap();
            let steps = finish(&mut tuner, &group);
            let weights: Vec<(String, Vec<f32>)> = tuner
                .pipeline()
                .lm
                .params()
                .iter()
                .map(|(name, t)| (name.to_owned(), t.flatten(0, -1).try_into().unwrap()))
                .collect();
            (steps, tuner.digest().unwrap(), weights)
        })
    };
    let ranks: Vec<_> = [start(0), start(1)].into_iter().map(|t| t.join().unwrap()).collect();
    assert_eq!(ranks[0].0, ranks[1].0, "every rank tells the same");
    assert_eq!(ranks[0].1, ranks[1].1, "every rank has the same bits");
    for (a, b) in ranks[0].0.iter().zip(&alone) {
        assert!((a.loss - b.loss).abs() < 1e-3 * b.loss, "{a:?} {b:?}");
    }
    assert!((ranks[0].0[0].grad_norm - alone[0].grad_norm).abs() < 1e-4 * alone[0].grad_norm);
    let params = one.pipeline().lm.params();
    for (name, weights) in &ranks[0].2 {
        let own: Vec<f32> = params.get(name).unwrap().flatten(0, -1).try_into().unwrap();
        let apart = own.iter().zip(weights).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(apart < 2e-2, "{name}: {apart}");
    }
}

#[test]
fn a_resumed_run_ends_in_the_same_bits() {
    let (folder, model) = base();
    let (steps, undisturbed) = whole(settings(&model));
    let checkpoints =
        |stage: &str| Checkpoints::new(folder.path().join("checkpoints"), stage.to_owned(), 2);
    let mut first = Tuner::load(settings(&model), &worked()).unwrap();
    assert_eq!(checkpoints("a").restore(&mut first, &Solo::new()).unwrap(), 0);
    for _ in 0..4 {
        first.advance(&Solo::new()).unwrap();
        checkpoints("a").write(&first).unwrap();
    }
    assert_eq!(checkpoints("a").list().unwrap(), [3, 4], "the newest two are kept");
    drop(first);
    let mut second = Tuner::load(settings(&model), &worked()).unwrap();
    assert_eq!(checkpoints("a").restore(&mut second, &Solo::new()).unwrap(), 4);
    assert_eq!(finish(&mut second, &Solo::new()), steps[4..]);
    assert_eq!(second.digest().unwrap(), undisturbed.digest().unwrap());

    // Not with other examples, another model or other values.
    let mut other = Tuner::load(settings(&model), &worked()).unwrap();
    let error = checkpoints("b").restore(&mut other, &Solo::new()).unwrap_err().to_string();
    assert!(error.contains("other examples") && error.contains("step-00000004"), "{error}");
}

fn write_parquet(path: &Path, columns: Vec<(&str, Vec<Option<&str>>)>) {
    let columns = columns
        .into_iter()
        .map(|(name, list)| (name, Arc::new(StringArray::from(list)) as ArrayRef));
    let batch =
        RecordBatch::try_from_iter_with_nullable(columns.map(|(n, c)| (n, c, true))).unwrap();
    let file = std::fs::File::create(path).unwrap();
    let mut writer = parquet::arrow::ArrowWriter::try_new(file, batch.schema(), None).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
}

#[test]
fn parquet_and_json_lines_say_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let (lines, table) = (folder.path().join("a.jsonl"), folder.path().join("a.parquet"));
    std::fs::write(
        &lines,
        "{\"prompt\": \"p\", \"cot\": \"c\", \"refined_prompt\": \"r\", \"careful\": true}\n\n\
         {\"text\": \"q\", \"refined\": \"s\"}\n{\"prompt\": \"t\", \"response\": \"all of it\"}\n",
    )
    .unwrap();
    write_parquet(
        &table,
        vec![
            ("prompt", vec![Some("p"), Some("q"), Some("t")]),
            ("chain_of_thought", vec![Some("c"), None, None]),
            ("source", vec![Some("x"), None, None]),
            ("refined", vec![Some("r"), Some("s"), None]),
            ("response", vec![None, None, Some("all of it")]),
        ],
    );
    let expected =
        [("p", "c\nRevised Prompt:\nr"), ("q", "Revised Prompt:\ns"), ("t", "all of it")];
    let expected = expected.map(|(p, r)| Worked { prompt: p.to_owned(), response: r.to_owned() });
    assert_eq!(read(&lines).unwrap(), expected);
    assert_eq!(read(&table).unwrap(), expected);
}

#[test]
fn what_is_wrong_with_examples_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let said = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        read(&path).unwrap_err().to_string()
    };
    assert!(said("a.jsonl", "").contains("no worked examples"));
    assert!(said("a.jsonl", "{\"prompt\": \"p\", \"refined\": \"r\"}\n[1]\n").contains("line 2"));
    assert!(said("a.jsonl", "{\"refined\": \"r\"}").contains("`prompt` is missing"));
    assert!(said("a.jsonl", "{\"prompt\": \"p\"}").contains("neither `refined` nor `response`"));
    let both = said("a.jsonl", "{\"prompt\": \"p\", \"refined\": \"r\", \"response\": \"s\"}");
    assert!(both.contains("one of them"), "{both}");
    assert!(said("a.parquet", "no").contains("not a Parquet file"));
    let table = folder.path().join("b.parquet");
    write_parquet(
        &table,
        vec![("prompt", vec![Some("p"), Some("")]), ("refined", vec![Some("r"); 2])],
    );
    let error = read(&table).unwrap_err().to_string();
    assert!(error.contains("row 2") && error.contains("b.parquet"), "{error}");
    let missing = read(Path::new("no/such.jsonl")).unwrap_err().to_string();
    assert!(missing.contains("no/such.jsonl"), "{missing}");

    let (_folder, model) = base();
    let mut short = settings(&model);
    short.sft.max_tokens = 3;
    let error = Tuner::load(short, &worked()).err().unwrap().to_string();
    assert!(error.contains("sft.max_tokens") && error.contains("22"), "{error}");
}
