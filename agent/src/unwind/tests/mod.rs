//! What the tests of tables share: building one from a file or from bytes, and rules in words.

#![expect(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

mod fuzz;
mod hostile;
mod known;
mod machine;
mod unsaid;

use std::{
    io::Write as _,
    path::{Path, PathBuf},
};

use podflame_wire::unwind::{Cfa, NO_RULE, Page, Rule, Saved, TABLE_PAGES};

use super::*;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src/unwind/testdata").join(name)
}

/// The table of a file, within the default limits.
fn of_file(path: &Path, rules: &mut Rules) -> Result<FileTable, NoTable> {
    build(&Arc::new(File::open(path).unwrap()), rules, &Limits::default(), &mut || ())
}

/// The table of a file with these bytes.
fn of_bytes(bytes: &[u8], rules: &mut Rules, limits: &Limits) -> Result<FileTable, NoTable> {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    let table = build(&Arc::new(file.reopen().unwrap()), rules, limits, &mut || ());
    if let Ok(table) = &table {
        check(table, rules, limits);
    }
    table
}

/// What holds for every table.
fn check(table: &FileTable, rules: &Rules, limits: &Limits) {
    let pages = table.segments.iter().map(|segment| segment.pages.len());
    assert!(pages.clone().all(|pages| (1..=TABLE_PAGES).contains(&pages) && pages != 2));
    assert_eq!(table.bytes, (pages.sum::<usize>() * size_of::<Page>()) as u64);
    assert!(table.bytes <= limits.table_bytes);
    let rows = || table.segments.iter().flat_map(Segment::rows);
    assert_eq!(rows().count() as u64, table.rows);
    assert!(rows().map(|(address, _)| address).is_sorted_by(|a, b| a < b));
    assert!(rows().all(|(_, rule)| usize::from(rule) < rules.count()));
    for segment in &table.segments {
        assert!(segment.base < segment.end && segment.end - segment.base <= u32::MAX.into());
        let mut last = None;
        for (address, rule) in segment.rows() {
            assert!(last != Some(rule), "{address:x} changes nothing");
            assert!((segment.base..segment.end).contains(&address));
            last = Some(rule);
        }
        assert_eq!(segment.rows().next().unwrap().0, segment.base);
        assert_eq!(segment.rule(segment.end), NO_RULE);
    }
    assert!(table.segments.is_sorted_by(|a, b| a.end <= b.base));
}

/// A rule in words.
fn text(rule: &Rule) -> String {
    let at = |base: &str, offset: i64| match offset {
        0 => base.to_owned(),
        _ => format!("{base}{offset:+}"),
    };
    let offset = rule.cfa_offset.into();
    let cfa = Cfa::from_number(rule.cfa).unwrap();
    let found = match cfa {
        Cfa::Sp => at("sp", offset),
        Cfa::Fp => at("fp", offset),
        Cfa::Register => at(&format!("r{}", rule.cfa_register), offset),
        Cfa::AtSp => at(&format!("[{}]", at("sp", offset)), rule.cfa_add.into()),
        Cfa::AtFp => at(&format!("[{}]", at("fp", offset)), rule.cfa_add.into()),
        Cfa::Plt => format!("plt {offset}"),
        Cfa::Signal => {
            return format!("signal sp {offset} ra {} fp {}", rule.ra_offset, rule.fp_offset);
        }
        Cfa::None | Cfa::End | Cfa::Unsupported => return cfa.name().into(),
    };
    let saved = |how: u8, offset: i64| match Saved::from_number(how).unwrap() {
        Saved::Same => "same".into(),
        Saved::AtCfa => at("cfa", offset),
        Saved::AtFp => at("fp", offset),
        Saved::Undefined => "lost".into(),
    };
    let ra = saved(rule.ra, rule.ra_offset.into());
    format!("{found}, ra {ra}, fp {}", saved(rule.fp, rule.fp_offset.into()))
}

/// The rows of a table in words.
fn listing(table: &FileTable, rules: &Rules) -> String {
    let mut lines = String::new();
    for segment in &table.segments {
        lines += &format!("{:x}..{:x}\n", segment.base, segment.end);
        for (address, rule) in segment.rows() {
            lines += &format!("{address:x} {}\n", text(rules.get(rule).unwrap()));
        }
    }
    lines
}
