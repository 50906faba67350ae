//! The command: from arguments to a finished evaluation.

use super::{EvalError, Evaluation, Judge, Options, WorldJudge, evaluate};
use crate::args::EvalArgs;
use crate::load;
use std::path::PathBuf;

/// An evaluation failed.
#[derive(Debug, thiserror::Error)]
pub enum EvalCommandError {
    /// The prompt file cannot be used.
    #[error(transparent)]
    Prompts(#[from] duet_config::prompts::PromptsError),
    /// The judge cannot be loaded.
    #[error("the judge of {}: {reason}", folder.display())]
    Judge {
        /// The folder it was sought in.
        folder: PathBuf,
        /// Why.
        reason: String,
    },
    /// The evaluation itself failed.
    #[error(transparent)]
    Eval(#[from] EvalError),
}

/// Evaluates as the command line says; `say` is told what is going on, a line at a time.
///
/// # Errors
/// [`EvalCommandError`] naming the file, folder or prompt.
pub fn run(args: &EvalArgs, mut say: impl FnMut(&str)) -> Result<Evaluation, EvalCommandError> {
    let mut rows = duet_config::prompts::read(&args.prompts)?;
    rows.truncate(args.limit.unwrap_or(usize::MAX));
    let folder = args.judge.as_ref().unwrap_or(&args.model);
    let judge = WorldJudge::load(folder)
        .map_err(|reason| EvalCommandError::Judge { folder: folder.clone(), reason })?;
    if judge.is_none() {
        say("there is no judge in the model folder: images are made, not judged");
    }
    let mut engine = load::engine(&args.model, &args.sampling).map_err(EvalError::from)?;
    let options = Options {
        seed: args.seed,
        think: !args.sampling.no_think,
        images_per_prompt: args.images_per_prompt.max(1),
    };
    let count = rows.len();
    let judge = judge.as_ref().map(|judge| judge as &dyn Judge);
    let done = evaluate(&mut engine, judge, &rows, &options, &args.out, |done| {
        if done % 8 == 0 || done == count {
            say(&format!("evaluated {done} of {count} prompts"));
        }
    })?;
    let percent =
        |share: Option<f64>| share.map_or("-".to_owned(), |s| format!("{:.1} %", 100.0 * s));
    let totals = &done.totals;
    say(&format!(
        "image right {}, trace right {}, image as refined {}",
        percent(totals.semantic_accuracy),
        percent(totals.trace_accuracy),
        percent(totals.render_accuracy),
    ));
    Ok(done)
}
