//! What there is to know in the small world: numbers that have to be inferred, and colours of things.

use serde::{Deserialize, Serialize};

/// English words of the digits, by value.
pub const NUMBERS: [&str; 10] =
    ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"];

/// Names of the colours, in label order.
pub const COLOURS: [&str; 6] = ["red", "green", "blue", "yellow", "purple", "white"];

/// Names of the places, in label order: row by row.
pub const PLACES: [&str; 4] = ["top left", "top right", "bottom left", "bottom right"];

/// Things that are known by their colour.
const THINGS: [(&str, [&str; 9]); 6] = [
    (
        "red",
        [
            "blood",
            "strawberries",
            "rubies",
            "tomatoes",
            "cherries",
            "roses",
            "bricks",
            "lobsters",
            "ketchup",
        ],
    ),
    (
        "green",
        [
            "grass",
            "lettuce",
            "frogs",
            "emeralds",
            "cucumbers",
            "peas",
            "moss",
            "broccoli",
            "clover",
        ],
    ),
    (
        "blue",
        [
            "sky",
            "sapphires",
            "denim",
            "oceans",
            "lakes",
            "blueberries",
            "cobalt",
            "cornflowers",
            "bluebirds",
        ],
    ),
    (
        "yellow",
        [
            "bananas",
            "lemons",
            "sunshine",
            "canaries",
            "butter",
            "corn",
            "daffodils",
            "mustard",
            "chicks",
        ],
    ),
    (
        "purple",
        [
            "plums",
            "grapes",
            "violets",
            "lavender",
            "eggplants",
            "amethysts",
            "lilacs",
            "orchids",
            "mulberries",
        ],
    ),
    ("white", ["snow", "milk", "salt", "swans", "cotton", "chalk", "ivory", "sugar", "pearls"]),
];

/// Who has how many of what.
const COUNTS: [(&str, u8, &str); 48] = [
    ("spider", 8, "legs"),
    ("ant", 6, "legs"),
    ("horse", 4, "legs"),
    ("hen", 2, "legs"),
    ("snake", 0, "legs"),
    ("lion", 4, "paws"),
    ("bee", 6, "feet"),
    ("crab", 8, "feet"),
    ("car", 4, "wheels"),
    ("bicycle", 2, "wheels"),
    ("tricycle", 3, "wheels"),
    ("unicycle", 1, "wheels"),
    ("boat", 0, "wheels"),
    ("sled", 0, "wheels"),
    ("triangle", 3, "sides"),
    ("square", 4, "sides"),
    ("pentagon", 5, "sides"),
    ("hexagon", 6, "sides"),
    ("heptagon", 7, "sides"),
    ("octagon", 8, "sides"),
    ("nonagon", 9, "sides"),
    ("circle", 0, "sides"),
    ("cube", 6, "faces"),
    ("tetrahedron", 4, "faces"),
    ("octahedron", 8, "faces"),
    ("coin", 2, "faces"),
    ("week", 7, "days"),
    ("weekend", 2, "days"),
    ("quarter", 3, "months"),
    ("season", 3, "months"),
    ("pregnancy", 9, "months"),
    ("hand", 5, "fingers"),
    ("foot", 5, "toes"),
    ("starfish", 5, "arms"),
    ("octopus", 8, "arms"),
    ("human", 2, "arms"),
    ("cyclops", 1, "eyes"),
    ("worm", 0, "eyes"),
    ("guitar", 6, "strings"),
    ("violin", 4, "strings"),
    ("drum", 0, "strings"),
    ("rainbow", 7, "colors"),
    ("unicorn", 1, "horns"),
    ("bull", 2, "horns"),
    ("trident", 3, "tips"),
    ("fork", 4, "tips"),
    ("cat", 9, "lives"),
    ("ladybird", 7, "dots"),
];

/// What is counted.
const ANIMALS: [&str; 10] =
    ["dog", "cow", "pig", "goat", "duck", "mouse", "bear", "wolf", "fox", "owl"];

/// The kinds of inference that a prompt can ask for, as WISE (arXiv 2503.07265) sorts its prompts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Category {
    /// Sums and differences.
    Arithmetic,
    /// What comes before and after.
    Sequence,
    /// How many things are listed.
    Counting,
    /// How many of something a thing has.
    Facts,
}

