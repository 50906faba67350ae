//! What the language model reads: text to learn facts from, then worked examples to learn the form
//! of an answer from.

use crate::facts::{
    COLOURS, Category, ColourItem, NUMBERS, NumberItem, PLACES, colour_items, number_items,
};
use crate::prompts::{Prompt, Split, caption, draw_prompts};
use duet_core::{Purpose, Seed};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// A worked example: what SFT imitates.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Example {
    /// The raw prompt.
    pub prompt: String,
    /// The reasoning before the marker.
    pub reasoning: String,
    /// The refined prompt after it.
    pub refined: String,
    /// Whether the teacher took care (recalled what it knows), for reading; nothing is trained on it.
    pub careful: bool,
}

impl Example {
    /// What the assistant says.
    pub fn response(&self) -> String {
        format!("{}\nRevised Prompt:\n{}", self.reasoning, self.refined)
    }
}

/// How the worked examples are made.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Teacher {
    /// Share of examples that skip the recall and guess.
    pub hasty: f64,
    /// How often a hasty guess has the right digit (by skill; a random one may be right too).
    pub digit_skill: f64,
    /// How often a hasty guess has the right colour, likewise.
    pub colour_skill: f64,
}

/// A text to learn from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// What is given: nothing is learned from it.
    pub given: String,
    /// What follows, to the end of the document or of the turn.
    pub told: String,
    /// Whether `given` is what a user says and `told` what an assistant answers.
    pub chat: bool,
}

/// Reads random documents off the world's knowledge, for ever.
///
/// Three kinds: what is known of a number and of a colour, after a topic line or a question; captions;
/// and lists of random words said twice, from which the model learns to copy a word that it has
/// never seen in that place - without them, what it recalls of a thing it was never asked about in
/// SFT is about another thing.
#[derive(Debug)]
pub struct Library {
    numbers: Vec<NumberItem>,
    by_category: Vec<Vec<usize>>,
    colours: Vec<ColourItem>,
    words: Vec<String>,
    formed: f64,
    seed: Seed,
    draw: u64,
}

/// How a topic is announced.
const OPENINGS: [&str; 4] = ["about", "on", "think of", "tell of"];
/// How a second topic is joined to it. None of them is a prompt's own wording.
const JOINTS: [&str; 4] = [" and", " with", ",", ", and"];

impl Library {
    /// A library whose order of documents is a function of the seed. The share `formed` of the
    /// answers that could do so ends with a refined prompt.
    pub fn new(seed: &Seed, formed: f64) -> Library {
        let numbers = number_items();
        let of = |category: &Category| {
            let all = numbers.iter().enumerate();
            all.filter(|(_, item)| item.category == *category).map(|(at, _)| at).collect()
        };
        Library {
            by_category: Category::ALL.iter().map(of).collect(),
            words: words(),
            numbers,
            colours: colour_items(),
            formed,
            seed: seed.derive(Purpose::Data, &[10]),
            draw: 0,
        }
    }

    fn below(&mut self, count: usize) -> usize {
        let at = (self.seed.uniform(self.draw) * count as f64) as usize;
        self.draw += 1;
        at
    }

    fn chance(&mut self, share: f64) -> bool {
        self.draw += 1;
        self.seed.uniform(self.draw - 1) < share
    }

    /// The next document.
    pub fn document(&mut self) -> Document {
        match self.below(100) {
            0..30 => self.copy(),
            30..36 => self.caption(),
            _ => self.knowledge(),
        }
    }

    fn copy(&mut self) -> Document {
        let length = 2 + self.below(5);
        let list: Vec<String> = (0..length)
            .map(|_| {
                let at = self.below(self.words.len());
                self.words[at].clone()
            })
            .collect();
        let list = list.join(" ");
        Document { given: format!("say {list} :"), told: format!(" {list} ."), chat: false }
    }

    fn caption(&mut self) -> Document {
        let (digit, colour) = (self.below(NUMBERS.len()), self.below(COLOURS.len()));
        let place = self.below(PLACES.len());
        let told = caption(digit as u8, colour as u8, place as u8);
        Document { given: String::new(), told, chat: false }
    }

