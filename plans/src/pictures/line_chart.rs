//! Curves: a few named lines over two axes.

use super::axis::{Axis, viridis};
use super::font::{self, Weight};
use super::frame::MARGIN;
use super::picture::{Anchor, Color, Picture};
use super::{FAINT, INK, PAPER, RULE, TooLarge, raster, svg};

/// One line.
#[derive(Clone, Debug, PartialEq)]
pub struct Series {
    /// Its name in the legend.
    pub name: String,
    /// Its points (x, y) in the order in which they are joined. A point that has no place on the
    /// axes (not finite, or not above 0 on a logarithmic one) interrupts the line.
    pub points: Vec<(f64, f64)>,
}

/// A chart of a few lines with a legend beside them.
#[derive(Clone, Debug)]
pub struct LineChart {
    picture: Picture,
}

const WIDTH: u32 = 560;
const HEIGHT: u32 = 300;
const HEADER: u32 = 40;
/// The values beside the vertical axis.
const LEFT: u32 = 52;
const LEGEND_ROW: u32 = 18;
const LEGEND_WIDTH: u32 = 220;
/// As many rows fit beside the chart.
const LEGEND_ROWS: usize = 17;

/// Distinct to colour-blind eyes and in grey (after Okabe and Ito).
const COLORS: [Color; 7] = [
    Color(0x2B, 0x6C, 0xB0),
    Color(0xD5, 0x5E, 0x00),
    Color(0x00, 0x9E, 0x73),
    Color(0x42, 0x1C, 0x63),
    Color(0xE0, 0xA0, 0x00),
    Color(0x6C, 0xB4, 0xE4),
    Color(0xCC, 0x79, 0xA7),
];

/// Each line its own colour; where they are many, in order from dark to light.
fn color(index: usize, of: usize) -> Color {
    match of <= COLORS.len() {
        true => COLORS[index],
        false => viridis(0.95 * index as f64 / (of - 1) as f64),
    }
}

impl LineChart {
    /// The chart of these lines.
    pub fn new(title: &str, x: &Axis, y: &Axis, series: &[Series]) -> LineChart {
        let points = || series.iter().flat_map(|series| &series.points);
        let across = x.fitted(points().map(|point| point.0));
        let up = y.fitted(points().map(|point| point.1));
        let up = if y.range.is_none() { up.rounded() } else { up };
        let (left, top) = (MARGIN + LEFT, MARGIN + HEADER);
        let (right, bottom) = (left + WIDTH, top + HEIGHT);
        let regular = Weight::Regular;
        let mut picture = Picture::new(PAPER);

        let title = font::shortened(title, Weight::SemiBold, 15.0, WIDTH as f32);
        let semi_bold = Weight::SemiBold;
        picture.text(
            left,
            MARGIN + 12,
            Anchor::Start,
            15.0,
            semi_bold,
            INK,
            &title,
        );
        let label = font::shortened(&y.label, regular, 11.0, WIDTH as f32);
        picture.text(
            left,
            MARGIN + 29,
            Anchor::Start,
            11.0,
            regular,
            FAINT,
            &label,
        );
        for (place, text) in up.ticks() {
            let y = bottom - (place * f64::from(HEIGHT)).round() as u32;
            picture.rect(left, y, WIDTH, 1, RULE);
            picture.text(left - 8, y + 4, Anchor::End, 10.0, regular, INK, &text);
        }
        picture.rect(left, bottom, WIDTH, 1, FAINT);
        for (place, text) in across.ticks() {
            let x = left + (place * f64::from(WIDTH)).round() as u32;
            picture.rect(x, bottom, 1, 4, FAINT);
            picture.text(x, bottom + 17, Anchor::Middle, 10.0, regular, INK, &text);
        }
        let middle = left + WIDTH / 2;
        let label = font::shortened(&x.label, regular, 11.0, WIDTH as f32);
        picture.text(
            middle,
            bottom + 34,
            Anchor::Middle,
            11.0,
            regular,
            FAINT,
            &label,
        );

        picture.group("lines");
        for (i, line) in series.iter().enumerate() {
            let placed = line.points.iter().map(|(x, y)| {
                let (x, y) = (across.place(*x)?, up.place(*y)?);
                let x = f64::from(left) + x * f64::from(WIDTH);
                let y = f64::from(bottom) - y * f64::from(HEIGHT);
                Some((x as f32, y as f32))
            });
            let placed: Vec<_> = placed.collect();
            for part in placed
                .split(Option::is_none)
                .filter(|part| !part.is_empty())
            {
                let part = part.iter().flatten().copied().collect();
                picture.line(part, 2.0, color(i, series.len()));
            }
        }
        picture.end_group();
        let legend_right = legend(&mut picture, series, right + 20, top);
        picture.close(right.max(legend_right) + MARGIN, MARGIN);
        LineChart { picture }
    }

    /// The picture as an SVG document.
    pub fn to_svg(&self) -> String {
        svg::write(&self.picture)
    }

    /// The picture as the bytes of a PNG file, two pixels to each of the SVG's units.
    ///
    /// # Errors
    ///
    /// When the picture would have more pixels than anybody can look at: hundreds of lines.
    pub fn to_png(&self) -> Result<Vec<u8>, TooLarge> {
        raster::write(&self.picture, 2)
    }
}

/// Names beside the chart, in as many columns as they need; returns their right end.
fn legend(picture: &mut Picture, series: &[Series], left: u32, top: u32) -> u32 {
    let mut x = left;
    let mut first = 0;
    for column in series.chunks(LEGEND_ROWS) {
        let mut widest = 0;
        for (row, line) in column.iter().enumerate() {
            let y = top + row as u32 * LEGEND_ROW;
            let name = font::shortened(&line.name, Weight::Regular, 11.0, LEGEND_WIDTH as f32);
            let ends = [(x, y + 6), (x + 18, y + 6)].map(|(x, y)| (x as f32, y as f32));
            let ink = color(first + row, series.len());
            picture.line(ends.to_vec(), 2.5, ink);
            picture.text(
                x + 26,
                y + 10,
                Anchor::Start,
                11.0,
                Weight::Regular,
                INK,
                &name,
            );
            widest = widest.max(font::width(&name, Weight::Regular, 11.0).ceil() as u32);
        }
        first += column.len();
        x += 26 + widest + 20;
    }
    x.saturating_sub(20)
}
