//! TCP retransmits, charged to the socket's owner and to the stack that sent the data.
//!
//! A retransmit runs wherever a timer or an acknowledgement is handled, so the running task says
//! nothing. The owner is the socket's cgroup. The first retransmit arms the socket: from then on
//! `sock_send_length`, which runs in the sender's own context, keeps the sender's stack in the
//! socket's storage. A socket that never lost anything pays a look-up and nothing more.

use core::{
    intrinsics::{AtomicOrdering::SeqCst, atomic_cxchg},
    ptr,
};

use aya_ebpf::{
    bindings::BPF_SK_STORAGE_GET_F_CREATE,
    helpers::generated::{bpf_ktime_get_ns, bpf_sk_storage_get, bpf_skc_to_tcp_sock},
    macros::btf_tracepoint,
    programs::BtfTracePointContext,
};
use aya_log_ebpf::warn;
use podflame_wire::{
    COMM_LEN, Cause, Drop, Probe, RetransmitRecord, SENDER_INTERVAL_NS, StackEnd, Task,
    python::{MAX_SENDER_PYTHON_FRAMES, PythonEnd},
    walk::{get, set},
};

use crate::{
    fields::*,
    maps::{FRAMES, RETRANSMIT_SCRATCH, SENDER_FRAMES, SENDER_SCRATCH, SENDERS, Sender},
    python_stack,
    record::Run,
    stack, task,
};

/// `AF_INET6` of `include/linux/socket.h`; any other family here is `AF_INET`.
const AF_INET6: u16 = 10;
/// `TCP_SYN_SENT` of `include/net/tcp_states.h`.
const TCP_SYN_SENT: u8 = 2;
/// `TCP_SYN_RECV` of `include/net/tcp_states.h`: a SYN-ACK that was not answered.
const TCP_SYN_RECV: u8 = 3;
/// `TCP_CA_Recovery` of `enum tcp_ca_state`, `include/uapi/linux/tcp.h`.
const TCP_CA_RECOVERY: u8 = 3;
/// `TCP_CA_Loss` of the same.
const TCP_CA_LOSS: u8 = 4;
/// The low five bits of the byte that holds `icsk_ca_state` (`include/net/inet_connection_sock.h`).
const CA_STATE_MASK: u8 = 0x1f;

/// The sender of a segment while none is known.
const NOBODY: Task = Task { pid: 0, tid: 0, start_ns: 0, exec_id: 0, pad: 0, comm: [0; COMM_LEN] };

/// A segment is sent again: arguments are the socket and the buffer (`include/trace/events/tcp.h`).
#[btf_tracepoint(function = "tcp_retransmit_skb")]
pub(crate) fn retransmit(ctx: BtfTracePointContext) -> i32 {
    let Some(run) = Run::start(Probe::Retransmit) else { return 0 };
    let sk: *const u8 = ctx.arg(0);
    let skb: *const u8 = ctx.arg(1);
    let Some(scratch) = RETRANSMIT_SCRATCH.get_ptr_mut(0) else {
        run.dropped(Drop::NoMemory);
        return 0;
    };
    // SAFETY: the scratch is this CPU's; `sk` and `skb` are typed pointers, and each offset is of
    // the type it is used with.
    let full = unsafe {
        let scratch = &mut *scratch;
        let record = &mut scratch.record;
        set(&mut record.header.cgroup_id, owner(sk));
        let storage = storage(sk, BPF_SK_STORAGE_GET_F_CREATE as u64);
        sender(storage, record, &mut scratch.frames);
        if !run.wanted(&record.header) {
            run.filtered();
            return 0;
        }
        endpoints(sk, record, &SOCKET);
        set(&mut record.netns, netns(sk));
        set(&mut record.state, read(sk, &SOCK_STATE).unwrap_or(0));
        tcp(sk, record);
        let segments = if failed(&ctx) { 0 } else { segments(skb) };
        record.segments = segments;
        record.header.weight = segments as u64;
        run.send(scratch, false)
    };
    if full == Err(0) {
        warn!(&ctx, "the ring buffer is full: retransmits are being dropped and counted");
    }
    0
}

