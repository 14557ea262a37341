//! Plans as pictures: layers down, steps across, one colour per action (the paper's Figure 5).
//!
//! This module decides what is where; `picture` holds the result, `svg` and `raster` write it
//! down. The same plans always give the same bytes on one machine, and the same SVG everywhere.

mod font;
mod picture;
mod raster;
mod svg;

pub use raster::TooLarge;

use crate::{Action, Plan};
use font::Weight;
use picture::{Anchor, Color, Picture};

/// A heat map of one plan, or of several side by side.
#[derive(Clone, Debug)]
pub struct HeatMap {
    picture: Picture,
}

const INK: Color = Color(0x1F, 0x29, 0x33);
const FAINT: Color = Color(0x61, 0x6E, 0x7C);
const PAPER: Color = Color(0xFF, 0xFF, 0xFF);

/// Light to dark as less is computed, so that it reads in grey and to colour-blind eyes too.
const fn color(action: Action) -> Color {
    match action {
        Action::Full => Color(0xE4, 0xE7, 0xEB),
        Action::Asc => Color(0xF7, 0xC9, 0x48),
        Action::WaRs => Color(0x6C, 0xB4, 0xE4),
        Action::WaRsAsc => Color(0x2B, 0x6C, 0xB0),
        Action::Ast => Color(0x42, 0x1C, 0x63),
    }
}

const MARGIN: u32 = 24;
/// Between panels, and between the last row of panels and the legend.
const GUTTER: u32 = 36;
/// Title, subtitle and the gap below them.
const HEADER: u32 = 52;
/// Layer numbers, and the gap between them and the grid.
const LEFT: u32 = 34;
/// Step numbers and the word below them.
const BOTTOM: u32 = 40;
const LEGEND: u32 = 14;
/// A panel is at least so wide: room for its title.
const NARROWEST: u32 = 230;
/// Panels wrap into another row beyond this width, in pixels.
const WIDEST: u32 = 1500;
/// So many panels are made to fit beside each other if that leaves their cells visible.
const ABREAST: usize = 3;
/// The legend may be wider than a narrow panel, up to this.
const LEGEND_WIDTH: u32 = 540;

impl HeatMap {
    /// The heat map of one plan.
    pub fn new(plan: &Plan) -> HeatMap {
        HeatMap::side_by_side(&[plan])
    }

