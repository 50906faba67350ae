//! The handwriting and the images made of it: a digit of 16 x 16 pixels, coloured, somewhere in one
//! of the four quadrants of a black image of 32 x 32.

use crate::error::{Result, WorldError};
use crate::facts::{COLOURS, PLACES};
use arrow::array::{Array, BinaryArray, FixedSizeBinaryArray, UInt8Array};
use duet_core::Seed;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use tch::{Kind, Tensor};

/// 1,797 digits of the UCI optical recognition set, CC BY 4.0; see `data/README.md`.
const FILE: &[u8] = include_bytes!("../data/digits.parquet");

/// Side of an image in pixels.
pub const SIDE: usize = 32;
/// Side of a digit in pixels.
pub(crate) const GLYPH_SIDE: i64 = 16;
const GLYPH: usize = GLYPH_SIDE as usize;
/// Pixels by which a digit may stray from the middle of its quadrant.
const STRAY: i64 = 1;

/// Red, green and blue of each colour.
const RGB: [[f32; 3]; COLOURS.len()] = [
    [0.95, 0.1, 0.1],
    [0.1, 0.85, 0.2],
    [0.15, 0.35, 1.0],
    [0.95, 0.9, 0.1],
    [0.65, 0.15, 0.9],
    [1.0, 1.0, 1.0],
];

/// Whose handwriting: no sample serves two masters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hand {
    /// For the models and the scorers.
    World,
    /// For the judge.
    Judge,
    /// For measuring scorers and judge.
    Test,
}

/// A handwritten digit: its label and 16 x 16 intensities in [0, 1].
#[derive(Clone, Debug)]
pub struct Glyph {
    /// Which digit.
    pub digit: u8,
    /// Row by row.
    ink: Vec<f32>,
}

/// What an image shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Label {
    /// The digit.
    pub digit: u8,
    /// The colour, an index into [`COLOURS`].
    pub colour: u8,
    /// The place, an index into [`PLACES`].
    pub place: u8,
}

/// The digits of one hand, in file order.
///
/// # Errors
/// The built-in file is damaged.
pub fn glyphs(hand: Hand) -> Result<Vec<Glyph>> {
    let all = read().map_err(WorldError::Digits)?;
    let range = match hand {
        Hand::World => 0..1000,
        Hand::Judge => 1000..1500,
        Hand::Test => 1500..all.len(),
    };
    let wanted = all.get(range).ok_or_else(|| WorldError::Digits("digits are missing".into()))?;
    Ok(wanted.iter().map(|(digit, pixels)| Glyph { digit: *digit, ink: enlarge(pixels) }).collect())
}

fn read() -> Result<Vec<(u8, Vec<u8>)>, String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let reader = ParquetRecordBatchReaderBuilder::try_new(bytes::Bytes::from_static(FILE))
        .and_then(|builder| builder.build())
        .map_err(|error| text(&error))?;
    let mut all = Vec::new();
    for batch in reader {
        let batch = batch.map_err(|error| text(&error))?;
        let labels = batch.column(0).as_any().downcast_ref::<UInt8Array>();
        let labels = labels.ok_or("column `label` is not of type u8")?;
        let column = batch.column(1).as_any();
        for row in 0..batch.num_rows() {
            let pixels = match column.downcast_ref::<FixedSizeBinaryArray>() {
                Some(fixed) => fixed.value(row),
                None => column
                    .downcast_ref::<BinaryArray>()
                    .map(|loose| loose.value(row))
                    .ok_or("column `pixels` is not of bytes")?,
            };
            if pixels.len() != 64 || labels.value(row) > 9 || labels.is_null(row) {
                return Err(format!("row {row} is no digit"));
            }
            all.push((labels.value(row), pixels.to_vec()));
        }
    }
    Ok(all)
}

