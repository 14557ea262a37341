//! The two embedded fonts (subsets of Inter, see `font/LICENSE`) and how wide text is in them.
//!
//! Embedded, because a picture must not depend on what the machine has installed.

use ab_glyph::{Font, FontRef, ScaleFont};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Weight {
    Regular,
    SemiBold,
}

/// The font at `size` pixels per em.
pub(super) fn scaled(weight: Weight, size: f32) -> ab_glyph::PxScaleFont<FontRef<'static>> {
    let bytes: &'static [u8] = match weight {
        Weight::Regular => include_bytes!("../../font/Inter-Regular.otf"),
        Weight::SemiBold => include_bytes!("../../font/Inter-SemiBold.otf"),
    };
    let font = FontRef::try_from_slice(bytes).expect("the embedded font is a font");
    // ab_glyph scales by ascent + descent, everybody else by em.
    let em = font.units_per_em().unwrap_or(1000.0);
    let scale = size * font.height_unscaled() / em;
    font.into_scaled(scale)
}

/// Width of a line of text, in pixels.
pub(super) fn width(text: &str, weight: Weight, size: f32) -> f32 {
    let font = scaled(weight, size);
    text.chars().map(|c| font.h_advance(font.glyph_id(c))).sum()
}

/// As much of a text as is at most `room` pixels wide, with an ellipsis where it was cut.
pub(super) fn shortened(text: &str, weight: Weight, size: f32, room: f32) -> String {
    let font = scaled(weight, size);
    let advance = |c| font.h_advance(font.glyph_id(c));
    let ellipsis = advance('…');
    let (mut used, mut fits) = (0.0, 0);
    for (at, c) in text.char_indices() {
        used += advance(c);
        if used > room {
            return format!("{}…", &text[..fits]);
        }
        if used + ellipsis <= room {
            fits = at + c.len_utf8();
        }
    }
    text.to_owned()
}
