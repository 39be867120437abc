//! The walk over a user stack, by the tables of [`unwind`](crate::unwind) and by frame pointers where
//! there are none. One code for the BPF programs and for user space, where it is tested.
//!
//! The state lies in a map and each step reads it back from there ([`get`], [`set`]): the verifier then
//! knows nothing of it but its type, so that all paths through a step end in the same state and it
//! looks at each step once, not once for each path before it. For the same reason searches take a fixed
//! number of steps and choose by arithmetic, not by branches.
//!
//! The stack is read in aligned windows of 1 KiB, three to five times cheaper than word by word. An
//! aligned window never crosses a page, so a page that is not there ends the walk and nothing else.
//!
//! No frame is invented: an address is a frame only if executable memory of the process holds it.

use crate::{
    BY_FRAME_POINTER, MAX_FRAMES, StackEnd,
    unwind::{Cfa, Mapping, MappingKind, NO_RULE, PAGE_ROWS, Page, Rule, Saved},
};

/// Words of the window through which a stack is read.
pub const WINDOW: usize = 128;

/// Bytes of the window.
const WINDOW_BYTES: u64 = (WINDOW * 8) as u64;

/// Where a window never is: a bit is set that is not in any window's address.
const NOTHING: u64 = 8;

/// Below this nothing is ever mapped (`vm.mmap_min_addr` is 64 KiB, a page at the least).
const USER_START: u64 = 0x1000;

/// Steps to find a mapping among as many as a process can have here.
const MAPPING_STEPS: usize = crate::unwind::MAX_PROCESS_MAPPINGS.ilog2() as usize + 1;

/// Registers by their DWARF numbers, as far as a rule can name them (x86-64: rax to r15).
pub const REGISTERS: usize = 16;

/// How code without a table is left: it keeps the frame pointer of its caller where its own points, and
/// the return address above (System V ABI for x86-64, section 3.2.2; AAPCS64, section 6.4.6).
const BY_POINTER: Rule = Rule {
    cfa: Cfa::Fp as u8,
    cfa_register: 0,
    ra: Saved::AtCfa as u8,
    fp: Saved::AtCfa as u8,
    cfa_offset: 16,
    cfa_add: 0,
    ra_offset: -8,
    fp_offset: -16,
};

/// What differs between processors.
pub trait Machine {
    /// First address that is not of user space.
    const USER_END: u64;
    /// The bits of a return address that are its address. Others may be a signature (pointer
    /// authentication).
    const ADDRESS: u64;
    /// Whether a frame pointer points to the outer end of its frame, so that it tells the caller's stack
    /// pointer.
    const POINTER_ENDS_FRAME: bool;
}

/// 47 bits of addresses (`TASK_SIZE_MAX`). With five levels of page tables there are more, but the kernel
/// hands out none of those without being asked.
#[derive(Debug)]
pub struct X86_64;

impl Machine for X86_64 {
    const USER_END: u64 = 0x7fff_ffff_f000;
    const ADDRESS: u64 = u64::MAX;
    const POINTER_ENDS_FRAME: bool = true;
}

/// 48 bits of addresses, or fewer. There are more with 52 bits, which nobody gets without asking
/// (`DEFAULT_MAP_WINDOW`). A signature is in the bits above (Arm ARM, D8.10).
#[derive(Debug)]
pub struct AArch64;

impl Machine for AArch64 {
    const USER_END: u64 = 1 << 48;
    const ADDRESS: u64 = (1 << 48) - 1;
    // The frame record is wherever the function wants it (AAPCS64, section 6.4.6); gcc puts it at the
    // inner end.
    const POINTER_ENDS_FRAME: bool = false;
}

/// What a walk reads: the process's memory, and the tables.
pub trait Target {
    /// The processor that the process runs on.
    type Machine: Machine;
    /// Reads [`WINDOW`] words from an aligned address. `false` if any of them cannot be read.
    fn read(&self, address: u64, window: &mut [u64; WINDOW]) -> bool;
    /// A mapping by its place among those of all processes.
    fn mapping(&self, index: u32) -> Option<&Mapping>;
    /// A page of a table.
    fn page(&self, table: u32, page: u32) -> Option<&Page>;
    /// A rule.
    fn rule(&self, index: u16) -> Option<&Rule>;
    /// What [`Target::remember`] was told last of this address, or 0. It may forget.
    #[inline(always)]
    fn recall(&self, _at: u64, _generation: u32) -> u32 {
        0
    }
    /// Takes note of the rule for an address, which holds wherever the generation is the same.
    #[inline(always)]
    fn remember(&self, _at: u64, _generation: u32, _rule: u32) {}
}

