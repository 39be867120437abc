"""Spends 70 % of its CPU time in `hot_a` and 30 % in `hot_b`, in each of two threads.

Both are several calls deep; `hot_b` sorts with a key, so that Python calls C and C calls Python. Runs on
every version from 3.8 on. Follows the other workloads: says `ready`, and ends on SIGTERM or with the one
who started it.
"""

import ctypes
import signal
import sys
import threading
import time

TURN = 0.01  # Seconds of CPU time of one round.
RUNNING = True


def hot_a(until):
    total = 0
    while time.thread_time() < until:
        for number in range(200):
            total += number * number
    return total


def hot_b(until):
    while time.thread_time() < until:
        sorted(range(100), key=hot_b_key)


def hot_b_key(number):
    total = 0
    for digit in range(10):
        total += number * digit
    return total


class Worker:
    def round(self, until):
        middle = until - 0.3 * TURN
        hot_a(middle)
        self.other(until)

    def other(self, until):
        return [hot_b(until) for _ in range(1)]


def turns(worker):
    until = time.thread_time()
    while RUNNING:
        until += TURN
        worker.round(until)
        # A thread that waited for the other to let it run has used no time of its own meanwhile.
        until = max(until, time.thread_time())


def in_main_thread():
    turns(Worker())


def in_second_thread():
    turns(Worker())


def stop(_signal, _frame):
    global RUNNING
    RUNNING = False


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    signal.signal(signal.SIGTERM, stop)
    sys.setswitchinterval(0.001)
    second = threading.Thread(target=in_second_thread, name="second")
    second.start()
    print("ready", flush=True)
    in_main_thread()
    second.join()
