//! A sheet of small grey images as one PNG: a column for each class, a row for each draw.

use std::fs::File;
use std::io::BufWriter;
use std::path::Path;

use anyhow::{Context, Result};

/// Pixels of the file for each pixel of an image.
const ZOOM: usize = 3;
/// Pixels of the file between two images.
const GAP: usize = 4;

/// Writes `images`, each `side`×`side` in [-1, 1] one after another, filling rows of `columns`.
pub fn write(path: &Path, images: &[f32], side: usize, columns: usize) -> Result<()> {
    let (width, height, pixels) = draw(images, side, columns);
    let file = File::create(path).with_context(|| format!("{}: cannot write", path.display()))?;
    let mut encoder = png::Encoder::new(BufWriter::new(file), width as u32, height as u32);
    encoder.set_color(png::ColorType::Grayscale);
    encoder.set_depth(png::BitDepth::Eight);
    encoder
        .write_header()
        .and_then(|mut writer| writer.write_image_data(&pixels))
        .with_context(|| format!("{}: cannot write", path.display()))
}

fn draw(images: &[f32], side: usize, columns: usize) -> (usize, usize, Vec<u8>) {
    let count = images.len() / (side * side);
    let cell = side * ZOOM + GAP;
    let (width, height) = (columns * cell + GAP, count.div_ceil(columns) * cell + GAP);
    let mut pixels = vec![u8::MAX; width * height];
    for (i, image) in images.chunks_exact(side * side).enumerate() {
        let (left, top) = (GAP + i % columns * cell, GAP + i / columns * cell);
        for y in 0..side * ZOOM {
            for x in 0..side * ZOOM {
                let value = image[y / ZOOM * side + x / ZOOM].clamp(-1.0, 1.0);
                pixels[(top + y) * width + left + x] = ((value + 1.0) * 127.5).round() as u8;
            }
        }
    }
    (width, height, pixels)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_fill_rows_and_values_fill_the_range() {
        // three images of 2x2 in rows of two: black, white, and one that is off the scale
        let images = [[-1.0f32; 4], [1.0; 4], [-7.0; 4]].concat();
        let (width, height, pixels) = draw(&images, 2, 2);
        assert_eq!((width, height), (2 * 10 + 4, 2 * 10 + 4));
        let at = |column: usize, row: usize| pixels[(row * 10 + 5) * width + column * 10 + 5];
        assert_eq!((at(0, 0), at(1, 0), at(0, 1)), (0, 255, 0));
        assert_eq!(at(1, 1), 255, "an empty place stays white");
        assert_eq!(pixels[0], 255, "the gap is white");
    }
}