/// A SYN-ACK is sent again: arguments are the listening socket and the request.
#[btf_tracepoint(function = "tcp_retransmit_synack")]
pub(crate) fn synack(ctx: BtfTracePointContext) -> i32 {
    let Some(run) = Run::start(Probe::SynAck) else { return 0 };
    let sk: *const u8 = ctx.arg(0);
    let request: *const u8 = ctx.arg(1);
    let Some(scratch) = RETRANSMIT_SCRATCH.get_ptr_mut(0) else {
        run.dropped(Drop::NoMemory);
        return 0;
    };
    // SAFETY: as in `retransmit`.
    let full = unsafe {
        let scratch = &mut *scratch;
        let record = &mut scratch.record;
        set(&mut record.header.cgroup_id, owner(sk));
        nobody(record, StackEnd::None);
        if !run.wanted(&record.header) {
            run.filtered();
            return 0;
        }
        endpoints(request, record, &REQUEST);
        set(&mut record.netns, netns(sk));
        record.state = TCP_SYN_RECV;
        record.cause = Cause::SynAck as u8;
        record.srtt_us = 0;
        record.cwnd = 0;
        record.segments = 1;
        record.header.weight = 1;
        run.send(scratch, false)
    };
    if full == Err(0) {
        warn!(&ctx, "the ring buffer is full: retransmits are being dropped and counted");
    }
    0
}

/// A task sent on a socket: keeps its stack if the socket is armed and the last one is old.
#[btf_tracepoint(function = "sock_send_length")]
pub(crate) fn sender_stack(ctx: BtfTracePointContext) -> i32 {
    let Some(run) = Run::start(Probe::Sender) else { return 0 };
    let sk: *const u8 = ctx.arg(0);
    // SAFETY: `sk` is a typed pointer; the storage is read and written as its version demands.
    unsafe {
        let storage = storage(sk, 0);
        if storage.is_null() {
            run.filtered();
            return 0;
        }
        let storage = &mut *storage;
        let now = bpf_ktime_get_ns();
        if now - storage.time_ns < SENDER_INTERVAL_NS {
            run.filtered();
            return 0;
        }
        let Some(walk) = SENDER_SCRATCH.get_ptr_mut(0) else {
            run.dropped(Drop::NoMemory);
            return 0;
        };
        let before = get(&storage.version);
        let version = &raw mut storage.version;
        if !before.is_multiple_of(2)
            || !atomic_cxchg::<u64, { SeqCst }, { SeqCst }>(version, before, before + 1).1
        {
            // Another thread is writing; its stack is as good.
            run.filtered();
            return 0;
        }
        task::write_current(&mut storage.task);
        let (walk, python) = &mut *walk;
        let start = task::user_registers(walk);
        let Sender { task, shape, stack, .. } = &mut *storage;
        stack::user(walk, start, task, stack, shape);
        python_stack::walk(python, task, stack, shape, MAX_SENDER_PYTHON_FRAMES);
        storage.time_ns = now;
        set(&mut storage.version, before + 2);
        run.kept(get(&storage.shape.user_end), get(&storage.shape.python_end));
    }
    0
}

/// The socket's storage, or null.
///
/// # Safety
///
/// `sk` must be a typed pointer to a socket.
#[inline(always)]
unsafe fn storage(sk: *const u8, flags: u64) -> *mut Sender {
    // SAFETY: the caller's promise; a new storage is zeroed.
    unsafe {
        bpf_sk_storage_get(
            (&raw const SENDERS).cast_mut().cast(),
            sk.cast_mut().cast(),
            ptr::null_mut(),
            flags,
        )
        .cast()
    }
}

