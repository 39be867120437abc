//! Pictures are read back as XML.
#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

use proptest::prelude::*;
use roxmltree::{Document, Node, ParsingOptions};

use super::{super::tests::golden, *};
use crate::{
    export::{
        fixture::{Fixture, HOSTILE, profiles, sampled, user},
        tests::options,
    },
    fold::is_unprintable,
};

/// Parses a picture, which also checks that it is well-formed XML 1.0.
fn with_document<T>(svg: &[u8], read: impl FnOnce(&Document<'_>) -> T) -> T {
    let text = str::from_utf8(svg).unwrap();
    let allow = ParsingOptions { allow_dtd: true, ..Default::default() };
    read(&Document::parse_with_options(text, allow).unwrap())
}

/// Title, horizontal extent and colour of every box, one a line.
fn boxes(document: &Document<'_>) -> Vec<String> {
    let frames = document.descendants().find(|n| n.attribute("id") == Some("frames")).unwrap();
    frames
        .children()
        .filter(Node::is_element)
        .map(|frame| {
            let child = |name| frame.children().find(|c| c.tag_name().name() == name).unwrap();
            let (title, rect) = (child("title").text().unwrap_or_default(), child("rect"));
            let [x, y, width, fill] =
                ["x", "y", "width", "fill"].map(|name| rect.attribute(name).unwrap().to_owned());
            format!("{title} | x {x} y {y} width {width} {fill}")
        })
        .collect()
}

fn child_boxes(svg: &[u8]) -> Vec<String> {
    with_document(svg, boxes)
}

#[test]
fn boxes_are_as_before() {
    for signal in Signal::ALL {
        let svg = render(&sampled(signal).profile(), &options()).unwrap();
        let text = child_boxes(&svg).join("\n") + "\n";
        golden(&format!("export.{}.boxes", signal.name()), &text);
    }
}

#[test]
fn search_and_zoom_are_there() {
    let svg = render(&sampled(Signal::Cpu).profile(), &options()).unwrap();
    with_document(&svg, |document| {
        let script = document.descendants().find(|n| n.tag_name().name() == "script").unwrap();
        let code: String = script.children().filter_map(|c| c.text()).collect();
        assert!(code.contains("function zoom") && code.contains("function search"));
        let text = |id| document.descendants().find(|n| n.attribute("id") == Some(id));
        assert_eq!(text("title").and_then(|n| n.text()), Some("CPU time on <node>"));
        assert_eq!(text("subtitle").and_then(|n| n.text()), Some("10 s at 99 Hz; 3 events lost"));
    });
}

#[test]
fn without_samples_the_picture_says_so() {
    let options = Options { subtitle: "perf_event_open: <denied>\u{1b}".into(), ..options() };
    let svg = render(&Fixture::new(Signal::Cpu).profile(), &options).unwrap();
    with_document(&svg, |document| {
        let texts: Vec<&str> = document.descendants().filter_map(|n| n.text()).collect();
        assert!(texts.contains(&"no samples"));
        assert!(texts.contains(&"perf_event_open: <denied>\\x1b"));
        assert!(texts.contains(&"CPU time on <node>"));
    });
}

#[test]
fn a_box_is_not_cut_by_a_name_that_sorts_between() {
    let mut fixture = Fixture::new(Signal::PageFault);
    let (a, b, c) = (user("a", "", 1), user("a b", "", 1), user("c", "", 1));
    for stack in [vec![a.clone()], vec![c.clone(), b], vec![c, a]] {
        fixture.sample(("w", 1, "t"), &stack, (1, 1));
    }
    let boxes = child_boxes(&render(&fixture.profile(), &Options::default()).unwrap());
    assert_eq!(boxes.iter().filter(|b| b.starts_with("a (2 faults")).count(), 1, "{boxes:?}");
}

#[test]
fn tiny_frames_are_left_out() {
    let mut fixture = Fixture::new(Signal::PageFault);
    fixture.sample(("w", 1, "t"), &[user("wide", "", 1)], (1, 1_000_000));
    fixture.sample(("w", 1, "t"), &[user("narrow", "", 1)], (1, 100));
    let boxes = child_boxes(&render(&fixture.profile(), &Options::default()).unwrap());
    assert!(boxes.iter().any(|b| b.starts_with("wide")), "{boxes:?}");
    assert!(!boxes.iter().any(|b| b.starts_with("narrow")), "{boxes:?}");
}

/// Element names and attributes of a picture, without what frames say.
fn shape(document: &Document<'_>) -> Vec<String> {
    document
        .descendants()
        .filter(Node::is_element)
        .map(|n| {
            let names: Vec<&str> = n.attributes().map(|a| a.name()).collect();
            format!("{} {}", n.tag_name().name(), names.join(" "))
        })
        .collect()
}

#[test]
fn hostile_names_add_nothing_to_the_document() {
    let picture = |name: &str| {
        let mut fixture = Fixture::new(Signal::Cpu);
        let stack = [user(name, name, 1), user(name, name, 1)];
        fixture.sample((name, 1, name), &stack, (1, 1_000_000));
        let title = name.to_owned();
        let options = Options { subtitle: title.clone() + "s", title, ..options() };
        render(&fixture.profile(), &options).unwrap()
    };
    let plain = with_document(&picture("plain"), shape);
    for hostile in HOSTILE {
        let svg = picture(hostile);
        assert_eq!(with_document(&svg, shape), plain, "{hostile:?}");
        let raw = |c: char| is_unprintable(c) && !matches!(c, '\n' | '\t' | '\u{a0}');
        assert_eq!(str::from_utf8(&svg).unwrap().find(raw), None, "{hostile:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn every_picture_is_well_formed(profile in profiles()) {
        let svg = render(&profile, &options()).unwrap();
        let elements = with_document(&svg, |document| document.descendants().count());
        prop_assert!(elements > 5);
    }
}
