//! The Python stack of the running task, where the agent says that it has one. The walk itself, and
//! what it relies on, is in `podflame_wire::python`.

use aya_ebpf::helpers::generated::{bpf_get_current_task_btf, bpf_probe_read_user};
use podflame_wire::{
    StackShape, Task,
    python::{Memory, PythonEnd, Walk},
    walk::{get, set},
};

use crate::{
    fields::{TASK_FSBASE, read},
    maps::{PYTHON, PYTHON_THREADS},
};

/// The memory of the running task.
struct Current;

impl Memory for Current {
    #[inline(always)]
    fn read<const N: usize>(&self, into: &mut [u64; N], bytes: u32, address: u64) -> bool {
        // SAFETY: the caller asks for no more than `into` holds; any address may be asked for.
        unsafe { bpf_probe_read_user(into.as_mut_ptr().cast(), bytes, address as *const _) == 0 }
    }
}

/// Finds the thread, as a function that the verifier looks at by itself.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn find_thread(walk: *mut Walk, hint: u64) -> u64 {
    if walk.is_null() {
        return PythonEnd::None as u64;
    }
    // SAFETY: the verifier makes sure of it: the callers pass a walk or nothing.
    unsafe { (*walk).find(&Current, hint) }
}

/// Reads a frame, likewise.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn next_frame(walk: *mut Walk) -> u64 {
    if walk.is_null() {
        return PythonEnd::None as u64;
    }
    // SAFETY: as in `find_thread`.
    unsafe { (*walk).step(&Current) }
}

/// Writes the Python stack of the running task behind the frames that `shape` states, at most `most`
/// frames; then how many there are, and why it ended, to `shape`.
#[inline(always)]
pub(crate) fn walk<const N: usize>(
    walk: &mut Walk,
    task: &Task,
    out: &mut [u64; N],
    shape: &mut StackShape,
    most: usize,
) {
    set(&mut shape.python_frames, 0);
    set(&mut shape.python_end, PythonEnd::None as u8);
    // SAFETY: the value is copied at once. One that is replaced meanwhile leads nowhere.
    let Some(process) = (unsafe { PYTHON.get(task.pid) }) else { return };
    if process.start_ns != task.start_ns || process.exec_id != task.exec_id {
        return;
    }
    // SAFETY: the helper returns a typed pointer to the running task; the field is of its type.
    let thread =
        unsafe { read(bpf_get_current_task_btf().cast::<u8>().cast_const(), &TASK_FSBASE) };
    let Some(thread) = thread else { return };
    walk.begin(process, thread);
    // SAFETY: the value is copied out at once.
    let hint = unsafe { PYTHON_THREADS.get(task.tid) }.copied().unwrap_or(0);
    let at = (get(&shape.kernel_frames) + get(&shape.user_frames)) as usize;
    let find = |walk: &mut Walk| find_thread(walk, hint);
    let (count, end) = walk.run(find, |walk| next_frame(walk), out, at, most);
    let found = walk.found();
    if found != hint && found != 0 {
        // A failure only means that the thread is looked for again.
        let _ = PYTHON_THREADS.insert(task.tid, found, 0);
    }
    // To memory at once: what follows reads it from there, and is then the same for all ends.
    set(&mut shape.python_frames, count);
    set(&mut shape.python_end, end as u8);
}
