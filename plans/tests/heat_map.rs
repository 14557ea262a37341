//! What a heat map shows, read back from the picture.

mod common;

use std::collections::HashMap;

use ditfastattn_plans::{Action, Cfg, HeatMap, Plan, TooLarge};
use proptest::prelude::*;

fn plan(name: &str, rows: &[&str]) -> Plan {
    let row = |row: &&str| row.split(' ').map(|name| name.parse().unwrap()).collect();
    let steps = rows.iter().map(row).collect();
    let name = Some(name.to_owned());
    Plan {
        name,
        cfg: Cfg::CondFirst,
        steps,
        ..Plan::all_full(1, 1)
    }
}

fn sample() -> Plan {
    plan(
        "D3",
        &[
            "full asc full",
            "wa-rs ast wa-rs+asc",
            "ast full asc",
            "full wa-rs ast",
        ],
    )
}

#[derive(Debug, Clone, PartialEq)]
struct Rect {
    x: u32,
    y: u32,
    width: u32,
    height: u32,
    fill: String,
}

/// The rectangles of each action's groups, panel after panel, and all texts.
fn read(svg: &str) -> (Vec<(String, Vec<Rect>)>, Vec<String>) {
    let document = roxmltree::Document::parse(svg).unwrap();
    let number = |node: roxmltree::Node, name| node.attribute(name).unwrap().parse().unwrap();
    let groups = document
        .descendants()
        .filter(|node| node.has_tag_name("g"))
        .map(|group| {
            let rects = group.children().filter(|node| node.has_tag_name("rect"));
            let rects = rects.map(|node| Rect {
                x: number(node, "x"),
                y: number(node, "y"),
                width: number(node, "width"),
                height: number(node, "height"),
                fill: node.attribute("fill").unwrap().to_owned(),
            });
            (
                group.attribute("class").unwrap().to_owned(),
                rects.collect(),
            )
        });
    let texts = document
        .descendants()
        .filter(|node| node.has_tag_name("text"));
    (
        groups.collect(),
        texts
            .map(|node| node.text().unwrap_or_default().to_owned())
            .collect(),
    )
}

#[test]
fn every_layer_step_is_one_cell_in_its_place_and_colour() {
    let plan = sample();
    let (groups, _) = read(&HeatMap::new(&plan).to_svg());
    let mut cells = HashMap::new();
    let mut colours = HashMap::new();
    for (action, rects) in &groups {
        for rect in rects {
            assert_eq!(colours.entry(action).or_insert(&rect.fill), &&rect.fill);
            assert!(
                cells.insert((rect.x, rect.y), action.as_str()).is_none(),
                "cells overlap"
            );
        }
    }
    assert_eq!(cells.len(), 12);
    let mut distinct: Vec<_> = colours.values().collect();
    distinct.sort();
    distinct.dedup();
    assert_eq!(distinct.len(), 5, "one colour per action");
    // Steps from left to right, layers from top to bottom.
    let mut columns: Vec<u32> = cells.keys().map(|(x, _)| *x).collect();
    let mut rows: Vec<u32> = cells.keys().map(|(_, y)| *y).collect();
    for places in [&mut columns, &mut rows] {
        places.sort();
        places.dedup();
    }
    for (step, x) in columns.iter().enumerate() {
        for (layer, y) in rows.iter().enumerate() {
            assert_eq!(cells[&(*x, *y)], plan.action(step, layer).name());
        }
    }
}

#[test]
fn a_picture_says_what_it_shows() {
    let (_, texts) = read(
        &HeatMap::new(&Plan {
            delta: Some(0.075),
            ..sample()
        })
        .to_svg(),
    );
    for expected in [
        "D3",
        "3 layers × 4 steps, δ 0.075",
        "layer",
        "step",
        "0",
        "2",
        "ast  25 %",
        "wa-rs+asc  8 %",
    ] {
        assert!(
            texts.iter().any(|text| text == expected),
            "{expected:?} in {texts:?}"
        );
    }
}

