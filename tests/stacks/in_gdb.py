# Runs inside gdb: stops a program again and again, and writes down each stop for the tests of the stack
# walk: registers, stack memory, mappings, and gdb's own backtrace. Started by record.py.
#
# The answer is gdb's alone: nothing here knows how podflame walks.
import json
import os
import re
import struct
import subprocess

import gdb

PLAN = json.loads(os.environ["STACKS_PLAN"])
# Outermost frames that gdb is asked for; the walk takes 127.
MOST_FRAMES = 160
# Stack memory that is kept above and below each stack pointer, at most.
ABOVE = 256 << 10
BELOW = 256
PAGE = 4096

X86_64 = ["rax", "rdx", "rcx", "rbx", "rsi", "rdi", "rbp", "rsp"] + [f"r{n}" for n in range(8, 16)]
# Bits of an address that are no signature (48 bits of addresses).
ADDRESS = (1 << 48) - 1


def register(name, frame=None):
    frame = frame or gdb.newest_frame()
    value = frame.read_register(name)
    return int(value.cast(gdb.lookup_type("unsigned long"))) & (1 << 64) - 1


class Machine:
    """What differs between the processors."""

    def __init__(self):
        self.name = PLAN["machine"]
        self.x86_64 = self.name == "x86_64"
        self.names = X86_64 if self.x86_64 else [f"x{n}" for n in range(31)] + ["sp"]
        self.sp = "rsp" if self.x86_64 else "sp"
        self.pc = "rip" if self.x86_64 else "pc"

    def registers(self):
        return [register(name) for name in self.names]


def program_headers(path):
    """Executable parts of an ELF file, and the address of its .text."""
    with open(path, "rb") as file:
        data = file.read()
    phoff, shoff = struct.unpack_from("<QQ", data, 32)
    _, phsize, phnum, shsize, shnum, shstr = struct.unpack_from("<HHHHHH", data, 52)
    loads = []
    for n in range(phnum):
        kind, flags, offset, address, _, filesz = struct.unpack_from("<IIQQQQ", data, phoff + n * phsize)
        if kind == 1 and flags & 1:
            loads.append((offset, address, filesz))
    names = struct.unpack_from("<Q", data, shoff + shstr * shsize + 24)[0]
    text = None
    for n in range(shnum):
        name, _, _, address = struct.unpack_from("<IIQQ", data, shoff + n * shsize)
        start = names + name
        if data[start : data.index(b"\0", start)] == b".text":
            text = address
    return loads, text


def mappings_of_process(pid):
    """Executable mappings, as the agent reads them."""
    found = []
    with open(f"/proc/{pid}/maps") as maps:
        for line in maps:
            fields = line.split(None, 5)
            if "x" not in fields[1] or fields[5:] == ["[vsyscall]\n"]:
                continue
            start, end = (int(part, 16) for part in fields[0].split("-"))
            path = fields[5].strip() if len(fields) > 5 else ""
            found.append((start, end, int(fields[2], 16), path))
    return found


def is_known(pc, mappings):
    """Whether gdb knows the file of this code. Where it does not, it guesses from the code's bytes."""
    if any(path == "[vdso]" and start <= pc < end for start, end, _, path in mappings):
        return True
    sections = re.findall(r"(0x\w+) - (0x\w+) is ", gdb.execute("info files", to_string=True))
    return any(int(start, 16) <= pc < int(end, 16) for start, end in sections)


def mappings_of_files():
    """The same from what gdb knows of loaded files: qemu does not tell."""
    found = {}
    # Of the program itself it says no name.
    main = gdb.current_progspace().filename
    for line in gdb.execute("info files", to_string=True).splitlines():
        match = re.match(r"\s+(0x\w+) - 0x\w+ is \.text(?: in (.*))?$", line)
        if not match:
            continue
        path = os.path.abspath(match.group(2) or main)
        loads, text = program_headers(path)
        bias = int(match.group(1), 16) - text
        for offset, address, size in loads:
            start = bias + address & ~(PAGE - 1)
            end = bias + address + size + PAGE - 1 & ~(PAGE - 1)
            found[start] = (start, end, offset & ~(PAGE - 1), path)
    return [found[start] for start in sorted(found)]


def read(address, length):
    """Memory from an address on, as far as it goes."""
    inferior = gdb.selected_inferior()
    data = b""
    while len(data) < length:
        size = PAGE - (address + len(data)) % PAGE
        try:
            data += bytes(inferior.read_memory(address + len(data), min(size, length - len(data))))
        except gdb.MemoryError:
            break
    return data


def backtrace(machine, mappings):
    """Return addresses with stack pointers, innermost first, and why gdb stopped."""
    frames = []
    frame = gdb.newest_frame()
    while frame is not None and len(frames) < MOST_FRAMES:
        try:
            # Frames that share another's registers are no frames of the stack.
            if frame.type() not in (gdb.INLINE_FRAME, gdb.TAILCALL_FRAME):
                frames.append((frame.pc(), register(machine.sp, frame)))
            if machine.x86_64 and not is_known(frame.pc(), mappings):
                reason = "code of no file"
                break
            reason = gdb.frame_stop_reason_string(frame.unwind_stop_reason())
            frame = frame.older()
        except gdb.error as error:
            reason = str(error)
            break
    return frames, reason


def stack_memory(frames):
    """Aligned memory around each frame's stack pointer."""
    memory = []
    for _, sp in frames:
        if any(start + BELOW <= sp < start + len(data) - 1024 for start, data in memory):
            continue
        start = sp - BELOW & ~7
        data = read(start, ABOVE)
        if not data:
            start = sp & ~(PAGE - 1)
            data = read(start, ABOVE)
        data = data[: len(data) & ~7]
        if data:
            memory.append((start, data))
    return memory


