//! The one definition of what crosses from the BPF programs to the agent: records in the ring
//! buffer, counters, and the names of maps and read-only globals.
//!
//! Every record starts with a [`Header`] and is sent with exactly the bytes it uses: the fixed part
//! of its kind, then [`StackShape::kernel_frames`] and [`StackShape::user_frames`] addresses of
//! 8 bytes each, then [`StackShape::python_frames`] pairs of such words. All integers are in the byte order of the machine. A struct here has no implicit
//! padding (asserted at the end of this file), so that no byte of kernel memory is sent unwritten.
#![no_std]

#[cfg(feature = "user")]
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Most frames of one kind (kernel or user) in a record, as `kernel.perf_event_max_stack` counts.
pub const MAX_FRAMES: usize = 127;

/// Set in the address of a user frame that was found by frame pointer, because the code that it called
/// has no table: if that code kept no frame pointer, the frame is not its caller.
pub const BY_FRAME_POINTER: u64 = 1 << 63;

/// Bytes of a `comm`, the NUL included (`TASK_COMM_LEN` in `include/linux/sched.h`).
pub const COMM_LEN: usize = 16;

/// Most cgroups that a filter can hold. Each costs about 64 bytes of kernel memory.
pub const MAX_CGROUPS: u32 = 16_384;

/// A socket's sender stack is taken at most once in this time, in nanoseconds. Each capture costs a
/// walk of the stack, so that a shorter time makes busy lossy senders slower.
pub const SENDER_INTERVAL_NS: u64 = 10_000_000;

/// Minor faults on a CPU from one run of the program to the next. A run that takes no sample costs
/// some 100 ns, and a fault five times that or more, so that more runs would be felt; fewer would
/// miss processes that fault rarely. The kernel throttles an event, and counts nothing meanwhile,
/// after `kernel.perf_event_max_sample_rate` runs a second: three million faults at its default.
pub const FAULT_PERIOD: u64 = 32;

/// A sample of the minor faults of a CPU is taken at most once in this time, in nanoseconds.
pub const FAULT_INTERVAL_NS: u64 = 5_000_000;

