//! The running task: who it is, and its registers in user space.

use aya_ebpf::{
    bindings::{bpf_perf_event_data, pt_regs},
    helpers::{
        bpf_get_current_pid_tgid,
        generated::{bpf_get_current_comm, bpf_get_current_task_btf, bpf_task_pt_regs},
    },
};
use podflame_wire::{COMM_LEN, Task};

use crate::fields::{TASK_FLAGS, TASK_GROUP_LEADER, TASK_START_BOOTTIME, read};

/// `PF_KTHREAD` of `include/linux/sched.h`: a thread without a user space.
const PF_KTHREAD: u32 = 0x0020_0000;

/// Where a walk over a user stack starts.
#[derive(Clone, Copy)]
pub(crate) struct Registers {
    /// Instruction pointer.
    pub(crate) ip: u64,
    /// Stack pointer.
    pub(crate) sp: u64,
    /// Frame pointer.
    pub(crate) fp: u64,
}

impl Registers {
    /// Reads the three from where the kernel keeps them. The reads are volatile so that the compiler
    /// cannot merge those of different sources: the verifier wants one kind of pointer an
    /// instruction.
    ///
    /// # Safety
    ///
    /// `regs` must be a pointer to registers that the verifier lets this program read.
    #[inline(always)]
    pub(crate) unsafe fn read(regs: *const pt_regs) -> Self {
        // SAFETY: the caller's promise.
        unsafe {
            Self {
                ip: (&raw const (*regs).rip).read_volatile(),
                sp: (&raw const (*regs).rsp).read_volatile(),
                fp: (&raw const (*regs).rbp).read_volatile(),
            }
        }
    }
}

/// Writes who the running task is to `task`, which lies in a map: a helper fills in the name, and
/// nothing of it stays in registers that the verifier would tell paths apart by.
#[inline(always)]
pub(crate) fn write_current(task: &mut Task) {
    let ids = bpf_get_current_pid_tgid();
    task.pid = (ids >> 32) as u32;
    task.tid = ids as u32;
    task.start_ns = start_time();
    // SAFETY: the array is as long as stated; on failure the helper fills it with zeros.
    unsafe { bpf_get_current_comm(task.comm.as_mut_ptr().cast(), COMM_LEN as u32) };
}

/// Start of the running thread group in nanoseconds of `CLOCK_BOOTTIME`, 0 if this kernel hides it.
#[inline(always)]
fn start_time() -> u64 {
    // SAFETY: the helper returns a typed pointer to the running task; the fields are of its type,
    // and the group leader's type is again `task_struct`.
    unsafe {
        let task = bpf_get_current_task_btf().cast::<u8>().cast_const();
        let Some(leader) = read::<*const u8>(task, &TASK_GROUP_LEADER) else { return 0 };
        read(leader, &TASK_START_BOOTTIME).unwrap_or(0)
    }
}

/// The registers with which the running task last left user space; all zero for a kernel thread.
#[inline(always)]
pub(crate) fn user_registers() -> Registers {
    // SAFETY: as in `start_time`; `bpf_task_pt_regs` takes and returns typed pointers.
    unsafe {
        let task = bpf_get_current_task_btf();
        match read::<u32>(task.cast::<u8>().cast_const(), &TASK_FLAGS) {
            Some(flags) if flags & PF_KTHREAD == 0 => {
                Registers::read(bpf_task_pt_regs(task) as *const pt_regs)
            }
            _ => Registers { ip: 0, sp: 0, fp: 0 },
        }
    }
}

/// The user registers of the task that a perf event interrupted; all zero if it has none. Also
/// whether it was in user mode.
///
/// # Safety
///
/// `event` must be the context of a `perf_event` program.
#[inline(always)]
pub(crate) unsafe fn interrupted(event: *const bpf_perf_event_data) -> (Registers, bool) {
    // SAFETY: the caller's promise. The low bits of the code segment selector are the privilege
    // level.
    let (regs, in_user_mode) =
        unsafe { (Registers::read(&raw const (*event).regs), (*event).regs.cs & 3 != 0) };
    (if in_user_mode { regs } else { user_registers() }, in_user_mode)
}
