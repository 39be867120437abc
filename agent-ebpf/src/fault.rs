//! Page faults: `perf_event` programs on the software events for minor and major faults.

use aya_ebpf::{
    helpers::generated::bpf_get_current_cgroup_id, macros::perf_event, programs::PerfEventContext,
};
use aya_log_ebpf::warn;
use podflame_wire::{Drop, FaultRecord, Probe, StackEnd};

use crate::{
    maps::FAULT_SCRATCH,
    record::{Facts, Run},
    task,
};

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
    let task = task::current();
    // SAFETY: a helper without arguments.
    let cgroup_id = unsafe { bpf_get_current_cgroup_id() };
    if !run.wanted(cgroup_id, task.pid) {
        return run.filtered();
    }
    let Some(scratch) = FAULT_SCRATCH.get_ptr_mut(0) else {
        run.dropped(Drop::NoMemory);
        return;
    };
    // SAFETY: as in `on_cpu`.
    unsafe {
        let scratch = &mut *scratch;
        let event = ctx.ctx;
        // A fault in the kernel on a user address (`copy_to_user`) is the system call's caller's.
        let (regs, _) = task::interrupted(event);
        let (user, end) = match regs {
            Some(regs) => scratch.walk.run(&regs, &mut scratch.frames, 0),
            None => (0, StackEnd::None),
        };
        let facts = Facts { cgroup_id, weight: (*event).sample_period, task };
        scratch.record.address = (*event).addr;
        scratch.record.header = run.header(facts, size_of::<FaultRecord>(), 0, user, end);
        let record = (&raw const scratch.record).cast();
        if run.send::<{ size_of::<FaultRecord>() }>(record, &scratch.record.header) == Err(0) {
            warn!(ctx, "the ring buffer is full: page faults are being dropped and counted");
        }
    }
}
