//! What ends the process, and the exit code it ends with.

use crate::error::WorkError;
use crate::evaluate::EvalError;
use crate::evaluate::command::EvalCommandError;
use crate::picture::PictureError;
use crate::sample::SampleError;
use duet_models::ModelError;
use duet_service::exit;
use duet_service::place::PlaceError;
use duet_service::worker::SessionError;

/// A failure of the whole process.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The configuration is wrong.
    #[error("{0}")]
    Config(String),
    /// The store or the system refused.
    #[error("{0}")]
    Io(String),
    /// Nothing says who this process is, or it has no GPU.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// The session with the coordinator ended early.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// The models cannot be loaded or run.
    #[error(transparent)]
    Work(#[from] WorkError),
    /// libtorch cannot be set up.
    #[error(transparent)]
    Torch(#[from] duet_torch::InitError),
    /// `eval` failed.
    #[error(transparent)]
    Eval(#[from] EvalCommandError),
    /// `sample` failed.
    #[error(transparent)]
    Sample(#[from] SampleError),
}

impl Failure {
    /// The exit code.
    pub fn exit_code(&self) -> u8 {
        match self {
            Failure::Config(_) => exit::CONFIG,
            Failure::Io(_) => exit::IO,
            Failure::Place(error) => error.exit_code(),
            Failure::Session(error) => error.exit_code(),
            Failure::Work(error) => work(error),
            Failure::Torch(_) => exit::OTHER,
            Failure::Eval(EvalCommandError::Prompts(duet_config::prompts::PromptsError::Io {
                ..
            })) => exit::IO,
            Failure::Eval(EvalCommandError::Prompts(_) | EvalCommandError::Judge { .. }) => {
                exit::CONFIG
            }
            Failure::Eval(EvalCommandError::Eval(error)) => match error {
                EvalError::Work(error) => work(error),
                EvalError::Prompt { source, .. } => model(source),
                EvalError::Judge(_) => exit::OTHER,
                EvalError::Picture(error) => picture(error),
                EvalError::Io { .. } => exit::IO,
            },
            Failure::Sample(error) => sample(error),
        }
    }
}

fn sample(error: &SampleError) -> u8 {
    match error {
        SampleError::Work(error) => work(error),
        SampleError::Picture(error) => picture(error),
        SampleError::Prompt { source, .. } => model(source),
        SampleError::Prompts(duet_config::prompts::PromptsError::Io { .. })
        | SampleError::Place(_)
        | SampleError::Io { .. } => exit::IO,
        SampleError::Prompts(_) => exit::CONFIG,
        SampleError::Out { .. } => exit::USAGE,
    }
}

fn work(error: &WorkError) -> u8 {
    match error {
        WorkError::Model(error) => model(error),
        WorkError::Artifact(_) | WorkError::Weights(_) | WorkError::Store(_) => exit::IO,
        _ => exit::OTHER,
    }
}

fn model(error: &ModelError) -> u8 {
    match error {
        ModelError::Io { .. } => exit::IO,
        ModelError::NotFinite { .. } | ModelError::Torch(_) => exit::OTHER,
        _ => exit::CONFIG,
    }
}

fn picture(error: &PictureError) -> u8 {
    match error {
        PictureError::Io { .. } => exit::IO,
        PictureError::Encode { .. } => exit::OTHER,
    }
}
