//! From file, environment and command line to one set of values.

use crate::error::{ConfigError, Problem, did_you_mean};
use crate::presets;
use crate::raw::Raw;
use config::builder::DefaultState;
use config::{ConfigBuilder, FileFormat};
use std::collections::BTreeMap;
use std::ffi::OsString;
use toml::{Table, Value};

/// The environment of this process, without what is not UTF-8 (no configuration key is).
pub fn environment() -> BTreeMap<String, String> {
    let text = |(name, value): (OsString, OsString)| {
        Some((name.into_string().ok()?, value.into_string().ok()?))
    };
    std::env::vars_os().filter_map(text).collect()
}

/// What environment variables that are meant for the configuration begin with.
const ENV_PREFIX: &str = "DUET__";

/// Where a key was set, for errors.
struct Origins {
    name: String,
    env: BTreeMap<String, String>,
    set: Vec<String>,
}

/// Reads all layers.
pub(crate) fn read(
    name: &str,
    text: &str,
    env: &BTreeMap<String, String>,
    set: &[String],
) -> Result<Raw, ConfigError> {
    let file: Table = toml::from_str(text).map_err(|error| ConfigError::Syntax {
        name: name.to_owned(),
        reason: error.to_string().trim_end().to_owned(),
    })?;
    let mut above = config::Config::builder()
        .add_source(config::File::from_str(&file.to_string(), FileFormat::Toml));
    let mut origins = Origins { name: name.to_owned(), env: BTreeMap::new(), set: Vec::new() };
    for (variable, value) in env.iter().filter(|(variable, _)| variable.starts_with(ENV_PREFIX)) {
        let key = variable[ENV_PREFIX.len()..].to_lowercase().replace("__", ".");
        above = put(above, &key, value, &format!("{variable}={value}"))?;
        origins.env.insert(key, variable.clone());
    }
    for text in set {
        let Some((key, value)) = text.split_once('=') else {
            let reason = "write `section.key=value`".to_owned();
            return Err(ConfigError::Override { text: text.clone(), reason });
        };
        above = put(above, key.trim(), value.trim(), text)?;
        origins.set.push(key.trim().to_owned());
    }
    let above = merged(above, name)?;
    let all = match above.get("preset") {
        None => above,
        Some(preset) => under(preset, above.clone(), name)?,
    };
    deserialize(&all, &origins)
}

/// The layers above, with the preset's values where they are silent.
fn under(preset: &Value, above: Table, name: &str) -> Result<Table, ConfigError> {
    let wrong = |problem: String| ConfigError::Invalid {
        name: name.to_owned(),
        problems: vec![Problem { key: "preset".to_owned(), problem }],
    };
    let names = presets::PRESETS.iter().map(|(name, _)| *name);
    let Some(preset) = preset.as_str() else {
        return Err(wrong(format!(
            "must be text: one of {}",
            names.collect::<Vec<_>>().join(", ")
        )));
    };
    let Some((_, text)) = presets::PRESETS.iter().find(|(name, _)| *name == preset) else {
        let hint = did_you_mean(preset, names.clone());
        let names = names.collect::<Vec<_>>().join(", ");
        return Err(wrong(format!("there is no preset `{preset}`{hint} (there are {names})")));
    };
    let mut below: Table = toml::from_str(text).map_err(|error| wrong(error.to_string()))?;
    // These tables mean something as a whole: one set above is not mixed with the preset's.
    for whole in ["window", "schedule"] {
        if above.get(whole).is_some_and(|table| table.get("kind").is_some()) {
            below.remove(whole);
        }
    }
    for mix in ["llm", "dit"] {
        let set = above.get("reward").is_some_and(|table| table.get(mix).is_some());
        if let (true, Some(Value::Table(reward))) = (set, below.get_mut("reward")) {
            reward.remove(mix);
        }
    }
    let builder = config::Config::builder()
        .add_source(config::File::from_str(&below.to_string(), FileFormat::Toml))
        .add_source(config::File::from_str(&above.to_string(), FileFormat::Toml));
    merged(builder, name)
}

fn merged(builder: ConfigBuilder<DefaultState>, name: &str) -> Result<Table, ConfigError> {
    let syntax = |error: config::ConfigError| ConfigError::Syntax {
        name: name.to_owned(),
        reason: error.to_string(),
    };
    builder.build().and_then(config::Config::try_deserialize).map_err(syntax)
}

