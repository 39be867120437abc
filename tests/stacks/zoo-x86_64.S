// Hand-written assembler of x86-64 without call frame information (see zoo.c).
        .text
        .globl bare_with_frame_pointer
        .type bare_with_frame_pointer, @function
bare_with_frame_pointer:
        push %rbp
        mov %rsp, %rbp
        sub $32, %rsp
        call *%rdi
        leave
        ret
        .size bare_with_frame_pointer, . - bare_with_frame_pointer

        .globl bare_without_frame_pointer
        .type bare_without_frame_pointer, @function
bare_without_frame_pointer:
        sub $40, %rsp
        call *%rdi
        add $40, %rsp
        ret
        .size bare_without_frame_pointer, . - bare_without_frame_pointer

        .globl fault
        .type fault, @function
fault:
        .cfi_startproc
        xor %eax, %eax
        mov (%rax), %rax
        ret
        .cfi_endproc
        .size fault, . - fault

        // Without a name, by which gdb would take it for a function.
        nop
.Lrestorer:
        mov $15, %rax
        syscall

        .section .data.rel.ro, "aw"
        .globl bare_restorer
        .balign 8
bare_restorer:
        .quad .Lrestorer
        .size bare_restorer, 8

        .section .note.GNU-stack, "", @progbits
