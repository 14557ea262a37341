//! Plans as pictures: layers down, steps across, one colour per action (the paper's Figure 5).

use super::font::Weight;
use super::frame::{Cell, GUTTER, Grid, LEFT, MARGIN, flow};
use super::picture::{Anchor, Color, Picture};
use super::{INK, PAPER, TooLarge, font, raster, svg};
use crate::{Action, Plan};

/// A heat map of one plan, or of several side by side.
#[derive(Clone, Debug)]
pub struct HeatMap {
    picture: Picture,
}

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

const LEGEND: u32 = 14;
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
        let shapes: Vec<_> = plans.iter().map(|p| (p.step_count(), p.layers())).collect();
        let cell = Cell::fitting(&shapes);
        let grids: Vec<_> = shapes.iter().map(|shape| Grid::new(*shape, cell)).collect();
        let mut picture = Picture::new(PAPER);
        let (places, right, bottom) = flow(&grids);
        for ((plan, grid), (x, y)) in plans.iter().zip(&grids).zip(places) {
            panel(&mut picture, plan, &grid.at(x, y));
        }
        let legend_right = legend(&mut picture, plans, right, bottom + GUTTER / 2);
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

fn panel(picture: &mut Picture, plan: &Plan, grid: &Grid) {
    let delta = plan
        .delta
        .map(|delta| format!(", δ {delta}"))
        .unwrap_or_default();
    let (steps, layers) = (plan.step_count(), plan.layers());
    let title = plan.name.as_deref().unwrap_or("plan");
    grid.header(
        picture,
        title,
        &format!("{layers} layers × {steps} steps{delta}"),
    );
    for action in Action::ALL {
        picture.group(action.name());
        for (step, row) in plan.steps.iter().enumerate() {
            for (layer, _) in row.iter().enumerate().filter(|(_, a)| **a == action) {
                grid.fill(picture, step, layer, color(action));
            }
        }
        picture.end_group();
    }
    grid.axes(picture);
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
