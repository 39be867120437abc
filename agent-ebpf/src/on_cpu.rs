//! On-CPU samples: a `perf_event` program on `cpu-clock`.

use aya_ebpf::{
    helpers::generated::bpf_get_current_cgroup_id, macros::perf_event, programs::PerfEventContext,
};
use aya_log_ebpf::warn;
use podflame_wire::{Drop, Probe, walk::set};

use crate::{maps::ON_CPU_SCRATCH, record::Run, stack, task};

/// Samples the task that the timer interrupted, with both its stacks.
#[perf_event]
pub(crate) fn on_cpu(ctx: PerfEventContext) -> u32 {
    let Some(run) = Run::start(Probe::OnCpu) else { return 0 };
    let Some(scratch) = ON_CPU_SCRATCH.get_ptr_mut(0) else {
        run.dropped(Drop::NoMemory);
        return 0;
    };
    // SAFETY: the scratch is this CPU's and nobody else's while this program runs; the context is
    // of the kind that its accessors expect.
    let full = unsafe {
        let scratch = &mut *scratch;
        let header = &mut scratch.record.header;
        task::write_current(&mut header.task);
        header.cgroup_id = bpf_get_current_cgroup_id();
        if !run.wanted(header) {
            run.filtered();
            return 0;
        }
        header.weight = (*ctx.ctx).sample_period;
        let (start, in_user_mode) = task::interrupted(ctx.ctx, &mut scratch.walk);
        set(&mut header.stack.kernel_frames, 0);
        if !in_user_mode {
            stack::kernel(ctx.ctx.cast(), &mut scratch.frames, &mut header.stack);
        }
        stack::whole(scratch, start);
        run.send(scratch, false)
    };
    if full == Err(0) {
        warn!(&ctx, "the ring buffer is full: on-CPU samples are being dropped and counted");
    }
    0
}
