//! The picture of a run: held-out prompts, with the image before and after training.
//!
//! ```text
//!  title
//!  subtitle
//!  PROMPT                 BEFORE              AFTER
//!  category               +-------+           +-------+
//!  the raw prompt,        | image |           | image |
//!  wrapped                |       |           |       |
//!  asks for: green 4      +-------+           +-------+
//!                         x judge: red 3      v judge: green 4
//!                         refined prompt      refined prompt
//! ```
//! Right and wrong differ by colour (blue, vermilion), by mark (tick, cross) and in words.

use super::canvas::{Canvas, Colour, Type, Weight, palette};
use super::evaluation::{EvaluatedPrompt, Evaluation, Subject};
use super::{ReportError, save_png};
use image::RgbImage;
use std::collections::BTreeMap;
use std::path::Path;

/// Whether an image shows what its prompt asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The judge sees the true target.
    Right,
    /// The judge sees something else.
    Wrong,
    /// There is no judge.
    Unjudged,
}

/// One image of the grid.
#[derive(Clone, Debug)]
pub struct Cell {
    /// The image.
    pub image: RgbImage,
    /// The refined prompt it was made from.
    pub caption: String,
    /// Right or wrong.
    pub verdict: Verdict,
    /// What the judge sees, in words.
    pub seen: String,
}

/// One prompt of the grid.
#[derive(Clone, Debug)]
pub struct Row {
    /// The raw prompt.
    pub prompt: String,
    /// Its category.
    pub category: String,
    /// What it asks for, in words; empty when nobody knows.
    pub target: String,
    /// The image of the base model.
    pub before: Option<Cell>,
    /// The image after training.
    pub after: Option<Cell>,
}

/// A grid to draw.
#[derive(Clone, Debug)]
pub struct Grid {
    /// First line.
    pub title: String,
    /// Second line.
    pub subtitle: String,
    /// The prompts.
    pub rows: Vec<Row>,
}

const MARGIN: f32 = 32.0;
const PROMPT_WIDTH: f32 = 236.0;
const CELL_WIDTH: f32 = 196.0;
const GAP: f32 = 28.0;
const IMAGE: f32 = 128.0;
const FRAME: f32 = 3.0;
const HEADER: f32 = 116.0;
const ROW_PAD: f32 = 16.0;
const PIXELS_PER_POINT: f32 = 2.0;

/// Where a row's parts lie, in points.
#[derive(Clone, Debug, PartialEq)]
struct Placed {
    top: f32,
    height: f32,
    prompt: Vec<String>,
    captions: [Vec<String>; 2],
}

const PROMPT_SIZE: f32 = 14.0;
const PROMPT_LEADING: f32 = 20.0;
const CAPTION_SIZE: f32 = 11.0;
const CAPTION_LEADING: f32 = 15.0;

/// Left edges of the prompt, before and after columns.
fn columns() -> [f32; 3] {
    let before = MARGIN + PROMPT_WIDTH + GAP;
    [MARGIN, before, before + CELL_WIDTH + GAP]
}

fn page_width() -> f32 {
    columns()[2] + CELL_WIDTH + MARGIN
}

fn place(rows: &[Row], faces: &Type) -> Vec<Placed> {
    let mut top = HEADER;
    let caption = |cell: &Option<Cell>| {
        let text = cell.as_ref().map_or("", |cell| cell.caption.as_str());
        faces.wrap(text, CAPTION_SIZE, Weight::Regular, CELL_WIDTH, 4)
    };
    rows.iter()
        .map(|row| {
            let prompt = faces.wrap(&row.prompt, PROMPT_SIZE, Weight::Regular, PROMPT_WIDTH, 8);
            let captions = [caption(&row.before), caption(&row.after)];
            let lines = captions[0].len().max(captions[1].len()) as f32;
            let cell = IMAGE + 2.0 * FRAME + 28.0 + lines * CAPTION_LEADING;
            let text = 44.0 + prompt.len() as f32 * PROMPT_LEADING;
            let height = cell.max(text) + 2.0 * ROW_PAD;
            let placed = Placed { top, height, prompt, captions };
            top += height;
            placed
        })
        .collect()
}

