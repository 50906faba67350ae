//! TensorBoard event files: TFRecord frames around `tensorflow.Event` messages.
//!
//! A frame is the length (u64, little endian), the masked CRC-32C of those eight bytes, the message,
//! and the masked CRC-32C of the message (TensorFlow `core/lib/io/record_writer.cc`). The first
//! message names the format, `brain.Event:2`; TensorBoard wants `tfevents` in the file's name.

use super::ReportError;
use super::metrics::Metrics;
use image::RgbImage;
use prost::Message;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

/// `tensorflow.Event` (`core/util/event.proto`), as far as it is written.
#[derive(Clone, PartialEq, Message)]
pub struct Event {
    /// Seconds since 1970.
    #[prost(double, tag = "1")]
    pub wall_time: f64,
    /// The iteration.
    #[prost(int64, tag = "2")]
    pub step: i64,
    /// Only in the first event.
    #[prost(string, optional, tag = "3")]
    pub file_version: Option<String>,
    /// What is told.
    #[prost(message, optional, tag = "5")]
    pub summary: Option<Summary>,
}

/// `tensorflow.Summary` (`core/framework/summary.proto`).
#[derive(Clone, PartialEq, Message)]
pub struct Summary {
    /// Named values.
    #[prost(message, repeated, tag = "1")]
    pub value: Vec<Value>,
}

/// `tensorflow.Summary.Value`: a scalar or an image.
#[derive(Clone, PartialEq, Message)]
pub struct Value {
    /// Its name; `/` makes groups.
    #[prost(string, tag = "1")]
    pub tag: String,
    /// A scalar.
    #[prost(float, optional, tag = "2")]
    pub simple_value: Option<f32>,
    /// An image.
    #[prost(message, optional, tag = "4")]
    pub image: Option<EncodedImage>,
}

/// `tensorflow.Summary.Image`.
#[derive(Clone, PartialEq, Message)]
pub struct EncodedImage {
    /// Pixels.
    #[prost(int32, tag = "1")]
    pub height: i32,
    /// Pixels.
    #[prost(int32, tag = "2")]
    pub width: i32,
    /// 3: RGB.
    #[prost(int32, tag = "3")]
    pub colorspace: i32,
    /// PNG bytes.
    #[prost(bytes = "vec", tag = "4")]
    pub encoded_image_string: Vec<u8>,
}

/// TensorFlow's mask, which keeps a checksum of data that contains checksums meaningful.
fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// Writes one event file.
pub struct EventWriter {
    path: PathBuf,
    to: BufWriter<File>,
}

impl EventWriter {
    /// The file's name below the log directory: one file per run, written anew each time, so that
    /// a resumed run does not show twice.
    pub const NAME: &'static str = "events.out.tfevents.0000000001.duet";

    /// Starts `folder/`[`EventWriter::NAME`] anew.
    ///
    /// # Errors
    /// The folder or the file cannot be written.
    pub fn create(folder: &Path) -> Result<EventWriter, ReportError> {
        let path = folder.join(Self::NAME);
        let file = std::fs::create_dir_all(folder).and_then(|()| File::create(&path));
        let file = file.map_err(|source| ReportError::io("write", &path, source))?;
        let mut writer = EventWriter { path, to: BufWriter::new(file) };
        writer
            .event(&Event { file_version: Some("brain.Event:2".to_owned()), ..Event::default() })?;
        Ok(writer)
    }

