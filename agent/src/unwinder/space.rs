//! A process's executable memory and the tables of its files → its mappings as the walk reads them.
//! Pure.

use podflame_wire::unwind::{Mapping, MappingKind};

use crate::unwind::Load;

/// A table in the kernel: a part of a file's own addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part {
    /// First of the file's addresses, from which its rows count.
    pub(super) base: u64,
    /// The first address behind it.
    pub(super) end: u64,
    /// Where the table is.
    pub(super) slot: u32,
    /// How many pages it has.
    pub(super) pages: u32,
}

/// Adds the memory from `start` to `end`, which holds the file from `offset` on, to `space`: what has a
/// table, and in between what has none. `parts` is in the order of addresses.
pub(super) fn add(
    space: &mut Vec<Mapping>,
    (start, end, offset): (u64, u64, u64),
    loads: &[Load],
    parts: &[Part],
) {
    // Where each byte of the file is, as far as this mapping has it.
    let Some((first, shift)) = loads.iter().find_map(|load| {
        let first = load.offset.max(offset);
        let last = load.offset.saturating_add(load.size).min(offset.saturating_add(end - start));
        // Address in memory = the file's own address + shift.
        let in_file = load.address.wrapping_add(first - load.offset);
        (first < last).then(|| (in_file, start.wrapping_add(first - offset).wrapping_sub(in_file)))
    }) else {
        return push(space, start, end, None);
    };
    let last = first.wrapping_add(end.wrapping_sub(first.wrapping_add(shift)));
    let mut at = start;
    for part in parts.iter().filter(|part| part.base < last && part.end > first) {
        let from = part.base.max(first).wrapping_add(shift);
        let to = part.end.min(last).wrapping_add(shift);
        if at < from {
            push(space, at, from, None);
        }
        push(space, from, to, Some((part, part.base.wrapping_add(shift))));
        at = to;
    }
    if at < end {
        push(space, at, end, None);
    }
}

/// Adds memory without a table.
pub(super) fn add_without(space: &mut Vec<Mapping>, start: u64, end: u64, kind: MappingKind) {
    space.push(Mapping { start, end, bias: 0, table: 0, kind: kind as u32 });
}

fn push(space: &mut Vec<Mapping>, start: u64, end: u64, table: Option<(&Part, u64)>) {
    match table {
        Some((part, bias)) => {
            let kind = MappingKind::Table as u32 | part.pages << 8;
            space.push(Mapping { start, end, bias, table: part.slot, kind });
        }
        None => add_without(space, start, end, MappingKind::NoTable),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn show(start: u64, end: u64, offset: u64, loads: &[Load], parts: &[Part]) -> Vec<String> {
        let mut space = Vec::new();
        add(&mut space, (start, end, offset), loads, parts);
        let line = |m: &Mapping| {
            let kind = if m.kind & 0xff == MappingKind::Table as u32 { "table" } else { "none" };
            format!(
                "{:x}-{:x} {kind} {} {:x}",
                m.start,
                m.end,
                m.table,
                m.start.wrapping_sub(m.bias)
            )
        };
        space.iter().map(line).collect()
    }

    #[test]
    fn addresses_in_memory_are_those_of_the_file_shifted() {
        let load = Load { offset: 0x1000, size: 0x3000, address: 0x401000 };
        let part = |base, end, slot| Part { base, end, slot, pages: 3 };
        let whole = [part(0x401000, 0x404000, 7)];
        // Address in the table last: the mapping's start, less the table's base.
        let all = show(0x7f00_0000, 0x7f00_3000, 0x1000, &[load], &whole);
        assert_eq!(all, ["7f000000-7f003000 table 7 0"]);
        let tail = show(0x7f00_0000, 0x7f00_1000, 0x2000, &[load], &whole);
        assert_eq!(tail, ["7f000000-7f001000 table 7 1000"]);
        let two = [part(0x401800, 0x402000, 1), part(0x402000, 0x403000, 2)];
        let split = show(0x1_0000, 0x1_3000, 0x1000, &[load], &two);
        assert_eq!(
            split,
            [
                "10000-10800 none 0 10000",
                "10800-11000 table 1 0",
                "11000-12000 table 2 0",
                "12000-13000 none 0 12000"
            ]
        );
        assert_eq!(show(0x1_0000, 0x1_3000, 0x9000, &[load], &two), ["10000-13000 none 0 10000"]);
        assert_eq!(show(0x1_0000, 0x1_3000, 0x1000, &[], &two), ["10000-13000 none 0 10000"]);
    }
}
