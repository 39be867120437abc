// A library that zoo.c loads while it runs.
#include <stdint.h>

static volatile uint64_t entered;

void plugin_enter(void (*then)(void)) {
    char block[64];
    for (int i = 0; i < 64; i++)
        block[i] = (char)entered;
    then();
    entered += block[7] + 1;
}