/// Draws the grid.
///
/// # Errors
/// Only when the compiled-in fonts are damaged.
pub fn draw(grid: &Grid) -> Result<RgbImage, ReportError> {
    let faces = Type::load()?;
    let placed = place(&grid.rows, &faces);
    let height = placed.last().map_or(HEADER, |row| row.top + row.height) + MARGIN / 2.0;
    let mut canvas = Canvas::new(page_width(), height, PIXELS_PER_POINT, &faces);
    header(&mut canvas, grid);
    for (row, place) in grid.rows.iter().zip(&placed) {
        draw_row(&mut canvas, row, place, &faces);
    }
    Ok(canvas.into_pixels())
}

fn header(canvas: &mut Canvas<'_>, grid: &Grid) {
    canvas.text(MARGIN, 44.0, &grid.title, 21.0, Weight::Bold, palette::INK);
    canvas.text(MARGIN, 68.0, &grid.subtitle, 12.0, Weight::Regular, palette::GREY);
    for (x, name) in columns().iter().zip(["PROMPT", "BEFORE TRAINING", "AFTER TRAINING"]) {
        canvas.text(*x, HEADER - 10.0, name, 10.0, Weight::Bold, palette::GREY);
    }
}

fn draw_row(canvas: &mut Canvas<'_>, row: &Row, place: &Placed, faces: &Type) {
    canvas.fill(MARGIN, place.top, page_width() - 2.0 * MARGIN, 1.0, palette::LINE);
    let top = place.top + ROW_PAD;
    let [left, before, after] = columns();
    let category = row.category.replace(['_', '-'], " ");
    canvas.text(left, top + 10.0, &category, 11.0, Weight::Bold, palette::GREY);
    for (i, line) in place.prompt.iter().enumerate() {
        let y = top + 34.0 + i as f32 * PROMPT_LEADING;
        canvas.text(left, y, line, PROMPT_SIZE, Weight::Regular, palette::INK);
    }
    if !row.target.is_empty() {
        let y = top + 38.0 + place.prompt.len() as f32 * PROMPT_LEADING;
        let target = format!("asks for: {}", row.target);
        canvas.text(left, y, &target, CAPTION_SIZE, Weight::Regular, palette::GREY);
    }
    for ((x, cell), caption) in
        [(before, &row.before), (after, &row.after)].into_iter().zip(&place.captions)
    {
        if let Some(cell) = cell {
            draw_cell(canvas, (x, top), cell, caption, faces);
        }
    }
}

fn draw_cell(
    canvas: &mut Canvas<'_>,
    (x, top): (f32, f32),
    cell: &Cell,
    caption: &[String],
    faces: &Type,
) {
    let colour = match cell.verdict {
        Verdict::Right => palette::BLUE,
        Verdict::Wrong => palette::VERMILION,
        Verdict::Unjudged => palette::LINE,
    };
    let outer = IMAGE + 2.0 * FRAME;
    canvas.fill(x, top, outer, outer, colour);
    canvas.picture(x + FRAME, top + FRAME, IMAGE, &cell.image);
    let line = top + outer + 19.0;
    if cell.verdict != Verdict::Unjudged {
        mark(canvas, (x + 7.0, line - 4.5), cell.verdict, colour);
        let seen = faces.wrap(&cell.seen, CAPTION_SIZE, Weight::Bold, CELL_WIDTH - 20.0, 1);
        let seen = seen.first().map_or("", String::as_str);
        canvas.text(x + 20.0, line, seen, CAPTION_SIZE, Weight::Bold, colour);
    }
    for (i, text) in caption.iter().enumerate() {
        let y = line + 18.0 + i as f32 * CAPTION_LEADING;
        canvas.text(x, y, text, CAPTION_SIZE, Weight::Regular, palette::GREY);
    }
}

