//! Accounting, the filter, and the way of a record into the ring buffer.

use aya_ebpf::{
    bindings::{BPF_RB_AVAIL_DATA, BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP},
    helpers::generated::{bpf_get_smp_processor_id, bpf_ktime_get_ns, bpf_ringbuf_output},
};
use podflame_wire::{Control, Counters, Drop, Header, Probe, StackEnd, StackShape, Task};

use crate::maps::{CGROUPS, CONTROL, COUNTERS, EVENTS, FRAMES, SEEN};

/// One run of a program: every way out of it counts, so that `hits = stored + dropped + filtered`.
pub(crate) struct Run {
    probe: Probe,
    counters: *mut Counters,
}

/// What is known of an event before its stack is walked.
pub(crate) struct Facts {
    /// The cgroup that is charged.
    pub(crate) cgroup_id: u64,
    /// What it stands for.
    pub(crate) weight: u64,
    /// The task that is charged.
    pub(crate) task: Task,
}

impl Run {
    /// Counts a hit. `None` cannot happen: the index is in the array.
    #[inline(always)]
    pub(crate) fn start(probe: Probe) -> Option<Self> {
        let counters = COUNTERS.get_ptr_mut(probe as u32)?;
        // SAFETY: the slot is this CPU's, and no other program writes the slot of this probe.
        unsafe { (*counters).hits += 1 };
        Some(Self { probe, counters })
    }

    /// The event is outside what is asked for.
    #[inline(always)]
    pub(crate) fn filtered(self) {
        // SAFETY: as in `start`.
        unsafe { (*self.counters).filtered += 1 };
    }

    /// The event is lost. Returns how often that reason came before on this CPU.
    #[inline(always)]
    pub(crate) fn dropped(self, reason: Drop) -> u64 {
        // SAFETY: as in `start`; the index is a variant's number.
        unsafe {
            let count = &raw mut (*self.counters).dropped[reason as usize];
            let before = *count;
            *count = before + 1;
            before
        }
    }

    /// The event is kept without a record.
    #[inline(always)]
    pub(crate) fn kept(self, end: StackEnd) {
        // SAFETY: as in `start`; the index is a variant's number.
        unsafe {
            (*self.counters).stored += 1;
            (*self.counters).stack_ends[end as usize] += 1;
        }
    }

    /// Whether the filter lets an event of this cgroup and process pass.
    #[inline(always)]
    pub(crate) fn wanted(&self, cgroup_id: u64, pid: u32) -> bool {
        let Some(control) = control() else { return true };
        if control.only_pid != 0 && control.only_pid != pid {
            return false;
        }
        // SAFETY: the value is not kept.
        control.only_cgroups == 0 || unsafe { CGROUPS.get(&cgroup_id) }.is_some()
    }

    /// The header of a record of `fixed` bytes and these frames.
    #[inline(always)]
    pub(crate) fn header(
        &self,
        facts: Facts,
        fixed: usize,
        kernel: usize,
        user: usize,
        end: StackEnd,
    ) -> Header {
        // SAFETY: helpers without arguments.
        let (cpu, time_ns) = unsafe { (bpf_get_smp_processor_id(), bpf_ktime_get_ns()) };
        Header {
            kind: self.probe as u8,
            pad: 0,
            cpu: cpu as u16,
            len: (fixed + 8 * (kernel + user)) as u32,
            time_ns,
            cgroup_id: facts.cgroup_id,
            weight: facts.weight,
            task: facts.task,
            stack: StackShape {
                kernel_frames: kernel as u16,
                user_frames: user as u16,
                user_end: end as u8,
                pad: [0; 3],
            },
        }
    }

    /// Sends the record that starts at `record`: its fixed part of `FIXED` bytes and the frames
    /// behind it. `Err` with how often the ring buffer was full before, if it is now.
    ///
    /// # Safety
    ///
    /// `record` must start with `header` and lie in a `Scratch` whose fixed part is `FIXED` bytes.
    #[inline(always)]
    pub(crate) unsafe fn send<const FIXED: usize>(
        self,
        record: *const u8,
        header: &Header,
    ) -> Result<(), u64> {
        let shape = header.stack;
        let frames = (shape.kernel_frames + shape.user_frames) as usize & (FRAMES - 1);
        let wake = if is_new(&header.task) || is_filling() {
            BPF_RB_FORCE_WAKEUP
        } else {
            BPF_RB_NO_WAKEUP
        };
        // SAFETY: the caller's promise: that many bytes are there.
        let failed = unsafe {
            bpf_ringbuf_output(
                (&raw const EVENTS).cast_mut().cast(),
                record.cast_mut().cast(),
                (FIXED + frames * 8) as u64,
                wake as u64,
            )
        };
        if failed != 0 {
            return Err(self.dropped(Drop::RingFull));
        }
        // SAFETY: as in `start`; the index is masked to the array and a variant's number anyway.
        unsafe {
            (*self.counters).stored += 1;
            (*self.counters).weight += header.weight;
            if let Some(count) = (*self.counters).stack_ends.get_mut(shape.user_end as usize) {
                *count += 1;
            }
        }
        Ok(())
    }
}

#[inline(always)]
fn control() -> Option<&'static Control> {
    CONTROL.get(0)
}

/// Whether this is the first record of its process: the agent is woken at once, to read the
/// process's mappings before it is gone.
#[inline(always)]
fn is_new(task: &Task) -> bool {
    if task.pid == 0 {
        return false;
    }
    // SAFETY: the value is copied out at once.
    if unsafe { SEEN.get(&task.pid) }.is_some_and(|start| *start == task.start_ns) {
        return false;
    }
    // A failure only means that the next record wakes the agent again.
    let _ = SEEN.insert(&task.pid, &task.start_ns, 0);
    true
}

/// Whether so much is unread that the agent should come before its next poll.
#[inline(always)]
fn is_filling() -> bool {
    let unread = EVENTS.query(BPF_RB_AVAIL_DATA as u64);
    control().is_some_and(|control| unread >= control.wake_bytes)
}
