# Functions whose call frame information has every shape that the builder must know on x86-64. What
# they do is not the point: they are never run. The files beside it, x86_64.elf, debug.elf with
# .debug_frame instead, and go.elf with the mark of a Go program:
#   link="gcc -nostdlib -static -no-pie -Wl,--build-id=none,--eh-frame-hdr"
#   link="$link -Wl,-z,max-page-size=4096,-z,noseparate-code"
#   $link x86_64.s -o x86_64.elf; strip x86_64.elf
#   $link -Wa,--defsym,DEBUG=1 x86_64.s -o debug.elf
#   objcopy --strip-unneeded --keep-section=.debug_frame --compress-debug-sections=zlib debug.elf
#   objcopy --add-section .note.go.buildid=/dev/null debug.elf go.elf
# The .rows are their tables, as the tests write them; they were held against the source by hand.
        .ifdef DEBUG
        .cfi_sections .debug_frame
        .endif
        .macro function name
        .globl \name
        .p2align 4
\name:
        .cfi_startproc
        .endm

        .text
# The outermost function: its return address is undefined (psABI of x86-64, section 3.4.1).
        function _start
        .cfi_undefined rip
        call usual
        hlt
        .cfi_endproc

# gcc -O2 -fno-omit-frame-pointer, with an early return.
        function usual
        push %rbp
        .cfi_def_cfa_offset 16
        .cfi_offset rbp, -16
        mov %rsp, %rbp
        .cfi_def_cfa_register rbp
        test %edi, %edi
        je 1f
        .cfi_remember_state
        leave
        .cfi_def_cfa rsp, 8
        .cfi_restore rbp
        ret
1:      .cfi_restore_state
        leave
        .cfi_def_cfa rsp, 8
        ret
        .cfi_endproc

# gcc -O2, and a function that follows at once with the same rule.
        function frameless
        sub $40, %rsp
        .cfi_def_cfa_offset 48
        call usual
        add $40, %rsp
        .cfi_def_cfa_offset 8
        ret
        .cfi_endproc
        .cfi_startproc
        .skip 4, 0x90
        .cfi_endproc

# gcc where it realigns the stack: the frame is found through a saved register.
        function realigned
        lea 8(%rsp), %r10
        .cfi_def_cfa r10, 0
        and $-32, %rsp
        push -8(%r10)
        push %rbp
        mov %rsp, %rbp
        .cfi_escape 0x10, 6, 2, 0x76, 0                 # DW_CFA_expression rbp: breg6 0
        push %r10
        .cfi_escape 0x0f, 3, 0x76, 0x78, 0x06           # def_cfa_expression: breg6 -8; deref
        nop
        .cfi_endproc

# OpenSSL, which keeps the caller's stack pointer in its frame.
        function kept
        nop
        .cfi_escape 0x0f, 6, 0x77, 0xd8, 0x00, 0x06, 0x23, 8  # breg7 88; deref; plus_uconst 8
        nop
        .cfi_escape 0x0f, 2, 0x77, 24                   # breg7 24
        nop
        .cfi_endproc

# The stubs of GNU ld: with lit11, and as written for -z ibtplt with lit10.
        function stubs
        nop
        .cfi_escape 0x0f, 11, 0x77, 8, 0x80, 0, 0x3f, 0x1a, 0x3b, 0x2a, 0x33, 0x24, 0x22
        nop
        .cfi_escape 0x0f, 11, 0x77, 8, 0x80, 0, 0x3f, 0x1a, 0x3a, 0x2a, 0x33, 0x24, 0x22
        nop
        .cfi_endproc

# __restore_rt of glibc: everything is where the kernel put it.
        .p2align 4
        .cfi_startproc
        .cfi_signal_frame
        .cfi_escape 0x0f, 4, 0x77, 0xa0, 0x01, 0x06     # def_cfa_expression: breg7 160; deref
        .cfi_escape 0x10, 16, 3, 0x77, 0xa8, 0x01       # rip: breg7 168
        .cfi_escape 0x10, 6, 3, 0x77, 0xf8, 0x00        # rbp: breg7 120
        .cfi_escape 0x10, 7, 3, 0x77, 0xa0, 0x01        # rsp: breg7 160
        nop
        .globl restore
restore:
        mov $15, %rax
        syscall
        .cfi_endproc

# What calls itself a signal frame and is another.
        function other_signal
        .cfi_signal_frame
        nop
        .cfi_endproc

# The frame pointer is lost, and back again.
        function lost
        .cfi_register rbp, r9
        nop
        .cfi_undefined rbp
        nop
        .cfi_val_offset rbp, -8
        nop
        .cfi_same_value rbp
        nop
        .cfi_endproc

# What a rule cannot say, in turns with what it can.
        function unsupported
        .cfi_register rip, rcx                          # as where exceptions are resumed
        nop
        .cfi_offset rip, -8
        nop
        .cfi_register rsp, r8                           # as in longjmp
        nop
        .cfi_val_offset rsp, 0
        nop
        .cfi_same_value rip
        nop
        .cfi_offset rip, -8
        nop
        .cfi_def_cfa rsp, 0x80000000
        nop
        .cfi_def_cfa rsp, 8
        nop
        .cfi_offset rip, -40000
        nop
        .cfi_offset rip, -8
        nop
        .cfi_escape 0x0f, 2, 0x77, 8                    # breg7 8
        nop
        .cfi_escape 0x0f, 4, 0x77, 8, 0x06, 0x06        # breg7 8; deref; deref
        nop
        .cfi_endproc

# Instructions that contradict themselves: the state of nobody is restored.
        function malformed
        nop
        .cfi_def_cfa_offset 32
        nop
        .cfi_escape 0x0b
        nop
        .cfi_def_cfa_offset 64
        nop
        .cfi_endproc

# No information.
        .globl nothing
nothing:
        ret
        .section .note.GNU-stack, "", @progbits
