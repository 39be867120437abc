//! What holds for every walk, whatever it reads.

use std::cell::Cell;

use podflame_wire::{
    BY_FRAME_POINTER, MAX_FRAMES, StackEnd,
    unwind::{Cfa, Mapping, MappingKind, NO_ROW, NO_RULE, PAGE_ROWS, Page, Rule, Saved},
    walk::{AArch64, Machine, REGISTERS, Start, Target, WINDOW, Walk, X86_64},
};
use proptest::prelude::*;

use super::case::{none, walk};

/// Where mappings, and where the stack, of these processes are.
const CODE: u64 = 0x40_0000;
const STACK: u64 = 0x7ff0_0000_0000;

/// A process in which everything is arbitrary.
#[derive(Clone, Debug)]
struct Any {
    mappings: Vec<Mapping>,
    pages: Vec<Page>,
    rules: Vec<Rule>,
    /// The stack, and after it nothing; read again and again.
    words: Vec<u64>,
    /// Bytes of stack that can be read.
    readable: u64,
    /// The last table that was looked into.
    table: Cell<u32>,
}

struct On<'a, M>(&'a Any, std::marker::PhantomData<M>);

impl<M: Machine> Target for On<'_, M> {
    type Machine = M;

    fn read(&self, address: u64, window: &mut [u64; WINDOW]) -> bool {
        assert!(address.is_multiple_of(size_of_val(window) as u64));
        let Some(inside) = address.checked_sub(STACK).filter(|inside| *inside < self.0.readable)
        else {
            return false;
        };
        for (n, word) in window.iter_mut().enumerate() {
            *word = self.0.words[(inside as usize / 8 + n) % self.0.words.len()];
        }
        true
    }

    fn mapping(&self, index: u32) -> Option<&Mapping> {
        self.0.mappings.get(index as usize)
    }

    fn page(&self, table: u32, page: u32) -> Option<&Page> {
        self.0.table.set(table);
        self.0.pages.get(table as usize + page as usize)
    }

    fn rule(&self, index: u16) -> Option<&Rule> {
        self.0.rules.get(usize::from(index))
    }
}

/// A word of a stack: often an address of code, or of the stack above, or nothing.
fn word() -> impl Strategy<Value = u64> {
    prop_oneof![
        3 => (0_u64..0x2_0000).prop_map(|at| CODE + at),
        3 => (0_u64..0x800).prop_map(|at| STACK + 8 * at),
        1 => Just(0_u64),
        1 => any::<u64>(),
    ]
}

fn rule() -> impl Strategy<Value = Rule> {
    let numbers = (0_u8..11, 0_u8..20, 0_u8..5, 0_u8..5);
    let offsets = (-40_i32..400, -40_i16..40, -40_i16..40, -40_i32..40);
    (numbers, offsets, any::<bool>()).prop_map(|(numbers, offsets, aligned)| {
        let unit = if aligned { 8 } else { 1 };
        Rule {
            cfa: numbers.0,
            cfa_register: numbers.1,
            ra: numbers.2,
            fp: numbers.3,
            cfa_offset: unit * offsets.0,
            cfa_add: unit as i16 * offsets.1,
            ra_offset: unit as i16 * offsets.2,
            fp_offset: unit * offsets.3,
        }
    })
}

/// Mappings one behind the other, with gaps or without.
fn mappings() -> impl Strategy<Value = Vec<Mapping>> {
    let one = (0_u64..0x1000, 1_u64..0x3000, 0_u32..6, 0_u32..5, 0_u32..4);
    prop::collection::vec(one, 0..40).prop_map(|parts| {
        let mut at = CODE;
        let place = |(gap, len, table, kind, pages)| {
            let start = at + gap * u64::from(gap > 0x800);
            at = start + len;
            Mapping { start, end: at, bias: CODE, table, kind: kind | pages << 8 }
        };
        parts.into_iter().map(place).collect()
    })
}

fn page() -> impl Strategy<Value = Page> {
    let row = || (0_u32..0x2_0000, 0_u16..12);
    let rows = prop_oneof![
        9 => prop::collection::vec(row(), 0..24),
        1 => prop::collection::vec(row(), 0..=PAGE_ROWS),
    ];
    rows.prop_map(|mut rows| {
        rows.sort_unstable();
        page_of(&rows)
    })
}

fn page_of(rows: &[(u32, u16)]) -> Page {
    let mut page = Page { start: [NO_ROW; PAGE_ROWS], rule: [NO_RULE; PAGE_ROWS] };
    for (n, (start, rule)) in rows.iter().enumerate() {
        (page.start[n], page.rule[n]) = (*start, *rule);
    }
    page
}

prop_compose! {
    fn process()(
        mappings in mappings(),
        pages in prop::collection::vec(page(), 0..8),
        rules in prop::collection::vec(rule(), 0..12),
        words in prop::collection::vec(word(), 1..300),
        readable in 0_u64..0x10_0000,
    ) -> Any {
        Any { mappings, pages, rules, words, readable, table: Cell::new(u32::MAX) }
    }
}

