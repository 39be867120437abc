//! Stacks: the kernel's by its own unwinder, the user's by a walk along the frame pointers.
//!
//! The user stack is read in aligned windows of 1 KiB, one `bpf_probe_read_user` each, and walked
//! in the copy: three to five times cheaper than a read for each frame. An aligned window never
//! crosses a page, so a page that is not there ends the walk and nothing else.
//!
//! `bpf_get_stackid` and `bpf_get_stack` are not used for user stacks: they can crash kernels before
//! 6.13 when uprobes race.

use aya_ebpf::helpers::generated::{bpf_get_stack, bpf_probe_read_user};
use podflame_wire::{MAX_FRAMES, StackEnd};

use crate::{
    maps::{FRAMES, WINDOW},
    task::Registers,
};

/// Bytes of the window.
const WINDOW_BYTES: u64 = (WINDOW * 8) as u64;

/// First address that is not of user space (x86-64, 47 bits; `TASK_SIZE_MAX`).
const USER_END: u64 = 0x7fff_ffff_f000;

/// Below this nothing is ever mapped (`vm.mmap_min_addr` is 64 KiB, a page at the least).
const USER_START: u64 = 0x1000;

/// Puts the kernel stack at the front of `frames`; returns how many there are.
///
/// # Safety
///
/// `ctx` must be the context of a `perf_event` program.
#[inline(always)]
pub(crate) unsafe fn kernel(ctx: *mut core::ffi::c_void, frames: &mut [u64; FRAMES]) -> usize {
    // SAFETY: the buffer is as long as stated; the caller's promise for `ctx`.
    let bytes = unsafe { bpf_get_stack(ctx, frames.as_mut_ptr().cast(), (MAX_FRAMES * 8) as u32, 0) };
    if bytes <= 0 {
        return 0;
    }
    let count = bytes as usize / 8;
    if count > MAX_FRAMES { MAX_FRAMES } else { count }
}

/// A walk along the frame pointers of a user stack.
pub(crate) struct Walk<'a> {
    /// Copy of the part of the stack that was read last.
    window: &'a mut [u64; WINDOW],
    /// Where that part is; 0: nothing was read.
    base: u64,
}

impl<'a> Walk<'a> {
    /// A walk that reads through `window`.
    #[inline(always)]
    pub(crate) fn new(window: &'a mut [u64; WINDOW]) -> Self {
        Self { window, base: 0 }
    }

    /// Writes the user stack to `out[at..]`, innermost frame first, at most [`MAX_FRAMES`]; returns
    /// how many frames there are and why it ended.
    ///
    /// Each frame on the stack is the caller's frame pointer and the return address above it (System
    /// V ABI for x86-64, section 3.2.2), and lies above the one before.
    #[inline(always)]
    pub(crate) fn run<const N: usize>(
        &mut self,
        regs: &Registers,
        out: &mut [u64; N],
        at: usize,
    ) -> (usize, StackEnd) {
        if !is_code(regs.ip) {
            return (0, StackEnd::None);
        }
        out[at & (N - 1)] = regs.ip;
        let mut fp = regs.fp;
        let mut below = regs.sp;
        let mut count = 1;
        while count < MAX_FRAMES {
            if fp == 0 {
                return (count, StackEnd::Complete);
            }
            if fp < below || fp % 8 != 0 || fp >= USER_END {
                return (count, StackEnd::NoFramePointer);
            }
            let Some((outer, address)) = self.frame(fp) else {
                return (count, StackEnd::Unreadable);
            };
            if address == 0 {
                return (count, StackEnd::Complete);
            }
            if !is_code(address) {
                return (count, StackEnd::NoFramePointer);
            }
            out[(at + count) & (N - 1)] = address;
            count += 1;
            below = fp + 16;
            fp = outer;
        }
        (count, if fp == 0 { StackEnd::Complete } else { StackEnd::Truncated })
    }

    /// The two words at `fp`: the caller's frame pointer and the return address.
    #[inline(always)]
    fn frame(&mut self, fp: u64) -> Option<(u64, u64)> {
        let base = fp & !(WINDOW_BYTES - 1);
        let index = (fp % WINDOW_BYTES / 8) as usize;
        if index == WINDOW - 1 {
            // The pair lies across two windows, which only an unusual alignment of the stack does.
            let mut pair = [0_u64; 2];
            // SAFETY: reads into `pair`, as long as stated; any address may be asked for.
            let failed =
                unsafe { bpf_probe_read_user(pair.as_mut_ptr().cast(), 16, fp as *const _) };
            return (failed == 0).then_some((pair[0], pair[1]));
        }
        if base != self.base {
            // SAFETY: reads into the window, as long as stated; any address may be asked for.
            let failed = unsafe {
                bpf_probe_read_user(
                    self.window.as_mut_ptr().cast(),
                    WINDOW_BYTES as u32,
                    base as *const _,
                )
            };
            if failed != 0 {
                return None;
            }
            self.base = base;
        }
        Some((self.window[index & (WINDOW - 1)], self.window[(index + 1) & (WINDOW - 1)]))
    }
}

/// Whether code of user space can be at this address.
#[inline(always)]
fn is_code(address: u64) -> bool {
    address >= USER_START && address < USER_END
}