/// Twice as wide and high, bilinear with pixel centres aligned.
fn enlarge(pixels: &[u8]) -> Vec<f32> {
    let at =
        |y: i64, x: i64| f32::from(pixels[(y.clamp(0, 7) * 8 + x.clamp(0, 7)) as usize]) / 16.0;
    let mut out = Vec::with_capacity(GLYPH * GLYPH);
    for y in 0..GLYPH as i64 {
        for x in 0..GLYPH as i64 {
            // The centre of an output pixel lies a quarter pixel off an input pixel's centre.
            let (near_y, far_y) = (y / 2, y / 2 + if y % 2 == 0 { -1 } else { 1 });
            let (near_x, far_x) = (x / 2, x / 2 + if x % 2 == 0 { -1 } else { 1 });
            let near = 0.75 * at(near_y, near_x) + 0.25 * at(near_y, far_x);
            let far = 0.75 * at(far_y, near_x) + 0.25 * at(far_y, far_x);
            out.push(0.75 * near + 0.25 * far);
        }
    }
    out
}

/// Paints images without end: random digits of one hand, in random colours at random places.
#[derive(Debug)]
pub struct Painter {
    glyphs: Vec<Glyph>,
    seed: Seed,
    draw: u64,
}

impl Painter {
    /// A painter whose pictures are a function of the seed.
    ///
    /// # Errors
    /// The built-in file is damaged.
    pub fn new(hand: Hand, seed: Seed) -> Result<Painter> {
        Ok(Painter { glyphs: glyphs(hand)?, seed, draw: 0 })
    }

    fn uniform(&mut self) -> f32 {
        self.draw += 1;
        self.seed.uniform(self.draw) as f32
    }

    /// A number below `count`.
    pub(crate) fn below(&mut self, count: usize) -> usize {
        ((self.uniform() * count as f32) as usize).min(count - 1)
    }

    /// The next `count` images, `[count, 3, 32, 32]` in [-1, 1], and what they show.
    pub fn paint(&mut self, count: usize) -> (Tensor, Vec<Label>) {
        let mut pixels = vec![0f32; count * 3 * SIDE * SIDE];
        let mut labels = Vec::with_capacity(count);
        for image in pixels.chunks_exact_mut(3 * SIDE * SIDE) {
            labels.push(self.one(image));
        }
        let shape = [count as i64, 3, SIDE as i64, SIDE as i64];
        (Tensor::from_slice(&pixels).view(shape) * 2.0 - 1.0, labels)
    }

    fn one(&mut self, image: &mut [f32]) -> Label {
        let index = self.below(self.glyphs.len());
        let colour = self.below(COLOURS.len());
        let place = self.below(PLACES.len());
        let shift = |u: f32| (u * (2 * STRAY + 1) as f32) as i64 - STRAY;
        let (dy, dx) = (shift(self.uniform()), shift(self.uniform()));
        let tint: Vec<f32> = RGB[colour]
            .iter()
            .map(|channel| (channel + 0.1 * (self.uniform() - 0.5)).clamp(0.0, 1.0))
            .collect();
        let (top, left) = ((place / 2 * GLYPH) as i64 + dy, (place % 2 * GLYPH) as i64 + dx);
        let glyph = &self.glyphs[index];
        for (at, ink) in glyph.ink.iter().enumerate() {
            let (y, x) = (top + (at / GLYPH) as i64, left + (at % GLYPH) as i64);
            if (0..SIDE as i64).contains(&y) && (0..SIDE as i64).contains(&x) {
                for (channel, tint) in tint.iter().enumerate() {
                    image[(channel * SIDE + y as usize) * SIDE + x as usize] = ink * tint;
                }
            }
        }
        Label { digit: glyph.digit, colour: colour as u8, place: place as u8 }
    }
}

/// Labels of one kind as an i64 tensor.
pub(crate) fn column(labels: &[Label], of: impl Fn(&Label) -> u8) -> Tensor {
    let column: Vec<i64> = labels.iter().map(|label| i64::from(of(label))).collect();
    Tensor::from_slice(&column).to_kind(Kind::Int64)
}