prop_compose! {
    fn start()(ip in word(), sp in word(), fp in word(), link in word(), known in 0..8) -> (Start, bool) {
        (Start { ip, sp, fp, link, ..Start::default() }, known > 0)
    }
}

/// What must hold of the walk of any process.
fn check<M: Machine>(process: &Any, start: Start, registers: [u64; REGISTERS]) {
    let (frames, end) = walk(&On::<M>(process, std::marker::PhantomData), start, registers);
    assert!(frames.len() <= MAX_FRAMES);
    assert_eq!(frames.is_empty(), end == StackEnd::None);
    assert!(end != StackEnd::Truncated || frames.len() == MAX_FRAMES);
    for frame in frames.iter().skip(1).map(|frame| frame & !BY_FRAME_POINTER) {
        assert!(frame < M::USER_END);
        // A return address can be the first behind a mapping.
        let holds = |m: &Mapping| (m.start..=m.end).contains(&frame);
        assert!(start.mappings == 0 || process.mappings.iter().any(holds), "{frame:x} {end:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// It ends, and every frame lies in executable memory, if that is known.
    #[test]
    fn walks_end_and_invent_nothing(
        process in process(),
        (mut start, known) in start(),
        registers in prop::array::uniform16(word()),
    ) {
        start.mappings = if known { process.mappings.len() as u32 } else { 0 };
        check::<X86_64>(&process, start, registers);
        check::<AArch64>(&process, start, registers);
    }

    /// Without signals, and without code that changes stacks, it goes outwards and never back.
    #[test]
    fn stack_pointers_grow(
        mut process in process(),
        (mut start, _) in start(),
        registers in prop::array::uniform16(word()),
    ) {
        process.rules.iter_mut().filter(|r| r.cfa == Cfa::Signal as u8).for_each(|r| *r = none());
        for mapping in &mut process.mappings {
            mapping.kind &= !(u32::from(mapping.kind & 0xff == MappingKind::FramePointers as u32));
        }
        start.mappings = process.mappings.len() as u32;
        let target = On::<X86_64>(&process, std::marker::PhantomData);
        let mut walk = Walk::new();
        walk.registers = registers;
        let last = Cell::new(None);
        let step = |walk: &mut Walk| {
            let frame = match walk.hop(&target) {
                0 => walk.step(&target),
                frame => frame,
            };
            if frame > StackEnd::ALL.len() as u64 {
                assert!(last.get().is_none_or(|last| walk.stack_pointer() > last));
                last.set(Some(walk.stack_pointer()));
            }
            frame
        };
        walk.begin(&start);
        walk.run::<On<'_, X86_64>, 128>(step, &mut [0; 128], 0);
    }

    /// The search in fixed steps finds what the library's finds.
    #[test]
    fn rows_are_found(page in page(), at in prop_oneof![0_u32..0x2_0000, any::<u32>()]) {
        let expected = page.start.partition_point(|start| *start <= at).saturating_sub(1);
        prop_assert_eq!(page.find(at), expected);
        for start in page.start {
            let expected = page.start.partition_point(|other| *other <= start) - 1;
            prop_assert_eq!(page.find(start), expected);
        }
    }

    /// The search for a mapping finds what looking at each does.
    #[test]
    fn mappings_are_found(mut mappings in mappings(), offsets in prop::collection::vec(0_u64..0x8_0000, 20)) {
        for (n, mapping) in mappings.iter_mut().enumerate() {
            (mapping.table, mapping.kind) = (n as u32, MappingKind::Table as u32 | 1 << 8);
        }
        let end = Rule { cfa: Cfa::End as u8, ra: Saved::Undefined as u8, ..none() };
        let pages = vec![page_of(&[(0, 1)]); mappings.len()];
        let rules = vec![none(), end];
        let words = vec![0];
        let process = Any { mappings, pages, rules, words, readable: 0, table: Cell::new(0) };
        let edges = process.mappings.iter().flat_map(|m| [m.start - 1, m.start, m.end - 1, m.end]);
        for ip in edges.chain(offsets.iter().map(|offset| CODE + offset)) {
            process.table.set(u32::MAX);
            let start = Start { ip, mappings: process.mappings.len() as u32, ..Start::default() };
            if start.mappings == 0 {
                continue;
            }
            let target = On::<X86_64>(&process, std::marker::PhantomData);
            let (frames, end) = walk(&target, start, [0; REGISTERS]);
            let holds = |m: &Mapping| (m.start..m.end).contains(&ip);
            let expected = process.mappings.iter().position(holds);
            prop_assert_eq!(frames, [ip]);
            prop_assert_eq!(process.table.get(), expected.map_or(u32::MAX, |n| n as u32));
            let complete = expected.is_some();
            let why = if complete { StackEnd::Complete } else { StackEnd::NoMapping };
            prop_assert_eq!(end, why);
        }
    }
}
