//! A short bootstrap: the parts fit, see what they should, and come out the same twice.

use duet_core::Seed;
use duet_core::work::Score;
use duet_miniworld::bootstrap::{Manifest, Profile, run, tokenizer};
use duet_miniworld::digits::{Hand, Painter};
use duet_miniworld::facts::{COLOURS, PLACES};
use duet_miniworld::judge::Judge;
use duet_miniworld::prompts::{Split, Target, rows};
use duet_miniworld::scorers::Scorers;
use duet_models::embed::{DROPPED, PREFIX};
use duet_models::pipeline::Pipeline;
use duet_models::vae::to_bytes;

#[test]
fn the_embedding_template_takes_34_tokens() {
    assert_eq!(tokenizer().unwrap().encode(PREFIX).unwrap().len(), DROPPED);
}

#[test]
fn every_word_of_a_prompt_is_one_token() {
    let tokenizer = tokenizer().unwrap();
    for split in Split::ALL {
        for row in rows(split) {
            let words = row.text.split_whitespace().count() + row.text.matches(',').count();
            assert_eq!(tokenizer.encode(&row.text).unwrap().len(), words, "{}", row.text);
        }
    }
}

/// One bootstrap serves several questions, since it takes seconds.
#[test]
fn a_short_bootstrap_is_whole_repeatable_and_reused() {
    duet_torch::init(1).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = (folder.path().join("a"), folder.path().join("b"));
    let first = run(&a, 5, Profile::Test, &()).unwrap();
    let second = run(&b, 5, Profile::Test, &()).unwrap();
    assert_eq!(first, second, "the same seed makes the same bytes");

    // Whole: it loads, and its judges see painted images for what they are.
    let pipeline = Pipeline::load(&a).unwrap();
    assert_eq!(pipeline.pixels_per_token(), 8);
    assert!(first.measured.recogniser_accuracy > 0.6, "{:?}", first.measured);
    assert!(first.measured.judge_accuracy > 0.5, "{:?}", first.measured);
    scores_follow_the_target(&Scorers::load(&a).unwrap(), &Judge::load(&a).unwrap());

    // Reused: nothing is trained again, unless the folder was tampered with.
    let never = |_| panic!("trained again");
    assert_eq!(run(&a, 5, Profile::Test, &never).unwrap(), first);
    assert_eq!(Manifest::read(&a).unwrap().as_ref(), Some(&first));

    // Somebody's own folder is not overwritten.
    let own = folder.path().join("own");
    std::fs::create_dir(&own).unwrap();
    std::fs::write(own.join("thesis.txt"), "three years").unwrap();
    let error = run(&own, 5, Profile::Test, &never).unwrap_err().to_string();
    assert!(error.contains("own") && error.contains("another folder"), "{error}");
}

fn scores_follow_the_target(scorers: &Scorers, judge: &Judge) {
    let (images, labels) = Painter::new(Hand::Test, Seed::root(8)).unwrap().paint(60);
    let images = to_bytes(&images);
    let mut row = rows(Split::Test).remove(0);
    let mut target: Target = serde_json::from_str(&row.meta).unwrap();
    let (mut right, mut wrong, mut seen) = (0.0, 0.0, 0);
    for (index, label) in labels.iter().enumerate() {
        let image = images.narrow(0, index as i64, 1);
        let mut semantic = |digit: u8| {
            target.digit = digit;
            target.colour = COLOURS[usize::from(label.colour)].to_owned();
            target.place = PLACES[usize::from(label.place)].to_owned();
            row.meta = serde_json::to_string(&target).unwrap();
            let leaf = scorers.score(&image, &row, "").unwrap().remove(0);
            assert!(
                leaf.values()
                    .all(|score| matches!(score, Score::Scored(x) if (0.0..=1.0).contains(x)))
            );
            match leaf["semantic"] {
                Score::Scored(value) => value,
                _ => f64::NAN,
            }
        };
        right += semantic(label.digit) / 60.0;
        wrong += semantic((label.digit + 1) % 10) / 60.0;
        seen += usize::from(judge.see(&image).unwrap() == [(label.digit, label.colour)]);
    }
    assert!(right > 0.4 && wrong < 0.2, "right {right}, wrong {wrong}");
    assert!(seen > 30, "the judge saw {seen} of 60");
    row.meta = "{}".to_owned();
    assert!(scorers.score(&images, &row, "").is_err());
}