/// Where a walk starts.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Start {
    /// Instruction pointer.
    pub ip: u64,
    /// Stack pointer.
    pub sp: u64,
    /// Frame pointer.
    pub fp: u64,
    /// Link register, for the machines that have one.
    pub link: u64,
    /// The process's first mapping.
    pub first: u32,
    /// How many mappings it has; 0: nothing is known of the process yet.
    pub mappings: u32,
    /// Their [generation](crate::unwind::Process::generation); 0: no rule is to be remembered.
    pub generation: u32,
}

/// A walk.
#[derive(Clone, Debug)]
#[repr(C)]
pub struct Walk {
    pub(crate) ip: u64,
    pub(crate) sp: u64,
    pub(crate) fp: u64,
    link: u64,
    /// What is subtracted from `ip` to be within the instruction: 1 for a return address, which is
    /// behind the call and may be behind the function.
    pub(crate) back: u64,
    /// 1 while the frame is the innermost, whose registers are known.
    innermost: u64,
    /// 1 if the frame was found by frame pointer.
    pub(crate) chained: u64,
    /// 1 while `link` is the frame's own: in the innermost, and in one that a signal interrupted.
    linked: u64,
    /// The process's mappings.
    first: u32,
    mappings: u32,
    /// The mapping that was found last: from `start`, up to `end`.
    pub(crate) start: u64,
    pub(crate) end: u64,
    bias: u64,
    table: u32,
    pub(crate) kind: u32,
    /// Of the mappings; 0: nothing is remembered of them.
    pub generation: u32,
    /// Zero.
    pad: u32,
    /// Address of what is in the window, or [`NOTHING`].
    base: u64,
    window: [u64; WINDOW],
    /// Registers in the innermost frame, by DWARF number; whoever starts the walk writes them.
    pub registers: [u64; REGISTERS],
}

