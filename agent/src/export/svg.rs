//! Draws a flame graph as an SVG with search and zoom, by the inferno library.
//!
//! Width is weight. Colours tell user, kernel and inlined code and annotations apart; their shade
//! depends on the name alone, so that a function looks the same in every picture. Frames too narrow
//! to see are left out before any text is made.

use std::io;

use inferno::flamegraph::{
    self, Palette,
    color::{BackgroundColor, BasicPalette, Color, PaletteMap},
};

use super::Options;
use crate::{
    fold::{Folded, escape_with, fold, printable},
    profile::{Profile, Signal},
};

/// Frames narrower than one part in this of the picture are left out: a quarter of a pixel in 1200,
/// so that at most 5000 frames are in a row.
const NARROWEST: u64 = 5000;

/// From this total on, in nanoseconds, CPU time is in milliseconds; below it in microseconds, so that
/// rounding to whole units never shows in a share.
const MILLISECONDS_FROM: u64 = 10_000_000_000;

/// Two colours that the frames of one kind range between.
type Range = (Color, Color);

/// The look of one signal.
struct Look {
    background: BackgroundColor,
    user: Range,
    kernel: Range,
    inlined: Range,
    python: Range,
}

const ROOT: Color = rgb(225, 225, 225);
const ANNOTATION: Range = (rgb(185, 185, 185), rgb(215, 215, 215));

const fn rgb(r: u8, g: u8, b: u8) -> Color {
    Color { r, g, b }
}

fn look(signal: Signal) -> Look {
    match signal {
        Signal::Cpu => Look {
            background: BackgroundColor::Yellow,
            user: (rgb(230, 75, 45), rgb(255, 165, 75)),
            kernel: (rgb(150, 130, 210), rgb(190, 170, 245)),
            inlined: (rgb(250, 205, 80), rgb(255, 230, 130)),
            python: (rgb(85, 180, 95), rgb(150, 220, 135)),
        },
        Signal::PageFault => Look {
            background: BackgroundColor::Green,
            user: (rgb(60, 175, 85), rgb(130, 220, 120)),
            kernel: (rgb(150, 130, 210), rgb(190, 170, 245)),
            inlined: (rgb(180, 225, 90), rgb(215, 240, 140)),
            python: (rgb(45, 165, 160), rgb(120, 210, 200)),
        },
        Signal::Retransmit => Look {
            background: BackgroundColor::Blue,
            user: (rgb(75, 140, 225), rgb(135, 190, 250)),
            kernel: (rgb(150, 130, 210), rgb(190, 170, 245)),
            inlined: (rgb(95, 205, 215), rgb(155, 230, 235)),
            python: (rgb(85, 180, 95), rgb(150, 220, 135)),
        },
    }
}

/// The SVG of a profile. One without samples says so, and [`Options::subtitle`] says why.
///
/// # Errors
/// When inferno fails.
pub fn render(profile: &Profile, options: &Options) -> io::Result<Vec<u8>> {
    let mut folded = fold(profile, options.root);
    let total = folded.total();
    if total == 0 {
        return Ok(no_samples(options).into_bytes());
    }
    folded.prune(total.div_ceil(NARROWEST));

    // Inferno reads `foo 12 34` as two numbers, hence no plain space before a last number.
    let names: Vec<String> =
        folded.names().iter().map(|name| escape_with(name, "\u{a0}")).collect();
    let mut colours = colours(&names, &look(profile.signal));
    let (count_name, factor) = match profile.signal {
        Signal::Cpu if total >= MILLISECONDS_FROM => ("ms", 1e-6),
        Signal::Cpu => ("µs", 1e-3),
        other => (other.unit(), 1.0),
    };

    let mut drawing = flamegraph::Options::default();
    drawing.title = printable(&options.title).into_owned();
    drawing.subtitle =
        (!options.subtitle.is_empty()).then(|| printable(&options.subtitle).into_owned());
    drawing.bgcolors = Some(look(profile.signal).background);
    // Used for no frame, as the map below has every name; set so that nothing can be random.
    drawing.colors = Palette::Basic(BasicPalette::Hot);
    drawing.deterministic = true;
    drawing.palette_map = Some(&mut colours);
    drawing.count_name = count_name.to_owned();
    drawing.factor = factor;
    drawing.min_width = 0.0;
    // Inferno sorts lines, in which `a b;c` comes between `a` and `a;b` and cuts the box of `a` in
    // two. Our order is by frame; a flame chart takes lines as they come, the last one first.
    drawing.flame_chart = true;

    let lines = lines(&folded, &names);
    let mut svg = Vec::new();
    flamegraph::from_lines(&mut drawing, lines.iter().rev().map(String::as_str), &mut svg)?;
    Ok(svg)
}

/// The folded stacks as lines for inferno, with a total that fits 64 bits.
fn lines(folded: &Folded, names: &[String]) -> Vec<String> {
    let mut room = u64::MAX;
    let mut lines = Vec::new();
    for (frames, value) in folded.stacks() {
        let value = value.min(room);
        room -= value;
        let frames: Vec<&str> =
            frames.iter().filter_map(|f| names.get(*f as usize)).map(String::as_str).collect();
        lines.push(format!("{} {value}", frames.join(";")));
    }
    lines
}

fn colours(names: &[String], look: &Look) -> PaletteMap {
    let mut map = PaletteMap::default();
    map.insert("", ROOT);
    for name in names {
        let range = if name.ends_with("_[k]") {
            look.kernel
        } else if name.ends_with("_[p]") {
            look.python
        } else if name.ends_with("_[i]") {
            look.inlined
        } else if name.starts_with('[') && name.ends_with(']') {
            ANNOTATION
        } else {
            look.user
        };
        map.insert(name, shade(range, name));
    }
    map
}

/// A colour of the range, by a hash of the name (FNV-1a, the same on every machine).
fn shade((from, to): Range, name: &str) -> Color {
    let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let between = |from: u8, to: u8| {
        let span = u64::from(to.saturating_sub(from)) + 1;
        from.saturating_add(u8::try_from((hash >> 32) % 256 * span / 256).unwrap_or(u8::MAX))
    };
    rgb(between(from.r, to.r), between(from.g, to.g), between(from.b, to.b))
}

/// A picture without frames. Inferno would make an error of it.
fn no_samples(options: &Options) -> String {
    let [title, subtitle] = [&options.title, &options.subtitle].map(|text| xml(text));
    format!(
        r##"<?xml version="1.0" standalone="no"?>
<svg version="1.1" width="1200" height="120" viewBox="0 0 1200 120" xmlns="http://www.w3.org/2000/svg">
<rect width="100%" height="100%" fill="#f0f0f0"/>
<g font-family="monospace" font-size="12" text-anchor="middle">
<text x="50%" y="24" font-size="17">{title}</text>
<text x="50%" y="60">no samples</text>
<text x="50%" y="90">{subtitle}</text>
</g>
</svg>
"##
    )
}

/// Text as XML character data.
fn xml(text: &str) -> String {
    printable(text).replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests;