/// Copies who sent last, and the stack, into the record. If that is written meanwhile, or was never,
/// nothing is known.
///
/// # Safety
///
/// `storage` must be a socket's storage, or null.
#[inline(always)]
unsafe fn sender(
    storage: *const Sender,
    record: &mut RetransmitRecord,
    frames: &mut [u64; FRAMES],
) {
    nobody(record, StackEnd::None);
    if storage.is_null() {
        return;
    }
    // SAFETY: the caller's promise.
    unsafe {
        let version = &raw const (*storage).version;
        let before = version.read_volatile();
        let time_ns = (&raw const (*storage).time_ns).read_volatile();
        if time_ns == 0 {
            return;
        }
        // All of it stays in memory: the verifier then takes one way through what follows.
        set(&mut record.header.stack, (&raw const (*storage).shape).read_volatile());
        set(&mut record.header.stack.kernel_frames, 0);
        let shape = &record.header.stack;
        let count = (get(&shape.user_frames) + 2 * get(&shape.python_frames)) as usize;
        let mut index = 0;
        while index < SENDER_FRAMES {
            if index >= count {
                break;
            }
            frames[index & (FRAMES - 1)] = (*storage).stack[index & (SENDER_FRAMES - 1)];
            index += 1;
        }
        record.header.task = (*storage).task;
        record.sender_age_ns = bpf_ktime_get_ns() - time_ns;
        if !before.is_multiple_of(2) || version.read_volatile() != before {
            nobody(record, StackEnd::Torn);
        }
    }
}

/// No sender is known, for this reason.
#[inline(always)]
fn nobody(record: &mut RetransmitRecord, end: StackEnd) {
    record.header.task = NOBODY;
    record.header.stack.kernel_frames = 0;
    record.header.stack.user_frames = 0;
    record.header.stack.user_end = end as u8;
    record.header.stack.python_frames = 0;
    record.header.stack.python_end = PythonEnd::None as u8;
    record.sender_age_ns = 0;
}

/// ID of the cgroup that owns a socket, 0 if this kernel hides it.
///
/// # Safety
///
/// `sk` must be a typed pointer to a socket.
#[inline(always)]
unsafe fn owner(sk: *const u8) -> u64 {
    // SAFETY: each pointer is of the type that the next offset is for.
    unsafe {
        let Some(cgroup) = read::<*const u8>(sk, &SOCK_CGROUP) else { return 0 };
        let Some(node) = read::<*const u8>(cgroup, &CGROUP_KN) else { return 0 };
        read(node, &KERNFS_NODE_ID).unwrap_or(0)
    }
}

/// Inode number of a socket's network namespace, 0 if unknown.
///
/// # Safety
///
/// `sk` must be a typed pointer to a socket.
#[inline(always)]
unsafe fn netns(sk: *const u8) -> u32 {
    // SAFETY: as in `owner`.
    unsafe {
        let Some(net) = read::<*const u8>(sk, &SOCK_NET) else { return 0 };
        read(net, &NET_INUM).unwrap_or(0)
    }
}

/// Whether the kernel tried to send again and could not, as while the device still holds the segment
/// from the last time. Since 6.17 the tracepoint tells such attempts too, with the error as a third
/// argument (`include/trace/events/tcp.h`).
#[inline(always)]
fn failed(ctx: &BtfTracePointContext) -> bool {
    RETRANSMIT_ERR.load() != podflame_wire::field::ABSENT && ctx.arg::<i32>(2) != 0
}

/// Segments in a buffer that is being sent again, at least 1.
///
/// # Safety
///
/// `skb` must be a typed pointer to a buffer of TCP.
#[inline(always)]
unsafe fn segments(skb: *const u8) -> u32 {
    let (cb, field) = (SKB_CB.load(), TCP_CB_SEGMENTS.load());
    if cb == podflame_wire::field::ABSENT || field == podflame_wire::field::ABSENT {
        return 1;
    }
    // SAFETY: the caller's promise; the control block holds a `tcp_skb_cb`.
    let segments = unsafe { skb.add((cb + field) as usize).cast::<u16>().read_volatile() };
    if segments == 0 { 1 } else { segments as u32 }
}