impl Walk {
    /// A walk that was not started.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            ip: 0,
            sp: 0,
            fp: 0,
            link: 0,
            back: 0,
            innermost: 0,
            chained: 0,
            linked: 0,
            first: 0,
            mappings: 0,
            start: 0,
            end: 0,
            bias: 0,
            table: 0,
            kind: 0,
            generation: 0,
            pad: 0,
            base: NOTHING,
            window: [0; WINDOW],
            registers: [0; REGISTERS],
        }
    }

    /// Goes to where a walk starts.
    #[inline(always)]
    pub fn begin(&mut self, start: &Start) {
        set(&mut self.ip, start.ip);
        set(&mut self.sp, start.sp);
        set(&mut self.fp, start.fp);
        set(&mut self.link, start.link);
        set(&mut self.back, 0);
        set(&mut self.innermost, 1);
        set(&mut self.chained, 0);
        set(&mut self.linked, 1);
        set(&mut self.first, start.first);
        set(&mut self.mappings, start.mappings);
        set(&mut self.generation, start.generation);
        set(&mut self.start, 1);
        set(&mut self.end, 0);
        set(&mut self.base, NOTHING);
    }

    /// Writes the user stack to `out` from `at` on, innermost frame first, at most [`MAX_FRAMES`];
    /// returns how many there are, and why it ended. `N` is a power of two, and indices are taken
    /// modulo `N`. A frame that was found by frame pointer has [`BY_FRAME_POINTER`] set.
    ///
    /// `next` is [`Walk::hop`] and, where that gives 0, [`Walk::step`]: a BPF program makes that a function
    /// of its own, which the verifier looks at once, and not once for each frame.
    #[inline(always)]
    pub fn run<T: Target, const N: usize>(
        &mut self,
        next: impl Fn(&mut Self) -> u64,
        out: &mut [u64; N],
        at: usize,
    ) -> (usize, StackEnd) {
        let ip = get(&self.ip);
        if !is_code::<T>(ip) {
            return (0, StackEnd::None);
        }
        out[at & (N - 1)] = ip;
        let mut count = 1;
        // Once more than there are frames: the last is one only if code is there, and may be the outermost.
        while count <= MAX_FRAMES {
            let frame = next(self);
            if frame < USER_START {
                let end = StackEnd::from_number(frame as u8).unwrap_or(StackEnd::None);
                // What was taken for the caller is no code, so it was not the caller.
                let invented = usize::from(end == StackEnd::NoMapping && count > 1);
                return (count - invented, end);
            }
            if count == MAX_FRAMES {
                break;
            }
            out[(at + count) & (N - 1)] = frame;
            count += 1;
        }
        (count, StackEnd::Truncated)
    }

    /// The stack pointer of the frame that the walk has come to.
    #[must_use]
    pub fn stack_pointer(&self) -> u64 {
        self.sp
    }

    /// Goes one frame outwards and returns its address, marked if it was found by frame pointer; or, if
    /// there is none, the number of the [`StackEnd`], which no address is as small as.
    #[inline(always)]
    pub fn step<T: Target>(&mut self, target: &T) -> u64 {
        match self.caller(target) {
            Ok(frame) => frame,
            Err(end) => end as u64,
        }
    }

    #[inline(always)]
    fn caller<T: Target>(&mut self, target: &T) -> Result<u64, StackEnd> {
        let at = get(&self.ip).wrapping_sub(get(&self.back));
        if at < get(&self.start) || at >= get(&self.end) {
            self.locate(target, at);
        }
        let kind = get(&self.kind) & 0xff;
        if kind == MappingKind::Gap as u32 {
            return Err(StackEnd::NoMapping);
        }
        let mut index = NO_RULE;
        if kind == MappingKind::Table as u32 {
            index = self.find_row(target, at);
        }
        let Some(mut rule) =
            (if index == NO_RULE { Some(&BY_POINTER) } else { target.rule(index) })
        else {
            return Err(StackEnd::NoTable);
        };
        let generation = get(&self.generation);
        if index != NO_RULE && generation != 0 {
            target.remember(at, generation, rule.usual());
        }
        // With a stack pointer that is not known, only the frame pointer leads on.
        if !T::Machine::POINTER_ENDS_FRAME && get(&self.chained) != 0 && rule.is_by_stack_pointer()
        {
            (rule, index) = (&BY_POINTER, NO_RULE);
        }
        let uncertain = u64::from(kind != MappingKind::FramePointers as u32);
        self.apply(target, rule, index == NO_RULE, uncertain)
    }

    /// Finds the mapping that holds an address.
    #[inline(always)]
    fn locate<T: Target>(&mut self, target: &T, at: u64) {
        let mut low = get(&self.first);
        let mut len = get(&self.mappings);
        // Without mappings nothing is known, and everything is left by its frame pointer.
        let mut found = (0, u64::MAX, 0, 0, MappingKind::NoTable as u32);
        if len > 0 {
            for _ in 0..MAPPING_STEPS {
                if len < 2 {
                    break;
                }
                let half = len >> 1;
                let Some(mapping) = target.mapping(low.wrapping_add(half)) else { break };
                // 1 if the mapping begins at or below the address.
                let below = !(at.wrapping_sub(mapping.start) >> 63) & 1;
                low = low.wrapping_add(half * below as u32);
                len = len - half * below as u32 - (len - half) * (1 - below as u32);
            }
            found.4 = MappingKind::Gap as u32;
            if let Some(mapping) = target.mapping(low) {
                found = (mapping.start, mapping.end, mapping.bias, mapping.table, mapping.kind);
            }
            if at < found.0 || at >= found.1 {
                found = (1, 0, 0, 0, MappingKind::Gap as u32);
            }
        }
        set(&mut self.start, found.0);
        set(&mut self.end, found.1);
        set(&mut self.bias, found.2);
        set(&mut self.table, found.3);
        set(&mut self.kind, found.4);
    }

    /// Index of the rule that holds at an address of the current mapping.
    #[inline(always)]
    fn find_row<T: Target>(&self, target: &T, at: u64) -> u16 {
        let table = get(&self.table);
        let at = at.wrapping_sub(get(&self.bias)) as u32;
        let mut page = 0;
        if get(&self.kind) >> 8 > 1 {
            let Some(index) = target.page(table, 0) else { return NO_RULE };
            page = 1 + index.find(at);
        }
        let Some(page) = target.page(table, page as u32) else { return NO_RULE };
        let row = page.find(at);
        // Before the first row there is none.
        if page.start[row] > at { NO_RULE } else { page.rule[row] }
    }

    /// Goes to the caller's frame by a rule.
    #[inline(always)]
    fn apply<T: Target>(
        &mut self,
        target: &T,
        rule: &Rule,
        by_pointer: bool,
        uncertain: u64,
    ) -> Result<u64, StackEnd> {
        let (sp, fp) = (get(&self.sp), get(&self.fp));
        let cfa = rule.cfa;
        // A chain of frame pointers ends with 0. Where none led here, 0 is but what the register holds.
        let chain = get(&self.chained) | (uncertain ^ 1);
        if cfa == Cfa::End as u8 || (by_pointer && fp == 0 && chain != 0) {
            return Err(StackEnd::Complete);
        }
        let downwards = fp < sp && uncertain != 0;
        if by_pointer && (downwards || !fp.is_multiple_of(8) || fp >= T::Machine::USER_END) {
            return Err(self.no_way_on());
        }
        let mut from = sp;
        let mut offset = i64::from(rule.cfa_offset);
        if cfa == Cfa::Fp as u8 || cfa == Cfa::AtFp as u8 {
            from = fp;
        } else if cfa == Cfa::Register as u8 {
            if get(&self.innermost) == 0 {
                return Err(StackEnd::UnsupportedRule);
            }
            from = get(&self.registers[usize::from(rule.cfa_register) & (REGISTERS - 1)]);
        } else if cfa == Cfa::Plt as u8 {
            let in_second_half = (get(&self.ip) & 15) as i64 >= offset;
            offset = 8 + 8 * i64::from(in_second_half);
        } else if cfa == Cfa::None as u8 || cfa >= Cfa::End as u8 {
            return Err(StackEnd::UnsupportedRule);
        }
        let mut caller_sp = from.wrapping_add_signed(offset);
        let signal = cfa == Cfa::Signal as u8;
        if cfa == Cfa::AtSp as u8 || cfa == Cfa::AtFp as u8 || signal {
            let add = i64::from(rule.cfa_add) * i64::from(!signal);
            caller_sp = self.word(target, caller_sp)?.wrapping_add_signed(add);
        }
        // The stack grows downwards; only a signal can have been handled on another one.
        let least = sp + 1 - get(&self.linked);
        if caller_sp < least && !signal && (uncertain != 0 || !by_pointer) {
            return Err(StackEnd::Unreadable);
        }
        let saved_from = if signal { sp } else { caller_sp };
        let mut ip = get(&self.link);
        if rule.ra == Saved::AtCfa as u8 {
            ip = self.word(target, saved_from.wrapping_add_signed(rule.ra_offset.into()))?;
        } else if get(&self.linked) == 0 {
            return Err(StackEnd::UnsupportedRule);
        }
        ip &= T::Machine::ADDRESS;
        let mut caller_fp = fp;
        if rule.fp == Saved::AtCfa as u8 || rule.fp == Saved::AtFp as u8 {
            let from = if rule.fp == Saved::AtFp as u8 { fp } else { saved_from };
            caller_fp = self.word(target, from.wrapping_add_signed(rule.fp_offset.into()))?;
        } else if rule.fp == Saved::Undefined as u8 {
            caller_fp = 0;
        }
        if ip == 0 {
            return Err(if by_pointer && chain == 0 {
                self.no_way_on()
            } else {
                StackEnd::Complete
            });
        }
        if !is_code::<T>(ip) {
            return Err(if by_pointer { self.no_way_on() } else { StackEnd::NoMapping });
        }
        let linked = signal && rule.cfa_add != 0;
        if linked {
            let link = self.word(target, sp.wrapping_add_signed(rule.cfa_add.into()))?;
            set(&mut self.link, link);
        }
        self.arrive(ip, caller_sp, caller_fp, by_pointer);
        set(&mut self.linked, u64::from(linked));
        // A signal can interrupt any instruction, and it is that one which is next.
        set(&mut self.back, u64::from(!signal));
        Ok(ip | (BY_FRAME_POINTER * (u64::from(by_pointer) & uncertain)))
    }

    /// Why a frame pointer that leads nowhere ends the walk.
    #[inline(always)]
    fn no_way_on(&self) -> StackEnd {
        if get(&self.mappings) == 0 { StackEnd::NoFramePointer } else { StackEnd::NoTable }
    }

    /// Takes the caller's registers for a frame that made a call.
    #[inline(always)]
    pub(crate) fn arrive(&mut self, ip: u64, sp: u64, fp: u64, by_pointer: bool) {
        set(&mut self.ip, ip);
        set(&mut self.sp, sp);
        set(&mut self.fp, fp);
        set(&mut self.back, 1);
        set(&mut self.innermost, 0);
        set(&mut self.chained, u64::from(by_pointer));
        set(&mut self.linked, 0);
    }

    /// A word of the stack.
    #[inline(always)]
    fn word<T: Target>(&mut self, target: &T, address: u64) -> Result<u64, StackEnd> {
        if self.reach(target, address) { Ok(self.at(address)) } else { Err(StackEnd::Unreadable) }
    }

    /// Makes sure that a word is in the window. `false` if it cannot be read.
    #[inline(always)]
    pub(crate) fn reach<T: Target>(&mut self, target: &T, address: u64) -> bool {
        if self.is_here(address) {
            return true;
        }
        if !address.is_multiple_of(8) || address >= T::Machine::USER_END {
            return false;
        }
        let base = address & !(WINDOW_BYTES - 1);
        set(&mut self.base, NOTHING);
        if !target.read(base, &mut self.window) {
            return false;
        }
        set(&mut self.base, base);
        true
    }

    /// Whether a word is in the window.
    #[inline(always)]
    pub(crate) fn is_here(&self, address: u64) -> bool {
        // An aligned address in the window has no other bits than these.
        address & !(WINDOW_BYTES - 8) == get(&self.base)
    }

    /// A word of the window.
    #[inline(always)]
    pub(crate) fn at(&self, address: u64) -> u64 {
        get(&self.window[(address / 8) as usize & (WINDOW - 1)])
    }
}

