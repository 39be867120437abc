//! The BPF programs of podflame. Each probe family has a file; they share the maps, the stack walk
//! and the accounting.
//!
//! Built by `cargo xtask build-ebpf`; see `wire.rs` for what crosses to the agent. The programs run
//! under kernel lockdown `confidentiality`: no `bpf_probe_read_kernel`, no kprobe, no fentry. Kernel
//! memory is read only through typed pointers at offsets that the agent takes from the running
//! kernel's BTF.
#![no_std]
#![no_main]
// Compare-and-exchange, which BPF has since 5.12 but the target's `core::sync::atomic` not yet.
#![expect(internal_features, reason = "there is no other way to it, and the toolchain is pinned")]
#![feature(core_intrinsics)]

mod fault;
mod fields;
mod maps;
mod on_cpu;
mod python_stack;
mod record;
mod retransmit;
mod stack;
mod task;

/// Never runs: the verifier would refuse a program that can reach it with a live loop.
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// Several helpers are for GPL-compatible programs only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 4] = *b"GPL\0";
