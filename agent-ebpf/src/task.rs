//! The running task: who it is, and its registers in user space.

use aya_ebpf::{
    bindings::{bpf_perf_event_data, pt_regs},
    helpers::{
        bpf_get_current_pid_tgid,
        generated::{bpf_get_current_comm, bpf_get_current_task_btf, bpf_task_pt_regs},
    },
};
use podflame_wire::{
    COMM_LEN, Task,
    walk::{Start, Walk, set},
};

use crate::fields::{TASK_EXEC_ID, TASK_FLAGS, TASK_GROUP_LEADER, TASK_START_BOOTTIME, read};

/// `PF_KTHREAD` of `include/linux/sched.h`: a thread without a user space.
const PF_KTHREAD: u32 = 0x0020_0000;

/// Reads the registers with which user space was left into `walk`, and returns where a walk starts. The
/// reads are volatile so that the compiler leaves them where they are.
///
/// # Safety
///
/// `regs` must be a pointer to registers that the verifier lets this program read.
#[inline(always)]
unsafe fn read_registers(regs: *const pt_regs, walk: &mut Walk) -> Start {
    // SAFETY: the caller's promise.
    unsafe {
        macro_rules! reg {
            ($name:ident) => {
                (&raw const (*regs).$name).read_volatile()
            };
        }
        // By their DWARF numbers (System V ABI for x86-64, figure 3.36).
        let start = Start { ip: reg!(rip), sp: reg!(rsp), fp: reg!(rbp), ..Start::default() };
        let registers = &mut walk.registers;
        set(&mut registers[0], reg!(rax));
        set(&mut registers[1], reg!(rdx));
        set(&mut registers[2], reg!(rcx));
        set(&mut registers[3], reg!(rbx));
        set(&mut registers[4], reg!(rsi));
        set(&mut registers[5], reg!(rdi));
        set(&mut registers[6], start.fp);
        set(&mut registers[7], start.sp);
        set(&mut registers[8], reg!(r8));
        set(&mut registers[9], reg!(r9));
        set(&mut registers[10], reg!(r10));
        set(&mut registers[11], reg!(r11));
        set(&mut registers[12], reg!(r12));
        set(&mut registers[13], reg!(r13));
        set(&mut registers[14], reg!(r14));
        set(&mut registers[15], reg!(r15));
        start
    }
}

/// Writes who the running task is to `task`, which lies in a map: a helper fills in the name, and
/// nothing of it stays in registers that the verifier would tell paths apart by.
#[inline(always)]
pub(crate) fn write_current(task: &mut Task) {
    let ids = bpf_get_current_pid_tgid();
    task.pid = (ids >> 32) as u32;
    task.tid = ids as u32;
    (task.start_ns, task.exec_id) = program();
    task.pad = 0;
    // SAFETY: the array is as long as stated; on failure the helper fills it with zeros.
    unsafe { bpf_get_current_comm(task.comm.as_mut_ptr().cast(), COMM_LEN as u32) };
}

/// Start of the running thread group in nanoseconds of `CLOCK_BOOTTIME`, 0 if this kernel hides it; and
/// how many programs it and its ancestors have executed.
#[inline(always)]
fn program() -> (u64, u32) {
    // SAFETY: the helper returns a typed pointer to the running task; the fields are of its type,
    // and the group leader's type is again `task_struct`.
    unsafe {
        let task = bpf_get_current_task_btf().cast::<u8>().cast_const();
        let Some(leader) = read::<*const u8>(task, &TASK_GROUP_LEADER) else { return (0, 0) };
        let start = read(leader, &TASK_START_BOOTTIME).unwrap_or(0);
        (start, read(leader, &TASK_EXEC_ID).unwrap_or(0))
    }
}

/// Reads the registers with which the running task last left user space into `walk`, and returns where
/// a walk starts; nowhere for a kernel thread.
#[inline(always)]
pub(crate) fn user_registers(walk: &mut Walk) -> Start {
    // SAFETY: as in `program`; `bpf_task_pt_regs` takes and returns typed pointers.
    unsafe {
        let task = bpf_get_current_task_btf();
        match read::<u32>(task.cast::<u8>().cast_const(), &TASK_FLAGS) {
            Some(flags) if flags & PF_KTHREAD == 0 => {
                read_registers(bpf_task_pt_regs(task) as *const pt_regs, walk)
            }
            _ => Start::default(),
        }
    }
}

/// The same for the task that a perf event interrupted. Also whether it was in user mode.
///
/// # Safety
///
/// `event` must be the context of a `perf_event` program.
#[inline(always)]
pub(crate) unsafe fn interrupted(
    event: *const bpf_perf_event_data,
    walk: &mut Walk,
) -> (Start, bool) {
    // SAFETY: the caller's promise. The low bits of the code segment selector are the privilege
    // level.
    unsafe {
        let in_user_mode = (*event).regs.cs & 3 != 0;
        // One after the other, not either or: the compiler would make one piece of code of both, and
        // the verifier wants one kind of pointer an instruction.
        let mut start = read_registers(&raw const (*event).regs, walk);
        if !in_user_mode {
            start = user_registers(walk);
        }
        (start, in_user_mode)
    }
}
