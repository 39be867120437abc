//! Code of which files do not say how it is unwound.

use super::{
    hostile::{frames, with_code_and_frames},
    *,
};

/// Where no entry says it, the code is known by its bytes; where one does, that counts.
#[test]
fn what_signal_handlers_return_to_has_a_rule() {
    let table = |functions: &[(u64, u64, &[u8])]| {
        let bytes = with_code_and_frames(&frames(functions.iter().copied()));
        let mut rules = Rules::default();
        let table = of_bytes(&bytes, &mut rules, &Limits::default()).unwrap();
        let lines = listing(&table, &rules).replace(", ra cfa-8, fp same", "");
        let lines: Vec<String> = lines.lines().skip(1).map(Into::into).collect();
        (lines, table.stats.signal_returns)
    };
    let signal = "400170 signal sp 160 ra 168 fp 120";
    let (rows, found) = table(&[(0x40_0100, 8, &[])]);
    assert_eq!(rows, ["400000 none", "400100 sp+8", "400108 none", signal, "40017a none"]);
    assert_eq!(found, 1);
    let (rows, found) = table(&[(0x40_0100, 0x70, &[]), (0x40_017a, 8, &[])]);
    let expected = ["400000 none", "400100 sp+8", signal, "40017a sp+8", "400182 none"];
    assert_eq!((rows.as_slice(), found), (&expected.map(String::from)[..], 1));
    // The byte before it, or one of its own, is another's.
    for functions in [(0x40_0100, 0x71), (0x40_0175, 8), (0x40_0179, 8)] {
        assert_eq!(table(&[(functions.0, functions.1, &[])]).1, 0);
    }
}

/// `x86_64.elf` whose code, 0xc5 bytes from 0x4000f0 on, is a procedure linkage table of that name with
/// these bytes in its second stub.
fn linkage_table(name: &[u8; 5], stub: &[u8], functions: &[(u64, u64, &[u8])]) -> Vec<u8> {
    let mut bytes = with_code_and_frames(&frames(functions.iter().copied()));
    let text = bytes.windows(7).position(|window| window == b"\0.text\0").unwrap() + 1;
    bytes[text..text + 5].copy_from_slice(name);
    bytes[0xf0..0x1b5].fill(0x90);
    bytes[0x100..0x100 + stub.len()].copy_from_slice(stub);
    bytes
}

fn lines(bytes: &[u8]) -> Vec<String> {
    let mut rules = Rules::default();
    let table = of_bytes(bytes, &mut rules, &Limits::default()).unwrap();
    let lines = listing(&table, &rules).replace(", ra cfa-8, fp same", "");
    lines.lines().skip(1).map(Into::into).collect()
}

/// As lld writes them: without an entry.
#[test]
fn linkage_tables_have_rules() {
    let lazy = b"\xff\x25\0\0\0\0\x68\0\0\0\0";
    let marked = b"\xf3\x0f\x1e\xfa\x68";
    let behind: &[(u64, u64, &[u8])] = &[(0x40_0300, 8, &[])];
    let rows = |name, stub: &[u8]| {
        let mut rows = lines(&linkage_table(name, stub, behind));
        let last = rows.split_off(rows.len() - 3);
        assert_eq!(last, ["4001b5 none", "400300 sp+8", "400308 none"]);
        rows
    };
    let first = ["400000 none", "4000f0 sp+16", "4000f6 sp+24"];
    assert_eq!(rows(b".plt\0", lazy), [&first[..], &["400100 plt 11"]].concat());
    assert_eq!(rows(b".plt\0", marked), [&first[..], &["400100 plt 9"]].concat());

    let mut arm = linkage_table(b".plt\0", lazy, behind);
    arm[18] = 183;
    assert_eq!(lines(&arm)[..2], ["400000 none", "400110 sp, ra same, fp same"]);

    // Whatever else that may be, and where an entry says something of a part of it.
    let nothing = ["400000 none", "400300 sp+8", "400308 none"];
    assert_eq!(lines(&linkage_table(b".plt\0", b"\x90", behind)), nothing);
    assert_eq!(lines(&linkage_table(b".plx\0", lazy, behind)), nothing);
    let within = lines(&linkage_table(b".plt\0", lazy, &[(0x40_0120, 8, &[])]));
    assert_eq!(within[2], "4000f6 sp+24");
    assert_eq!(within[3..], ["400100 none", "400120 sp+8", "400128 none"]);
}