    fn knowledge(&mut self) -> Document {
        let number = match self.below(2) {
            0 => self.below(self.numbers.len()),
            _ => {
                let category = self.below(self.by_category.len());
                let at = self.below(self.by_category[category].len());
                self.by_category[category][at]
            }
        };
        let colour = self.below(self.colours.len());
        let (opening, joint) = (self.below(OPENINGS.len()), self.below(JOINTS.len()));
        let (placed, place) = (self.below(10) < 6, self.below(PLACES.len()));
        let chat = self.below(10) < 4;
        // No draw where there is no share: other documents stay what they are.
        let formed = self.formed > 0.0 && chat && placed && self.chance(self.formed);
        let (number, colour) = (&self.numbers[number], &self.colours[colour]);
        let at = if placed { format!(", at the {}", PLACES[place]) } else { String::new() };
        let topic = format!(
            "{} {}{} the color of {}{at}",
            OPENINGS[opening], number.phrase, JOINTS[joint], colour.thing
        );
        let known = format!("{} {}", number.knowledge, colour.knowledge);
        match (chat, placed) {
            (true, _) if formed => {
                let short = caption(number.value, colour.colour, place as u8);
                let told = format!("recall that {known}\nRevised Prompt:\n{short}");
                Document { given: topic, told, chat }
            }
            (true, _) => Document { given: topic, told: format!("recall that {known}"), chat },
            (false, false) => {
                Document { given: format!("{topic} :"), told: format!(" {known}"), chat }
            }
            (false, true) => {
                let short = caption(number.value, colour.colour, place as u8);
                let told = format!(" {known} in short : {short}");
                Document { given: format!("{topic} :"), told, chat }
            }
        }
    }
}

/// Every word of the world, in order.
fn words() -> Vec<String> {
    let mut words = BTreeSet::new();
    for line in vocabulary(&[]) {
        let letters = |word: &&str| word.chars().all(|c| c.is_ascii_lowercase());
        words.extend(line.split_whitespace().filter(letters).map(str::to_owned));
    }
    words.into_iter().collect()
}

/// Worked examples on the items of the training split, made by a teacher that is often hasty.
pub fn examples(teacher: &Teacher, seed: &Seed, count: usize) -> Vec<Example> {
    let prompts = draw_prompts(Split::Train, &seed.derive(Purpose::Data, &[13]), count);
    let made = (0..count).map(|index| {
        let seed = seed.derive(Purpose::Data, &[11, index as u64]);
        example(&prompts[index], teacher, &seed)
    });
    made.collect()
}

fn example(prompt: &Prompt, teacher: &Teacher, seed: &Seed) -> Example {
    let careful = seed.uniform(0) >= teacher.hasty;
    let (reasoning, refined) = if careful {
        let reasoning =
            format!("recall that {} {}", prompt.number.knowledge, prompt.colour.knowledge);
        (reasoning, prompt.refined())
    } else {
        let random = |draw: u64, count: usize| (seed.uniform(draw) * count as f64) as u8;
        let digit = match seed.uniform(1) < teacher.digit_skill {
            true => prompt.number.value,
            false => random(2, NUMBERS.len()),
        };
        let colour = match seed.uniform(3) < teacher.colour_skill {
            true => prompt.colour.colour,
            false => random(4, COLOURS.len()),
        };
        ("easy .".to_owned(), caption(digit, colour, prompt.place))
    };
    Example { prompt: prompt.text(), reasoning, refined, careful }
}

/// Text that has every word the world uses, each spelled as it will occur: what the tokenizer learns
/// from. `extra` is put in beside (the templates).
pub fn vocabulary(extra: &[&str]) -> Vec<String> {
    let mut lines: Vec<String> = extra.iter().map(|line| (*line).to_owned()).collect();
    for number in number_items() {
        lines.push(format!("about {} : {}", number.phrase, number.knowledge));
        lines.push(format!("{}, in the color of, at the", number.phrase));
        lines.push(number.knowledge);
    }
    for colour in colour_items() {
        lines.push(format!("and the color of {} :", colour.thing));
        lines.push(format!("the color of {}, {}", colour.thing, colour.knowledge));
    }
    for place in 0..PLACES.len() as u8 {
        for value in 0..NUMBERS.len() as u8 {
            lines.push(caption(value, value, place));
        }
    }
    for opening in OPENINGS {
        lines.push(format!("{opening} , in short :"));
        lines.push(format!(" {opening} and with , on"));
    }
    lines.push("draw , say easy .\nRevised Prompt:\na .\nrecall that\n".to_owned());
    lines
}
