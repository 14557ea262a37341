//! A picture as the bytes of a PNG file, for tickets and chats. Draws, decides nothing.

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

impl Canvas {
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