/// The offsets of the addresses of one kind of object.
struct Endpoints {
    family: &'static aya_ebpf::Global<u32>,
    ports: [&'static aya_ebpf::Global<u32>; 2],
    v4: [&'static aya_ebpf::Global<u32>; 2],
    v6: [&'static aya_ebpf::Global<u32>; 2],
}

const SOCKET: Endpoints = Endpoints {
    family: &SOCK_FAMILY,
    ports: [&SOCK_LOCAL_PORT, &SOCK_REMOTE_PORT],
    v4: [&SOCK_LOCAL_V4, &SOCK_REMOTE_V4],
    v6: [&SOCK_LOCAL_V6, &SOCK_REMOTE_V6],
};

const REQUEST: Endpoints = Endpoints {
    family: &REQ_FAMILY,
    ports: [&REQ_LOCAL_PORT, &REQ_REMOTE_PORT],
    v4: [&REQ_LOCAL_V4, &REQ_REMOTE_V4],
    v6: [&REQ_LOCAL_V6, &REQ_REMOTE_V6],
};

/// Fills in family, addresses and ports.
///
/// # Safety
///
/// `object` must be a typed pointer of the kind that `at` is for.
#[inline(always)]
unsafe fn endpoints(object: *const u8, record: &mut RetransmitRecord, at: &Endpoints) {
    // SAFETY: the caller's promise.
    unsafe {
        set(&mut record.family, read(object, at.family).unwrap_or(0));
        set(&mut record.local_port, read(object, at.ports[0]).unwrap_or(0));
        set(&mut record.remote_port, u16::from_be(read(object, at.ports[1]).unwrap_or(0)));
        if get(&record.family) == AF_INET6 {
            record.local = words(object, at.v6[0]);
            record.remote = words(object, at.v6[1]);
        } else {
            record.local = word(read(object, at.v4[0]).unwrap_or(0));
            record.remote = word(read(object, at.v4[1]).unwrap_or(0));
        }
    }
}

/// An IPv4 address in the room of an IPv6 one.
#[inline(always)]
fn word(address: u32) -> [u8; 16] {
    let a = address.to_ne_bytes();
    [a[0], a[1], a[2], a[3], 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
}

/// An IPv6 address, read as four words: that is how BTF has it (`in6_addr.s6_addr32`).
///
/// # Safety
///
/// As for `endpoints`.
#[inline(always)]
unsafe fn words(object: *const u8, field: &aya_ebpf::Global<u32>) -> [u8; 16] {
    let offset = field.load();
    if offset == podflame_wire::field::ABSENT {
        return [0; 16];
    }
    // SAFETY: the caller's promise.
    unsafe {
        let at = object.add(offset as usize).cast::<u32>();
        let all = [
            at.read_volatile(),
            at.add(1).read_volatile(),
            at.add(2).read_volatile(),
            at.add(3).read_volatile(),
        ];
        core::mem::transmute::<[u32; 4], [u8; 16]>(all)
    }
}

/// Fills in what only a full TCP socket knows: the cause, the round-trip time and the window.
///
/// # Safety
///
/// `sk` must be a typed pointer to a socket.
#[inline(always)]
unsafe fn tcp(sk: *const u8, record: &mut RetransmitRecord) {
    // SAFETY: the helper checks the socket and returns a typed pointer or null.
    unsafe {
        let tp = bpf_skc_to_tcp_sock(sk.cast_mut().cast()).cast::<u8>().cast_const();
        if tp.is_null() {
            record.cause = Cause::Unknown as u8;
            record.srtt_us = 0;
            record.cwnd = 0;
            return;
        }
        // `srtt_us` is kept eight times as large (`include/linux/tcp.h`).
        record.srtt_us = read::<u32>(tp, &TCP_SRTT).unwrap_or(0) >> 3;
        record.cwnd = read(tp, &TCP_CWND).unwrap_or(0);
        record.cause = match read::<u8>(tp, &TCP_CA_STATE).map(|state| state & CA_STATE_MASK) {
            _ if get(&record.state) == TCP_SYN_SENT => Cause::Syn as u8,
            Some(TCP_CA_LOSS) => Cause::Timeout as u8,
            Some(TCP_CA_RECOVERY) => Cause::Fast as u8,
            // Outside recovery and loss, only a tail loss probe sends old data again
            // (`tcp_send_loss_probe` in `net/ipv4/tcp_output.c`).
            Some(_) => Cause::TailLossProbe as u8,
            None => Cause::Unknown as u8,
        };
    }
}
