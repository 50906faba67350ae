//! The picture of the learning curves: four panels, a smoothed line over each faint raw one.

use super::canvas::{Canvas, Colour, Type, Weight, palette};
use super::metrics::Metrics;
use super::panels::{Axis, Panel, Series, panels};
use super::{ReportError, save_png};
use image::RgbImage;
use std::path::Path;

/// An exponential moving average that does not start at zero (as TensorBoard smooths).
pub fn smooth(points: &[(f64, f64)], weight: f64) -> Vec<(f64, f64)> {
    let (mut sum, mut mass) = (0.0, 0.0);
    let step = |&(x, y): &(f64, f64)| {
        sum = weight * sum + (1.0 - weight) * y;
        mass = weight * mass + (1.0 - weight);
        (x, sum / mass)
    };
    points.iter().map(step).collect()
}

/// Weight of the smoothing for a run of `count` iterations: none for a handful.
fn weight(count: usize) -> f64 {
    match count {
        0..8 => 0.0,
        8..24 => 0.6,
        24..200 => 0.85,
        _ => 0.95,
    }
}

/// Round numbers that cover `low..high` with about `count` steps of 1, 2 or 5 times a power of ten.
fn ticks(low: f64, high: f64, count: usize) -> Vec<f64> {
    let rough = ((high - low) / count as f64).max(f64::MIN_POSITIVE);
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|m| m * power).into_iter().find(|s| *s >= rough * 0.999);
    let step = step.unwrap_or(10.0 * power);
    let first = (low / step - 1e-9).ceil() as i64;
    let last = (high / step + 1e-9).floor() as i64;
    (first..=last).map(|i| i as f64 * step).collect()
}

const PAGE: (f32, f32) = (960.0, 660.0);
const PIXELS_PER_POINT: f32 = 2.0;
const MARGIN: f32 = 32.0;
const TOP: f32 = 72.0;

/// The frame of a panel's plot and the ranges it shows.
struct Frame {
    x: f32,
    y: f32,
    width: f32,
    height: f32,
    xs: (f64, f64),
    ys: (f64, f64),
}

impl Frame {
    fn at(&self, (x, y): (f64, f64)) -> (f32, f32) {
        let part = |v: f64, (low, high): (f64, f64)| ((v - low) / (high - low)) as f32;
        (self.x + part(x, self.xs) * self.width, self.y + (1.0 - part(y, self.ys)) * self.height)
    }
}

/// Draws the four panels.
///
/// # Errors
/// Only when the compiled-in fonts are damaged.
pub fn draw(name: &str, panels: &[Panel; 4]) -> Result<RgbImage, ReportError> {
    let faces = Type::load()?;
    let mut canvas = Canvas::new(PAGE.0, PAGE.1, PIXELS_PER_POINT, &faces);
    let title = format!("Learning curves of {name}");
    canvas.text(MARGIN, 42.0, &title, 19.0, Weight::Bold, palette::INK);
    let (gap, bottom) = (40.0, 28.0);
    let width = (PAGE.0 - 2.0 * MARGIN - gap) / 2.0;
    let height = (PAGE.1 - TOP - bottom - gap / 2.0) / 2.0;
    for (i, panel) in panels.iter().enumerate() {
        let x = MARGIN + (i % 2) as f32 * (width + gap);
        let y = TOP + (i / 2) as f32 * (height + gap / 2.0);
        draw_panel(&mut canvas, panel, [x, y, width, height], &faces);
    }
    Ok(canvas.into_pixels())
}

fn draw_panel(canvas: &mut Canvas<'_>, panel: &Panel, area: [f32; 4], faces: &Type) {
    let [x, y, width, height] = area;
    let lines = usable(panel);
    canvas.text(x, y + 12.0, panel.title, 13.0, Weight::Bold, palette::INK);
    let used = legend(canvas, &lines, (x, y + 32.0), width, faces);
    let top = y + 32.0 + used;
    let mut frame = Frame {
        x: x + 44.0,
        y: top,
        width: width - 44.0,
        height: y + height - 30.0 - top,
        xs: (0.0, 1.0),
        ys: (0.0, 1.0),
    };
    if lines.is_empty() {
        let at = frame.at((0.5, 0.5));
        canvas.text(at.0 - 30.0, at.1, "no data yet", 11.0, Weight::Regular, palette::GREY);
        return;
    }
    (frame.xs, frame.ys) = ranges(&lines, panel.axis);
    axes(canvas, &frame, panel.axis, faces);
    for (line, colour) in lines.iter().zip(palette::SERIES) {
        polyline(canvas, &frame, &line.points, 1.0, faint(colour));
    }
    for (line, colour) in lines.iter().zip(palette::SERIES) {
        let smoothed = smooth(&line.points, weight(line.points.len()));
        polyline(canvas, &frame, &smoothed, 2.0, colour);
        if let Some(last) = smoothed.last() {
            let (px, py) = frame.at(*last);
            canvas.disc(px, py, 3.0, colour);
        }
    }
}

/// The panel's lines in the units of its axis, without those that have no point.
fn usable(panel: &Panel) -> Vec<Series> {
    let convert = |&(x, y): &(f64, f64)| match panel.axis {
        Axis::Log => (y > 0.0).then(|| (x, y.log10())),
        Axis::Linear | Axis::Share => Some((x, y)),
    };
    let lines = panel.series.iter().map(|line| {
        let mut points: Vec<(f64, f64)> = line.points.iter().filter_map(convert).collect();
        if panel.axis == Axis::Log {
            bound(&mut points);
        }
        Series { label: line.label.clone(), points }
    });
    lines.filter(|line: &Series| !line.points.is_empty()).collect()
}

