//! A scorer of the user's behind HTTP: a vision-language model, an aesthetic head, whatever answers
//! `POST` with JSON. `docs/scorers.md` has the protocol.

use crate::scorer::{Job, Scorer};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use duet_config::HttpScorer;
use duet_core::work::{LeafScores, Score};
use image::{ExtendedColorType, ImageEncoder, codecs::png::PngEncoder};
use reqwest::{Client, StatusCode};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use tch::{Device, Kind, Tensor};
use tokio::runtime::Runtime;

/// Between two attempts at a server that cannot be reached or is overloaded; doubles.
const PAUSE: Duration = Duration::from_millis(100);
/// An answer longer than this is none.
const MAX_ANSWER: usize = 1 << 20;

/// A server that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    /// The variable that holds the token is not set.
    #[error("reward.http.token_env: the environment has no variable `{0}`; set it to the token")]
    NoToken(String),
    /// The token cannot be sent.
    #[error("reward.http.token_env: `{0}` holds characters that a header cannot have")]
    BadToken(String),
    /// The client cannot be made.
    #[error("reward.http: {0}")]
    Client(String),
}

/// What is asked of the server.
#[derive(Debug, Serialize)]
struct Question<'a> {
    /// What each component is judged against.
    components: BTreeMap<&'a str, &'a str>,
    prompt: &'a str,
    refined_prompt: &'a str,
    /// What the prompt file says of the prompt; null where it says nothing.
    meta: serde_json::Value,
    /// PNG files in base64.
    images: Vec<String>,
}

/// What it says.
#[derive(Debug, Deserialize)]
struct Answer {
    /// One for each image: null or nothing where there is no score.
    scores: Vec<BTreeMap<String, Option<f64>>>,
    /// Why components have none.
    #[serde(default)]
    errors: BTreeMap<String, String>,
}

/// A [`Scorer`] that asks a server.
#[derive(Debug)]
pub struct Remote {
    settings: HttpScorer,
    limit: Duration,
    token: Option<String>,
    client: Client,
    runtime: Runtime,
}

impl Remote {
    /// A scorer that asks the server of the configuration; it must answer within `limit`.
    ///
    /// # Errors
    /// [`HttpError`]. The server itself need not be there yet.
    pub fn new(settings: &HttpScorer, limit: Duration) -> Result<Remote, HttpError> {
        let token = match &settings.token_env {
            None => None,
            Some(name) => {
                let token = std::env::var(name).map_err(|_| HttpError::NoToken(name.clone()))?;
                let fits = token.bytes().all(|byte| (0x21..0x7f).contains(&byte));
                Some(fits.then_some(token).ok_or_else(|| HttpError::BadToken(name.clone()))?)
            }
        };
        // Another part of the process may have installed the provider already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = Client::builder().build();
        let client = client.map_err(|error| HttpError::Client(error.to_string()))?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|error| HttpError::Client(error.to_string()))?;
        Ok(Remote { settings: settings.clone(), limit, token, client, runtime })
    }

    fn question<'a>(&'a self, job: &'a Job) -> Result<Question<'a>, String> {
        let against = |component: &'a String| {
            let refined = self.settings.refined.contains(component);
            let text = if refined { &job.refined_prompt } else { &job.prompt.text };
            (component.as_str(), text.as_str())
        };
        let meta = match job.prompt.meta.as_str() {
            "" => serde_json::Value::Null,
            text => serde_json::from_str(text).unwrap_or_else(|_| text.into()),
        };
        Ok(Question {
            components: self.settings.components.iter().map(against).collect(),
            prompt: &job.prompt.text,
            refined_prompt: &job.refined_prompt,
            meta,
            images: pngs(&job.images)?,
        })
    }

    /// Asks until there is an answer, the server says no, or time is over.
    async fn ask(&self, question: &Question<'_>) -> Result<Answer, String> {
        let (end, mut pause) = (Instant::now() + self.limit, PAUSE);
        loop {
            let reason = match self.attempt(question, end).await {
                Ok(answer) => return Ok(answer),
                Err(Trouble::Final(reason)) => return Err(reason),
                Err(Trouble::Passing(reason)) => reason,
            };
            if Instant::now() + pause >= end {
                return Err(reason);
            }
            tokio::time::sleep(pause).await;
            pause *= 2;
        }
    }

    async fn attempt(&self, question: &Question<'_>, end: Instant) -> Result<Answer, Trouble> {
        let left = end.saturating_duration_since(Instant::now());
        let mut request = self.client.post(&self.settings.url).timeout(left).json(question);
        if let Some(token) = &self.token {
            request = request.bearer_auth(token);
        }
        // `without_url`: it may hold credentials, and reasons are logged.
        let sent = request.send().await.map_err(reqwest::Error::without_url);
        let mut response = sent.map_err(|error| Trouble::Passing(told(&error)))?;
        let status = response.status();
        let mut body = Vec::new();
        loop {
            match response.chunk().await {
                Ok(Some(piece)) if body.len() + piece.len() <= MAX_ANSWER => {
                    body.extend_from_slice(&piece);
                }
                Ok(Some(_)) => {
                    let reason = format!("the scorer's answer is longer than {MAX_ANSWER} bytes");
                    return Err(Trouble::Final(reason));
                }
                Ok(None) => break,
                Err(error) => return Err(Trouble::Passing(told(&error.without_url()))),
            }
        }
        if !status.is_success() {
            let begins: String = String::from_utf8_lossy(&body).chars().take(200).collect();
            let reason = format!("the scorer answered {status}: {begins}");
            let busy = status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS;
            return Err(if busy { Trouble::Passing(reason) } else { Trouble::Final(reason) });
        }
        serde_json::from_slice(&body).map_err(|error| {
            Trouble::Final(format!("the scorer's answer is not understood: {error}"))
        })
    }
}

