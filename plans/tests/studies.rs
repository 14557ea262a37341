//! What value maps and line charts show, read back from the pictures.

use ditfastattn_plans::{Axis, LineChart, Scale, Series, TooLarge, ValueMap, Values};
use proptest::prelude::*;

fn values(title: &str, rows: &[&[f64]]) -> Values {
    Values {
        title: title.to_owned(),
        values: rows.iter().map(|row| row.to_vec()).collect(),
    }
}

fn series(name: &str, points: &[(f64, f64)]) -> Series {
    Series {
        name: name.to_owned(),
        points: points.to_vec(),
    }
}

/// The fills of the rectangles in each group of this class, and all texts.
fn read(svg: &str, class: &str) -> (Vec<Vec<String>>, Vec<String>) {
    let document = roxmltree::Document::parse(svg).unwrap();
    let groups = document
        .descendants()
        .filter(|node| node.attribute("class") == Some(class));
    let groups = groups.map(|group| {
        let rects = group.children().filter(|node| node.has_tag_name("rect"));
        rects
            .map(|rect| rect.attribute("fill").unwrap().to_owned())
            .collect()
    });
    let texts = document
        .descendants()
        .filter(|node| node.has_tag_name("text"));
    let texts = texts.map(|node| node.text().unwrap_or_default().to_owned());
    (groups.collect(), texts.collect())
}

fn size_of_png(bytes: Vec<u8>) -> (u32, u32) {
    let reader = png::Decoder::new(std::io::Cursor::new(bytes)).read_info();
    let reader = reader.unwrap();
    (reader.info().width, reader.info().height)
}

fn size_of_svg(svg: &str) -> (u32, u32) {
    let document = roxmltree::Document::parse(svg).unwrap();
    let size = |name| {
        document
            .root_element()
            .attribute(name)
            .unwrap()
            .parse()
            .unwrap()
    };
    (size("width"), size("height"))
}

const GREY: &str = "#E4E7EB";
const DARKEST: &str = "#440154";
const LIGHTEST: &str = "#FDE725";

#[test]
fn a_small_map_and_a_small_chart() {
    let maps = [
        values("steps", &[&[f64::NAN, f64::NAN], &[0.8, 0.9], &[0.95, 1.0]]),
        values("halves", &[&[0.85, 0.9], &[0.9, 0.95], &[1.0, 1.0]]),
    ];
    insta::assert_snapshot!(
        "map",
        ValueMap::new(&maps, &Axis::new("cosine similarity")).to_svg()
    );
    let lines = [
        series("window", &[(1.0, 0.1), (2.0, 0.03), (3.0, 0.01)]),
        series("residual", &[(1.0, 0.001), (2.0, 0.0), (3.0, 0.0005)]),
    ];
    let chart = LineChart::new("Drift", &Axis::new("step"), &Axis::log("MSE"), &lines);
    insta::assert_snapshot!("chart", chart.to_svg());
}

#[test]
fn colours_run_from_the_lowest_to_the_highest_value_over_all_panels() {
    let maps = [
        values("a", &[&[0.0, 0.5], &[f64::INFINITY]]),
        values("b", &[&[1.0]]),
    ];
    let svg = ValueMap::new(&maps, &Axis::new("similarity")).to_svg();
    let (panels, texts) = read(&svg, "values");
    assert_eq!(
        panels,
        [vec![DARKEST, "#21918C", GREY, GREY], vec![LIGHTEST]]
    );
    for text in [
        "a",
        "b",
        "2 layers × 2 steps",
        "similarity",
        "0",
        "0.2",
        "1.0",
    ] {
        assert!(
            texts.iter().any(|t| t == text),
            "{text} is not in {texts:?}"
        );
    }
}

#[test]
fn a_given_range_holds_and_values_beyond_are_drawn_at_its_ends() {
    let axis = Axis {
        range: Some((0.5, 1.0)),
        ..Axis::new("")
    };
    let map = ValueMap::new(&[values("a", &[&[-3.0, 0.5, 1.0, 7.0]])], &axis);
    let (panels, _) = read(&map.to_svg(), "values");
    assert_eq!(panels, [[DARKEST, DARKEST, LIGHTEST, LIGHTEST]]);
    let log = Axis {
        range: Some((1e-4, 1.0)),
        ..Axis::log("")
    };
    let map = ValueMap::new(&[values("a", &[&[0.0, 1e-4, 1e-2, 1.0]])], &log);
    let (panels, _) = read(&map.to_svg(), "values");
    assert_eq!(panels, [[GREY, DARKEST, "#21918C", LIGHTEST]]);
}

#[test]
fn lines_break_where_there_is_no_value() {
    let line = series("x", &[(0.0, 1.0), (1.0, 2.0), (2.0, f64::NAN), (3.0, 1.0)]);
    let svg = LineChart::new("t", &Axis::new("x"), &Axis::new("y"), &[line]).to_svg();
    let document = roxmltree::Document::parse(&svg).unwrap();
    let group = document
        .descendants()
        .find(|node| node.attribute("class") == Some("lines"));
    let lines: Vec<&str> = group
        .unwrap()
        .children()
        .filter_map(|node| node.attribute("points"))
        .collect();
    assert_eq!(lines.len(), 2);
    assert_eq!(lines[0].split(' ').count(), 2);
    // A dot: one point, twice.
    let dot: Vec<&str> = lines[1].split(' ').collect();
    assert_eq!(dot[0], dot[1]);
}

