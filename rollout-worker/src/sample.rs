//! `sample`: one image from one prompt, with how it was made in the file.

use crate::args::SampleArgs;
use crate::error::WorkError;
use crate::load;
use crate::picture::{Picture, PictureError};
use duet_core::Seed;
use duet_core::work::Window;
use tch::Tensor;

/// Making a picture failed.
#[derive(Debug, thiserror::Error)]
pub enum SampleError {
    /// The models refused.
    #[error(transparent)]
    Work(#[from] WorkError),
    /// The file cannot be written.
    #[error(transparent)]
    Picture(#[from] PictureError),
}

impl From<duet_models::ModelError> for SampleError {
    fn from(error: duet_models::ModelError) -> Self {
        SampleError::Work(error.into())
    }
}

/// Makes the picture and writes it; `say` is told what is going on, a line at a time.
///
/// # Errors
/// [`SampleError`]; then no file is written.
pub fn sample(args: &SampleArgs, mut say: impl FnMut(&str)) -> Result<(), SampleError> {
    say(&format!("loading {}", args.model.display()));
    let mut engine = load::engine(&args.model, &args.sampling)?;
    let seed = Seed::root(args.seed);
    let mut texts = vec![
        ("Software".to_owned(), concat!("Duet ", env!("CARGO_PKG_VERSION")).to_owned()),
        ("prompt".to_owned(), args.prompt.clone()),
        ("seed".to_owned(), args.seed.to_string()),
    ];
    let embeds = if args.sampling.no_think {
        engine.embed(&args.prompt)?
    } else {
        say("thinking");
        let question = engine.question(&args.prompt)?;
        let thoughts = engine.think(&question, 1, &seed)?;
        let Some(thought) = thoughts.into_iter().next() else {
            return Err(duet_models::ModelError::BadInput("no trace was sampled".to_owned()).into());
        };
        say(&format!("{}\n", thought.text.trim()));
        texts.push(("trace".to_owned(), thought.text));
        texts.push(("refined prompt".to_owned(), thought.refined_prompt));
        thought.embeds
    };
    let options = engine.sampling().render.clone();
    say(&format!(
        "drawing {} x {} pixels in {} steps",
        options.width, options.height, options.steps
    ));
    let rendered = engine.draw(&embeds, 1, Window::default(), &seed)?;
    let made = format!("steps {}, cfg {}", options.steps, options.guidance);
    texts.push(("sampling".to_owned(), made));
    picture(&rendered.images, 0, texts)?.save(&args.out)?;
    say(&format!("wrote {}", args.out.display()));
    Ok(())
}

/// Image `index` of `u8 [K, H, W, 3]`.
///
/// # Errors
/// libtorch cannot copy it.
pub fn picture(
    images: &Tensor,
    index: usize,
    texts: Vec<(String, String)>,
) -> Result<Picture, duet_models::ModelError> {
    let image = images.select(0, index as i64);
    let (height, width) = (image.size()[0] as u32, image.size()[1] as u32);
    Ok(Picture { width, height, pixels: duet_torch::bytes::to_bytes(&image)?, texts })
}