/// What is wrong with an attempt: worth another, or final.
enum Trouble {
    Passing(String),
    Final(String),
}

/// An error with what lies under it: reqwest's own text says little.
fn told(error: &reqwest::Error) -> String {
    let mut text = format!("the scorer cannot be asked: {error}");
    let mut source = std::error::Error::source(error);
    while let Some(inner) = source {
        text += &format!(": {inner}");
        source = inner.source();
    }
    text
}

impl Scorer for Remote {
    fn components(&self) -> Vec<String> {
        self.settings.components.clone()
    }

    fn score(&mut self, job: &Job) -> Result<Vec<LeafScores>, String> {
        let question = self.question(job)?;
        let answer = self.runtime.block_on(self.ask(&question))?;
        let leaf = |scores: &BTreeMap<String, Option<f64>>| -> LeafScores {
            let of = |component: &String| {
                let score = match (scores.get(component), answer.errors.get(component)) {
                    (Some(Some(value)), _) => Score::Scored(*value),
                    (_, Some(reason)) => Score::Failed(reason.clone()),
                    _ => Score::Failed("the scorer left it out".to_owned()),
                };
                (component.clone(), score)
            };
            self.settings.components.iter().map(of).collect()
        };
        Ok(answer.scores.iter().map(leaf).collect())
    }
}

/// Each image of `u8 [K, H, W, 3]` as a PNG file in base64.
fn pngs(images: &Tensor) -> Result<Vec<String>, String> {
    let wrong = |error: tch::TchError| format!("the images cannot be read: {error}");
    let [count, height, width, 3] = images.size()[..] else {
        return Err(format!("images have shape {:?}, expected [K, H, W, 3]", images.size()));
    };
    let images = images.f_to_device(Device::Cpu).and_then(|i| i.f_to_kind(Kind::Uint8));
    let images = images.and_then(|images| images.f_contiguous()).map_err(wrong)?;
    let side = |pixels: i64| u32::try_from(pixels).map_err(|error| error.to_string());
    let (width, height) = (side(width)?, side(height)?);
    let one = |index: i64| {
        let flat = images.f_select(0, index).and_then(|image| image.f_flatten(0, -1));
        let bytes = Vec::<u8>::try_from(&flat.map_err(wrong)?).map_err(wrong)?;
        let mut file = Vec::new();
        PngEncoder::new(&mut file)
            .write_image(&bytes, width, height, ExtendedColorType::Rgb8)
            .map_err(|error| format!("an image cannot be encoded: {error}"))?;
        Ok(STANDARD.encode(file))
    };
    (0..count).map(one).collect()
}
