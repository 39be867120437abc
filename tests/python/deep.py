"""Waits on its input many calls deep, and says what its stack is: `ready` and a JSON object with the
thread's ID and the functions from the innermost on, each as `NAME FILE LINE`.

The names are of each kind that a string of CPython can be: ASCII, Latin-1, two bytes and four.
"""

import json
import sys
import threading


def stack():
    frames = []
    frame = sys._getframe(1)
    while frame:
        code = frame.f_code
        name = getattr(code, "co_qualname", code.co_name)
        frames.append(f"{name} {code.co_filename} {frame.f_lineno}")
        frame = frame.f_back
    return frames


def report(frames):
    print("ready", json.dumps({"thread": threading.get_ident(), "stack": frames}), flush=True)


def wait():
    # In one line, so that what is said is what is seen.
    report(stack()), sys.stdin.readline()  # noqa: one line


def größe(number):
    return wait() or number


class Ωμέγα:
    def __init__(self, depth):
        if depth:
            Ωμέγα(depth - 1)
        else:
            sorted([1], key=größe)


def generator():
    yield max([3], key=lambda number: Ωμέγα(number) and number)


# A file whose name needs four bytes a character.
exec(compile("def other():\n  return \\\n    list(generator())\n", "😀.py", "exec"))


def main():
    with open(__file__ if "__file__" in globals() else "/dev/null") as _:
        other()


if __name__ == "__main__":
    # Threads are listed from the newest on: this one has to be passed.
    release = threading.Event()
    second = threading.Thread(target=release.wait)
    second.start()
    main()
    release.set()
