// Hand-written assembler of AArch64 without call frame information (see zoo.c).
        .text
        .globl bare_with_frame_pointer
        .type bare_with_frame_pointer, %function
bare_with_frame_pointer:
        stp x29, x30, [sp, #-48]!
        mov x29, sp
        blr x0
        ldp x29, x30, [sp], #48
        ret
        .size bare_with_frame_pointer, . - bare_with_frame_pointer

        .globl bare_without_frame_pointer
        .type bare_without_frame_pointer, %function
bare_without_frame_pointer:
        str x30, [sp, #-48]!
        blr x0
        ldr x30, [sp], #48
        ret
        .size bare_without_frame_pointer, . - bare_without_frame_pointer

        .globl fault
        .type fault, %function
fault:
        .cfi_startproc
        mov x0, #0
        ldr x0, [x0]
        ret
        .cfi_endproc
        .size fault, . - fault

        // Without a name, by which gdb would take it for a function.
        nop
.Lrestorer:
        mov x8, #139
        svc #0

        .section .data.rel.ro, "aw"
        .globl bare_restorer
        .balign 8
bare_restorer:
        .quad .Lrestorer
        .size bare_restorer, 8

        .section .note.GNU-stack, "", %progbits