#[test]
fn panels_have_their_titles_and_share_a_legend() {
    let (one, two) = (sample(), plan("D6", &["full", "ast"]));
    let (groups, texts) = read(&HeatMap::side_by_side(&[&one, &two]).to_svg());
    assert_eq!(groups.len(), 10);
    for expected in ["D3", "D6", "full", "asc", "wa-rs", "wa-rs+asc", "ast"] {
        assert_eq!(
            texts.iter().filter(|text| *text == expected).count(),
            1,
            "{expected}"
        );
    }
    let right_of_first = groups[..5]
        .iter()
        .flat_map(|g| &g.1)
        .map(|r| r.x + r.width)
        .max();
    let left_of_second = groups[5..].iter().flat_map(|g| &g.1).map(|r| r.x).min();
    assert!(right_of_first < left_of_second, "side by side");
}

#[test]
fn hostile_names_stay_text() {
    let name = "</text><script>alert(1)</script>&\"'\u{1}\u{b}\u{1b}\u{fffe}\u{202e}".to_owned();
    let svg = HeatMap::new(&Plan {
        name: Some(name),
        ..sample()
    })
    .to_svg();
    assert!(!svg.contains("<script"));
    assert!(
        !svg.contains(['\u{1}', '\u{b}', '\u{1b}', '\u{fffe}']),
        "XML 1.0 has no such characters"
    );
    read(&svg);
    let endless = Plan {
        name: Some("W".repeat(1 << 20)),
        ..sample()
    };
    assert!(HeatMap::new(&endless).to_svg().len() < 10_000);
}

#[test]
fn the_png_is_the_svg_at_twice_the_size() {
    let map = HeatMap::side_by_side(&[&sample(), &plan("D6", &["full", "ast"])]);
    let svg = map.to_svg();
    let document = roxmltree::Document::parse(&svg).unwrap();
    let size = |name| {
        document
            .root_element()
            .attribute(name)
            .unwrap()
            .parse::<u32>()
            .unwrap()
    };

    let bytes = map.to_png().unwrap();
    let mut reader = png::Decoder::new(std::io::Cursor::new(bytes))
        .read_info()
        .unwrap();
    let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
    let info = reader.next_frame(&mut pixels).unwrap();
    assert_eq!(
        (info.width, info.height),
        (2 * size("width"), 2 * size("height"))
    );
    assert_eq!(
        (info.color_type, info.bit_depth),
        (png::ColorType::Rgb, png::BitDepth::Eight)
    );
    let pixel = |x: u32, y: u32| {
        let at = 3 * (y * info.width + x) as usize;
        format!(
            "#{:02X}{:02X}{:02X}",
            pixels[at],
            pixels[at + 1],
            pixels[at + 2]
        )
    };
    for rect in read(&svg).0.iter().flat_map(|group| &group.1) {
        for (x, y) in [(0, 0), (2 * rect.width - 1, 2 * rect.height - 1)] {
            assert_eq!(pixel(2 * rect.x + x, 2 * rect.y + y), rect.fill);
        }
    }
    // The title is drawn: there is ink above the first cell.
    let first = &read(&svg).0[0].1[0];
    let inked = (0..2 * first.y).any(|y| (0..info.width).any(|x| pixel(x, y) == "#1F2933"));
    assert!(inked);
}

#[test]
fn a_picture_nobody_can_look_at_is_refused_as_png_and_small_as_svg_text_allows() {
    let plan = Plan::all_full(1, 400_000);
    let map = HeatMap::new(&plan);
    assert!(matches!(map.to_png(), Err(TooLarge { width, .. }) if width >= 800_000));
}

#[test]
fn no_plan_and_an_empty_plan_are_pictures_too() {
    for map in [
        HeatMap::side_by_side(&[]),
        HeatMap::new(&Plan::all_full(0, 0)),
    ] {
        read(&map.to_svg());
        assert!(map.to_png().is_ok());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn cells_are_as_many_as_layer_steps_and_pictures_repeat(plans in prop::collection::vec(common::plans(), 1..5)) {
        let plans: Vec<&Plan> = plans.iter().collect();
        let svg = HeatMap::side_by_side(&plans).to_svg();
        prop_assert_eq!(&svg, &HeatMap::side_by_side(&plans).to_svg());
        let (groups, _) = read(&svg);
        prop_assert_eq!(groups.len(), 5 * plans.len());
        for (panel, plan) in groups.chunks(5).zip(&plans) {
            for ((class, rects), action) in panel.iter().zip(Action::ALL) {
                prop_assert_eq!(class, action.name());
                prop_assert_eq!(rects.len(), plan.counts().of(action));
            }
        }
    }
}
