//! The rows of the paper's experiment, and what is done for each.

/// What a row starts from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// The base model.
    Base,
    /// The base model after SFT.
    Sft,
}

/// Which models reinforcement learning trains, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Training {
    /// Both at every iteration.
    Balanced,
    /// The LLM in the first half of the iterations, the DiT in the second.
    Staged,
    /// The LLM alone.
    LlmOnly,
    /// The DiT alone.
    DitOnly,
}

impl Training {
    /// The overrides of the configuration that say so.
    pub fn set(self, iterations: u32) -> Vec<String> {
        let weights = |llm: &str, dit: &str| {
            vec![
                "schedule.kind=\"weights\"".to_owned(),
                format!("schedule.llm_weight={llm}"),
                format!("schedule.dit_weight={dit}"),
            ]
        };
        match self {
            Training::Balanced => vec!["schedule.kind=\"balanced\"".to_owned()],
            Training::Staged => vec![
                "schedule.kind=\"staged\"".to_owned(),
                format!("schedule.switch_at={}", iterations / 2),
            ],
            Training::LlmOnly => weights("1.0", "0.0"),
            Training::DitOnly => weights("0.0", "1.0"),
        }
    }
}

/// A row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// Its name on the command line and in files.
    pub id: &'static str,
    /// Its name for people.
    pub label: &'static str,
    /// What it starts from.
    pub start: Start,
    /// Whether the model is asked to think before it draws.
    pub think: bool,
    /// Reinforcement learning, where there is any.
    pub training: Option<Training>,
    /// WISE of the paper (tables 1 and 4); empty where it shows none.
    pub wise: &'static str,
    /// T2I-ReasonBench, accuracy, of the paper (tables 2, 4 and 5).
    pub reason: &'static str,
}

const fn row(id: &'static str, label: &'static str, start: Start) -> Row {
    Row { id, label, start, think: true, training: None, wise: "", reason: "" }
}

/// All rows, in the order in which they are done and shown.
pub const ROWS: [Row; 8] = [
    Row {
        think: false,
        wise: "0.61",
        reason: "57.8",
        ..row("base", "base, no thinking", Start::Base)
    },
    Row { wise: "0.65", reason: "60.9", ..row("zero-shot", "zero-shot thinking", Start::Base) },
    Row { wise: "0.74", reason: "66.1", ..row("sft", "SFT", Start::Sft) },
    Row {
        training: Some(Training::Balanced),
        wise: "0.70",
        reason: "66.9",
        ..row("grpo-without-sft", "GRPO without SFT", Start::Base)
    },
    Row {
        training: Some(Training::Staged),
        wise: "0.79",
        reason: "68.3",
        ..row("staged", "SFT + GRPO, staged", Start::Sft)
    },
    Row {
        training: Some(Training::Balanced),
        reason: "69.8",
        ..row("balanced", "SFT + GRPO, balanced", Start::Sft)
    },
    Row {
        training: Some(Training::LlmOnly),
        ..row("llm-only", "SFT + GRPO, LLM only", Start::Sft)
    },
    Row {
        training: Some(Training::DitOnly),
        ..row("dit-only", "SFT + GRPO, DiT only", Start::Sft)
    },
];

/// What the paper says of two rows: the second is better.
pub const ORDERINGS: [(&str, &str); 8] = [
    ("base", "zero-shot"),
    ("zero-shot", "sft"),
    ("sft", "staged"),
    ("sft", "balanced"),
    ("zero-shot", "grpo-without-sft"),
    ("grpo-without-sft", "sft"),
    ("grpo-without-sft", "balanced"),
    ("staged", "balanced"),
];
