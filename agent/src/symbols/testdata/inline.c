// The ELF files here, for tests that need exact addresses:
//   gcc -g -O2 -gdwarf-5 -static -nostdlib -no-pie -ffile-prefix-map=$PWD=/src -fno-asynchronous-unwind-tables \
//       -Wl,--build-id=sha1,-z,noseparate-code,-z,max-page-size=4096 inline.c -o inline.elf
//   objcopy --only-keep-debug inline.elf inline.debug
//   objcopy --strip-all --add-gnu-debuglink=inline.debug inline.elf stripped.elf
//   objcopy --compress-debug-sections=zlib inline.elf zlib.elf  (and zstd)
static volatile int sink;

static inline __attribute__((always_inline)) void innermost(int x) {
    sink = x;
}

static inline __attribute__((always_inline)) void middle(int x) {
    innermost(x + 1);
}

__attribute__((noinline)) void outer(int x) {
    middle(x);
    sink = 2;
}

void alias_of_outer(int x) __attribute__((alias("outer")));

__asm__(".text\n.globl assembly\nassembly: nop\nnop\nret\n");

void _start(void) {
    outer(1);
    for (;;) {
    }
}
