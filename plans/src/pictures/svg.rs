//! A picture as an SVG document, for browsers and papers. Writes text, decides nothing.

use std::fmt::Write;

use super::font::Weight;
use super::picture::{Anchor, Color, Mark, Picture};

pub(super) fn write(picture: &Picture) -> String {
    let Picture {
        width,
        height,
        background,
        marks,
    } = picture;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
         viewBox=\"0 0 {width} {height}\" font-family=\"Inter, Helvetica, Arial, sans-serif\">\n\
         <rect width=\"{width}\" height=\"{height}\" fill=\"{}\"/>\n",
        hex(*background)
    );
    for mark in marks {
        // Writing to a String cannot fail.
        let _ = match mark {
            Mark::Group(name) => writeln!(svg, "<g class=\"{}\">", escaped(name)),
            Mark::EndGroup => writeln!(svg, "</g>"),
            Mark::Rect {
                x,
                y,
                width,
                height,
                fill,
            } => writeln!(
                svg,
                "<rect x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{height}\" fill=\"{}\"/>",
                hex(*fill)
            ),
            Mark::Line {
                points,
                width,
                stroke,
            } => {
                // A dot is a line from a point to itself.
                let dot = if points.len() == 1 {
                    points.first()
                } else {
                    None
                };
                let points: Vec<String> = points
                    .iter()
                    .chain(dot)
                    .map(|(x, y)| format!("{x:.1},{y:.1}"))
                    .collect();
                writeln!(
                    svg,
                    "<polyline points=\"{}\" fill=\"none\" stroke=\"{}\" stroke-width=\"{width}\" stroke-linecap=\"round\" stroke-linejoin=\"round\"/>",
                    points.join(" "),
                    hex(*stroke)
                )
            }
            Mark::Text {
                x,
                y,
                anchor,
                size,
                weight,
                fill,
                text,
            } => writeln!(
                svg,
                "<text x=\"{x}\" y=\"{y}\" font-size=\"{size}\" font-weight=\"{}\" text-anchor=\"{}\" fill=\"{}\" xml:space=\"preserve\">{}</text>",
                match weight {
                    Weight::Regular => 400,
                    Weight::SemiBold => 600,
                },
                match anchor {
                    Anchor::Start => "start",
                    Anchor::Middle => "middle",
                    Anchor::End => "end",
                },
                hex(*fill),
                escaped(text)
            ),
        };
    }
    svg.push_str("</svg>\n");
    svg
}

fn hex(Color(r, g, b): Color) -> String {
    format!("#{r:02X}{g:02X}{b:02X}")
}

/// Text for XML. Characters that XML 1.0 does not allow, even escaped, become U+FFFD.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\u{0}'..='\u{1F}' | '\u{7F}'..='\u{9F}' | '\u{FFFE}' | '\u{FFFF}' => {
                out.push('\u{FFFD}')
            }
            _ => out.push(c),
        }
    }
    out
}