impl Category {
    /// All of them.
    pub const ALL: [Category; 4] =
        [Category::Arithmetic, Category::Sequence, Category::Counting, Category::Facts];

    /// Its name in files.
    pub fn name(self) -> &'static str {
        match self {
            Category::Arithmetic => "arithmetic",
            Category::Sequence => "sequence",
            Category::Counting => "counting",
            Category::Facts => "facts",
        }
    }
}

/// A number that has to be inferred.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NumberItem {
    /// The kind of inference.
    pub category: Category,
    /// How a prompt puts it: `the number of legs of a spider`.
    pub phrase: String,
    /// What there is to know about it: `a spider has eight legs .`
    pub knowledge: String,
    /// The number.
    pub value: u8,
}

/// A colour that has to be inferred.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ColourItem {
    /// The thing, as a prompt names it.
    pub thing: &'static str,
    /// What there is to know about it: `grass is green .`
    pub knowledge: String,
    /// Its colour, an index into [`COLOURS`].
    pub colour: u8,
}

/// Every number item, category by category, in a fixed order.
pub fn number_items() -> Vec<NumberItem> {
    let mut items = arithmetic();
    items.extend(sequence());
    items.extend(counting());
    items.extend(COUNTS.iter().map(|(who, value, what)| {
        let article = if who.starts_with(['a', 'e', 'i', 'o']) { "an" } else { "a" };
        NumberItem {
            category: Category::Facts,
            phrase: format!("the number of {what} of {article} {who}"),
            knowledge: format!("{article} {who} has {} {what} .", word(*value)),
            value: *value,
        }
    }));
    items
}

/// Every colour item, colour by colour.
pub fn colour_items() -> Vec<ColourItem> {
    let all = THINGS.iter().zip(0u8..).flat_map(|((name, things), colour)| {
        things.iter().map(move |thing| ColourItem {
            thing,
            knowledge: format!("the color of {thing} is {name} ."),
            colour,
        })
    });
    all.collect()
}

/// The word of a digit.
fn word(value: u8) -> &'static str {
    NUMBERS[usize::from(value)]
}

fn arithmetic() -> Vec<NumberItem> {
    let mut items = Vec::new();
    let mut add = |phrase: String, value: u8| {
        items.push(NumberItem {
            category: Category::Arithmetic,
            knowledge: format!("{phrase} is {} .", word(value)),
            phrase,
            value,
        });
    };
    for a in 0..=9u8 {
        for b in 1..=9u8 {
            if a + b <= 9 {
                add(format!("{} plus {}", word(a), word(b)), a + b);
            }
            if a >= b {
                add(format!("{} minus {}", word(a), word(b)), a - b);
            }
        }
    }
    items
}

fn sequence() -> Vec<NumberItem> {
    let mut items = Vec::new();
    for value in 0..=9i8 {
        for (relation, step) in
            [("after", 1i8), ("before", -1), ("two after", 2), ("two before", -2)]
        {
            let from = value - step;
            if (0..=9).contains(&from) {
                let (from, to) = (NUMBERS[from as usize], NUMBERS[value as usize]);
                items.push(NumberItem {
                    category: Category::Sequence,
                    phrase: format!("the number {relation} {from}"),
                    knowledge: format!("{relation} {from} comes {to} ."),
                    value: value as u8,
                });
            }
        }
    }
    items
}

/// Lists of animals, one to five long, by a fixed rule: no list is a part of the rule's choice that
/// another shares, since each is taken once.
fn counting() -> Vec<NumberItem> {
    let mut items: Vec<NumberItem> = Vec::new();
    let count = ANIMALS.len();
    for length in 1..=5usize {
        for start in 0..count {
            let stride = [1, 3, 7, 9][(start + length) % 4];
            let list: Vec<&str> =
                (0..length).map(|i| ANIMALS[(start + i * stride) % count]).collect();
            let told: Vec<String> = list
                .iter()
                .enumerate()
                .map(|(i, animal)| format!("{} {animal}", NUMBERS[i + 1]))
                .collect();
            items.push(NumberItem {
                category: Category::Counting,
                phrase: format!("as many as {}", list.join(" ")),
                knowledge: format!("{} .", told.join(" ")),
                value: length as u8,
            });
        }
    }
    items
}
