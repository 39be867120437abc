// Throws through twenty frames, catches, and sorts: exceptions, templates and strings, as C++ has them.
#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

static long descend(int level, long number) {
    if (level == 0) {
        if (number % 3 == 0) throw std::runtime_error("every third");
        return number;
    }
    std::string text(level, 'a');
    return descend(level - 1, number) + static_cast<long>(text.size());
}

int main() {
    volatile long sum = 0;
    for (long number = 0;; number++) {
        try {
            sum = sum + descend(20, number);
        } catch (const std::exception &error) {
            sum = sum + error.what()[0];
        }
        if (number % 1000 == 0) {
            std::vector<long> values(1000);
            for (long i = 0; i < 1000; i++) values[i] = (number * 7919 + i * 31) % 1000;
            std::sort(values.begin(), values.end());
            sum = sum + values[3];
        }
    }
}
