//! Pictures as PNG files that say how they were made.

use std::path::{Path, PathBuf};

/// A picture cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum PictureError {
    /// The system refused.
    #[error("cannot write {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// Its pixels or texts cannot be encoded.
    #[error("cannot encode {}: {source}", path.display())]
    Encode {
        /// The file.
        path: PathBuf,
        /// Why.
        source: png::EncodingError,
    },
}

/// An RGB picture with named texts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    /// Pixels.
    pub width: u32,
    /// Pixels.
    pub height: u32,
    /// RGB, row by row: `height x width x 3`.
    pub pixels: Vec<u8>,
    /// Texts by keyword (`prompt`, `seed`, ...), at most 79 Latin-1 characters each.
    pub texts: Vec<(String, String)>,
}

impl Picture {
    /// The file. Equal pictures give equal bytes. A text goes into a `tEXt` chunk where Latin-1 can
    /// hold it, and into an `iTXt` chunk (UTF-8) where it cannot.
    ///
    /// # Errors
    /// `pixels` are not `width x height x 3`, or a keyword is not one that PNG allows.
    pub fn encode(&self) -> Result<Vec<u8>, png::EncodingError> {
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, self.width, self.height);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        for (keyword, text) in &self.texts {
            if text.chars().all(|c| u32::from(c) < 256) {
                encoder.add_text_chunk(keyword.clone(), text.clone())?;
            } else {
                encoder.add_itxt_chunk(keyword.clone(), text.clone())?;
            }
        }
        let mut writer = encoder.write_header()?;
        writer.write_image_data(&self.pixels)?;
        writer.finish()?;
        Ok(bytes)
    }

    /// Writes the file beside its place, then moves it there.
    ///
    /// # Errors
    /// [`PictureError`] when it cannot be encoded or written; then the place is as it was.
    pub fn save(&self, path: &Path) -> Result<(), PictureError> {
        let bytes = self
            .encode()
            .map_err(|source| PictureError::Encode { path: path.to_owned(), source })?;
        let beside = path.with_extension("partial");
        let moved = std::fs::write(&beside, bytes).and_then(|()| std::fs::rename(&beside, path));
        moved.map_err(|source| PictureError::Io { path: path.to_owned(), source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picture() -> Picture {
        let texts = [("prompt", "três pássaros"), ("trace", "3 is 三\nRevised Prompt:\nA red 3.")];
        Picture {
            width: 3,
            height: 2,
            pixels: (0..18).collect(),
            texts: texts.map(|(k, v)| (k.to_owned(), v.to_owned())).to_vec(),
        }
    }

    #[test]
    fn pixels_and_texts_come_back() {
        let bytes = picture().encode().unwrap();
        assert_eq!(bytes, picture().encode().unwrap());
        let mut reader = png::Decoder::new(std::io::Cursor::new(bytes)).read_info().unwrap();
        let mut pixels = vec![0; 18];
        reader.next_frame(&mut pixels).unwrap();
        reader.finish().unwrap();
        assert_eq!(pixels, picture().pixels);
        let info = reader.info();
        assert_eq!(info.uncompressed_latin1_text[0].text, "três pássaros");
        assert_eq!(info.utf8_text[0].get_text().unwrap(), picture().texts[1].1);
    }

    #[test]
    fn too_few_pixels_are_an_error_and_leave_no_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.png");
        let short = Picture { pixels: vec![0; 5], ..picture() };
        assert!(short.save(&path).unwrap_err().to_string().contains("a.png"));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        let nowhere = folder.path().join("no/such/a.png");
        assert!(picture().save(&nowhere).unwrap_err().to_string().contains("no/such/a.png"));
    }
}
