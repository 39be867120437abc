//! Byte offsets of kernel fields: read-only globals that the agent fills in from the running
//! kernel's BTF before it loads the programs (`podflame_wire::field`). The verifier knows their
//! values, so that a load at such an offset is one at a constant, and a branch on an absent field
//! is not even looked at.

use aya_ebpf::Global;
use podflame_wire::field::ABSENT;

macro_rules! fields {
    ($($name:ident)*) => { $(
        #[unsafe(no_mangle)]
        pub(crate) static $name: Global<u32> = Global::new(ABSENT);
    )* };
}

fields! {
    TASK_GROUP_LEADER
    TASK_START_BOOTTIME
    TASK_EXEC_ID
    TASK_FLAGS
    TASK_FSBASE
    SOCK_FAMILY
    SOCK_STATE
    SOCK_LOCAL_PORT
    SOCK_REMOTE_PORT
    SOCK_LOCAL_V4
    SOCK_REMOTE_V4
    SOCK_LOCAL_V6
    SOCK_REMOTE_V6
    SOCK_NET
    SOCK_CGROUP
    SOCK_PROTOCOL
    SOCK_TYPE
    NET_INUM
    CGROUP_KN
    KERNFS_NODE_ID
    SKB_CB
    TCP_CB_SEGMENTS
    RETRANSMIT_ERR
    TCP_SRTT
    TCP_CWND
    TCP_CA_STATE
    REQ_FAMILY
    REQ_LOCAL_PORT
    REQ_REMOTE_PORT
    REQ_LOCAL_V4
    REQ_REMOTE_V4
    REQ_LOCAL_V6
    REQ_REMOTE_V6
}

/// Reads a field of a kernel object through a typed pointer.
///
/// # Safety
///
/// `object` must be a pointer that the verifier knows the type of, and `field` must hold the offset
/// of a field of type `T` in that type; otherwise the verifier refuses the program.
#[inline(always)]
pub(crate) unsafe fn read<T: Copy>(object: *const u8, field: &Global<u32>) -> Option<T> {
    let offset = field.load();
    if offset == ABSENT {
        return None;
    }
    // SAFETY: the caller's promise; the kernel makes a bad pointer read as zero (`BPF_PROBE_MEM`).
    Some(unsafe { object.add(offset as usize).cast::<T>().read_volatile() })
}
