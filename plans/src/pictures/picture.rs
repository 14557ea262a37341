//! A picture as a list of filled rectangles, lines and texts, in pixels from the top left.

use super::font::Weight;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Color(pub u8, pub u8, pub u8);

/// Which end of a text its position names.
#[derive(Clone, Copy, Debug)]
pub(super) enum Anchor {
    Start,
    Middle,
    End,
}

#[derive(Clone, Debug)]
pub(super) enum Mark {
    /// Begins a group of marks that belong together; it has a name.
    Group(&'static str),
    EndGroup,
    Rect {
        x: u32,
        y: u32,
        width: u32,
        height: u32,
        fill: Color,
    },
    /// Straight from point to point, with round ends. One point is a dot.
    Line {
        points: Vec<(f32, f32)>,
        width: f32,
        stroke: Color,
    },
    /// `y` is the baseline; `size` is in pixels per em.
    Text {
        x: u32,
        y: u32,
        anchor: Anchor,
        size: f32,
        weight: Weight,
        fill: Color,
        text: String,
    },
}

#[derive(Clone, Debug)]
pub(super) struct Picture {
    pub width: u32,
    pub height: u32,
    pub background: Color,
    pub marks: Vec<Mark>,
}

impl Picture {
    pub(super) fn new(background: Color) -> Picture {
        Picture {
            width: 0,
            height: 0,
            background,
            marks: Vec::new(),
        }
    }

    pub(super) fn group(&mut self, name: &'static str) {
        self.marks.push(Mark::Group(name));
    }

    pub(super) fn end_group(&mut self) {
        self.marks.push(Mark::EndGroup);
    }

    pub(super) fn rect(&mut self, x: u32, y: u32, width: u32, height: u32, fill: Color) {
        self.height = self.height.max(y + height);
        self.marks.push(Mark::Rect {
            x,
            y,
            width,
            height,
            fill,
        });
    }

    pub(super) fn line(&mut self, points: Vec<(f32, f32)>, width: f32, stroke: Color) {
        self.marks.push(Mark::Line {
            points,
            width,
            stroke,
        });
    }

    #[allow(
        clippy::too_many_arguments,
        reason = "one call draws one line of text; names would be longer than the call"
    )]
    pub(super) fn text(
        &mut self,
        x: u32,
        y: u32,
        anchor: Anchor,
        size: f32,
        weight: Weight,
        fill: Color,
        text: &str,
    ) {
        self.height = self.height.max(y);
        let text = text.to_owned();
        self.marks.push(Mark::Text {
            x,
            y,
            anchor,
            size,
            weight,
            fill,
            text,
        });
    }

    /// Fixes the width, and the height at `margin` below the lowest mark.
    pub(super) fn close(&mut self, width: u32, margin: u32) {
        self.width = width;
        self.height += margin;
    }
}