    /// Several plans in panels beside each other, with one legend, for comparison. Cells have one
    /// size in all panels; panels that do not fit wrap into further rows.
    pub fn side_by_side(plans: &[&Plan]) -> HeatMap {
        let cell = Cell::fitting(plans);
        let panel_width =
            |plan: &Plan| (LEFT + plan.step_count() as u32 * cell.width).max(NARROWEST);
        let panel_height = |plan: &Plan| HEADER + plan.layers() as u32 * cell.height + BOTTOM;

        let mut picture = Picture::new(PAPER);
        let (mut x, mut y, mut row_height, mut right) = (MARGIN, MARGIN, 0, MARGIN);
        for plan in plans {
            if x > MARGIN && x + panel_width(plan) > WIDEST {
                (x, y, row_height) = (MARGIN, y + row_height + GUTTER / 2, 0);
            }
            panel(&mut picture, plan, cell, x, y, panel_width(plan));
            row_height = row_height.max(panel_height(plan));
            right = right.max(x + panel_width(plan));
            x += panel_width(plan) + GUTTER;
        }
        let legend_right = legend(&mut picture, plans, right, y + row_height + GUTTER / 2);
        picture.close(right.max(legend_right) + MARGIN, MARGIN);
        HeatMap { picture }
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

/// The size of one layer-step, in pixels, the gap included.
#[derive(Clone, Copy)]
struct Cell {
    width: u32,
    height: u32,
}

impl Cell {
    /// Square, and as large as lets the longest plan, or three of them, fill the width.
    fn fitting(plans: &[&Plan]) -> Cell {
        let steps = plans
            .iter()
            .map(|plan| plan.step_count())
            .max()
            .unwrap_or(1)
            .max(1);
        let layers = plans
            .iter()
            .map(|plan| plan.layers())
            .max()
            .unwrap_or(1)
            .max(1);
        let panel = match plans.len().min(ABREAST) {
            0 | 1 => 720,
            abreast => WIDEST as usize / abreast - (LEFT + GUTTER) as usize,
        };
        let width = (panel / steps).clamp(1, 16) as u32;
        let height = (480 / layers).clamp(1, 16) as u32;
        // Long plans keep readable rows; everything else gets squares.
        if width >= 4 && height >= 4 {
            let side = width.min(height);
            return Cell {
                width: side,
                height: side,
            };
        }
        Cell { width, height }
    }

    fn gap(size: u32) -> u32 {
        if size > 4 { 1 } else { 0 }
    }
}

fn panel(picture: &mut Picture, plan: &Plan, cell: Cell, x: u32, y: u32, width: u32) {
    let (steps, layers) = (plan.step_count() as u32, plan.layers() as u32);
    let title = font::shortened(
        plan.name.as_deref().unwrap_or("plan"),
        Weight::SemiBold,
        15.0,
        width as f32 - LEFT as f32,
    );
    let (left, top) = (x + LEFT, y + HEADER);
    picture.text(
        left,
        y + 14,
        Anchor::Start,
        15.0,
        Weight::SemiBold,
        INK,
        &title,
    );
    let delta = plan
        .delta
        .map(|delta| format!(", δ {delta}"))
        .unwrap_or_default();
    let subtitle = format!("{layers} layers × {steps} steps{delta}");
    let subtitle = font::shortened(&subtitle, Weight::Regular, 11.0, width as f32 - LEFT as f32);
    picture.text(
        left,
        y + 31,
        Anchor::Start,
        11.0,
        Weight::Regular,
        FAINT,
        &subtitle,
    );

    for action in Action::ALL {
        picture.group(action.name());
        for (step, row) in plan.steps.iter().enumerate() {
            for (layer, _) in row.iter().enumerate().filter(|(_, a)| **a == action) {
                picture.rect(
                    left + step as u32 * cell.width,
                    top + layer as u32 * cell.height,
                    cell.width - Cell::gap(cell.width),
                    cell.height - Cell::gap(cell.height),
                    color(action),
                );
            }
        }
        picture.end_group();
    }

    let bottom = top + layers * cell.height;
    picture.text(
        left - 8,
        top - 6,
        Anchor::End,
        11.0,
        Weight::Regular,
        FAINT,
        "layer",
    );
    for layer in ticks(layers, cell.height, 14) {
        let middle = top + layer * cell.height + cell.height / 2;
        picture.text(
            left - 8,
            middle + 4,
            Anchor::End,
            10.0,
            Weight::Regular,
            INK,
            &layer.to_string(),
        );
    }
    for step in ticks(steps, cell.width, 26) {
        let middle = left + step * cell.width + cell.width / 2;
        picture.text(
            middle,
            bottom + 15,
            Anchor::Middle,
            10.0,
            Weight::Regular,
            INK,
            &step.to_string(),
        );
    }
    let middle = left + steps * cell.width / 2;
    picture.text(
        middle,
        bottom + 32,
        Anchor::Middle,
        11.0,
        Weight::Regular,
        FAINT,
        "step",
    );
}

/// The numbers to write along an axis: round ones, at least `apart` pixels from each other.
fn ticks(count: u32, cell: u32, apart: u32) -> impl Iterator<Item = u32> {
    let every =
        (0..).flat_map(|power| [1u32, 2, 5].map(|digit| u64::from(digit) * 10u64.pow(power)));
    let stride = every
        .take(27)
        .find(|stride| stride * u64::from(cell) >= u64::from(apart));
    (0..count).step_by(stride.unwrap_or(1) as usize)
}

/// Draws the legend, in as many rows as fit between the margin and `right`; returns its own right.
fn legend(picture: &mut Picture, plans: &[&Plan], right: u32, top: u32) -> u32 {
    let (mut x, mut y, mut widest) = (MARGIN + LEFT, top, MARGIN + LEFT);
    for action in Action::ALL {
        // A share makes sense only where there is one plan to have it.
        let label = match plans {
            [plan] => format!("{action}  {:.0} %", 100.0 * plan.counts().share(action)),
            _ => action.name().to_owned(),
        };
        let width = LEGEND + 6 + font::width(&label, Weight::Regular, 11.0).ceil() as u32;
        if x > MARGIN + LEFT && x + width > right.max(LEGEND_WIDTH) {
            (x, y) = (MARGIN + LEFT, y + LEGEND + 8);
        }
        picture.rect(x, y, LEGEND, LEGEND, color(action));
        picture.text(
            x + LEGEND + 6,
            y + 11,
            Anchor::Start,
            11.0,
            Weight::Regular,
            INK,
            &label,
        );
        widest = widest.max(x + width);
        x += width + 20;
    }
    widest
}
