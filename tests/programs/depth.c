// Spins below a known number of frames, all of different functions: `depth N`, 1 to 128, counts `_start`.
//
// Without a C library, so that the compiler's options decide on all of the stack.

// A compiler that makes no unwind tables takes no directives for them either.
#ifdef __GCC_HAVE_DWARF2_CFI_ASM
#define OUTERMOST ".cfi_startproc\n.cfi_undefined rip\n"
#define END ".cfi_endproc\n"
#else
#define OUTERMOST
#define END
#endif

asm(".globl _start\n"
    ".type _start, @function\n"
    "_start:\n" OUTERMOST
    "    xor %ebp, %ebp\n"
    "    mov 16(%rsp), %rdi\n"
    "    and $-16, %rsp\n"
    "    call number\n"
    "    mov %rax, %rdi\n"
    "    cmp $1, %rdi\n"
    "1:  je 1b\n"
    "    call level_0_0_0\n"
    "    hlt\n" END
    ".size _start, . - _start\n");

__attribute__((used)) static long number(const char *digits) {
    long number = 0;
    while (*digits)
        number = 10 * number + (*digits++ - '0');
    return number;
}

// As much of the stack as a function of a usual program takes.
#define LEVEL(name, next)                                                                          \
    __attribute__((noipa)) long next(long depth);                                                  \
    __attribute__((noipa)) long name(long depth) {                                                 \
        volatile long room[7];                                                                     \
        room[depth & 3] = depth;                                                                   \
        if (depth == 2)                                                                            \
            for (;;)                                                                               \
                asm volatile("");                                                                  \
        return next(depth - 1) + room[depth & 3];                                                  \
    }

#define EIGHT(high, middle, after)                                                                 \
    LEVEL(level_##high##_##middle##_0, level_##high##_##middle##_1)                                \
    LEVEL(level_##high##_##middle##_1, level_##high##_##middle##_2)                                \
    LEVEL(level_##high##_##middle##_2, level_##high##_##middle##_3)                                \
    LEVEL(level_##high##_##middle##_3, level_##high##_##middle##_4)                                \
    LEVEL(level_##high##_##middle##_4, level_##high##_##middle##_5)                                \
    LEVEL(level_##high##_##middle##_5, level_##high##_##middle##_6)                                \
    LEVEL(level_##high##_##middle##_6, level_##high##_##middle##_7)                                \
    LEVEL(level_##high##_##middle##_7, after)

#define SIXTY_FOUR(high, after)                                                                    \
    EIGHT(high, 0, level_##high##_1_0)                                                             \
    EIGHT(high, 1, level_##high##_2_0)                                                             \
    EIGHT(high, 2, level_##high##_3_0)                                                             \
    EIGHT(high, 3, level_##high##_4_0)                                                             \
    EIGHT(high, 4, level_##high##_5_0)                                                             \
    EIGHT(high, 5, level_##high##_6_0)                                                             \
    EIGHT(high, 6, level_##high##_7_0)                                                             \
    EIGHT(high, 7, after)

SIXTY_FOUR(0, level_1_0_0)
SIXTY_FOUR(1, bottom)

__attribute__((noipa)) long bottom(long depth) { return depth; }
