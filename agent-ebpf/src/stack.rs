//! Stacks: the kernel's by its own unwinder, the user's by a [walk](podflame_wire::walk).
//!
//! `bpf_get_stackid` and `bpf_get_stack` are not used for user stacks: they follow frame pointers only,
//! and can crash kernels before 6.13 when uprobes race.

use aya_ebpf::helpers::generated::{bpf_get_stack, bpf_probe_read_user};
use podflame_wire::{
    Header, MAX_FRAMES, StackEnd, StackShape, Task,
    python::MAX_PYTHON_FRAMES,
    unwind::{Mapping, Page, Rule},
    walk::{self, Start, Target, WINDOW, Walk, get, set},
};

use crate::{
    maps::{FRAMES, MAPPINGS, PROCESSES, RULE_CACHE, RULES, SENDER_FRAMES, Scratch, TABLES},
    python_stack,
    record::Record,
};

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

    #[inline(always)]
    fn recall(&self, at: u64, generation: u32) -> u32 {
        // SAFETY: the cache is this CPU's; see `RULE_CACHE` for who uses it.
        RULE_CACHE.get(0).map_or(0, |cache| cache.get(at, generation))
    }

    #[inline(always)]
    fn remember(&self, at: u64, generation: u32, rule: u32) {
        if let Some(cache) = RULE_CACHE.get_ptr_mut(0) {
            // SAFETY: as in `recall`.
            unsafe { (*cache).put(at, generation, rule) };
        }
    }
}

/// A step of a walk, as a function that the verifier looks at by itself (`global function`): it knows
/// nothing of what the caller knows, and so looks at it once.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn step_out(walk: *mut Walk) -> u64 {
    if walk.is_null() {
        return StackEnd::None as u64;
    }
    // SAFETY: the verifier makes sure of it: the callers pass a walk or nothing.
    unsafe { (*walk).step(&Running) }
}

/// The same, the short way if there is one. Apart, so that it is short in instructions too.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn hop_out(walk: *mut Walk) -> u64 {
    if walk.is_null() {
        return StackEnd::None as u64;
    }
    // SAFETY: as in `step_out`.
    match unsafe { (*walk).hop(&Running) } {
        0 => step_out(walk),
        frame => frame,
    }
}

/// Declares a walk that writes to a buffer of a length, as a function that the verifier looks at by itself;
/// its result holds how many frames there are, and from bit 16 on the number of the [`StackEnd`].
macro_rules! walk_out {
    ($name:ident, $frames:expr) => {
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $name(walk: *mut Walk, out: *mut [u64; $frames], at: u64) -> u64 {
            if walk.is_null() || out.is_null() {
                return 0;
            }
            // SAFETY: as in `step_out`.
            let (walk, out) = unsafe { (&mut *walk, &mut *out) };
            let (count, end) = walk.run::<Running, _>(|walk| hop_out(walk), out, at as usize);
            count as u64 | (end as u64) << 16
        }
    };
}
walk_out!(walk_out, FRAMES);
walk_out!(walk_sender_out, SENDER_FRAMES);

/// Where frames go.
pub(crate) trait Frames {
    /// Writes the frames of a walk that has begun from `at` on.
    fn walk_out(&mut self, walk: &mut Walk, at: u64) -> u64;
}

impl Frames for [u64; FRAMES] {
    #[inline(always)]
    fn walk_out(&mut self, walk: &mut Walk, at: u64) -> u64 {
        walk_out(walk, self, at)
    }
}

impl Frames for [u64; SENDER_FRAMES] {
    #[inline(always)]
    fn walk_out(&mut self, walk: &mut Walk, at: u64) -> u64 {
        // A perf event can interrupt this, and change what is remembered under its hands.
        set(&mut walk.generation, 0);
        walk_sender_out(walk, self, at)
    }
}

/// Writes the user stack of `task`, which runs, behind the kernel frames that `shape` states, innermost
/// frame first; then how many there are, and why it ended, to `shape`.
#[inline(always)]
pub(crate) fn user<F: Frames>(
    walk: &mut Walk,
    mut start: Start,
    task: &Task,
    out: &mut F,
    shape: &mut StackShape,
) {
    // SAFETY: what is read is not kept.
    if let Some(process) = unsafe { PROCESSES.get(get(&task.pid)) }
        && process.start_ns == get(&task.start_ns)
        && process.exec_id == get(&task.exec_id)
    {
        (start.first, start.mappings) = (get(&process.first), get(&process.mappings));
        start.generation = get(&process.generation);
    }
    walk.begin(&start);
    let result = out.walk_out(walk, get(&shape.kernel_frames) as u64);
    // To memory at once: what follows reads it from there, and is then the same for all ends.
    set(&mut shape.user_frames, result as u16);
    set(&mut shape.user_end, (result >> 16) as u8);
}

/// Writes the user stack of the running task and its Python stack behind the kernel frames that the record
/// in `scratch` states.
#[inline(always)]
pub(crate) fn whole<R: Record>(scratch: &mut Scratch<R>, start: Start) {
    let Header { task, stack, .. } = scratch.record.header();
    user(&mut scratch.walk, start, task, &mut scratch.frames, stack);
    let python = &mut scratch.python;
    python_stack::walk(python, task, &mut scratch.frames, stack, MAX_PYTHON_FRAMES);
}
