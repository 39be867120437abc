//! Code of which files do not say how it is unwound, but of which it is known.
//!
//! - What signal handlers return to. The C library hands the kernel a few instructions for that, which
//!   call `rt_sigreturn`. glibc describes how they are unwound; musl (`src/signal/*/restore.s`) does not,
//!   nor does the vDSO of AArch64 (`vdso/sigreturn.S`: what it said was wrong for others). Unwinders know
//!   such code by its bytes, as gdb and libgcc do (`aarch64_fallback_frame_state`), and so is it found
//!   here, once for each file.
//! - Procedure linkage tables. Linkers write them. GNU ld describes those of x86-64, but not those of
//!   AArch64, and lld none.
//!
//! An entry of the file always counts more than what is known here.

use podflame_wire::unwind::{Cfa, NO_RULE, Rule, Saved};

use super::{FileTable, Limits, NoTable, Rules, pages::Writer, rules::bare, translate::Machine};
use crate::symbols::elf::Elf;

/// Parts of a file that are searched, the largest first. Where a program is linked with musl, musl's code
/// lies between few other functions; elsewhere it is the bytes between functions that are not aligned.
const PARTS: usize = 32;
/// Bytes of a part that are searched. All of musl has 600 KiB.
const PART_BYTES: u64 = 1 << 20;
/// Places that are taken. A C library has one or two.
const PLACES: usize = 8;

/// `mov $15, %rax; syscall`.
const X86_64: &[u8] = b"\x48\xc7\xc0\x0f\0\0\0\x0f\x05";
/// `mov x8, #139; svc #0`.
const AARCH64: &[u8] = b"\x68\x11\x80\xd2\x01\0\0\xd4";

/// Addresses without a rule, from and up to.
type Part = (u64, u64);

/// Addresses, from and up to, and their rule.
type Place = (u64, u64, Rule);

/// Bytes of a stub of x86-64, and of what is before all stubs.
const STUB: u64 = 16;
/// The same of AArch64 for what is before all stubs.
const AARCH64_FIRST: u64 = 32;

/// Adds the rules of such code to a table, if there is any.
pub(super) fn add(
    elf: &Elf,
    machine: Machine,
    mut table: FileTable,
    rules: &mut Rules,
    limits: &Limits,
) -> Result<FileTable, NoTable> {
    let parts = without_rule(&table);
    let mut places = stubs(elf, machine);
    places.retain(|(from, to, _)| parts.iter().any(|part| part.0 <= *from && *to <= part.1));
    table.stats.stubs = places.len() as u64;
    places.extend(signal_returns(elf, machine, &table, parts));
    table.stats.signal_returns = places.len() as u64 - table.stats.stubs;
    if places.is_empty() {
        return Ok(table);
    }
    places.sort_unstable_by_key(|place| place.0);
    // Headers can lie.
    places.dedup_by(|place, before| place.0 < before.1);
    let mut numbered = Vec::new();
    for (from, to, rule) in places {
        match rules.number(rule) {
            Some(rule) => numbered.push((from, to, rule)),
            None => table.stats.rules_full += 1,
        }
    }
    insert(table, &numbered, limits)
}

/// What signal handlers return to.
fn signal_returns(
    elf: &Elf,
    machine: Machine,
    table: &FileTable,
    mut parts: Vec<Part>,
) -> Vec<Place> {
    let code = if machine == Machine::AArch64 { AARCH64 } else { X86_64 };
    parts.retain(|(from, to)| to - from > code.len() as u64);
    parts.sort_unstable_by_key(|(from, to)| from.wrapping_sub(*to));
    parts.truncate(PARTS);
    let mut places = Vec::new();
    for (from, to) in parts {
        let Some(offset) = table.offset(from) else { continue };
        let len = (to - from).min(PART_BYTES);
        // Of a file that is being changed there will be no table at all.
        let Ok(bytes) = elf.read(offset, len, PART_BYTES) else { continue };
        let found = bytes.windows(code.len()).enumerate().filter(|(_, window)| *window == code);
        for (at, _) in found.take(PLACES - places.len()) {
            // A return address is looked up by the byte before it, which is nobody else's.
            if at > 0 {
                let at = from + at as u64;
                places.push((at - 1, at + code.len() as u64, signal(machine)));
            }
        }
    }
    places
}

