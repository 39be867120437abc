// As x86_64.s, for AArch64:
//   llvm-mc -filetype=obj -triple=aarch64-linux-gnu aarch64.s -o aarch64.o
//   ld.lld -z max-page-size=4096 -z noseparate-code --build-id=none -s aarch64.o -o aarch64.elf
        .text
        .globl _start
_start:
        .cfi_startproc
        .cfi_undefined x30
        bl usual
        .cfi_endproc

// gcc -O2 -mbranch-protection=standard: the return address is signed, and the frame record holds
// frame pointer and return address.
        .globl usual
usual:
        .cfi_startproc
        paciasp
        .cfi_negate_ra_state
        stp x29, x30, [sp, -32]!
        .cfi_def_cfa_offset 32
        .cfi_offset 29, -32
        .cfi_offset 30, -24
        mov x29, sp
        bl leaf
        ldp x29, x30, [sp], 32
        .cfi_restore 30
        .cfi_restore 29
        .cfi_def_cfa_offset 0
        autiasp
        .cfi_negate_ra_state
        ret
        .cfi_endproc

// The return address stays in its register.
        .globl leaf
leaf:
        .cfi_startproc
        sub sp, sp, 64
        .cfi_def_cfa_offset 64
        add sp, sp, 64
        .cfi_def_cfa_offset 0
        ret
        .cfi_endproc

// alloca: the frame is found by the frame pointer.
        .globl dynamic
dynamic:
        .cfi_startproc
        stp x29, x30, [sp, -16]!
        .cfi_def_cfa_offset 16
        .cfi_offset 29, -16
        .cfi_offset 30, -8
        mov x29, sp
        .cfi_def_cfa x29, 16
        sub sp, sp, x0
        mov sp, x29
        .cfi_def_cfa sp, 16
        .cfi_escape 0x10, 30, 2, 0x8d, 8        // x30: breg29 8
        nop
        ldp x29, x30, [sp], 16
        .cfi_endproc

// The vDSO's return from a signal handler, up to Linux 5.7.
        .globl signal
signal:
        .cfi_startproc
        .cfi_signal_frame
        .cfi_def_cfa x29, 0
        .cfi_offset x29, 0
        .cfi_offset x30, 8
        nop
        .cfi_endproc

// As longjmp, and a return address in another register.
        .globl unsupported
unsupported:
        .cfi_startproc
        .cfi_def_cfa x0, 0
        .cfi_offset x29, 80
        .cfi_offset x30, 88
        nop
        .cfi_offset sp, 104
        nop
        .cfi_restore sp
        .cfi_def_cfa sp, 0
        .cfi_register x30, x9
        nop
        .cfi_endproc
