//! Numbers per layer and step as pictures, coloured from low to high: how similar attention is
//! between steps and between the halves of guidance, and how far windows and residuals drift (the
//! paper's Figures 3 and 4).

use super::axis::{Axis, Fitted, viridis};
use super::font::{self, Weight};
use super::frame::{Cell, GUTTER, Grid, LEFT, MARGIN, flow};
use super::picture::{Anchor, Picture};
use super::{FAINT, INK, PAPER, RULE, TooLarge, raster, svg};

/// One panel: a number for each layer at each step.
#[derive(Clone, Debug, PartialEq)]
pub struct Values {
    /// What the panel shows.
    pub title: String,
    /// One row per step, in it one value per layer, as in a plan. Rows may be shorter than others
    /// or empty. Values that are not finite (or not above 0, on a logarithmic scale) are left
    /// grey, such as that of a first step compared with none.
    pub values: Vec<Vec<f64>>,
}

/// Layers down, steps across, values as colours, with a bar that explains them.
#[derive(Clone, Debug)]
pub struct ValueMap {
    picture: Picture,
}

const BAR_WIDTH: u32 = 240;
const BAR_HEIGHT: u32 = 12;

impl ValueMap {
    /// Panels beside each other, with one colour scale. Panels that do not fit wrap.
    pub fn new(panels: &[Values], colors: &Axis) -> ValueMap {
        let layers = |panel: &Values| panel.values.iter().map(Vec::len).max().unwrap_or(0);
        let shapes: Vec<_> = panels.iter().map(|p| (p.values.len(), layers(p))).collect();
        let cell = Cell::fitting(&shapes);
        let grids: Vec<_> = shapes.iter().map(|shape| Grid::new(*shape, cell)).collect();
        let all = panels
            .iter()
            .flat_map(|panel| panel.values.iter().flatten());
        let fitted = match colors.range {
            Some(_) => colors.fitted(all.copied()),
            None => colors.fitted(all.copied()).rounded(),
        };
        let mut picture = Picture::new(PAPER);
        let (places, right, bottom) = flow(&grids);
        for ((panel, grid), (x, y)) in panels.iter().zip(&grids).zip(places) {
            draw(&mut picture, panel, layers(panel), &grid.at(x, y), &fitted);
        }
        let bar_right = bar(
            &mut picture,
            &colors.label,
            &fitted,
            right,
            bottom + GUTTER / 2,
        );
        picture.close(right.max(bar_right) + MARGIN, MARGIN);
        ValueMap { picture }
    }

    /// The picture as an SVG document.
    pub fn to_svg(&self) -> String {
        svg::write(&self.picture)
    }

    /// The picture as the bytes of a PNG file, two pixels to each of the SVG's units.
    ///
    /// # Errors
    ///
    /// When the picture would have more pixels than anybody can look at: thousands of steps.
    pub fn to_png(&self) -> Result<Vec<u8>, TooLarge> {
        raster::write(&self.picture, 2)
    }
}

fn draw(picture: &mut Picture, panel: &Values, layers: usize, grid: &Grid, colors: &Fitted) {
    let subtitle = format!("{layers} layers × {} steps", panel.values.len());
    grid.header(picture, &panel.title, &subtitle);
    picture.group("values");
    for (step, row) in panel.values.iter().enumerate() {
        for layer in 0..layers {
            let place = row.get(layer).and_then(|value| colors.place(*value));
            grid.fill(picture, step, layer, place.map_or(RULE, viridis));
        }
    }
    picture.end_group();
    grid.axes(picture);
}

/// Draws the colour bar with its label above and its values below; returns its right end.
fn bar(picture: &mut Picture, label: &str, colors: &Fitted, right: u32, top: u32) -> u32 {
    let left = MARGIN + LEFT;
    let width = BAR_WIDTH.min(right.saturating_sub(left)).max(120);
    // The label has the panels' width, or that of a short sentence.
    let room = right.saturating_sub(left).max(2 * BAR_WIDTH) as f32;
    let label = font::shortened(label, Weight::Regular, 11.0, room);
    let label_width = font::width(&label, Weight::Regular, 11.0).ceil() as u32;
    let regular = Weight::Regular;
    picture.text(left, top + 8, Anchor::Start, 11.0, regular, FAINT, &label);
    let bar_top = top + 16;
    picture.group("scale");
    for x in 0..width / 2 {
        let place = (f64::from(x) + 0.5) / f64::from(width / 2);
        picture.rect(left + 2 * x, bar_top, 2, BAR_HEIGHT, viridis(place));
    }
    picture.end_group();
    let mut free = 0;
    for (place, text) in colors.ticks() {
        let x = left + (place * f64::from(width)).round() as u32;
        let half = font::width(&text, regular, 10.0).ceil() as u32 / 2;
        if x.saturating_sub(half) < free {
            continue;
        }
        picture.rect(
            x.saturating_sub(u32::from(place == 1.0)),
            bar_top + BAR_HEIGHT,
            1,
            3,
            INK,
        );
        let y = bar_top + BAR_HEIGHT + 14;
        picture.text(x, y, Anchor::Middle, 10.0, regular, INK, &text);
        free = x + half + 8;
    }
    left + width.max(label_width).max(free.saturating_sub(left))
}
