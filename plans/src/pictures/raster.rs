//! A picture as the bytes of a PNG file, for tickets and chats. Draws, decides nothing.

use std::collections::BTreeMap;

use ab_glyph::{Font, ScaleFont, point};

use super::font;
use super::picture::{Anchor, Color, Mark, Picture};

/// The most pixels that are drawn: 192 MB of memory.
const MAX_PIXELS: u64 = 64 << 20;

/// A picture with more pixels than are worth drawing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the picture would have {width} × {height} pixels, more than {MAX_PIXELS}; write an SVG instead"
)]
pub struct TooLarge {
    /// Width in pixels.
    pub width: u64,
    /// Height in pixels.
    pub height: u64,
}

struct Canvas {
    width: usize,
    height: usize,
    rgb: Vec<u8>,
}

pub(super) fn write(picture: &Picture, scale: u32) -> Result<Vec<u8>, TooLarge> {
    let (width, height) = (
        u64::from(picture.width) * u64::from(scale),
        u64::from(picture.height) * u64::from(scale),
    );
    if width.saturating_mul(height) > MAX_PIXELS {
        return Err(TooLarge { width, height });
    }
    let (width, height) = (width as usize, height as usize);
    let Color(r, g, b) = picture.background;
    let mut canvas = Canvas {
        width,
        height,
        rgb: [r, g, b].repeat(width * height),
    };
    let s = scale as usize;
    for mark in &picture.marks {
        match mark {
            Mark::Group(_) | Mark::EndGroup => {}
            Mark::Rect {
                x,
                y,
                width,
                height,
                fill,
            } => {
                let (left, top) = (*x as usize * s, *y as usize * s);
                for y in top..top + *height as usize * s {
                    for x in left..left + *width as usize * s {
                        canvas.blend(x, y, *fill, 1.0);
                    }
                }
            }
            Mark::Line {
                points,
                width,
                stroke,
            } => {
                let points: Vec<_> = points
                    .iter()
                    .map(|(x, y)| (x * scale as f32, y * scale as f32))
                    .collect();
                canvas.line(&points, width * scale as f32, *stroke);
            }
            Mark::Text {
                x,
                y,
                anchor,
                size,
                weight,
                fill,
                text,
            } => {
                let size = size * scale as f32;
                let width = font::width(text, *weight, size);
                let left = (*x * scale) as f32
                    - match anchor {
                        Anchor::Start => 0.0,
                        Anchor::Middle => width / 2.0,
                        Anchor::End => width,
                    };
                let font = font::scaled(*weight, size);
                let mut pen = point(left, (*y * scale) as f32);
                for c in text.chars() {
                    let id = font.glyph_id(c);
                    let glyph = id.with_scale_and_position(font.scale(), pen);
                    pen.x += font.h_advance(id);
                    let Some(outline) = font.font.outline_glyph(glyph) else {
                        continue;
                    };
                    let corner = outline.px_bounds().min;
                    outline.draw(|x, y, coverage| {
                        let (x, y) = (corner.x + x as f32, corner.y + y as f32);
                        if x >= 0.0 && y >= 0.0 {
                            canvas.blend(x as usize, y as usize, *fill, coverage);
                        }
                    });
                }
            }
        }
    }
    Ok(encode(&canvas))
}

/// Distance of a point from the line between two others.
fn distance((x, y): (f32, f32), (ax, ay): (f32, f32), (bx, by): (f32, f32)) -> f32 {
    let (dx, dy) = (bx - ax, by - ay);
    let length = dx * dx + dy * dy;
    let along = match length > 0.0 {
        true => (((x - ax) * dx + (y - ay) * dy) / length).clamp(0.0, 1.0),
        false => 0.0,
    };
    (x - ax - along * dx).hypot(y - ay - along * dy)
}

impl Canvas {
    /// Draws straight from point to point. Where parts overlap they are drawn once.
    fn line(&mut self, points: &[(f32, f32)], width: f32, stroke: Color) {
        let reach = width / 2.0 + 1.0;
        let mut covered: BTreeMap<(usize, usize), f32> = BTreeMap::new();
        for (i, a) in points.iter().enumerate() {
            let b = points.get(i + 1).unwrap_or(a);
            let span = |a: f32, b: f32, end: usize| {
                let low = (a.min(b) - reach).max(0.0) as usize;
                low..((a.max(b) + reach).max(0.0) as usize + 1).min(end)
            };
            for y in span(a.1, b.1, self.height) {
                for x in span(a.0, b.0, self.width) {
                    let away = distance((x as f32 + 0.5, y as f32 + 0.5), *a, *b);
                    let coverage = (width / 2.0 + 0.5 - away).clamp(0.0, 1.0);
                    if coverage > 0.0 {
                        let most = covered.entry((y, x)).or_default();
                        *most = most.max(coverage);
                    }
                }
            }
        }
        for ((y, x), coverage) in covered {
            self.blend(x, y, stroke, coverage);
        }
    }

    /// Mixes a colour into a pixel; outside of the canvas it does nothing.
    fn blend(&mut self, x: usize, y: usize, Color(r, g, b): Color, coverage: f32) {
        if x >= self.width || y >= self.height {
            return;
        }
        let at = 3 * (y * self.width + x);
        let coverage = coverage.clamp(0.0, 1.0);
        for (old, new) in self.rgb[at..at + 3].iter_mut().zip([r, g, b]) {
            *old = (f32::from(*old) * (1.0 - coverage) + f32::from(new) * coverage).round() as u8;
        }
    }
}

fn encode(canvas: &Canvas) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, canvas.width as u32, canvas.height as u32);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    // Memory does not run out of space, and the canvas has as many bytes as the header says.
    let mut writer = encoder.write_header().expect("a canvas is never empty");
    writer
        .write_image_data(&canvas.rgb)
        .expect("a canvas is as large as it says");
    writer.finish().expect("memory takes what is written");
    bytes
}