/// Sets one key above everything before it.
fn put(
    builder: ConfigBuilder<DefaultState>,
    key: &str,
    value: &str,
    text: &str,
) -> Result<ConfigBuilder<DefaultState>, ConfigError> {
    let wrong = |reason: String| ConfigError::Override { text: text.to_owned(), reason };
    let plain = |part: &str| {
        !part.is_empty()
            && part.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-')
    };
    if !key.split('.').all(plain) {
        return Err(wrong(format!("`{key}` is no key; write `section.key=value`")));
    }
    let value = literal(value);
    builder.set_override(key, plain_value(value)).map_err(|error| wrong(error.to_string()))
}

/// A TOML value, or text where it is none.
fn literal(text: &str) -> Value {
    let document: Result<Table, _> = toml::from_str(&format!("value = {text}"));
    match document.ok().and_then(|mut table| table.remove("value").filter(|_| table.is_empty())) {
        Some(value) => value,
        None => Value::String(text.to_owned()),
    }
}

fn plain_value(value: Value) -> config::Value {
    use config::ValueKind;
    let kind = match value {
        Value::String(text) => ValueKind::String(text),
        Value::Integer(number) => ValueKind::I64(number),
        Value::Float(number) => ValueKind::Float(number),
        Value::Boolean(yes) => ValueKind::Boolean(yes),
        Value::Datetime(time) => ValueKind::String(time.to_string()),
        Value::Array(list) => ValueKind::Array(list.into_iter().map(plain_value).collect()),
        Value::Table(table) => ValueKind::Table(
            table.into_iter().map(|(key, value)| (key, plain_value(value))).collect(),
        ),
    };
    config::Value::new(None, kind)
}

/// Strictly: no unknown key, no number for a text, no text for a number. The values are written out
/// as TOML once more, because its reader says where in the text it stumbled, and so at which key.
fn deserialize(values: &Table, origins: &Origins) -> Result<Raw, ConfigError> {
    let text = values.to_string();
    toml::from_str::<Raw>(&text).map_err(|error| {
        let key = error.span().map(|span| key_at(&text, span.start)).unwrap_or_default();
        let (key, problem) = explain(key, error.message());
        let problem = format!("{problem}{}", origins.of(&key));
        ConfigError::Invalid {
            name: origins.name.clone(),
            problems: vec![Problem { key, problem }],
        }
    })
}

/// The key whose line holds a position of TOML text.
fn key_at(text: &str, position: usize) -> String {
    let mut section = "";
    let mut start = 0;
    for line in text.split_inclusive('\n') {
        let end = start + line.len();
        let line = line.trim();
        if let Some(name) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            section = name.trim_matches(['[', ']']);
        }
        if position < end {
            let Some((key, _)) = line.split_once(" = ") else { return section.to_owned() };
            return if section.is_empty() { key.to_owned() } else { format!("{section}.{key}") };
        }
        start = end;
    }
    section.to_owned()
}

/// Makes a deserializer's message one that says what to do.
fn explain(mut key: String, message: &str) -> (String, String) {
    let message = message.trim();
    if let Some(rest) = message.strip_prefix("unknown field `") {
        let (word, rest) = rest.split_once('`').unwrap_or((rest, ""));
        if key.is_empty() {
            key = word.to_owned();
        } else if key != word && !key.ends_with(&format!(".{word}")) {
            key = format!("{key}.{word}");
        }
        let known: Vec<&str> = rest.split('`').skip(1).step_by(2).collect();
        let hint = did_you_mean(word, known.iter().copied());
        return (key, format!("there is no such key{hint} (there are {})", known.join(", ")));
    }
    if let Some(rest) = message.strip_prefix("missing field `") {
        let word = rest.trim_end_matches('`');
        let key = if key.is_empty() { word.to_owned() } else { format!("{key}.{word}") };
        return (key, "must be given".to_owned());
    }
    if let Some(rest) = message.strip_prefix("unknown variant `") {
        let (word, rest) = rest.split_once('`').unwrap_or((rest, ""));
        let known: Vec<&str> = rest.split('`').skip(1).step_by(2).collect();
        let hint = did_you_mean(word, known.iter().copied());
        return (key, format!("`{word}` is no choice{hint} (there are {})", known.join(", ")));
    }
    (key, message.to_owned())
}

impl Origins {
    /// Where a key was set, if not in the file.
    fn of(&self, key: &str) -> String {
        if self.set.iter().any(|set| set == key) {
            return " [from --set; text that looks like a number goes in quotes]".to_owned();
        }
        match self.env.get(key) {
            Some(variable) => format!(" [from the environment variable {variable}]"),
            None => String::new(),
        }
    }
}
