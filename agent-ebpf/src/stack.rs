//! Stacks: the kernel's by its own unwinder, the user's by a walk along the frame pointers.
//!
//! The user stack is read in aligned windows of 1 KiB, one `bpf_probe_read_user` each, and walked
//! in the copy: three to five times cheaper than a read for each frame. An aligned window never
//! crosses a page, so a page that is not there ends the walk and nothing else.
//!
//! `bpf_get_stackid` and `bpf_get_stack` are not used for user stacks: they can crash kernels before
//! 6.13 when uprobes race.

use aya_ebpf::helpers::generated::{bpf_get_stack, bpf_probe_read_user};
use podflame_wire::{MAX_FRAMES, StackEnd, StackShape};

use crate::{maps::FRAMES, task::Registers};

/// Words of the window through which a user stack is read.
const WINDOW: usize = 128;

/// Bytes of the window.
const WINDOW_BYTES: u64 = (WINDOW * 8) as u64;

/// First address that is not of user space (x86-64, 47 bits; `TASK_SIZE_MAX`).
const USER_END: u64 = 0x7fff_ffff_f000;

/// Below this nothing is ever mapped (`vm.mmap_min_addr` is 64 KiB, a page at the least).
const USER_START: u64 = 0x1000;

/// Puts the kernel stack at the front of `frames`, and how many there are into `shape`.
///
/// # Safety
///
/// `ctx` must be the context of a `perf_event` program.
#[inline(always)]
pub(crate) unsafe fn kernel(
    ctx: *mut core::ffi::c_void,
    frames: &mut [u64; FRAMES],
    shape: &mut StackShape,
) {
    // SAFETY: the buffer is as long as stated; the caller's promise for `ctx`.
    let bytes =
        unsafe { bpf_get_stack(ctx, frames.as_mut_ptr().cast(), (MAX_FRAMES * 8) as u32, 0) };
    let count = if bytes > 0 { bytes as u64 / 8 } else { 0 };
    set(&mut shape.kernel_frames, count as u16);
}

/// A walk along the frame pointers of a user stack. It lives in a map, and each step reads its state
/// back from there: the verifier then knows nothing of it but its type, so that all paths through a
/// step end in the same state and it looks at each step once, not once for each path before it.
#[repr(C)]
pub(crate) struct Walk {
    /// Frame pointer of the next frame.
    fp: u64,
    /// The next frame cannot be below this.
    below: u64,
    /// Address of what is in the window; 0: nothing was read.
    base: u64,
    /// Copy of the part of the stack that was read last.
    window: [u64; WINDOW],
}

impl Walk {
    /// Writes the user stack behind the kernel frames that `shape` states, innermost frame first, at
    /// most [`MAX_FRAMES`]; then how many there are, and why it ended, to `shape`. `N` is a power of
    /// two.
    ///
    /// Each frame on the stack is the caller's frame pointer and the return address above it (System
    /// V ABI for x86-64, section 3.2.2), and lies above the one before.
    #[inline(always)]
    pub(crate) fn run<const N: usize>(
        &mut self,
        regs: Registers,
        out: &mut [u64; N],
        shape: &mut StackShape,
    ) {
        let at = get(&shape.kernel_frames) as usize;
        set(&mut self.fp, regs.fp);
        set(&mut self.below, regs.sp);
        set(&mut self.base, 0);
        let mut count = 0;
        let mut end = StackEnd::None;
        if is_code(regs.ip) {
            out[at & (N - 1)] = regs.ip;
            count = 1;
            end = StackEnd::Truncated;
            while count < MAX_FRAMES {
                match self.step() {
                    Ok(address) => out[(at + count) & (N - 1)] = address,
                    Err(reason) => {
                        end = reason;
                        break;
                    }
                }
                count += 1;
            }
            if get(&self.fp) == 0 {
                end = StackEnd::Complete;
            }
        }
        // To memory at once: what follows reads it from there, and is then the same for all ends.
        set(&mut shape.user_frames, count as u16);
        set(&mut shape.user_end, end as u8);
    }

    /// Goes one frame outwards and returns its return address.
    #[inline(always)]
    fn step(&mut self) -> Result<u64, StackEnd> {
        let fp = get(&self.fp);
        if fp == 0 {
            return Err(StackEnd::Complete);
        }
        if fp < get(&self.below) || !fp.is_multiple_of(8) || fp >= USER_END {
            return Err(StackEnd::NoFramePointer);
        }
        let index = (fp % WINDOW_BYTES / 8) as usize;
        let (mut base, mut bytes) = (fp & !(WINDOW_BYTES - 1), WINDOW_BYTES as u32);
        if index == WINDOW - 1 {
            // The pair lies across two windows, which only an unusual alignment of the stack does.
            (base, bytes) = (fp, 16);
        }
        if base != get(&self.base) {
            // SAFETY: reads into the window, as long as stated; any address may be asked for.
            let failed = unsafe {
                bpf_probe_read_user(self.window.as_mut_ptr().cast(), bytes, base as *const _)
            };
            if failed != 0 {
                return Err(StackEnd::Unreadable);
            }
            set(&mut self.base, base);
        }
        let index = ((fp - base) / 8) as usize;
        let outer = self.window[index & (WINDOW - 1)];
        let address = self.window[(index + 1) & (WINDOW - 1)];
        if address == 0 {
            return Err(StackEnd::Complete);
        }
        if !is_code(address) {
            return Err(StackEnd::NoFramePointer);
        }
        set(&mut self.below, fp + 16);
        set(&mut self.fp, outer);
        Ok(address)
    }
}

/// Reads a field from memory, not from a register that still holds it.
#[inline(always)]
pub(crate) fn get<T: Copy>(field: &T) -> T {
    // SAFETY: a reference is valid for reads.
    unsafe { core::ptr::from_ref(field).read_volatile() }
}

/// Writes a field to memory.
#[inline(always)]
pub(crate) fn set<T: Copy>(field: &mut T, value: T) {
    // SAFETY: a reference is valid for writes.
    unsafe { core::ptr::from_mut(field).write_volatile(value) }
}

/// Whether code of user space can be at this address.
#[inline(always)]
fn is_code(address: u64) -> bool {
    (USER_START..USER_END).contains(&address)
}
