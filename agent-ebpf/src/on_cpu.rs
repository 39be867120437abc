//! On-CPU samples: a `perf_event` program on `cpu-clock`.

use aya_ebpf::{
    helpers::generated::bpf_get_current_cgroup_id, macros::perf_event, programs::PerfEventContext,
};
use aya_log_ebpf::warn;
use podflame_wire::{Drop, MAX_FRAMES, Probe, SampleRecord, StackEnd};

use crate::{
    maps::ON_CPU_SCRATCH,
    record::{Facts, Run},
    stack, task,
};

/// Samples the task that the timer interrupted, with both its stacks.
#[perf_event]
pub(crate) fn on_cpu(ctx: PerfEventContext) -> u32 {
    let Some(run) = Run::start(Probe::OnCpu) else { return 0 };
    let task = task::current();
    // SAFETY: a helper without arguments.
    let cgroup_id = unsafe { bpf_get_current_cgroup_id() };
    if !run.wanted(cgroup_id, task.pid) {
        run.filtered();
        return 0;
    }
    let Some(scratch) = ON_CPU_SCRATCH.get_ptr_mut(0) else {
        run.dropped(Drop::NoMemory);
        return 0;
    };
    // SAFETY: the scratch is this CPU's and nobody else's while this program runs; the context is
    // of the kind that its accessors expect.
    unsafe {
        let scratch = &mut *scratch;
        let event = ctx.ctx;
        let (regs, in_user_mode) = task::interrupted(event);
        let kernel =
            if in_user_mode { 0 } else { stack::kernel(event.cast(), &mut scratch.frames) };
        let kernel = if kernel > MAX_FRAMES { MAX_FRAMES } else { kernel };
        let (user, end) = match regs {
            Some(regs) => scratch.walk.run(&regs, &mut scratch.frames, kernel),
            None => (0, StackEnd::None),
        };
        let facts = Facts { cgroup_id, weight: (*event).sample_period, task };
        scratch.record.header = run.header(facts, size_of::<SampleRecord>(), kernel, user, end);
        let record = (&raw const scratch.record).cast();
        if run.send::<{ size_of::<SampleRecord>() }>(record, &scratch.record.header) == Err(0) {
            warn!(&ctx, "the ring buffer is full: on-CPU samples are being dropped and counted");
        }
    }
    0
}