#[test]
fn nothing_to_show_is_a_picture_too() {
    let none = ValueMap::new(&[], &Axis::new(""));
    let empty = ValueMap::new(&[values("a", &[])], &Axis::log("b"));
    for map in [none, empty] {
        assert!(map.to_png().is_ok());
        read(&map.to_svg(), "values");
    }
    let chart = LineChart::new("", &Axis::new(""), &Axis::new(""), &[series("", &[])]);
    assert!(chart.to_png().is_ok());
    read(&chart.to_svg(), "lines");
}

#[test]
fn pictures_nobody_can_look_at_are_refused_as_png() {
    let endless = Values {
        title: "W".repeat(1 << 16),
        values: vec![vec![1.0]; 400_000],
    };
    let map = ValueMap::new(&[endless], &Axis::new("W".repeat(1 << 16)));
    assert!(matches!(map.to_png(), Err(TooLarge { .. })));
    let many: Vec<Series> = (0..10_000)
        .map(|i| series(&format!("a line with a long name, {i}"), &[(0.0, 0.0)]))
        .collect();
    let chart = LineChart::new("t", &Axis::new("x"), &Axis::new("y"), &many);
    assert!(matches!(chart.to_png(), Err(TooLarge { .. })));
}

/// Colours of pixels along the middle of a horizontal line.
#[test]
fn the_png_draws_the_lines_of_the_svg() {
    let line = series("flat", &[(0.0, 0.5), (1.0, 0.5), (2.0, 0.5)]);
    let y = Axis {
        range: Some((0.0, 1.0)),
        ..Axis::new("y")
    };
    let chart = LineChart::new("t", &Axis::new("x"), &y, &[line]);
    let svg = chart.to_svg();
    let bytes = chart.to_png().unwrap();
    let (width, height) = size_of_svg(&svg);
    assert_eq!(size_of_png(bytes.clone()), (2 * width, 2 * height));
    let mut reader = png::Decoder::new(std::io::Cursor::new(bytes))
        .read_info()
        .unwrap();
    let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
    reader.next_frame(&mut pixels).unwrap();
    let document = roxmltree::Document::parse(&svg).unwrap();
    let line = document
        .descendants()
        .find(|node| node.has_tag_name("polyline"))
        .unwrap();
    let points: Vec<f32> = line
        .attribute("points")
        .unwrap()
        .split([' ', ','])
        .map(|number| number.parse().unwrap())
        .collect();
    let (left, right, y) = (points[0] as u32, points[4] as u32, points[1]);
    for x in 2 * left + 2..2 * right - 2 {
        let at = 3 * ((2.0 * y) as u32 * 2 * width + x) as usize;
        assert_eq!(pixels[at..at + 3], [0x2B, 0x6C, 0xB0]);
    }
}

fn any_value() -> impl Strategy<Value = f64> {
    prop_oneof![any::<f64>(), -1.0f64..1.0, Just(0.0), Just(f64::NAN)]
}

fn axes() -> impl Strategy<Value = Axis> {
    let range = prop::option::of((any_value(), any_value()));
    (any::<String>(), any::<bool>(), range).prop_map(|(label, log, range)| Axis {
        label,
        scale: if log { Scale::Log } else { Scale::Linear },
        range,
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn any_numbers_make_a_map(panels in prop::collection::vec((any::<String>(), prop::collection::vec(prop::collection::vec(any_value(), 0..5), 0..7)), 0..4), axis in axes()) {
        let panels: Vec<Values> = panels.into_iter().map(|(title, values)| Values { title, values }).collect();
        let map = ValueMap::new(&panels, &axis);
        let svg = map.to_svg();
        prop_assert!(!svg.contains("NaN\""));
        let (groups, _) = read(&svg, "values");
        prop_assert_eq!(groups.len(), panels.len());
        for (group, panel) in groups.iter().zip(&panels) {
            let layers = panel.values.iter().map(Vec::len).max().unwrap_or(0);
            prop_assert_eq!(group.len(), layers * panel.values.len());
        }
        prop_assert_eq!(&svg, &ValueMap::new(&panels, &axis).to_svg());
        let (width, height) = size_of_svg(&svg);
        prop_assert_eq!(size_of_png(map.to_png().unwrap()), (2 * width, 2 * height));
    }

    #[test]
    fn any_numbers_make_a_chart(lines in prop::collection::vec((any::<String>(), prop::collection::vec((any_value(), any_value()), 0..6)), 0..12), x in axes(), y in axes(), title: String) {
        let lines: Vec<Series> = lines.into_iter().map(|(name, points)| Series { name, points }).collect();
        let chart = LineChart::new(&title, &x, &y, &lines);
        let svg = chart.to_svg();
        let (width, height) = size_of_svg(&svg);
        let document = roxmltree::Document::parse(&svg).unwrap();
        for line in document.descendants().filter_map(|node| node.attribute("points")) {
            for (i, number) in line.split([' ', ',']).enumerate() {
                let number: f32 = number.parse().unwrap();
                let end = [width, height][i % 2] as f32;
                prop_assert!((0.0..=end).contains(&number));
            }
        }
        prop_assert_eq!(size_of_png(chart.to_png().unwrap()), (2 * width, 2 * height));
    }
}
