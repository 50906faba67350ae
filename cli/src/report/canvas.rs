//! A small drawing surface: rectangles, discs, pictures and well-set text in DejaVu Sans.
//!
//! Coordinates are "points": a [`Canvas`] of scale 2 draws two pixels per point, so that a layout
//! reads the same on ordinary and on dense screens.

use super::ReportError;
use ab_glyph::{Font, FontRef, PxScale, ScaleFont, point};
use image::{Rgb, RgbImage, imageops};

/// A colour.
pub type Colour = Rgb<u8>;

/// The palette: Okabe and Ito's, which stays apart under every common colour-vision deficiency.
pub mod palette {
    use super::Colour;
    use image::Rgb;

    /// Page.
    pub const PAPER: Colour = Rgb([255, 255, 255]);
    /// Main text.
    pub const INK: Colour = Rgb([31, 35, 40]);
    /// Secondary text.
    pub const GREY: Colour = Rgb([101, 109, 118]);
    /// Hairlines.
    pub const LINE: Colour = Rgb([216, 222, 228]);
    /// What is right.
    pub const BLUE: Colour = Rgb([0, 114, 178]);
    /// What is wrong.
    pub const VERMILION: Colour = Rgb([213, 94, 0]);
    /// Series colours, in order of use.
    pub const SERIES: [Colour; 6] = [
        BLUE,
        VERMILION,
        Rgb([0, 158, 115]),
        Rgb([204, 121, 167]),
        Rgb([200, 140, 0]),
        Rgb([70, 160, 210]),
    ];
}

/// Weight of a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weight {
    /// DejaVu Sans.
    Regular,
    /// DejaVu Sans Bold.
    Bold,
}

/// The two faces of the report, compiled into the program.
pub struct Type {
    regular: FontRef<'static>,
    bold: FontRef<'static>,
}

impl Type {
    /// Reads the faces.
    ///
    /// # Errors
    /// Only when the compiled-in font files are damaged.
    pub fn load() -> Result<Type, ReportError> {
        let face = |bytes| FontRef::try_from_slice(bytes).map_err(|_| ReportError::Font);
        Ok(Type {
            regular: face(include_bytes!("../../assets/fonts/DejaVuSans.ttf"))?,
            bold: face(include_bytes!("../../assets/fonts/DejaVuSans-Bold.ttf"))?,
        })
    }

    fn face(&self, weight: Weight) -> &FontRef<'static> {
        match weight {
            Weight::Regular => &self.regular,
            Weight::Bold => &self.bold,
        }
    }

    /// The scale at which one em is `size` points (`ab_glyph` counts ascender to descender).
    fn scale(face: &FontRef<'static>, size: f32) -> PxScale {
        PxScale::from(size * face.height_unscaled() / face.units_per_em().unwrap_or(2048.0))
    }

    /// Advance width of `text` in points.
    pub fn width(&self, text: &str, size: f32, weight: Weight) -> f32 {
        let face = self.face(weight);
        let font = face.as_scaled(Self::scale(face, size));
        let mut previous = None;
        let mut width = 0.0;
        for c in text.chars() {
            let id = font.glyph_id(c);
            width += previous.map_or(0.0, |last| font.kern(last, id)) + font.h_advance(id);
            previous = Some(id);
        }
        width
    }

    /// `text` in lines no wider than `room` points: broken at spaces, inside a word only when the
    /// word alone is too wide, and cut with an ellipsis after `most` lines.
    pub fn wrap(
        &self,
        text: &str,
        size: f32,
        weight: Weight,
        room: f32,
        most: usize,
    ) -> Vec<String> {
        let fits = |line: &str| self.width(line, size, weight) <= room;
        let mut lines: Vec<String> = Vec::new();
        let mut line = String::new();
        for word in text.split_whitespace() {
            let longer = if line.is_empty() { word.to_owned() } else { format!("{line} {word}") };
            if fits(&longer) {
                line = longer;
                continue;
            }
            if !line.is_empty() {
                lines.push(std::mem::take(&mut line));
            }
            for c in word.chars() {
                line.push(c);
                if !fits(&line) && line.chars().count() > 1 {
                    line.pop();
                    lines.push(std::mem::replace(&mut line, c.to_string()));
                }
            }
        }
        if !line.is_empty() {
            lines.push(line);
        }
        if lines.len() > most {
            lines.truncate(most);
            if let Some(last) = lines.last_mut() {
                while !fits(&format!("{last}…")) && last.pop().is_some() {}
                *last = format!("{}…", last.trim_end());
            }
        }
        lines
    }
}

