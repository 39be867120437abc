//! Stacks: the kernel's by its own unwinder, the user's by a [walk](podflame_wire::walk).
//!
//! `bpf_get_stackid` and `bpf_get_stack` are not used for user stacks: they follow frame pointers only,
//! and can crash kernels before 6.13 when uprobes race.

use aya_ebpf::helpers::generated::{bpf_get_stack, bpf_probe_read_user};
use podflame_wire::{
    MAX_FRAMES, StackEnd, StackShape, Task,
    unwind::{Mapping, Page, Rule},
    walk::{self, Start, Target, WINDOW, Walk, get, set},
};

use crate::maps::{FRAMES, MAPPINGS, PROCESSES, RULES, TABLES};

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

/// What a walk reads, from a BPF program: the running process, and the maps.
struct Running;

impl Target for Running {
    #[cfg(bpf_target_arch = "x86_64")]
    type Machine = walk::X86_64;
    #[cfg(bpf_target_arch = "aarch64")]
    type Machine = walk::AArch64;

    #[inline(always)]
    fn read(&self, address: u64, window: &mut [u64; WINDOW]) -> bool {
        // SAFETY: writes as much as the window has; any address may be asked for.
        unsafe {
            bpf_probe_read_user(
                window.as_mut_ptr().cast(),
                size_of_val(window) as u32,
                address as *const _,
            ) == 0
        }
    }

    #[inline(always)]
    fn mapping(&self, index: u32) -> Option<&Mapping> {
        MAPPINGS.get(index)
    }

    #[inline(always)]
    fn page(&self, table: u32, page: u32) -> Option<&Page> {
        TABLES.get_value(table, &page)
    }

    #[inline(always)]
    fn rule(&self, index: u16) -> Option<&Rule> {
        RULES.get(index.into())
    }
}

/// A step of a walk, as a function that the verifier looks at by itself (`global function`): it knows
/// nothing of what the caller knows, and so looks at it once.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn step_out(walk: *mut Walk) -> u64 {
    if walk.is_null() {
        return StackEnd::None as u64;
    }
    // SAFETY: the verifier makes sure of it: the callers pass a walk or nothing.
    unsafe { (*walk).step(&Running) }
}

/// Writes the user stack of `task`, which runs, behind the kernel frames that `shape` states, innermost
/// frame first; then how many there are, and why it ended, to `shape`.
#[inline(always)]
pub(crate) fn user<const N: usize>(
    walk: &mut Walk,
    mut start: Start,
    task: &Task,
    out: &mut [u64; N],
    shape: &mut StackShape,
) {
    // SAFETY: what is read is not kept.
    if let Some(process) = unsafe { PROCESSES.get(get(&task.pid)) }
        && process.start_ns == get(&task.start_ns)
        && process.exec_id == get(&task.exec_id)
    {
        (start.first, start.mappings) = (process.first, process.mappings);
    }
    let at = get(&shape.kernel_frames) as usize;
    let (count, end) = walk.run::<Running, N>(|walk| step_out(walk), start, out, at);
    // To memory at once: what follows reads it from there, and is then the same for all ends.
    set(&mut shape.user_frames, count as u16);
    set(&mut shape.user_end, end as u8);
}
