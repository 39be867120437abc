// Programs whose stacks are hard to walk, for the recorder of cases (record.py). Each ends in `leaf`.
//
// Built without frame pointers unless said otherwise, for x86-64 and AArch64.
#define _GNU_SOURCE
#include <alloca.h>
#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

volatile uint64_t sink;

// In zoo-x86_64.S and zoo-aarch64.S: assembler without call frame information. All call their argument.
void bare_with_frame_pointer(void (*then)(void));
void bare_without_frame_pointer(void (*then)(void));
// What handlers return to, as a C library without call frame information has it.
extern void (*const bare_restorer)(void);
// Faults, in a function that keeps its return address in the link register where there is one.
void fault(void);

__attribute__((noinline)) void leaf(void) {
    for (int i = 0; i < 3; i++)
        sink += i;
}

__attribute__((noinline)) void middle(void) {
    char text[40];
    snprintf(text, sizeof text, "%d", (int)sink);
    leaf();
    sink += text[0];
}

__attribute__((noinline)) uint64_t deeper(uint64_t depth) {
    if (depth == 0) {
        middle();
        return sink;
    }
    return deeper(depth - 1) + depth;
}

static void handle(int signal) {
    sink += signal;
    middle();
}

// Leaves by `_exit`, since the fault would be met again.
static void handle_fault(int signal) {
    sink += signal;
    middle();
    _exit(0);
}

static void on_signal(int signal, void (*handler)(int), int flags) {
    struct sigaction action = {.sa_handler = handler, .sa_flags = flags};
    sigaction(signal, &action, NULL);
}

// `struct sigaction` of the kernel (`include/linux/signal_types.h`).
static void on_signal_return_to(int signal, void (*handler)(int), void (*restorer)(void)) {
    struct {
        void (*handler)(int);
        unsigned long flags;
        void (*restorer)(void);
        unsigned long mask;
    } action = {handler, 0x04000000, restorer, 0};
    syscall(SYS_rt_sigaction, signal, &action, NULL, sizeof action.mask);
}

static void use_other_stack(void) {
    static char other[64 << 10];
    stack_t stack = {.ss_sp = other, .ss_size = sizeof other};
    sigaltstack(&stack, NULL);
}

// Frames whose size is known at run time only.
__attribute__((noinline)) void grown(size_t size) {
    char *block = alloca(size);
    memset(block, 1, size);
    middle();
    sink += block[size / 2];
}

// A frame that is aligned anew: on x86-64 gcc finds the caller's by a register (DRAP).
__attribute__((noinline)) void aligned(int a, int b, int c, int d, int e, int f, int g, int h) {
    char block[200] __attribute__((aligned(64)));
    char *more = alloca(a + 16);
    memset(block, b, sizeof block);
    memset(more, c, a + 16);
    middle();
    sink += block[d] + more[e] + f + g + h;
}

static int compare(const void *a, const void *b) {
    leaf();
    return *(const int *)a - *(const int *)b;
}

static void *in_thread(void *unused) {
    middle();
    return unused;
}

static void at_exit(void) { middle(); }

int main(int argc, char **argv) {
    const char *what = argc > 1 ? argv[1] : "";
    if (!strcmp(what, "deep")) {
        sink += deeper(argc > 2 ? atoi(argv[2]) : 40);
    } else if (!strcmp(what, "signal")) {
        on_signal(SIGUSR1, handle, 0);
        raise(SIGUSR1);
    } else if (!strcmp(what, "restorer")) {
        on_signal_return_to(SIGUSR1, handle, bare_restorer);
        raise(SIGUSR1);
    } else if (!strcmp(what, "restorer-fault")) {
        on_signal_return_to(SIGSEGV, handle_fault, bare_restorer);
        fault();
    } else if (!strcmp(what, "alternate")) {
        use_other_stack();
        on_signal(SIGUSR1, handle, SA_ONSTACK);
        raise(SIGUSR1);
    } else if (!strcmp(what, "fault")) {
        use_other_stack();
        on_signal(SIGSEGV, handle_fault, SA_ONSTACK);
        fault();
    } else if (!strcmp(what, "grown")) {
        grown(argc * 100);
    } else if (!strcmp(what, "aligned")) {
        aligned(argc, 2, 3, 4, 5, 6, 7, 8);
    } else if (!strcmp(what, "bare-fp")) {
        bare_with_frame_pointer(middle);
    } else if (!strcmp(what, "bare")) {
        bare_without_frame_pointer(middle);
    } else if (!strcmp(what, "sort")) {
        int numbers[] = {3, 1, 2, 5, 4};
        qsort(numbers, 5, sizeof *numbers, compare);
    } else if (!strcmp(what, "thread")) {
        pthread_t thread;
        pthread_create(&thread, NULL, in_thread, NULL);
        pthread_join(thread, NULL);
    } else if (!strcmp(what, "exit")) {
        atexit(at_exit);
    } else if (!strcmp(what, "clock")) {
        struct timespec now;
        for (int i = 0; i < 1000; i++) {
            clock_gettime(CLOCK_MONOTONIC, &now);
            sink += now.tv_nsec;
        }
    } else if (!strcmp(what, "plt")) {
        for (int i = 0; i < 3; i++)
            sink += getppid();
    } else if (!strcmp(what, "plugin") && argc > 2) {
        void *library = dlopen(argv[2], RTLD_NOW);
        void (*enter)(void (*)(void)) = library ? dlsym(library, "plugin_enter") : NULL;
        if (enter)
            enter(middle);
    }
    return 0;
}