/// A surface of `width` x `height` points.
pub struct Canvas<'a> {
    pixels: RgbImage,
    scale: f32,
    faces: &'a Type,
}

impl<'a> Canvas<'a> {
    /// A blank page with `scale` pixels per point.
    pub fn new(width: f32, height: f32, scale: f32, faces: &'a Type) -> Canvas<'a> {
        let pixels = |points: f32| (points * scale).round().max(1.0) as u32;
        Canvas {
            pixels: RgbImage::from_pixel(pixels(width), pixels(height), palette::PAPER),
            scale,
            faces,
        }
    }

    /// A page that already has something on it.
    pub fn over(pixels: RgbImage, scale: f32, faces: &'a Type) -> Canvas<'a> {
        Canvas { pixels, scale, faces }
    }

    /// The finished picture.
    pub fn into_pixels(self) -> RgbImage {
        self.pixels
    }

    fn px(&self, points: f32) -> i64 {
        (points * self.scale).round() as i64
    }

    fn blend(&mut self, x: i64, y: i64, colour: Colour, cover: f32) {
        let inside = |v: i64, most: u32| (0..i64::from(most)).contains(&v);
        if !inside(x, self.pixels.width()) || !inside(y, self.pixels.height()) {
            return;
        }
        let pixel = self.pixels.get_pixel_mut(x as u32, y as u32);
        for (old, new) in pixel.0.iter_mut().zip(colour.0) {
            let mixed =
                f32::from(*old) + (f32::from(new) - f32::from(*old)) * cover.clamp(0.0, 1.0);
            *old = mixed.round() as u8;
        }
    }

    /// Fills a rectangle.
    pub fn fill(&mut self, x: f32, y: f32, width: f32, height: f32, colour: Colour) {
        let (left, top) = (self.px(x), self.px(y));
        let (right, bottom) = (self.px(x + width), self.px(y + height));
        for py in top..bottom.max(top + 1) {
            for px in left..right.max(left + 1) {
                self.blend(px, py, colour, 1.0);
            }
        }
    }

    /// Fills a disc with a smooth edge.
    pub fn disc(&mut self, cx: f32, cy: f32, radius: f32, colour: Colour) {
        let (cx, cy, r) = (cx * self.scale, cy * self.scale, radius * self.scale);
        for py in (cy - r - 1.0) as i64..=(cy + r + 1.0) as i64 {
            for px in (cx - r - 1.0) as i64..=(cx + r + 1.0) as i64 {
                let (dx, dy) = (px as f32 + 0.5 - cx, py as f32 + 0.5 - cy);
                self.blend(px, py, colour, r + 0.5 - dx.hypot(dy));
            }
        }
    }

    /// A straight stroke with round ends and a smooth edge.
    pub fn stroke(&mut self, from: (f32, f32), to: (f32, f32), width: f32, colour: Colour) {
        let s = self.scale;
        let (ax, ay, bx, by, r) = (from.0 * s, from.1 * s, to.0 * s, to.1 * s, width * s / 2.0);
        let (dx, dy) = (bx - ax, by - ay);
        let length = (dx * dx + dy * dy).max(1e-6);
        for py in (ay.min(by) - r - 1.0) as i64..=(ay.max(by) + r + 1.0) as i64 {
            for px in (ax.min(bx) - r - 1.0) as i64..=(ax.max(bx) + r + 1.0) as i64 {
                let (x, y) = (px as f32 + 0.5, py as f32 + 0.5);
                let along = (((x - ax) * dx + (y - ay) * dy) / length).clamp(0.0, 1.0);
                let away = (x - ax - along * dx).hypot(y - ay - along * dy);
                self.blend(px, py, colour, r + 0.5 - away);
            }
        }
    }

    /// Puts a picture into a square of `side` points: enlarged pixel by pixel when it is smaller,
    /// reduced smoothly when it is larger. Pictures that are not square keep their shape, centred.
    pub fn picture(&mut self, x: f32, y: f32, side: f32, picture: &RgbImage) {
        let room = self.px(x + side) - self.px(x);
        let longest = picture.width().max(picture.height()).max(1);
        let ratio = room as f64 / f64::from(longest);
        let size = |v: u32| ((f64::from(v) * ratio).round() as u32).max(1);
        let filter = match ratio >= 1.0 {
            true => imageops::FilterType::Nearest,
            false => imageops::FilterType::Lanczos3,
        };
        let fitted =
            imageops::resize(picture, size(picture.width()), size(picture.height()), filter);
        let left = self.px(x) + (room - i64::from(fitted.width())) / 2;
        let top = self.px(y) + (room - i64::from(fitted.height())) / 2;
        imageops::replace(&mut self.pixels, &fitted, left, top);
    }

    /// Sets one line of text with its baseline at `y`; returns where it ends.
    pub fn text(
        &mut self,
        x: f32,
        y: f32,
        text: &str,
        size: f32,
        weight: Weight,
        colour: Colour,
    ) -> f32 {
        let face = self.faces.face(weight);
        let scale = Type::scale(face, size * self.scale);
        let font = face.as_scaled(scale);
        let (mut pen, baseline) = (x * self.scale, (y * self.scale).round());
        let mut previous = None;
        for c in text.chars() {
            let id = font.glyph_id(c);
            pen += previous.map_or(0.0, |last| font.kern(last, id));
            previous = Some(id);
            let glyph = id.with_scale_and_position(scale, point(pen, baseline));
            if let Some(outline) = face.outline_glyph(glyph) {
                let corner = outline.px_bounds().min;
                outline.draw(|gx, gy, cover| {
                    let (px, py) =
                        (corner.x as i64 + i64::from(gx), corner.y as i64 + i64::from(gy));
                    self.blend(px, py, colour, cover);
                });
            }
            pen += font.h_advance(id);
        }
        pen / self.scale
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrapped_lines_fit_and_keep_every_word() {
        let faces = Type::load().unwrap();
        let text = "the number of legs a spider has, in the colour of a ripe lemon";
        let lines = faces.wrap(text, 12.0, Weight::Regular, 120.0, 99);
        assert!(lines.len() > 2);
        assert!(lines.iter().all(|line| faces.width(line, 12.0, Weight::Regular) <= 120.0));
        assert_eq!(lines.join(" "), text);
    }

    #[test]
    fn a_word_too_wide_is_broken_and_a_text_too_long_ends_in_an_ellipsis() {
        let faces = Type::load().unwrap();
        let broken = faces.wrap(&"w".repeat(200), 12.0, Weight::Regular, 100.0, 99);
        assert_eq!(broken.concat(), "w".repeat(200));
        let cut = faces.wrap(&"word ".repeat(100), 12.0, Weight::Bold, 100.0, 3);
        assert_eq!(cut.len(), 3);
        assert!(cut[2].ends_with('…') && faces.width(&cut[2], 12.0, Weight::Bold) <= 100.0);
        assert!(faces.wrap("", 12.0, Weight::Regular, 100.0, 3).is_empty());
    }

    #[test]
    fn drawing_outside_the_page_is_harmless() {
        let faces = Type::load().unwrap();
        let mut canvas = Canvas::new(20.0, 20.0, 2.0, &faces);
        canvas.text(-30.0, 400.0, "outside", 12.0, Weight::Bold, palette::INK);
        canvas.disc(0.0, 0.0, 30.0, palette::BLUE);
        canvas.fill(-5.0, -5.0, 100.0, 2.0, palette::INK);
        assert_eq!(canvas.into_pixels().dimensions(), (40, 40));
    }
}
