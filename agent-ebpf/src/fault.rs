//! Page faults: `perf_event` programs on the software events for minor and major faults.

use aya_ebpf::{
    helpers::generated::bpf_get_current_cgroup_id, macros::perf_event, programs::PerfEventContext,
};
use aya_log_ebpf::warn;
use podflame_wire::{Drop, Probe};

use crate::{maps::FAULT_SCRATCH, record::Run, stack::set, task};

/// Samples a minor fault; the weight is the number of faults since the sample before.
#[perf_event]
pub(crate) fn minor_fault(ctx: PerfEventContext) -> u32 {
    fault(&ctx, Probe::MinorFault);
    0
}

/// Takes a major fault, each one.
#[perf_event]
pub(crate) fn major_fault(ctx: PerfEventContext) -> u32 {
    fault(&ctx, Probe::MajorFault);
    0
}

#[inline(always)]
fn fault(ctx: &PerfEventContext, probe: Probe) {
    let Some(run) = Run::start(probe) else { return };
    let Some(scratch) = FAULT_SCRATCH.get_ptr_mut(0) else {
        run.dropped(Drop::NoMemory);
        return;
    };
    // SAFETY: as in `on_cpu`.
    let full = unsafe {
        let scratch = &mut *scratch;
        let header = &mut scratch.record.header;
        task::write_current(&mut header.task);
        header.cgroup_id = bpf_get_current_cgroup_id();
        if !run.wanted(header) {
            return run.filtered();
        }
        header.weight = (*ctx.ctx).sample_period;
        scratch.record.address = (*ctx.ctx).addr;
        // A fault in the kernel on a user address (`copy_to_user`) is the system call's caller's.
        let (regs, _) = task::interrupted(ctx.ctx);
        set(&mut header.stack.kernel_frames, 0);
        scratch.walk.run(regs, &mut scratch.frames, &mut header.stack);
        run.send(scratch)
    };
    if full == Err(0) {
        warn!(ctx, "the ring buffer is full: page faults are being dropped and counted");
    }
}
