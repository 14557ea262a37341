//! Pictures of plans and of the studies that lead to them, as SVG and PNG.
//!
//! `heat_map`, `value_map` and `line_chart` decide what is where; `picture` holds the result,
//! `svg` and `raster` write it down. The same data always give the same bytes on one machine, and
//! the same SVG everywhere.

mod axis;
mod font;
mod frame;
mod heat_map;
mod line_chart;
mod picture;
mod raster;
mod svg;
mod value_map;

pub use axis::{Axis, Scale};
pub use heat_map::HeatMap;
pub use line_chart::{LineChart, Series};
pub use raster::TooLarge;
pub use value_map::{ValueMap, Values};

use picture::Color;

const INK: Color = Color(0x1F, 0x29, 0x33);
const FAINT: Color = Color(0x61, 0x6E, 0x7C);
/// Grid lines, and cells without a value.
const RULE: Color = Color(0xE4, 0xE7, 0xEB);
const PAPER: Color = Color(0xFF, 0xFF, 0xFF);
