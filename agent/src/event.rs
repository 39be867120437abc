//! What the kernel reported, decoded: plain data over the bytes of one record.
//!
//! Not for anything resolved: addresses here are raw, and the cgroup is an ID. See [`crate::profile`]
//! for what leaves the agent.

use std::net::SocketAddr;

pub use podflame_wire::{
    BY_FRAME_POINTER, Cause, Drop as KernelDrop, Probe, StackEnd, python::PythonEnd,
};

/// A point on `CLOCK_MONOTONIC`, in nanoseconds. The only clock of the kernel side.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KTime(pub u64);

/// A cgroup (v2) by its kernfs ID, which is the inode number of its directory. 0 stands for unknown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CgroupId(pub u64);

/// A process that cannot be confused with a later one of the same PID.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ProcessKey {
    /// Thread group ID in the initial PID namespace. 0 is the kernel itself, or unknown.
    pub pid: u32,
    /// Start of the thread group's leader in nanoseconds of `CLOCK_BOOTTIME`. 0 if unknown.
    pub start_ns: u64,
    /// Which program it runs: it changes with each `execve`.
    pub exec_id: u32,
}

/// A thread's name as the kernel keeps it: NUL-terminated, any bytes, controlled by the process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Comm(pub [u8; podflame_wire::COMM_LEN]);

impl Comm {
    /// The name, without its NUL; bytes that are not UTF-8 become U+FFFD.
    #[must_use]
    pub fn to_text(self) -> String {
        let end = self.0.iter().position(|b| *b == 0).unwrap_or(self.0.len());
        String::from_utf8_lossy(&self.0[..end]).into_owned()
    }
}

/// The task that an event is charged to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Task {
    /// Its process.
    pub process: ProcessKey,
    /// Thread ID in the initial PID namespace.
    pub tid: u32,
    /// The thread's name at the time.
    pub comm: Comm,
}

/// Return addresses, innermost first, in the bytes of the record they came in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Frames<'a>(pub &'a [u8]);

impl<'a> Frames<'a> {
    /// The addresses.
    pub fn iter(self) -> impl ExactSizeIterator<Item = u64> + 'a {
        self.0.as_chunks::<8>().0.iter().map(|b| u64::from_ne_bytes(*b))
    }
}

/// The stacks of one record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Stack<'a> {
    /// Kernel frames, then user frames, and then two words for each Python frame.
    pub frames: Frames<'a>,
    /// How many of them are kernel frames.
    pub kernel_frames: u16,
    /// Why the user stack ended.
    pub end: StackEnd,
    /// How many Python frames there are.
    pub python_frames: u16,
    /// Why the Python stack ended.
    pub python_end: PythonEnd,
}

impl Stack<'_> {
    /// The addresses of the code objects of the Python frames.
    pub fn codes(&self) -> impl Iterator<Item = u64> {
        let native = self.frames.iter().len().saturating_sub(2 * usize::from(self.python_frames));
        self.frames.iter().skip(native).step_by(2).filter(|code| *code != 0)
    }
}

/// One event of a probe, as the kernel sent it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event<'a> {
    /// The probe that sent it.
    pub probe: Probe,
    /// When.
    pub time: KTime,
    /// On which CPU.
    pub cpu: u16,
    /// The cgroup that is charged: the task's, or the socket owner's.
    pub cgroup: CgroupId,
    /// Nanoseconds of CPU time, faults, or segments that it stands for.
    pub weight: u64,
    /// The task that is charged; for a retransmit the sender, its `pid` 0 while none is known.
    pub task: Task,
    /// Its stack.
    pub stack: Stack<'a>,
    /// What only this kind has.
    pub detail: Detail,
}

/// What only one kind of event has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Detail {
    /// An on-CPU sample.
    OnCpu,
    /// A page fault at this address.
    Fault {
        /// The address whose access faulted.
        address: u64,
    },
    /// A retransmit.
    Retransmit(Retransmit),
}

/// What is known of a retransmitted segment's socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Retransmit {
    /// The end on this node.
    pub local: SocketAddr,
    /// The other end.
    pub remote: SocketAddr,
    /// What made TCP send again.
    pub cause: Cause,
    /// TCP state (`include/net/tcp_states.h`), 1 for established.
    pub state: u8,
    /// Smoothed round-trip time in microseconds.
    pub srtt_us: u32,
    /// Congestion window in segments.
    pub cwnd: u32,
    /// Inode number of the network namespace.
    pub netns: u32,
    /// Time since the sender's stack was taken, in nanoseconds.
    pub sender_age_ns: u64,
}
