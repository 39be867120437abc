//! Accounting, the filter, and the way of a record into the ring buffer.

use aya_ebpf::{
    bindings::{BPF_RB_AVAIL_DATA, BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP},
    helpers::generated::{bpf_get_smp_processor_id, bpf_ktime_get_ns, bpf_ringbuf_output},
};
use podflame_wire::{
    Control, Counters, Drop, FaultRecord, Header, ONLY_KEPT, Probe, RetransmitRecord, SampleRecord,
    Task, Verdict, walk::get,
};

use crate::maps::{CGROUPS, CONTROL, COUNTERS, EVENTS, FRAMES, SEEN, Scratch};

/// One run of a program: every way out of it counts, so that `hits = stored + dropped + filtered`.
pub(crate) struct Run {
    probe: Probe,
    counters: *mut Counters,
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
    pub(crate) fn kept(self, end: u8, python_end: u8) {
        // SAFETY: as in `start`.
        unsafe {
            (*self.counters).stored += 1;
            if let Some(count) = (*self.counters).stack_ends.get_mut(end as usize) {
                *count += 1;
            }
            if let Some(count) = (*self.counters).python_ends.get_mut(python_end as usize) {
                *count += 1;
            }
        }
    }

    /// Whether the filter lets an event of this cgroup and process pass.
    #[inline(always)]
    pub(crate) fn wanted(&self, header: &Header) -> bool {
        let (cgroup_id, pid) = (get(&header.cgroup_id), get(&header.task.pid));
        let Some(control) = control() else { return true };
        if control.only_pid != 0 && control.only_pid != pid {
            return false;
        }
        if control.cgroups == 0 {
            return true;
        }
        // SAFETY: the value is copied out at once.
        match unsafe { CGROUPS.get(cgroup_id) }.copied() {
            Some(verdict) => verdict != Verdict::Except as u8,
            None => control.cgroups & ONLY_KEPT == 0,
        }
    }

    /// Completes the header of the record in `scratch` (its task, cgroup, weight and stack are there
    /// already) and sends the record with its frames, and wakes the agent if the record is `urgent`.
    /// `Err` with how often the ring buffer was full before, if it is now.
    #[inline(always)]
    pub(crate) fn send<R: Record>(self, scratch: &mut Scratch<R>, urgent: bool) -> Result<(), u64> {
        let frames_at = size_of::<R>();
        let header = scratch.record.header();
        let native = get(&header.stack.kernel_frames) + get(&header.stack.user_frames);
        let frames = (native + 2 * get(&header.stack.python_frames)) as usize & (FRAMES - 1);
        let len = frames_at + frames * 8;
        // SAFETY: helpers without arguments.
        let (cpu, time_ns) = unsafe { (bpf_get_smp_processor_id(), bpf_ktime_get_ns()) };
        header.kind = self.probe as u8;
        header.pad = 0;
        header.cpu = cpu as u16;
        header.len = len as u32;
        header.time_ns = time_ns;
        let (weight, end) = (get(&header.weight), get(&header.stack.user_end));
        let python_end = get(&header.stack.python_end);
        // What has mappings here was seen.
        let known = get(&scratch.walk.generation) != 0;
        let wake = urgent || (!known && is_new(&header.task)) || is_filling();
        let wake = if wake { BPF_RB_FORCE_WAKEUP } else { BPF_RB_NO_WAKEUP };
        // SAFETY: the frames lie right behind the record, so that many bytes are there.
        let failed = unsafe {
            bpf_ringbuf_output(
                (&raw const EVENTS).cast_mut().cast(),
                (&raw mut scratch.record).cast(),
                len as u64,
                wake as u64,
            )
        };
        if failed != 0 {
            return Err(self.dropped(Drop::RingFull));
        }
        // SAFETY: as in `start`.
        unsafe {
            (*self.counters).stored += 1;
            (*self.counters).weight += weight;
            if let Some(count) = (*self.counters).stack_ends.get_mut(end as usize) {
                *count += 1;
            }
            if let Some(count) = (*self.counters).python_ends.get_mut(python_end as usize) {
                *count += 1;
            }
        }
        Ok(())
    }
}

/// A record that starts with a header.
pub(crate) trait Record {
    /// The header.
    fn header(&mut self) -> &mut Header;
}

impl Record for SampleRecord {
    #[inline(always)]
    fn header(&mut self) -> &mut Header {
        &mut self.header
    }
}

impl Record for FaultRecord {
    #[inline(always)]
    fn header(&mut self) -> &mut Header {
        &mut self.header
    }
}

impl Record for RetransmitRecord {
    #[inline(always)]
    fn header(&mut self) -> &mut Header {
        &mut self.header
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
    // Another program in the same process has other mappings. No machine runs for 2^56 ns.
    let program = task.start_ns ^ (u64::from(task.exec_id) << 56);
    // SAFETY: the value is copied out at once.
    let known = match unsafe { SEEN.get(task.pid) } {
        Some(seen) => *seen == program,
        None => false,
    };
    if known {
        return false;
    }
    // A failure only means that the next record wakes the agent again.
    let _ = SEEN.insert(task.pid, program, 0);
    true
}

/// Whether so much is unread that the agent should come before its next poll.
#[inline(always)]
fn is_filling() -> bool {
    let unread = EVENTS.query(BPF_RB_AVAIL_DATA as u64);
    control().is_some_and(|control| unread >= control.wake_bytes)
}
