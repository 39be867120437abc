"""Writes, for the Python that runs this, line tables with what it says of them itself.

Each code object is a line `code FIRST_LINE TABLE`, and behind it, as `PLACE LINE` in one line, the line of
each instruction, 0 where it has none. `tests/golden/python/lines.VERSION` is the output of each version:

    for v in 3.8 3.9 3.10 3.11 3.12 3.13; do
        python$v tests/python/lines.py > tests/golden/python/lines.$v
    done
"""

import dis
import sys

# Odd on purpose: long jumps of lines forwards and backwards, code without lines, long functions.
SOURCES = [
    "def f(a, b):\n    return a + \\\n        b\n",
    "x = [i for i in range(10)\n     if i\n     > 5]\n",
    "try:\n    f()\nexcept E as e:\n    g(e)\nfinally:\n    h()\n",
    "def g():\n    with a as b, c as d:\n        yield b\n    return (\n" + "\n" * 300 + "        1)\n",
    "call(\n" + "".join(f"    a{i},\n" for i in range(200)) + ")\n",
    "for i in a:\n    while b:\n        if c: continue\n        break\n    else:\n        d\n",
    "async def h():\n    async for a in b:\n        await c\n",
    "\n" * 5000 + "class A:\n    x = 1\n" + "\n" * 200 + "    def f(self): return (lambda:\n  1)\n",
    "z = 1; " * 300 + "y = 2\n",
]


def places(code):
    """The line of each instruction."""
    size = len(code.co_code)
    lines = [0] * (size // 2)
    if hasattr(code, "co_lines"):
        for start, end, line in code.co_lines():
            for place in range(start, end, 2):
                lines[place // 2] = line or 0
    else:
        line = code.co_firstlineno
        starts = dict(dis.findlinestarts(code))
        for place in range(0, size, 2):
            line = starts.get(place, line)
            lines[place // 2] = line
    return lines


def show(code):
    table = code.co_linetable if sys.version_info >= (3, 10) else code.co_lnotab
    print("code", code.co_firstlineno, table.hex())
    runs, last = [], None
    for index, line in enumerate(places(code)):
        # Where the line changes, and so where the last one still holds.
        if line != last:
            runs.append(f"{2 * index} {line}")
            last = line
    print(*runs, sep=",")
    for const in code.co_consts:
        if hasattr(const, "co_code"):
            show(const)


for source in SOURCES:
    show(compile(source, "source", "exec"))
