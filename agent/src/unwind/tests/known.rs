//! Files of known content (`testdata`), row by row.

use super::*;

fn check_listing(bytes: &[u8], expected: &str) -> FileTable {
    let mut rules = Rules::default();
    let table = of_bytes(bytes, &mut rules, &Limits::default()).unwrap();
    assert_eq!(listing(&table, &rules), expected);
    table
}

fn read(name: &str) -> Vec<u8> {
    std::fs::read(fixture(name)).unwrap()
}

/// The file without section headers.
fn without_sections(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes[40..48].fill(0);
    bytes[58..64].fill(0);
    bytes
}

#[test]
fn every_shape_of_x86_64() {
    let expected = include_str!("../testdata/x86_64.rows");
    let table = check_listing(&read("x86_64.elf"), expected);
    let stats = Stats { functions: 12, malformed: 1, unsupported: 7, ..Stats::default() };
    assert_eq!(table.stats, stats);
    check_listing(&without_sections(read("x86_64.elf")), expected);
}

#[test]
fn every_shape_of_aarch64() {
    let expected = include_str!("../testdata/aarch64.rows");
    let table = check_listing(&read("aarch64.elf"), expected);
    assert_eq!(table.stats, Stats { functions: 6, unsupported: 3, ..Stats::default() });
    check_listing(&without_sections(read("aarch64.elf")), expected);
}

/// The same functions, at addresses of their own.
#[test]
fn debug_frame_where_there_is_nothing_else() {
    check_listing(&read("debug.elf"), include_str!("../testdata/debug.rows"));
}

#[test]
fn offsets_are_addresses() {
    let mut rules = Rules::default();
    let table = of_file(&fixture("aarch64.elf"), &mut rules).unwrap();
    assert_eq!(table.loads, [Load { offset: 0x284, size: 0x54, address: 0x20_1284 }]);
    assert_eq!(table.address(0x284), Some(0x20_1284));
    assert_eq!(table.address(0x2d7), Some(0x20_12d7));
    assert_eq!(table.address(0x283), None);
    assert_eq!(table.address(0x2d8), None);
    let rule = |address| text(rules.get(table.rule(address)).unwrap());
    assert_eq!(rule(0x20_1284), "end");
    assert_eq!(rule(0x20_1293), "sp+32, ra cfa-24, fp cfa-32");
    assert_eq!(rule(0x20_12d7), "unsupported");
    assert_eq!(rule(0x20_12d8), "none");
    assert_eq!(rule(0x20_1283), "none");
    assert_eq!(rule(u64::MAX), "none");
}

/// Of what files have in common there is one rule.
#[test]
fn files_share_rules() {
    let mut rules = Rules::default();
    of_file(&fixture("x86_64.elf"), &mut rules).unwrap();
    let count = rules.count();
    of_file(&fixture("debug.elf"), &mut rules).unwrap();
    assert_eq!(rules.added_since(count), []);
}

#[test]
fn files_without_a_table() {
    let reason = |bytes: &[u8]| {
        of_bytes(bytes, &mut Rules::default(), &Limits::default()).unwrap_err().name()
    };
    assert_eq!(reason(b""), "not ELF");
    assert_eq!(reason(b"#!/bin/sh\n"), "not ELF");
    let (whole, debug) = (read("x86_64.elf"), read("debug.elf"));
    let with = |at: usize, value: u8| {
        let mut bytes = whole.clone();
        bytes[at] = value;
        reason(&bytes)
    };
    // The class, the type and the machine.
    assert_eq!(with(4, 1), "other processor");
    assert_eq!(with(16, 1), "not ELF");
    assert_eq!(with(18, 3), "other processor");
    assert_eq!(reason(&whole[..whole.len() - 1]), "malformed");
    assert_eq!(reason(&without_sections(debug)), "no frame information");
    assert_eq!(reason(&read("go.elf")), "Go");
}