class Unsigned:
    """While it lasts, return addresses on the stack and in the link register carry no signature: gdb 13
    cannot take them off, because qemu 7.2 does not tell it which bits they are."""

    def __init__(self, machine, mappings):
        self.machine, self.mappings, self.before = machine, mappings, []

    def plain(self, word):
        low = word & ADDRESS
        code = any(start <= low < end for start, end, _, _ in self.mappings)
        return low if code and word != low else None

    def __enter__(self):
        if self.machine.x86_64:
            return
        inferior = gdb.selected_inferior()
        sp = register("sp") & ~7
        data = read(sp, ABOVE)
        for at in range(0, len(data) & ~7, 8):
            word = struct.unpack_from("<Q", data, at)[0]
            plain = self.plain(word)
            if plain is not None:
                inferior.write_memory(sp + at, struct.pack("<Q", plain))
                self.before.append((sp + at, word))
        self.link = register("x30")
        plain = self.plain(self.link)
        if plain is not None:
            gdb.execute(f"set var $x30 = {plain:#x}")
        gdb.invalidate_cached_frames()

    def __exit__(self, *_):
        if self.machine.x86_64:
            return
        inferior = gdb.selected_inferior()
        for address, word in self.before:
            inferior.write_memory(address, struct.pack("<Q", word))
        gdb.execute(f"set var $x30 = {self.link:#x}")
        gdb.invalidate_cached_frames()


class Recorder:
    def __init__(self):
        self.machine = Machine()
        self.seen = set()
        self.count = 0
        self.most = PLAN["count"]

    def full(self):
        return self.count >= self.most

    def capture(self):
        """Writes down where the program is, unless it was there before."""
        machine = self.machine
        pid = gdb.selected_inferior().pid
        native = machine.x86_64
        mappings = mappings_of_process(pid) if native else mappings_of_files()
        registers = machine.registers()
        pc = register(machine.pc)
        frames = [(0, register(machine.sp))]
        memory = stack_memory(frames)
        with Unsigned(machine, mappings):
            frames, reason = backtrace(machine, mappings)
        memory = stack_memory(frames)
        key = tuple(pc for pc, _ in frames)
        if key in self.seen or self.full():
            return
        self.seen.add(key)
        lines = [f"case {PLAN['name']} {self.count}", f"machine {machine.name}"]
        lines.append(f"pc {pc:x}")
        lines.append("registers " + " ".join(f"{value:x}" for value in registers))
        lines += [f"map {start:x} {end:x} {offset:x} {path}" for start, end, offset, path in mappings]
        lines += [f"mem {start:x} {data.hex()}" for start, data in memory]
        lines.append("gdb " + " ".join(f"{pc:x}" for pc, _ in frames))
        lines.append(f"stop {reason}")
        with open(PLAN["out"], "a") as out:
            out.write("\n".join(lines) + "\n")
        self.count += 1

    def alive(self):
        return bool(gdb.selected_inferior().pid)

    def steps(self, count, stride):
        """Steps by instructions, and captures every `stride`th."""
        for step in range(count):
            if not self.alive() or self.full():
                return
            gdb.execute("stepi", to_string=True)
            if self.alive() and step % stride == 0:
                self.capture()

    def breaks(self):
        for place in PLAN["at"]:
            gdb.execute(f"break {place}", to_string=True)
        for _ in range(PLAN.get("hits", 1)):
            gdb.execute("continue", to_string=True)
            if not self.alive():
                return
            self.capture()
            self.steps(PLAN.get("steps", 0), PLAN.get("stride", 1))
            if not self.alive() or self.full():
                return

    def random(self):
        gdb.execute("handle SIGSTOP stop print nopass", to_string=True)
        for turn in range(self.most * 4):
            pid = gdb.selected_inferior().pid
            # A process of its own: while gdb waits, it lets no thread of Python run.
            command = f"sleep {PLAN.get('every', 0.15)}; kill -STOP {pid}"
            timer = subprocess.Popen(["sh", "-c", command], stderr=subprocess.DEVNULL)
            gdb.execute("continue", to_string=True)
            timer.wait()
            if not self.alive() or self.full():
                return
            # At first the program is being loaded.
            if turn > 0:
                self.capture()


def main():
    for setting in [
        "pagination off",
        "confirm off",
        "backtrace past-main on",
        "backtrace past-entry on",
        "backtrace limit unlimited",
        "breakpoint pending on",
        "debuginfod enabled off",
        "auto-load safe-path /",
        "step-mode on",
        "print inferior-events off",
    ]:
        gdb.execute(f"set {setting}", to_string=True)
    for number in PLAN.get("pass", []):
        gdb.execute(f"handle {number} nostop noprint pass", to_string=True)
    gdb.execute(f"file {PLAN['argv'][0]}", to_string=True)
    if "remote" in PLAN:
        gdb.execute(f"set sysroot {PLAN['sysroot']}", to_string=True)
        gdb.execute(f"target remote {PLAN['remote']}", to_string=True)
    else:
        words = " ".join("'" + word + "'" for word in PLAN["argv"][1:])
        gdb.execute(f"set args {words} >/dev/null 2>&1 </dev/null", to_string=True)
        # The loader of the process first, so that breakpoints in libraries find their place.
        gdb.execute("starti", to_string=True)
    recorder = Recorder()
    if "at" in PLAN:
        recorder.breaks()
    else:
        recorder.random()
    if recorder.alive():
        gdb.execute("kill", to_string=True)
    print(f"{PLAN['name']}: {recorder.count} cases")


main()
