//! Page faults: `perf_event` programs on the software events for minor and major faults.

use aya_ebpf::{
    bindings::{bpf_perf_event_data, bpf_perf_event_value},
    helpers::generated::{bpf_get_current_cgroup_id, bpf_ktime_get_ns, bpf_perf_prog_read_value},
    macros::perf_event,
    programs::PerfEventContext,
};
use aya_log_ebpf::warn;
use podflame_wire::{Drop, FAULT_INTERVAL_NS, Probe, walk::set};

use crate::{
    maps::{FAULT_SCRATCH, TALLIES, Tally},
    record::Run,
    stack, task,
};

/// Samples minor faults: each [`FAULT_PERIOD`](podflame_wire::FAULT_PERIOD) it looks whether a sample
/// is due, whose weight is the number of faults since the one before.
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
        let Some(tally) = TALLIES.get_ptr_mut(u32::from(is_major(probe))) else {
            run.dropped(Drop::NoMemory);
            return;
        };
        let tally = &mut *tally;
        // Before the filter, so that the faults of others are never charged to what is wanted.
        let faults = tally.count(ctx.ctx);
        if !run.wanted(header) {
            return run.filtered();
        }
        let Some((weight, rested)) = tally.due(faults, probe) else { return run.filtered() };
        header.weight = weight;
        scratch.record.address = (*ctx.ctx).addr;
        // A fault in the kernel on a user address (`copy_to_user`) is the system call's caller's.
        let (start, _) = task::interrupted(ctx.ctx, &mut scratch.walk);
        set(&mut header.stack.kernel_frames, 0);
        stack::whole(scratch, start);
        // What a major fault is in may have been mapped since the process was read, and soon be gone.
        run.send(scratch, is_major(probe) && rested)
    };
    if full == Err(0) {
        warn!(ctx, "the ring buffer is full: page faults are being dropped and counted");
    }
}

fn is_major(probe: Probe) -> bool {
    probe as u8 == Probe::MajorFault as u8
}

impl Tally {
    /// Faults of this kind on this CPU since this was last asked.
    ///
    /// By the event's own count. The kernel can choose the period by itself, to keep a frequency, but
    /// its sum is not the number of faults (`perf_adjust_freq_unthr_events` in
    /// `kernel/events/core.c` starts it anew), and two samples in quick succession make it so long
    /// that the next comes after 0.3 s: half of a storm was seen to be missing.
    #[inline(always)]
    fn count(&mut self, event: *mut bpf_perf_event_data) -> u64 {
        let mut now = bpf_perf_event_value { counter: 0, enabled: 0, running: 0 };
        // SAFETY: the context is the program's, and the buffer as large as stated.
        let failed = unsafe {
            bpf_perf_prog_read_value(event, &raw mut now, size_of::<bpf_perf_event_value>() as u32)
        };
        if failed != 0 {
            // SAFETY: the context is the program's. It does not happen: the event is this CPU's.
            return unsafe { (*event).sample_period };
        }
        let before = core::mem::replace(&mut self.counter, now.counter);
        // A CPU that was offline comes back with a new event.
        if now.counter < before { now.counter } else { now.counter - before }
    }

    /// The weight of a sample, if one is due, which every major fault is; and whether none was taken
    /// for [`FAULT_INTERVAL_NS`].
    #[inline(always)]
    fn due(&mut self, faults: u64, probe: Probe) -> Option<(u64, bool)> {
        self.waiting += faults;
        // SAFETY: a helper without arguments.
        let now = unsafe { bpf_ktime_get_ns() };
        let rested = now - self.sampled_ns >= FAULT_INTERVAL_NS;
        if !is_major(probe) && !rested {
            return None;
        }
        if rested {
            self.sampled_ns = now;
        }
        Some((core::mem::take(&mut self.waiting), rested))
    }
}