/// Declares a field-less enum with a checked conversion from its number.
macro_rules! numbered {
    ($(#[$meta:meta])* $name:ident : $repr:ty { $($(#[$vmeta:meta])* $variant:ident = $value:literal, $text:literal;)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr($repr)]
        pub enum $name { $($(#[$vmeta])* $variant = $value,)* }

        impl $name {
            /// Every variant, in the order of the numbers.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The variant of that number.
            #[must_use]
            pub const fn from_number(number: $repr) -> Option<Self> {
                match number { $($value => Some(Self::$variant),)* _ => None }
            }

            /// The name users see.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $text,)* }
            }
        }
    };
}

pub mod hop;
pub mod unwind;
pub mod walk;

numbered! {
    /// A BPF program that counts for itself. The number indexes [`map::COUNTERS`], and is
    /// [`Header::kind`] in the records the program sends.
    Probe: u8 {
        /// `perf_event` on `cpu-clock`: sends a [`SampleRecord`].
        OnCpu = 0, "on_cpu";
        /// `perf_event` on minor page faults: sends a [`FaultRecord`].
        MinorFault = 1, "minor_fault";
        /// `perf_event` on major page faults: sends a [`FaultRecord`].
        MajorFault = 2, "major_fault";
        /// `tp_btf/tcp_retransmit_skb`: sends a [`RetransmitRecord`].
        Retransmit = 3, "retransmit";
        /// `tp_btf/tcp_retransmit_synack`: sends a [`RetransmitRecord`].
        SynAck = 4, "synack";
        /// `tp_btf/sock_send_length`: sends nothing; its captures are kept with the socket.
        Sender = 5, "sender";
    }
}

numbered! {
    /// Why a program could not store an event.
    Drop: u8 {
        /// The ring buffer had no room.
        RingFull = 0, "ring_full";
        /// A map that bounds memory had no room (socket storage, scratch).
        NoMemory = 1, "no_memory";
    }
}

/// How many [`Drop`] reasons there are.
pub const DROPS: usize = Drop::ALL.len();

numbered! {
    /// Why a user stack ended where it did.
    StackEnd: u8 {
        /// There was no user stack to walk: a kernel thread, or no registers.
        None = 0, "none";
        /// The outermost frame was reached.
        Complete = 1, "complete";
        /// [`MAX_FRAMES`] were taken and there were more.
        Truncated = 2, "truncated";
        /// The memory that the next frame is in could not be read.
        Unreadable = 3, "unreadable";
        /// The process has no tables yet, and its frame pointer leads nowhere.
        NoFramePointer = 4, "no_frame_pointer";
        /// Another CPU was writing the stack while it was read.
        Torn = 5, "torn";
        /// The next address is in no executable memory that is known of the process.
        NoMapping = 6, "no_mapping";
        /// The code has no table, and its frame pointer leads nowhere.
        NoTable = 7, "no_table";
        /// The file says how to go on in a way that the walk does not follow.
        UnsupportedRule = 8, "unsupported_rule";
    }
}

numbered! {
    /// What made TCP send a segment again.
    Cause: u8 {
        /// Unknown to this kernel's socket layout.
        Unknown = 0, "unknown";
        /// The retransmission timer ran out, or recovery after it (`TCP_CA_Loss`).
        Timeout = 1, "timeout";
        /// Duplicate or selective acknowledgements (`TCP_CA_Recovery`).
        Fast = 2, "fast";
        /// A SYN was not answered.
        Syn = 3, "syn";
        /// A SYN-ACK was not answered.
        SynAck = 4, "synack";
        /// A tail loss probe (RFC 8985, section 7).
        TailLossProbe = 5, "tail_loss_probe";
    }
}

/// Derives what the agent needs to view a record over bytes.
macro_rules! record {
    ($(#[$meta:meta])* pub struct $name:ident { $($body:tt)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[cfg_attr(feature = "user", derive(FromBytes, IntoBytes, Immutable, KnownLayout))]
        #[repr(C)]
        pub struct $name { $($body)* }
    };
}

pub mod python;

record! {
    /// A task as the kernel saw it: enough to know it again after it exited.
    pub struct Task {
        /// Thread group, in the initial PID namespace.
        pub pid: u32,
        /// Thread, in the initial PID namespace.
        pub tid: u32,
        /// Start of the thread group's leader in nanoseconds of `CLOCK_BOOTTIME`; tells a reused
        /// `pid` apart. 0 where the kernel's layout does not show it.
        pub start_ns: u64,
        /// Which program the process runs: it changes with each `execve` (`self_exec_id`).
        pub exec_id: u32,
        /// Zero.
        pub pad: u32,
        /// The thread's name, filled up with NULs.
        pub comm: [u8; COMM_LEN],
    }
}

record! {
    /// How many frames follow the fixed part, and how the stacks ended.
    pub struct StackShape {
        /// Kernel frames, innermost first.
        pub kernel_frames: u16,
        /// User frames behind them, innermost first; some with [`BY_FRAME_POINTER`].
        pub user_frames: u16,
        /// A [`StackEnd`].
        pub user_end: u8,
        /// A [`PythonEnd`](python::PythonEnd).
        pub python_end: u8,
        /// Python frames behind those, innermost first: two words each, of which [`python`] says what
        /// they hold.
        pub python_frames: u16,
    }
}

record! {
    /// What every record starts with.
    pub struct Header {
        /// A [`Probe`].
        pub kind: u8,
        /// Zero.
        pub pad: u8,
        /// The CPU it happened on.
        pub cpu: u16,
        /// Length of the whole record in bytes.
        pub len: u32,
        /// `CLOCK_MONOTONIC` in nanoseconds.
        pub time_ns: u64,
        /// Cgroup (v2) that is charged: of the task, or of the socket's owner. 0 if unknown.
        pub cgroup_id: u64,
        /// What the event stands for: nanoseconds of CPU time, faults, or segments.
        pub weight: u64,
        /// The task that is charged. For a retransmit this is the sender, and `pid` is 0 while no
        /// sender is known.
        pub task: Task,
        /// The frames behind the fixed part.
        pub stack: StackShape,
    }
}

record! {
    /// An on-CPU sample.
    pub struct SampleRecord {
        /// The common part.
        pub header: Header,
    }
}

record! {
    /// A page fault.
    pub struct FaultRecord {
        /// The common part.
        pub header: Header,
        /// The address whose access faulted.
        pub address: u64,
    }
}

record! {
    /// A TCP segment, or several in one buffer, sent again.
    pub struct RetransmitRecord {
        /// The common part. Its user frames are the sender's.
        pub header: Header,
        /// Time since the sender's stack was taken, in nanoseconds. 0 while none is known.
        pub sender_age_ns: u64,
        /// Local address, in network order; the first four bytes for IPv4.
        pub local: [u8; 16],
        /// Remote address, in network order; the first four bytes for IPv4.
        pub remote: [u8; 16],
        /// Local port, in host order.
        pub local_port: u16,
        /// Remote port, in host order.
        pub remote_port: u16,
        /// `AF_INET` (2) or `AF_INET6` (10).
        pub family: u16,
        /// TCP state (`include/net/tcp_states.h`).
        pub state: u8,
        /// A [`Cause`].
        pub cause: u8,
        /// Smoothed round-trip time in microseconds.
        pub srtt_us: u32,
        /// Congestion window in segments.
        pub cwnd: u32,
        /// Inode number of the socket's network namespace.
        pub netns: u32,
        /// Segments sent again; 0 if that was tried and failed.
        pub segments: u32,
    }
}

record! {
    /// What one program counted on one CPU. `hits = stored + sum(dropped) + filtered`, always.
    pub struct Counters {
        /// Runs of the program.
        pub hits: u64,
        /// Records handed to the ring buffer (for [`Probe::Sender`]: stacks kept with a socket).
        pub stored: u64,
        /// Events outside the filter, or (for [`Probe::Sender`]) sockets that need no stack now, or
        /// (for [`Probe::MinorFault`]) faults that are left to the next sample to stand for.
        pub filtered: u64,
        /// Events lost, by [`Drop`].
        pub dropped: [u64; DROPS],
        /// Sum of the weights stored.
        pub weight: u64,
        /// User stacks by [`StackEnd`].
        pub stack_ends: [u64; StackEnd::ALL.len()],
        /// Python stacks by [`PythonEnd`](python::PythonEnd).
        pub python_ends: [u64; python::PythonEnd::ALL.len()],
    }
}

/// Of [`Control::cgroups`]: what is in no kept cgroup is not stored.
pub const ONLY_KEPT: u32 = 1;

/// Of [`Control::cgroups`]: some cgroups are never stored.
pub const EXCEPT: u32 = 2;

numbered! {
    /// What [`map::CGROUPS`] says of a cgroup. A new one has that of the cgroup it is in.
    Verdict: u8 {
        /// It is stored.
        Keep = 1, "keep";
        /// It is never stored.
        Except = 2, "except";
    }
}

record! {
    /// A cgroup (v2) came or went; in [`map::CGROUP_CHANGES`].
    pub struct CgroupChange {
        /// Its ID.
        pub id: u64,
        /// 0: it was made. 1: it is removed.
        pub gone: u64,
    }
}

record! {
    /// What the agent may change while the programs run; the one value of [`map::CONTROL`].
    pub struct Control {
        /// What [`map::CGROUPS`] decides: [`ONLY_KEPT`], [`EXCEPT`], both, or nothing.
        pub cgroups: u32,
        /// If not 0, only this thread group is stored.
        pub only_pid: u32,
        /// Unread bytes in the ring buffer from which on the agent is woken.
        pub wake_bytes: u64,
    }
}

/// Names of the maps.
pub mod map {
    /// Ring buffer of records.
    pub const EVENTS: &str = "EVENTS";
    /// Per-CPU array of [`Counters`](super::Counters), by [`Probe`](super::Probe).
    pub const COUNTERS: &str = "COUNTERS";
    /// Array of one [`Control`](super::Control).
    pub const CONTROL: &str = "CONTROL";
    /// Hash of [`Verdict`](super::Verdict)s by cgroup ID, as
    /// [`Control::cgroups`](super::Control) asks for.
    pub const CGROUPS: &str = "CGROUPS";
    /// Ring buffer of [`CgroupChange`](super::CgroupChange)s.
    pub const CGROUP_CHANGES: &str = "CGROUP_CHANGES";
    /// Hash of processes by `pid`, whose first record woke the agent.
    pub const SEEN: &str = "SEEN";
    /// Socket storage of sender stacks.
    pub const SENDERS: &str = "SENDERS";
    /// Hash of [`Process`](super::python::Process) by `pid`.
    pub const PYTHON: &str = "PYTHON";
    /// Hash of [`Process`](super::unwind::Process) by `pid`.
    pub const PROCESSES: &str = "PROCESSES";
    /// Array of [`Mapping`](super::unwind::Mapping), those of a process one behind the other.
    pub const MAPPINGS: &str = "MAPPINGS";
    /// Array of arrays of [`Page`](super::unwind::Page), one for each table.
    pub const TABLES: &str = "TABLES";
    /// Array of [`Rule`](super::unwind::Rule).
    pub const RULES: &str = "RULES";
}

/// Names of the read-only globals: byte offsets of fields, from the running kernel's BTF.
/// [`ABSENT`](field::ABSENT) stands for a field that this kernel has not.
pub mod field {
    /// The kernel has no such field, and what needs it is left out.
    pub const ABSENT: u32 = u32::MAX;

    /// Each global with the struct and the path of the field it holds the offset of.
    pub const ALL: &[(&str, &str, &str)] = &[
        ("TASK_GROUP_LEADER", "task_struct", "group_leader"),
        ("TASK_START_BOOTTIME", "task_struct", "start_boottime"),
        ("TASK_EXEC_ID", "task_struct", "self_exec_id"),
        ("TASK_FLAGS", "task_struct", "flags"),
        // On x86-64 alone. The kernel keeps it current for the running task, but for code that changes
        // it by `wrfsbase`, which no C library does (`do_arch_prctl_64`, `arch/x86/kernel/process_64.c`).
        ("TASK_FSBASE", "task_struct", "thread.fsbase"),
        ("SOCK_FAMILY", "sock", "__sk_common.skc_family"),
        ("SOCK_STATE", "sock", "__sk_common.skc_state"),
        ("SOCK_LOCAL_PORT", "sock", "__sk_common.skc_num"),
        ("SOCK_REMOTE_PORT", "sock", "__sk_common.skc_dport"),
        ("SOCK_LOCAL_V4", "sock", "__sk_common.skc_rcv_saddr"),
        ("SOCK_REMOTE_V4", "sock", "__sk_common.skc_daddr"),
        ("SOCK_LOCAL_V6", "sock", "__sk_common.skc_v6_rcv_saddr"),
        ("SOCK_REMOTE_V6", "sock", "__sk_common.skc_v6_daddr"),
        ("SOCK_NET", "sock", "__sk_common.skc_net.net"),
        ("SOCK_CGROUP", "sock", "sk_cgrp_data.cgroup"),
        ("SOCK_PROTOCOL", "sock", "sk_protocol"),
        ("SOCK_TYPE", "sock", "sk_type"),
        ("NET_INUM", "net", "ns.inum"),
        ("CGROUP_KN", "cgroup", "kn"),
        ("CGROUP_PARENT", "cgroup", "self.parent"),
        ("CGROUP_ROOT", "cgroup", "root"),
        ("CGROUP_ROOT_HIERARCHY", "cgroup_root", "hierarchy_id"),
        ("CSS_CGROUP", "cgroup_subsys_state", "cgroup"),
        ("KERNFS_NODE_ID", "kernfs_node", "id"),
        ("SKB_CB", "sk_buff", "cb"),
        ("TCP_CB_SEGMENTS", "tcp_skb_cb", "tcp_gso_segs"),
        // The tracepoint has an argument of the same name where its entry has this field.
        ("RETRANSMIT_ERR", "trace_event_raw_tcp_retransmit_skb", "err"),
        ("TCP_SRTT", "tcp_sock", "srtt_us"),
        ("TCP_CWND", "tcp_sock", "snd_cwnd"),
        ("TCP_CA_STATE", "tcp_sock", "inet_conn.icsk_ca_state"),
        ("REQ_FAMILY", "request_sock", "__req_common.skc_family"),
        ("REQ_LOCAL_PORT", "request_sock", "__req_common.skc_num"),
        ("REQ_REMOTE_PORT", "request_sock", "__req_common.skc_dport"),
        ("REQ_LOCAL_V4", "request_sock", "__req_common.skc_rcv_saddr"),
        ("REQ_REMOTE_V4", "request_sock", "__req_common.skc_daddr"),
        ("REQ_LOCAL_V6", "request_sock", "__req_common.skc_v6_rcv_saddr"),
        ("REQ_REMOTE_V6", "request_sock", "__req_common.skc_v6_daddr"),
    ];
}

const _: () = {
    assert!(size_of::<Task>() == 40);
    assert!(size_of::<StackShape>() == 8);
    assert!(size_of::<Header>() == 8 + 3 * 8 + 40 + 8);
    assert!(size_of::<SampleRecord>() == size_of::<Header>());
    assert!(size_of::<FaultRecord>() == size_of::<Header>() + 8);
    assert!(size_of::<RetransmitRecord>() == size_of::<Header>() + 8 + 32 + 8 + 16);
    assert!(size_of::<Counters>() == 8 * (4 + DROPS + StackEnd::ALL.len() + 5));
    assert!(size_of::<Control>() == 16);
    assert!(size_of::<CgroupChange>() == 16);
    // Frames follow the fixed part, aligned.
    assert!(size_of::<FaultRecord>().is_multiple_of(8));
    assert!(size_of::<RetransmitRecord>().is_multiple_of(8));
};
