//! What every layers × steps picture has around its cells: titles, axes, places for panels.

use super::font::{self, Weight};
use super::picture::{Anchor, Color, Picture};
use super::{FAINT, INK};

pub(super) const MARGIN: u32 = 24;
/// Between panels, and between the last row of panels and what is below.
pub(super) const GUTTER: u32 = 36;
/// Layer numbers, and the gap between them and the grid.
pub(super) const LEFT: u32 = 34;
/// Title, subtitle and the gap below them.
const HEADER: u32 = 52;
/// Step numbers and the word below them.
const BOTTOM: u32 = 40;
/// A panel is at least so wide: room for its title.
const NARROWEST: u32 = 230;
/// Panels wrap into another row beyond this width, in pixels.
const WIDEST: u32 = 1500;
/// So many panels are made to fit beside each other if that leaves their cells visible.
const ABREAST: usize = 3;

/// The size of one layer-step, in pixels, the gap included.
#[derive(Clone, Copy)]
pub(super) struct Cell {
    width: u32,
    height: u32,
}

impl Cell {
    /// Square, and as large as lets the longest of the (steps, layers), or three of them, fill the
    /// width.
    pub(super) fn fitting(shapes: &[(usize, usize)]) -> Cell {
        let most =
            |of: fn(&(usize, usize)) -> usize| shapes.iter().map(of).max().unwrap_or(1).max(1);
        let (steps, layers) = (most(|shape| shape.0), most(|shape| shape.1));
        let panel = match shapes.len().min(ABREAST) {
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

/// A panel: a grid of cells with what is around it, in its place.
#[derive(Clone, Copy)]
pub(super) struct Grid {
    x: u32,
    y: u32,
    steps: u32,
    layers: u32,
    cell: Cell,
}

impl Grid {
    pub(super) fn new((steps, layers): (usize, usize), cell: Cell) -> Grid {
        Grid {
            x: 0,
            y: 0,
            steps: steps as u32,
            layers: layers as u32,
            cell,
        }
    }

    pub(super) fn at(self, x: u32, y: u32) -> Grid {
        Grid { x, y, ..self }
    }

    fn width(&self) -> u32 {
        (LEFT + self.steps * self.cell.width).max(NARROWEST)
    }

    fn height(&self) -> u32 {
        HEADER + self.layers * self.cell.height + BOTTOM
    }

    fn left(&self) -> u32 {
        self.x + LEFT
    }

    fn top(&self) -> u32 {
        self.y + HEADER
    }

    pub(super) fn header(&self, picture: &mut Picture, title: &str, subtitle: &str) {
        let room = self.width() as f32 - LEFT as f32;
        let lines = [
            (title, 14, 15.0, Weight::SemiBold, INK),
            (subtitle, 31, 11.0, Weight::Regular, FAINT),
        ];
        for (text, below, size, weight, ink) in lines {
            let text = font::shortened(text, weight, size, room);
            let y = self.y + below;
            picture.text(self.left(), y, Anchor::Start, size, weight, ink, &text);
        }
    }

    pub(super) fn fill(&self, picture: &mut Picture, step: usize, layer: usize, color: Color) {
        let Cell { width, height } = self.cell;
        picture.rect(
            self.left() + step as u32 * width,
            self.top() + layer as u32 * height,
            width - Cell::gap(width),
            height - Cell::gap(height),
            color,
        );
    }

    pub(super) fn axes(&self, picture: &mut Picture) {
        let mut label = |x, y, anchor, size, ink, text: &str| {
            picture.text(x, y, anchor, size, Weight::Regular, ink, text);
        };
        let (left, top) = (self.left(), self.top());
        let bottom = top + self.layers * self.cell.height;
        label(left - 8, top - 6, Anchor::End, 11.0, FAINT, "layer");
        for layer in ticks(self.layers, self.cell.height, 14) {
            let y = top + layer * self.cell.height + self.cell.height / 2 + 4;
            label(left - 8, y, Anchor::End, 10.0, INK, &layer.to_string());
        }
        for step in ticks(self.steps, self.cell.width, 26) {
            let x = left + step * self.cell.width + self.cell.width / 2;
            label(x, bottom + 15, Anchor::Middle, 10.0, INK, &step.to_string());
        }
        let middle = left + self.steps * self.cell.width / 2;
        label(middle, bottom + 32, Anchor::Middle, 11.0, FAINT, "step");
    }
}

/// Where panels go, beside each other and wrapped, and how far right and down that leads.
pub(super) fn flow(grids: &[Grid]) -> (Vec<(u32, u32)>, u32, u32) {
    let (mut x, mut y, mut row_height, mut right) = (MARGIN, MARGIN, 0, MARGIN);
    let mut places = Vec::new();
    for grid in grids {
        if x > MARGIN && x + grid.width() > WIDEST {
            (x, y, row_height) = (MARGIN, y + row_height + GUTTER / 2, 0);
        }
        places.push((x, y));
        row_height = row_height.max(grid.height());
        right = right.max(x + grid.width());
        x += grid.width() + GUTTER;
    }
    (places, right, y + row_height)
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