    /// Adds one event.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn event(&mut self, event: &Event) -> Result<(), ReportError> {
        let message = event.encode_to_vec();
        let length = (message.len() as u64).to_le_bytes();
        let parts: [&[u8]; 4] = [
            &length,
            &masked_crc(&length).to_le_bytes(),
            &message,
            &masked_crc(&message).to_le_bytes(),
        ];
        let written = parts.iter().try_for_each(|part| self.to.write_all(part));
        written.map_err(|source| ReportError::io("write", &self.path, source))
    }

    /// Adds all numbers of an iteration.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn scalars(&mut self, metrics: &Metrics) -> Result<(), ReportError> {
        let value = |(tag, value): (&String, &f64)| Value {
            tag: tag.clone(),
            simple_value: Some(*value as f32),
            image: None,
        };
        self.event(&Event {
            wall_time: metrics.at,
            step: i64::from(metrics.iteration),
            file_version: None,
            summary: Some(Summary { value: metrics.values.iter().map(value).collect() }),
        })
    }

    /// Adds an image.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn image(
        &mut self,
        tag: &str,
        step: u32,
        at: f64,
        image: &RgbImage,
    ) -> Result<(), ReportError> {
        let image = EncodedImage {
            height: image.height() as i32,
            width: image.width() as i32,
            colorspace: 3,
            encoded_image_string: super::png(&self.path, image)?,
        };
        let value = Value { tag: tag.to_owned(), simple_value: None, image: Some(image) };
        self.event(&Event {
            wall_time: at,
            step: i64::from(step),
            file_version: None,
            summary: Some(Summary { value: vec![value] }),
        })
    }

    /// Writes what is left.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn finish(mut self) -> Result<(), ReportError> {
        self.to.flush().map_err(|source| ReportError::io("write", &self.path, source))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads frames the way TensorFlow's record reader does, checksums first.
    fn read_events(bytes: &[u8]) -> Vec<Event> {
        let number = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let (mut at, mut events) = (0, Vec::new());
        while at < bytes.len() {
            let length = u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
            assert_eq!(number(at + 8), masked_crc(&bytes[at..at + 8]));
            let message = &bytes[at + 12..at + 12 + length];
            assert_eq!(number(at + 12 + length), masked_crc(message));
            events.push(Event::decode(message).unwrap());
            at += 16 + length;
        }
        events
    }

    #[test]
    fn the_mask_is_tensorflows() {
        // CRC-32C of 32 zero bytes is 0x8a9136aa (RFC 3720, B.4).
        assert_eq!(crc32c::crc32c(&[0; 32]), 0x8a91_36aa);
        let expected = 0x8a91_36aau32.rotate_right(15).wrapping_add(0xa282_ead8);
        assert_eq!(masked_crc(&[0; 32]), expected);
    }

    #[test]
    fn what_is_written_is_read_back() {
        let temporary = tempfile::tempdir().unwrap();
        let folder = temporary.path().join("tensorboard");
        let mut writer = EventWriter::create(&folder).unwrap();
        let values = [("reward/llm".to_owned(), 0.5), ("kl".to_owned(), 1e-5)].into();
        writer.scalars(&Metrics { iteration: 7, at: 12.5, values }).unwrap();
        let picture = RgbImage::from_pixel(3, 2, image::Rgb([1, 2, 3]));
        writer.image("held_out/grid", 8, 13.0, &picture).unwrap();
        writer.finish().unwrap();
        let events = read_events(&std::fs::read(folder.join(EventWriter::NAME)).unwrap());

        assert_eq!(events[0].file_version.as_deref(), Some("brain.Event:2"));
        assert_eq!((events[1].step, events[1].wall_time), (7, 12.5));
        let tags: Vec<_> = events[1].summary.as_ref().unwrap().value.iter().collect();
        assert_eq!((tags[0].tag.as_str(), tags[0].simple_value), ("kl", Some(1e-5)));
        assert_eq!((tags[1].tag.as_str(), tags[1].simple_value), ("reward/llm", Some(0.5)));
        let image = events[2].summary.as_ref().unwrap().value[0].image.clone().unwrap();
        assert_eq!((image.width, image.height, image.colorspace), (3, 2, 3));
        assert_eq!(
            image::load_from_memory(&image.encoded_image_string).unwrap().to_rgb8(),
            picture
        );
    }
}