impl Default for Walk {
    fn default() -> Self {
        Self::new()
    }
}

impl Rule {
    /// Whether the stack pointer must be known.
    #[inline(always)]
    fn is_by_stack_pointer(&self) -> bool {
        [Cfa::Sp as u8, Cfa::AtSp as u8, Cfa::Plt as u8, Cfa::Signal as u8].contains(&self.cfa)
    }
}

impl Page {
    /// The last row that begins at or below an address; 0 if there is none.
    #[inline(always)]
    #[must_use]
    pub fn find(&self, at: u32) -> usize {
        let mut row = 0;
        let mut half = PAGE_ROWS / 2;
        while half > 0 {
            let start = get(&self.start[(row + half) & (PAGE_ROWS - 1)]);
            // 1 if the row begins at or below the address.
            let below = (u64::from(start).wrapping_sub(u64::from(at) + 1) >> 63) as usize;
            row += half * below;
            half >>= 1;
        }
        row & (PAGE_ROWS - 1)
    }
}

/// Reads a field from memory, not from a register that still holds it.
#[inline(always)]
pub fn get<T: Copy>(field: &T) -> T {
    // SAFETY: a reference is valid for reads.
    unsafe { core::ptr::from_ref(field).read_volatile() }
}

/// Writes a field to memory.
#[inline(always)]
pub fn set<T: Copy>(field: &mut T, value: T) {
    // SAFETY: a reference is valid for writes.
    unsafe { core::ptr::from_mut(field).write_volatile(value) }
}

/// Whether code of user space can be at this address.
#[inline(always)]
pub(crate) fn is_code<T: Target>(address: u64) -> bool {
    (USER_START..T::Machine::USER_END).contains(&address)
}