/// Raises what lies more than two decades below a line's median to there: an iteration without anything
/// to learn from has a norm of rounding errors, and would squeeze all others into a stripe.
fn bound(points: &mut [(f64, f64)]) {
    let mut values: Vec<f64> = points.iter().map(|point| point.1).collect();
    values.sort_by(f64::total_cmp);
    let Some(median) = values.get(values.len() / 2) else { return };
    for point in points {
        point.1 = point.1.max(median - 2.0);
    }
}

fn ranges(lines: &[Series], axis: Axis) -> ((f64, f64), (f64, f64)) {
    let points = || lines.iter().flat_map(|line| line.points.iter());
    let span = |values: &mut dyn Iterator<Item = f64>| {
        values.fold((f64::MAX, f64::MIN), |(low, high), v| (low.min(v), high.max(v)))
    };
    let (first, last) = span(&mut points().map(|p| p.0));
    let (low, high) = span(&mut points().map(|p| p.1));
    let ys = match axis {
        Axis::Share => (0.0, 1.0),
        Axis::Log => (low.floor().min(high.ceil() - 1.0), high.ceil().max(low.floor() + 1.0)),
        Axis::Linear => {
            let pad = ((high - low) * 0.08).max(0.01 * high.abs().max(0.1));
            (low - pad, high + pad)
        }
    };
    ((first, last.max(first + 1.0)), ys)
}

fn axes(canvas: &mut Canvas<'_>, frame: &Frame, axis: Axis, faces: &Type) {
    let rows = match axis {
        Axis::Log => {
            let every = (((frame.ys.1 - frame.ys.0) / 6.0).ceil() as i64).max(1);
            let powers = frame.ys.0 as i64..=frame.ys.1 as i64;
            powers.filter(|p| p % every == 0).map(|p| p as f64).collect()
        }
        Axis::Linear | Axis::Share => ticks(frame.ys.0, frame.ys.1, 7),
    };
    let step = rows.get(1).map_or(1.0, |second: &f64| second - rows[0]);
    let digits = (-step.log10().floor()).clamp(0.0, 6.0) as usize;
    for value in rows {
        let (_, y) = frame.at((frame.xs.0, value));
        canvas.fill(frame.x, y - 0.25, frame.width, 0.5, palette::LINE);
        let label = match axis {
            Axis::Log => power_of_ten(value as i64),
            Axis::Linear | Axis::Share => format!("{value:.digits$}"),
        };
        let width = faces.width(&label, 10.0, Weight::Regular);
        canvas.text(frame.x - 8.0 - width, y + 3.5, &label, 10.0, Weight::Regular, palette::GREY);
    }
    let columns = ticks(frame.xs.0, frame.xs.1, 6);
    for value in columns.into_iter().filter(|value| value.fract() == 0.0) {
        let (x, _) = frame.at((value, frame.ys.0));
        let label = format!("{value:.0}");
        let width = faces.width(&label, 10.0, Weight::Regular);
        let y = frame.y + frame.height + 15.0;
        canvas.text(x - width / 2.0, y, &label, 10.0, Weight::Regular, palette::GREY);
    }
    let width = faces.width("iteration", 10.0, Weight::Regular);
    let (x, y) = (frame.x + (frame.width - width) / 2.0, frame.y + frame.height + 29.0);
    canvas.text(x, y, "iteration", 10.0, Weight::Regular, palette::GREY);
}

/// `10⁻³` for -3.
fn power_of_ten(exponent: i64) -> String {
    let raised = |c: char| match c {
        '-' => '⁻',
        '1' => '¹',
        '2' => '²',
        '3' => '³',
        digit => char::from_u32('⁰' as u32 + digit.to_digit(10).unwrap_or(0)).unwrap_or(digit),
    };
    format!("10{}", exponent.to_string().chars().map(raised).collect::<String>())
}

/// Draws the legend; returns the height it takes.
fn legend(
    canvas: &mut Canvas<'_>,
    lines: &[Series],
    (left, y): (f32, f32),
    width: f32,
    faces: &Type,
) -> f32 {
    let (mut x, mut row) = (left, 0.0);
    for (line, colour) in lines.iter().zip(palette::SERIES) {
        let needs = 22.0 + faces.width(&line.label, 10.5, Weight::Regular);
        if x > left && x + needs > left + width {
            (x, row) = (left, row + 16.0);
        }
        canvas.stroke((x + 1.0, y + row - 3.5), (x + 13.0, y + row - 3.5), 2.5, colour);
        canvas.text(x + 19.0, y + row, &line.label, 10.5, Weight::Regular, palette::INK);
        x += needs + 16.0;
    }
    row + 16.0
}

/// A quarter of a colour on paper.
fn faint(colour: Colour) -> Colour {
    image::Rgb(colour.0.map(|c| (f32::from(c) * 0.28 + 255.0 * 0.72) as u8))
}

fn polyline(
    canvas: &mut Canvas<'_>,
    frame: &Frame,
    points: &[(f64, f64)],
    width: f32,
    colour: Colour,
) {
    for pair in points.windows(2) {
        canvas.stroke(frame.at(pair[0]), frame.at(pair[1]), width, colour);
    }
}

/// Draws four panels into a PNG file.
///
/// # Errors
/// The file cannot be written.
pub fn save_panels(path: &Path, name: &str, panels: &[Panel; 4]) -> Result<(), ReportError> {
    save_png(path, &draw(name, panels)?)
}

/// Draws the learning curves of a run into a PNG file.
///
/// # Errors
/// The file cannot be written.
pub fn save(path: &Path, name: &str, metrics: &[Metrics]) -> Result<(), ReportError> {
    save_png(path, &draw(name, &panels(metrics))?)
}
