//! Page faults: `perf_event` programs on the software events for minor and major faults.

use aya_ebpf::{
    bindings::{bpf_perf_event_data, bpf_perf_event_value},
    helpers::generated::{bpf_get_current_cgroup_id, bpf_perf_prog_read_value},
    macros::perf_event,
    programs::PerfEventContext,
};
use aya_log_ebpf::warn;
use podflame_wire::{Drop, Probe};

use crate::{
    maps::{FAULT_SCRATCH, FAULTS_TOLD},
    record::Run,
    stack::set,
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
        // Before the filter, so that each sample stands for the faults behind the one before it,
        // whosever that was.
        header.weight = faults_since_last(ctx.ctx, probe);
        if !run.wanted(header) {
            return run.filtered();
        }
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

/// Faults of this kind on this CPU since this was last asked.
///
/// By the event's own count, and not its period: the kernel adapts the period between two samples,
/// and forgets faults when it does so (`perf_adjust_freq_unthr_events` in `kernel/events/core.c`) or
/// throttles the event. Half of a storm can be missing from the sum of the periods.
#[inline(always)]
fn faults_since_last(event: *mut bpf_perf_event_data, probe: Probe) -> u64 {
    let mut now = bpf_perf_event_value { counter: 0, enabled: 0, running: 0 };
    // SAFETY: the context is the program's, and the buffer as large as stated.
    let failed = unsafe {
        bpf_perf_prog_read_value(event, &raw mut now, size_of::<bpf_perf_event_value>() as u32)
    };
    let last = FAULTS_TOLD.get_ptr_mut(u32::from(probe as u8 == Probe::MajorFault as u8));
    let (0, Some(last)) = (failed, last) else {
        // SAFETY: the context is the program's. Neither happens: the event is this CPU's.
        return unsafe { (*event).sample_period };
    };
    // SAFETY: the slot is this CPU's, and this program does not interrupt itself.
    let before = unsafe { core::ptr::replace(last, now.counter) };
    // A CPU that was offline comes back with a new event.
    if now.counter < before { now.counter } else { now.counter - before }
}
