// Throws and catches C++ exceptions, for the recorder of cases (record.py).
#include <cstdio>
#include <stdexcept>
#include <string>

volatile unsigned long sink;

struct Counted {
    ~Counted();
};

extern "C" __attribute__((noinline)) void leaf() { sink = sink + 1; }

__attribute__((noinline)) Counted::~Counted() { leaf(); }

__attribute__((noinline)) void thrower(unsigned depth) {
    Counted counted;
    if (depth == 0)
        throw std::runtime_error("thrown " + std::to_string(sink));
    thrower(depth - 1);
    sink = sink + depth;
}

int main(int argc, char **) {
    unsigned turns = argc > 1 ? 1 : 400000;
    for (unsigned turn = 0; turn < turns; turn++) {
        try {
            thrower(turn % 12);
        } catch (const std::exception &error) {
            sink = sink + error.what()[0];
            leaf();
        }
    }
}