/// Procedure linkage tables. In all of them the return address is still where the caller has put it, but
/// for the first stub of `.plt`, which calls the loader to find a function.
fn stubs(elf: &Elf, machine: Machine) -> Vec<Place> {
    let mut places = Vec::new();
    let Ok(sections) = elf.sections() else { return places };
    let named = sections.iter().filter(|section| {
        let known = [".plt", ".plt.sec", ".plt.got"].contains(&section.name.as_str());
        known && section.size > 0 && section.address.checked_add(section.size).is_some()
    });
    for section in named.take(PLACES) {
        let (from, to) = (section.address, section.address + section.size);
        let at_sp = |offset| Rule {
            ra: Saved::AtCfa as u8,
            cfa_offset: offset,
            ra_offset: -8,
            ..bare(Cfa::Sp)
        };
        match (machine, section.name == ".plt") {
            (Machine::X86_64, false) => places.push((from, to, at_sp(8))),
            (Machine::X86_64, true) => {
                // Others push something before they jump to the first: a number of five bytes.
                let Ok(bytes) = elf.read(section.offset, section.size.min(2 * STUB), 2 * STUB)
                else {
                    continue;
                };
                let pushed = match bytes.get(STUB as usize..) {
                    Some([0xff, 0x25, ..]) => 6 + 5,
                    Some([0xf3, 0x0f, 0x1e, 0xfa, 0x68, ..]) => 4 + 5,
                    _ => continue,
                };
                // The first pushes one word more, with six bytes.
                places.push((from, from + 6, at_sp(16)));
                places.push((from + 6, from + STUB, at_sp(24)));
                let rule = Rule { cfa_offset: pushed, ..at_sp(8) };
                places.push((from + STUB, to, Rule { cfa: Cfa::Plt as u8, ..rule }));
            }
            // Each uses x16 and x17 only.
            (Machine::AArch64, true) if to - from > AARCH64_FIRST => {
                places.push((from + AARCH64_FIRST, to, bare(Cfa::Sp)));
            }
            (Machine::AArch64, _) => {}
        }
    }
    places.retain(|(from, to, _)| from < to);
    places
}

/// How the kernel lays the registers out behind the stack pointer with which a handler returns.
fn signal(machine: Machine) -> Rule {
    let (sp, ip, fp, link) = match machine {
        // `rt_sigframe` of `arch/x86/include/asm/sigframe.h`, less the return address: `ucontext`, in
        // it from 40 on r8 to r15, rdi, rsi, rbp, rbx, rdx, rax, rcx, rsp, rip.
        Machine::X86_64 => (160, 168, 120, 0),
        // `rt_sigframe` of `arch/arm64/kernel/signal.c`: `siginfo` of 128 bytes and `ucontext`, in it
        // from 184 on x0 to x30, sp, pc.
        Machine::AArch64 => (560, 568, 544, 552),
    };
    Rule {
        ra: Saved::AtCfa as u8,
        fp: Saved::AtCfa as u8,
        cfa_offset: sp,
        cfa_add: link,
        ra_offset: ip,
        fp_offset: fp,
        ..bare(Cfa::Signal)
    }
}

/// The code of a file for which it has no rule.
fn without_rule(table: &FileTable) -> Vec<Part> {
    let mut parts = Vec::new();
    for load in &table.loads {
        let mut from = load.address;
        let segments = table.segments.iter();
        for segment in segments.filter(|s| s.base < load.end() && s.end > load.address) {
            let mut open = Some(from);
            for (at, rule) in segment.rows().chain([(segment.end, NO_RULE)]) {
                match open {
                    Some(start) if rule != NO_RULE => {
                        parts.push((start, at));
                        open = None;
                    }
                    None if rule == NO_RULE => open = Some(at),
                    _ => {}
                }
            }
            from = open.unwrap_or(segment.end);
        }
        parts.push((from, load.end()));
    }
    let bounds = |(from, to): Part| table.loads.iter().find(|l| from >= l.address && to <= l.end());
    parts.retain(|part| part.0 < part.1 && bounds(*part).is_some());
    parts
}

/// The table with rules at these places, which have none and are in order.
fn insert(
    mut table: FileTable,
    places: &[(u64, u64, u16)],
    limits: &Limits,
) -> Result<FileTable, NoTable> {
    let start = table.loads.iter().map(|load| load.address).min().unwrap_or(0);
    let end = table.loads.iter().map(super::Load::end).max().unwrap_or(0);
    let mut rows: Vec<(u64, u16)> = Vec::new();
    for segment in &table.segments {
        rows.extend(segment.rows());
        rows.push((segment.end, NO_RULE));
    }
    for (from, to, rule) in places {
        rows.extend([(*from, *rule), (*to, NO_RULE)]);
    }
    // Of rows at one address, what begins there comes behind what ends there.
    rows.sort_by_key(|(at, rule)| (*at, *rule != NO_RULE));
    let mut writer = Writer::new(start, limits.table_bytes);
    for (at, rule) in rows {
        writer.push(at, rule)?;
    }
    (table.segments, table.rows, table.bytes) = writer.finish(end)?;
    Ok(table)
}
