//! What is held out is held out, and every prompt has the target that it says.

use duet_miniworld::corpus::{Teacher, examples};
use duet_miniworld::facts::{COLOURS, number_items};
use duet_miniworld::prompts::{Split, Target, caption, items, named, names_target, prompts, rows};
use duet_models::template::extract;
use std::collections::BTreeSet;

#[test]
fn no_item_of_one_split_is_asked_for_in_another() {
    let mut numbers = BTreeSet::new();
    let mut things = BTreeSet::new();
    let mut texts = BTreeSet::new();
    for split in Split::ALL {
        let own_numbers: BTreeSet<String> =
            prompts(split).iter().map(|p| p.number.phrase.clone()).collect();
        let own_things: BTreeSet<&str> = prompts(split).iter().map(|p| p.colour.thing).collect();
        let own_texts: BTreeSet<String> = rows(split).into_iter().map(|row| row.text).collect();
        assert_eq!(own_texts.len(), split.size());
        assert!(numbers.is_disjoint(&own_numbers) && things.is_disjoint(&own_things));
        assert!(texts.is_disjoint(&own_texts));
        numbers.extend(own_numbers);
        things.extend(own_things);
        texts.extend(own_texts);
    }
}

#[test]
fn sft_asks_for_training_items_only() {
    let teacher = Teacher { hasty: 0.5, digit_skill: 0.5, colour_skill: 0.5 };
    let examples = examples(&teacher, &duet_core::Seed::root(3), 300);
    for held_out in [Split::Validation, Split::Test] {
        let (numbers, colours) = items(held_out);
        for example in &examples {
            let asks = |phrase: &str| example.prompt.contains(&format!("draw {phrase},"));
            assert!(!numbers.iter().any(|item| asks(&item.phrase)), "{}", example.prompt);
            let of = |thing: &str| example.prompt.contains(&format!("the color of {thing},"));
            assert!(!colours.iter().any(|item| of(item.thing)), "{}", example.prompt);
        }
    }
    let careful = examples.iter().filter(|example| example.careful).count();
    assert!((120..180).contains(&careful), "{careful} of 300 careful");
}

#[test]
fn items_are_distinct_and_say_what_they_mean() {
    let items = number_items();
    let phrases: BTreeSet<&str> = items.iter().map(|item| item.phrase.as_str()).collect();
    assert_eq!(phrases.len(), items.len());
    let values: BTreeSet<u8> = items.iter().map(|item| item.value).collect();
    assert_eq!(values.len(), 10);
}

#[test]
fn a_row_carries_its_target() {
    for split in Split::ALL {
        for (prompt, row) in prompts(split).iter().zip(rows(split)) {
            let target: Target = serde_json::from_str(&row.meta).unwrap();
            assert_eq!(target, prompt.target());
            assert!(names_target(&prompt.refined(), &target));
            let wrong = caption((target.digit + 1) % 10, prompt.colour.colour, prompt.place);
            assert!(!names_target(&wrong, &target));
        }
    }
}

#[test]
fn a_refined_prompt_is_read_back() {
    for digit in 0..10 {
        for colour in 0..COLOURS.len() as u8 {
            for place in 0..4 {
                let text = caption(digit, colour, place);
                assert_eq!(named(&text), (Some(digit), Some(colour), Some(place)));
            }
        }
    }
    assert_eq!(named("a red or green four"), (Some(4), None, None));
    assert_eq!(named("seventeen"), (None, None, None));
    let teacher = Teacher { hasty: 0.0, digit_skill: 0.0, colour_skill: 0.0 };
    for example in examples(&teacher, &duet_core::Seed::root(4), 20) {
        let answer = extract(&example.response());
        assert!(answer.well_formed);
        assert_eq!(answer.refined, example.refined);
    }
}
