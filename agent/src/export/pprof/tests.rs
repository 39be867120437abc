//! Files are unpacked, decoded and read as a backend would.
#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::{fmt::Write as _, io::Read as _};

use flate2::read::GzDecoder;
use proptest::prelude::*;

use super::*;
use crate::export::{
    fixture::{Fixture, HOSTILE, about, inlined, kernel, profiles, sampled, unknown, user},
    tests::{golden, options},
};

fn decoded(profile: &Profile) -> proto::Profile {
    let mut bytes = Vec::new();
    let file = render(profile, &options()).unwrap();
    GzDecoder::new(&*file).read_to_end(&mut bytes).unwrap();
    proto::Profile::decode(&*bytes).unwrap()
}

/// What the messages say, with every reference followed; panics on one that leads nowhere.
fn text(profile: &proto::Profile) -> String {
    let string = |id: i64| &profile.string_table[usize::try_from(id).unwrap()];
    let mut out = String::new();
    let types = profile.sample_type.iter().chain(&profile.period_type);
    for kind in types {
        writeln!(out, "type {}/{}", string(kind.r#type), string(kind.unit)).unwrap();
    }
    let proto::Profile { time_nanos, duration_nanos, period, .. } = profile;
    writeln!(out, "time {time_nanos} duration {duration_nanos} period {period}").unwrap();
    for comment in &profile.comment {
        writeln!(out, "comment {}", string(*comment)).unwrap();
    }
    for (id, m) in (1..).zip(&profile.mapping) {
        assert_eq!(m.id, id);
        let flags = [m.has_functions, m.has_filenames, m.has_line_numbers, m.has_inline_frames]
            .map(u8::from);
        let (start, limit) = (m.memory_start, m.memory_limit);
        let (file, build_id) = (string(m.filename), string(m.build_id));
        writeln!(out, "mapping {file} {build_id:?} {start:x}-{limit:x} {flags:?}").unwrap();
    }
    for sample in &profile.sample {
        write!(out, "sample {:?}", sample.value).unwrap();
        for label in &sample.label {
            let key = string(label.key);
            match label.num {
                0 => write!(out, " {key}={}", string(label.str)).unwrap(),
                num => write!(out, " {key}={num}").unwrap(),
            }
        }
        out.push('\n');
        for id in &sample.location_id {
            let location = &profile.location[usize::try_from(*id - 1).unwrap()];
            assert_eq!(location.id, *id);
            let mapping = location.mapping_id.checked_sub(1);
            let file = mapping.map(|m| string(profile.mapping[m as usize].filename));
            write!(out, "  {:x} in {}", location.address, file.map_or("-", |f| f)).unwrap();
            for line in &location.line {
                let function = &profile.function[usize::try_from(line.function_id - 1).unwrap()];
                let (name, file) = (string(function.name), string(function.filename));
                write!(out, " | {name} {file}:{}", line.line).unwrap();
            }
            out.push('\n');
        }
    }
    out
}

#[test]
fn the_messages_are_as_before() {
    for signal in Signal::ALL {
        let profile = decoded(&sampled(signal).profile());
        golden(&format!("export.{}.pprof.txt", signal.name()), &text(&profile));
    }
}

#[test]
fn one_place_in_the_code_is_one_location() {
    let mut fixture = Fixture::new(Signal::Cpu);
    let outer = user("outer", "/bin/a", 3);
    let stack = [inlined("in2", "/bin/a", 1), inlined("in1", "/bin/a", 2), outer.clone()];
    fixture.sample(("w", 1, "t"), &stack, (1, 1));
    fixture.sample(("w", 2, "t"), &stack, (1, 1));
    fixture.sample(("w", 2, "t"), &[outer], (1, 1));
    let profile = decoded(&fixture.profile());
    assert_eq!(profile.location.iter().map(|l| l.line.len()).collect::<Vec<_>>(), [3, 1]);
    assert_eq!(profile.function.len(), 3);
    assert!(profile.mapping[0].has_inline_frames);
}

#[test]
fn an_unknown_function_keeps_its_place() {
    let mut fixture = Fixture::new(Signal::Cpu);
    let known = user("f", "/bin/a", 1);
    let stack = [unknown("[no symbols]", "/bin/a", 0x42), kernel("k"), about("note"), known];
    fixture.sample(("w", 1, "t"), &stack, (1, 1));
    let profile = decoded(&fixture.profile());
    let [unknown, kernel, note, known] = &profile.location[..] else { unreachable!("4 locations") };
    assert_eq!((unknown.address, unknown.line.len()), (0x42, 0));
    let [file, kernel_file, known_file] =
        [unknown, kernel, known].map(|l| profile.mapping[l.mapping_id as usize - 1]);
    assert!(!file.has_functions && file.memory_limit > 0x42);
    assert!(known_file.has_functions && known_file.filename == file.filename);
    assert_eq!(profile.string_table[file.build_id as usize], "c0ffee");
    assert_eq!(profile.string_table[kernel_file.filename as usize], KERNEL);
    assert!(kernel_file.has_functions);
    assert_eq!((note.mapping_id, note.line.len()), (0, 1));
}

#[test]
fn no_string_is_raw() {
    for hostile in HOSTILE {
        let mut fixture = Fixture::new(Signal::Cpu);
        fixture.sample((hostile, 1, hostile), &[user(hostile, hostile, 1)], (1, 1));
        let profile = decoded(&fixture.profile());
        assert!(profile.string_table.iter().any(|s| **s == *printable(hostile)));
        assert!(!profile.string_table.iter().any(|s| s.contains(crate::fold::is_unprintable)));
    }
}

proptest! {
    #[test]
    fn sums_are_kept_and_references_hold(profile in profiles()) {
        let decoded = decoded(&profile);
        prop_assert!(!text(&decoded).is_empty());
        prop_assert_eq!(&*decoded.string_table[0], "");
        for (index, part) in [|s: &Sample| s.count, |s: &Sample| s.weight].iter().enumerate() {
            let expected: i128 = profile.samples.iter().map(|s| i128::from(signed(part(s)))).sum();
            let sum: i128 = decoded.sample.iter().map(|s| i128::from(s.value[index])).sum();
            prop_assert_eq!(sum, expected);
        }
    }
}
