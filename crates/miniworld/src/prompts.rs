//! The prompts of the small world and how they are split.
//!
//! A prompt asks for a digit, its colour and its place: "draw two plus three, in the color of grass, at
//! the top left". Number and colour have to be inferred. No number item and no colour item of one
//! split occurs in a prompt of another: what a test prompt asks for, no prompt of training asked
//! for, in whatever words.

use crate::facts::{
    COLOURS, Category, ColourItem, NUMBERS, NumberItem, PLACES, colour_items, number_items,
};
use duet_core::work::PromptRow;
use duet_core::{Purpose, Seed};
use serde::{Deserialize, Serialize};

/// Which prompts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Split {
    /// For SFT and RL.
    Train,
    /// For choosing hyper-parameters.
    Validation,
    /// For measuring, at the very end.
    Test,
}

impl Split {
    /// All three.
    pub const ALL: [Split; 3] = [Split::Train, Split::Validation, Split::Test];

    /// Its name in files.
    pub fn name(self) -> &'static str {
        match self {
            Split::Train => "train",
            Split::Validation => "validation",
            Split::Test => "test",
        }
    }

    /// How many prompts it has.
    pub fn size(self) -> usize {
        match self {
            Split::Train => 512,
            Split::Validation => 64,
            Split::Test => 96,
        }
    }
}

/// What a prompt's image must show. The JSON of this is [`PromptRow::meta`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Target {
    /// The digit.
    pub digit: u8,
    /// The colour's name.
    pub colour: String,
    /// The place's name.
    pub place: String,
    /// The kind of inference behind the number.
    pub category: Category,
    /// What is asked about the number.
    pub number_item: String,
    /// The thing whose colour is asked.
    pub colour_item: String,
}

/// A prompt with all that it was made from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompt {
    /// The number.
    pub number: NumberItem,
    /// The colour.
    pub colour: ColourItem,
    /// The place, an index into [`PLACES`].
    pub place: u8,
}

impl Prompt {
    /// What a person would type.
    pub fn text(&self) -> String {
        let place = PLACES[usize::from(self.place)];
        let (number, thing) = (&self.number.phrase, self.colour.thing);
        format!("draw {number}, in the color of {thing}, at the {place}")
    }

    /// What the image must show.
    pub fn target(&self) -> Target {
        Target {
            digit: self.number.value,
            colour: COLOURS[usize::from(self.colour.colour)].to_owned(),
            place: PLACES[usize::from(self.place)].to_owned(),
            category: self.number.category,
            number_item: self.number.phrase.clone(),
            colour_item: self.colour.thing.to_owned(),
        }
    }

    /// The refined prompt that names the target outright.
    pub fn refined(&self) -> String {
        caption(self.number.value, self.colour.colour, self.place)
    }
}

/// How an image is described outright: `a green five at the top left`. Labels out of range wrap.
pub fn caption(digit: u8, colour: u8, place: u8) -> String {
    format!(
        "a {} {} at the {}",
        COLOURS[usize::from(colour) % COLOURS.len()],
        NUMBERS[usize::from(digit) % NUMBERS.len()],
        PLACES[usize::from(place) % PLACES.len()]
    )
}

/// What a refined prompt names: (digit, colour, place), each `None` where no word of that kind, or
/// words of two meanings, are in it.
pub fn named(refined: &str) -> (Option<u8>, Option<u8>, Option<u8>) {
    let lower = refined.to_lowercase();
    let words: Vec<&str> =
        lower.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()).collect();
    let one = |names: &[&str]| {
        let mut found =
            (0u8..).zip(names).filter(|(_, name)| words.contains(name)).map(|(index, _)| index);
        match (found.next(), found.next()) {
            (Some(index), None) => Some(index),
            _ => None,
        }
    };
    let place = PLACES.iter().position(|place| words.join(" ").contains(place));
    (one(&NUMBERS), one(&COLOURS), place.map(|place| place as u8))
}

/// Whether a refined prompt names the right digit and the right colour.
pub fn names_target(refined: &str, target: &Target) -> bool {
    let (digit, colour, _) = named(refined);
    digit == Some(target.digit)
        && colour.is_some_and(|colour| COLOURS[usize::from(colour)] == target.colour)
}

/// The items that the prompts of a split are made of.
pub fn items(split: Split) -> (Vec<NumberItem>, Vec<ColourItem>) {
    let mut numbers = Vec::new();
    for (at, category) in (0u64..).zip(Category::ALL) {
        let all = number_items().into_iter().filter(|item| item.category == category);
        numbers.extend(share(all.collect(), split, at));
    }
    let mut colours = Vec::new();
    for (at, _) in (0u8..).zip(COLOURS) {
        let all = colour_items().into_iter().filter(|item| item.colour == at);
        colours.extend(share(all.collect(), split, 100 + u64::from(at)));
    }
    (numbers, colours)
}

/// A split's share of a shuffled list: the first six tenths train, a tenth validate, the rest test.
fn share<T>(mut all: Vec<T>, split: Split, at: u64) -> Vec<T> {
    shuffle(&mut all, &world().derive(Purpose::Data, &[1, at]));
    let (train, validation) = (all.len() * 6 / 10, all.len().div_ceil(10));
    let range = match split {
        Split::Train => 0..train,
        Split::Validation => train..train + validation,
        Split::Test => train + validation..all.len(),
    };
    all.drain(range).collect()
}

/// The prompts of a split: the same in every run, whatever its seed. No prompt occurs twice.
pub fn prompts(split: Split) -> Vec<Prompt> {
    let seed = world().derive(Purpose::Data, &[2, split.size() as u64]);
    draw_prompts(split, &seed, split.size())
}

/// `count` different prompts from the items of a split, the categories taking turns. A split has
/// items for thousands.
pub(crate) fn draw_prompts(split: Split, seed: &Seed, count: usize) -> Vec<Prompt> {
    let (numbers, colours) = items(split);
    let mut out: Vec<Prompt> = Vec::with_capacity(count);
    let mut draw = 0;
    while out.len() < count {
        let category = Category::ALL[out.len() % Category::ALL.len()];
        let of_category: Vec<&NumberItem> =
            numbers.iter().filter(|item| item.category == category).collect();
        let prompt = Prompt {
            number: (*pick(seed, &mut draw, &of_category)).clone(),
            colour: pick(seed, &mut draw, &colours).clone(),
            place: (seed.uniform(draw) * PLACES.len() as f64) as u8,
        };
        draw += 1;
        if !out.contains(&prompt) {
            out.push(prompt);
        }
    }
    out
}

/// The prompts of a split as rows of a data set.
pub fn rows(split: Split) -> Vec<PromptRow> {
    let rows = prompts(split).into_iter().zip(0u64..).map(|(prompt, row)| PromptRow {
        row,
        text: prompt.text(),
        meta: serde_json::to_string(&prompt.target()).unwrap_or_default(),
    });
    rows.collect()
}

/// The seed of what is the same in every run.
fn world() -> Seed {
    Seed::root(0x6d69_6e69)
}

fn pick<'a, T>(seed: &Seed, draw: &mut u64, from: &'a [T]) -> &'a T {
    let at = (seed.uniform(*draw) * from.len() as f64) as usize;
    *draw += 1;
    &from[at]
}

/// Fisher and Yates' shuffle, from a seed.
pub(crate) fn shuffle<T>(list: &mut [T], seed: &Seed) {
    for last in (1..list.len()).rev() {
        let other = (seed.uniform(last as u64) * (last + 1) as f64) as usize;
        list.swap(last, other);
    }
}
