//! The thinking prompt: the chat turn that asks for a chain of thought and a refined prompt, and
//! taking the refined prompt out of the answer.

use crate::error::{ModelError, Result};
use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, context};

/// What separates the reasoning from the refined prompt.
pub const MARKER: &str = "Revised Prompt:";

/// Qwen2.5's chat format for turns of plain text.
const CHAT: &str = "{%- if messages[0].role != 'system' -%}\
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{%- endif -%}\
{%- for message in messages -%}\
{{ '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' }}{%- endfor -%}\
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}";

/// The instruction used when none is configured: the contents that arXiv 2601.10332 describes, in
/// words of our own.
pub const INSTRUCTION: &str = "You are a prompt optimizer specializing in image generation models. \
Rewrite the user's prompt into a clear version that is easy to render.\n\
1. Start from the prompt and reason step by step about the object or scene it asks for.\n\
2. Describe what will finally be seen: the main subject, its shape, colour and state.\n\
3. Where you are confident of what is meant, name it directly in your reasoning and in the result.\n\
4. Turn technical concepts into intuitive visual descriptions.\n\
5. Stay with the user's intent.\n\
First explain your reasoning. Then give the final prompt on the line after `Revised Prompt:`.\n\
Prompt: \n";

/// Makes the token text that the language model continues.
#[derive(Clone, Debug)]
pub struct ThinkTemplate {
    instruction: String,
    chat: Environment<'static>,
}

impl ThinkTemplate {
    /// `instruction` is put before the raw prompt, in the user's turn; `chat` is the tokenizer's chat
    /// template, or Qwen2.5's for plain text.
    ///
    /// # Errors
    /// When the chat template is not valid Jinja.
    pub fn new(instruction: &str, chat: Option<&str>) -> Result<ThinkTemplate> {
        let mut environment = Environment::new();
        // As transformers sets its Jinja up.
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        let fail = |error: minijinja::Error| ModelError::Template(error.to_string());
        environment.set_syntax(syntax.map_err(fail)?);
        environment.add_template_owned("chat", chat.unwrap_or(CHAT).to_owned()).map_err(fail)?;
        Ok(ThinkTemplate { instruction: instruction.to_owned(), chat: environment })
    }

    /// The text for one raw prompt, up to where the answer begins.
    pub fn render(&self, prompt: &str) -> Result<String> {
        let content = format!("{}{prompt}", self.instruction);
        let messages = [context! { role => "user", content => content }];
        self.chat
            .get_template("chat")
            .and_then(|chat| chat.render(context! { messages, add_generation_prompt => true }))
            .map_err(|error| ModelError::Template(error.to_string()))
    }
}

/// What an answer holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The refined prompt, or the whole text where there is none.
    pub refined: String,
    /// Whether the marker was there, with something after it.
    pub well_formed: bool,
}

/// Takes the refined prompt out of an answer: a leading `<think>` block is skipped, then everything
/// after the first `Revised Prompt:` counts. Without the marker, or with nothing after it, it is
/// the whole text, as the released inference code has it.
pub fn extract(text: &str) -> Answer {
    let body = skip_thought(text);
    match body.split_once(MARKER).map(|(_, refined)| refined.trim()) {
        Some(refined) if !refined.is_empty() => {
            Answer { refined: refined.to_owned(), well_formed: true }
        }
        _ => Answer { refined: text.trim().to_owned(), well_formed: false },
    }
}

/// What follows a leading `<think>…</think>`; the text itself where there is no whole block. The
/// paper's figure closes it with `<\think>`.
fn skip_thought(text: &str) -> &str {
    let Some(inside) = text.trim_start().strip_prefix("<think>") else {
        return text;
    };
    let closed = ["</think>", "<\\think>"].iter().filter_map(|tag| inside.split_once(tag));
    closed.map(|(_, after)| after).max_by_key(|after| after.len()).unwrap_or(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_chat_is_qwens() {
        let template = ThinkTemplate::new("Draw. Prompt: \n", None).unwrap();
        assert_eq!(
            template.render("{{ a {% four").unwrap(),
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nDraw. \
             Prompt: \n{{ a {% four<|im_end|>\n<|im_start|>assistant\n"
        );
        assert!(ThinkTemplate::new("", Some("{% if %}")).is_err());
    }

    #[test]
    fn the_refined_prompt_is_found() {
        let found = |text: &str| {
            let answer = extract(text);
            (answer.refined, answer.well_formed)
        };
        let good = |refined: &str| (refined.to_owned(), true);
        assert_eq!(found("Four.\nRevised Prompt:\na red 4\n"), good("a red 4"));
        assert_eq!(found("Revised Prompt: a\nb Revised Prompt: c"), good("a\nb Revised Prompt: c"));
        assert_eq!(found("<think>Revised Prompt: no</think>\nRevised Prompt:\nyes"), good("yes"));
        assert_eq!(found("<think>x<\\think> Revised Prompt: y"), good("y"));
        assert_eq!(found("<think>never closed Revised Prompt: y"), good("y"));
        assert_eq!(found("  no marker "), ("no marker".to_owned(), false));
        assert_eq!(found("Revised Prompt: \n"), ("Revised Prompt:".to_owned(), false));
        assert_eq!(found(""), (String::new(), false));
    }
}