/// A tick or a cross on a disc.
fn mark(canvas: &mut Canvas<'_>, (x, y): (f32, f32), verdict: Verdict, colour: Colour) {
    canvas.disc(x, y, 7.0, colour);
    let strokes: &[[(f32, f32); 2]] = match verdict {
        Verdict::Right => &[[(-3.2, 0.2), (-0.9, 2.6)], [(-0.9, 2.6), (3.3, -2.5)]],
        _ => &[[(-2.5, -2.5), (2.5, 2.5)], [(-2.5, 2.5), (2.5, -2.5)]],
    };
    for [(ax, ay), (bx, by)] in strokes {
        canvas.stroke((x + ax, y + ay), (x + bx, y + by), 1.7, palette::PAPER);
    }
}

/// Up to `most` prompts that both evaluations have: the categories in turn, each in file order, so
/// that what is shown does not depend on how it turned out.
pub fn choose<'a>(
    before: &'a Evaluation,
    after: &'a Evaluation,
    most: usize,
) -> Vec<(&'a EvaluatedPrompt, &'a EvaluatedPrompt)> {
    let later: BTreeMap<u64, &EvaluatedPrompt> = after.prompts.iter().map(|p| (p.row, p)).collect();
    let mut turns: BTreeMap<(usize, &str), (&EvaluatedPrompt, &EvaluatedPrompt)> = BTreeMap::new();
    let mut seen: BTreeMap<&str, usize> = BTreeMap::new();
    for prompt in &before.prompts {
        if let Some(after) = later.get(&prompt.row) {
            let turn = seen.entry(&prompt.category).or_default();
            turns.insert((*turn, &prompt.category), (prompt, after));
            *turn += 1;
        }
    }
    turns.into_values().take(most).collect()
}

fn cell(evaluation: &Evaluation, prompt: &EvaluatedPrompt) -> Result<Option<Cell>, ReportError> {
    let Some(image) = prompt.images.first() else {
        return Ok(None);
    };
    let seen = match &image.judged {
        Some(subject) => format!("judge sees: {subject}"),
        None => String::new(),
    };
    let verdict = match image.semantic {
        Some(true) => Verdict::Right,
        Some(false) => Verdict::Wrong,
        None => Verdict::Unjudged,
    };
    let caption = prompt.refined_prompt.clone();
    Ok(Some(Cell { image: evaluation.picture(image)?, caption, verdict, seen }))
}

/// The grid of a run.
///
/// # Errors
/// An image of the evaluations is missing or broken.
pub fn of_run(before: &Evaluation, after: &Evaluation, most: usize) -> Result<Grid, ReportError> {
    let mut rows = Vec::new();
    for (first, second) in choose(before, after, most) {
        rows.push(Row {
            prompt: first.prompt.clone(),
            category: first.category.clone(),
            target: first.target.as_ref().map_or_else(String::new, Subject::to_string),
            before: cell(before, first)?,
            after: cell(after, second)?,
        });
    }
    let change =
        |name: &str, b: f64, a: f64| format!("{name} {:.0} → {:.0} %", 100.0 * b, 100.0 * a);
    let (b, a) = (&before.totals, &after.totals);
    let subtitle = format!(
        "All {} held-out prompts:  {},  {},  {}",
        after.prompts.len(),
        change("image right", b.semantic_accuracy, a.semantic_accuracy),
        change("reasoning right", b.trace_accuracy, a.trace_accuracy),
        change("drawn as refined", b.render_accuracy, a.render_accuracy),
    );
    Ok(Grid { title: "Held-out prompts, before and after training".to_owned(), subtitle, rows })
}

/// Draws the grid of a run into a PNG file.
///
/// # Errors
/// An image is missing or broken, or the file cannot be written.
pub fn save(
    path: &Path,
    before: &Evaluation,
    after: &Evaluation,
    most: usize,
) -> Result<(), ReportError> {
    save_png(path, &draw(&of_run(before, after, most)?)?)
}
