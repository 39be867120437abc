//! The short way out of a frame, which nearly all frames take: by a rule of the usual form that this CPU
//! has used before for the same address of the same mappings, or by the frame pointer.
//!
//! It does what [`Walk::step`] does for these frames, and where it cannot, nothing: then that does it. It
//! spares the searches for the mapping and for the row, each of which goes through a dozen cache lines
//! that nobody else wants, so that they are cold 99 times a second.

use crate::{
    BY_FRAME_POINTER, StackEnd,
    unwind::{Cfa, MappingKind, Rule, Saved},
    walk::{Machine, Target, Walk, get, is_code, set},
};

/// Rules that a CPU remembers.
pub const CACHED_RULES: usize = 2048;

/// Bits of the offset of a usual rule's CFA, in words.
const CFA_BITS: u32 = 15;
/// Bits of the distance from the CFA down to the saved frame pointer, in words; 0: it is not saved.
const SAVED_BITS: u32 = 14;
/// The CFA is found by the frame pointer.
const BY_FP: u32 = 1 << 30;
/// What tells a usual rule from none.
const USUAL: u32 = 1 << 31;
/// The rule of the outermost frame.
const OUTERMOST: u32 = 1;

/// A rule that was used.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct Used {
    /// The address that it was used for.
    at: u64,
    /// The [generation](crate::unwind::Process::generation) of the mappings that the address was looked
    /// up in.
    generation: u32,
    /// The rule as [`Rule::usual`] says it.
    rule: u32,
}

/// The rules that one CPU used last, by address. What is in it never gets wrong: a generation stands for
/// the same mappings and tables for ever. Only for programs that cannot interrupt each other.
#[derive(Clone, Debug)]
#[repr(C)]
pub struct RuleCache([Used; CACHED_RULES]);

impl RuleCache {
    /// Nothing was used yet.
    #[must_use]
    pub const fn new() -> Self {
        Self([Used { at: 0, generation: 0, rule: 0 }; CACHED_RULES])
    }

    /// The usual rule that was used for an address, or 0.
    #[inline(always)]
    #[must_use]
    pub fn get(&self, at: u64, generation: u32) -> u32 {
        let used = &self.0[place(at)];
        if get(&used.at) != at || get(&used.generation) != generation {
            return 0;
        }
        get(&used.rule)
    }

    /// Remembers it.
    #[inline(always)]
    pub fn put(&mut self, at: u64, generation: u32, rule: u32) {
        let used = &mut self.0[place(at)];
        set(&mut used.at, at);
        set(&mut used.generation, generation);
        set(&mut used.rule, rule);
    }
}

impl Default for RuleCache {
    fn default() -> Self {
        Self::new()
    }
}

/// Where an address is kept: Fibonacci hashing (Knuth, The Art of Computer Programming, 6.4).
#[inline(always)]
fn place(at: u64) -> usize {
    (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (u64::BITS - CACHED_RULES.ilog2())) as usize
}

impl Rule {
    /// The rule in a few bits, if it is of the usual form; otherwise 0.
    #[inline(always)]
    #[must_use]
    pub fn usual(&self) -> u32 {
        let by_fp = self.cfa == Cfa::Fp as u8;
        let is_saved = self.fp == Saved::AtCfa as u8;
        let (cfa, saved) = (self.cfa_offset, -i64::from(self.fp_offset) * i64::from(is_saved));
        let usual = (by_fp | (self.cfa == Cfa::Sp as u8))
            & (self.ra == Saved::AtCfa as u8)
            & (self.ra_offset == -8)
            & (is_saved | (self.fp == Saved::Same as u8))
            & (cfa & 7 == 0)
            & (0..8 << CFA_BITS).contains(&cfa)
            & (saved & 7 == 0)
            & (saved >= 8 * i64::from(is_saved))
            & (saved < 8 << SAVED_BITS);
        let by_fp = BY_FP * u32::from(by_fp);
        let bits = cfa as u32 >> 3 | (saved as u32 >> 3) << CFA_BITS | by_fp | USUAL;
        let outermost = self.cfa == Cfa::End as u8;
        bits * u32::from(usual) + OUTERMOST * u32::from(outermost)
    }
}

impl Walk {
    /// Goes one frame outwards, or finds that there is none, as [`Walk::step`] would, if that is short;
    /// otherwise returns 0 and leaves the walk where it is.
    #[inline(always)]
    pub fn hop<T: Target>(&mut self, target: &T) -> u64 {
        if !T::Machine::POINTER_ENDS_FRAME {
            return 0;
        }
        let at = get(&self.ip).wrapping_sub(get(&self.back));
        let (sp, fp) = (get(&self.sp), get(&self.fp));
        let kind = get(&self.kind) & 0xff;
        let without =
            kind == MappingKind::NoTable as u32 || kind == MappingKind::FramePointers as u32;
        let by_pointer = without && at >= get(&self.start) && at < get(&self.end);
        let (cfa, saved);
        if by_pointer {
            if fp == 0 && (get(&self.chained) != 0 || kind == MappingKind::FramePointers as u32) {
                return StackEnd::Complete as u64;
            }
            if fp < sp {
                return 0;
            }
            (cfa, saved) = (fp.wrapping_add(16), 16);
        } else {
            let rule = target.recall(at, get(&self.generation));
            if rule & USUAL == 0 {
                return u64::from(rule & OUTERMOST) * StackEnd::Complete as u64;
            }
            let from = if rule & BY_FP != 0 { fp } else { sp };
            cfa = from.wrapping_add(u64::from(rule & ((1 << CFA_BITS) - 1)) * 8);
            saved = u64::from(rule >> CFA_BITS & ((1 << SAVED_BITS) - 1)) * 8;
        }
        // The stack grows downwards, and the return address is below the CFA.
        let ra = cfa.wrapping_sub(8);
        if cfa <= sp || !self.reach(target, ra) {
            return 0;
        }
        let ip = self.at(ra) & T::Machine::ADDRESS;
        let mut caller_fp = fp;
        if saved != 0 {
            let saved = cfa.wrapping_sub(saved);
            if !self.is_here(saved) {
                return 0;
            }
            caller_fp = self.at(saved);
        }
        if !is_code::<T>(ip) {
            return 0;
        }
        self.arrive(ip, cfa, caller_fp, by_pointer);
        let marked = by_pointer && kind == MappingKind::NoTable as u32;
        ip | (BY_FRAME_POINTER * u64::from(marked))
    }
}
