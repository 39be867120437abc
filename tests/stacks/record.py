# Records stacks of real programs with gdb as the judge, for the tests of the stack walk. `cargo xtask
# record-stacks` runs it; the raw recordings go to the directory that is its argument, from where the
# tests of `agent/src/unwinder/cases` cut out what a walk needs.
#
#   record.py DIRECTORY [PLAN...]
import json
import os
import shutil
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
ARM = "/usr/aarch64-linux-gnu"
PORT = 21934

# How each program is built: compiler, its arguments, and what it makes.
NO_FP = ["-O2", "-fomit-frame-pointer", "-fno-optimize-sibling-calls"]
FP = ["-O1", "-fno-omit-frame-pointer", "-fno-optimize-sibling-calls"]
ZOO = ["zoo.c", "zoo-x86_64.S", "-lpthread", "-ldl"]
ZOO_ARM = ["zoo.c", "zoo-aarch64.S", "-lpthread", "-ldl"]
SIGNED = ["-mbranch-protection=standard"]
PLAIN = ["-mbranch-protection=none"]
BUILDS = [
    ["zoo", "gcc", NO_FP + ["-pie", "-fPIE"] + ZOO],
    ["zoo-fp", "gcc", FP + ["-no-pie", "-Wl,-z,lazy"] + ZOO],
    ["zoo-static", "gcc", NO_FP + ["-static"] + ZOO],
    ["zoo-static-pie", "gcc", NO_FP + ["-static-pie", "-fPIE"] + ZOO],
    ["zoo-musl", "musl-gcc", NO_FP + ["-static"] + ZOO],
    ["plugin.so", "gcc", NO_FP + ["-shared", "-fPIC", "plugin.c"]],
    ["throws", "g++", NO_FP + ["throws.cc"]],
    ["zoo-arm", "aarch64-linux-gnu-gcc", NO_FP + PLAIN + ZOO_ARM],
    ["zoo-arm-signed", "aarch64-linux-gnu-gcc", NO_FP + SIGNED + ZOO_ARM],
    ["zoo-arm-fp", "aarch64-linux-gnu-gcc", FP + PLAIN + ["-static"] + ZOO_ARM],
    ["zoo-arm-static", "aarch64-linux-gnu-gcc", NO_FP + SIGNED + ["-static"] + ZOO_ARM],
    ["plugin-arm.so", "aarch64-linux-gnu-gcc", NO_FP + SIGNED + ["-shared", "-fPIC", "plugin.c"]],
    ["throws-arm", "aarch64-linux-gnu-g++", NO_FP + SIGNED + ["throws.cc"]],
]


def plan(name, argv, count, **how):
    return {"name": name, "argv": argv, "count": count, "machine": "x86_64", **how}


def x86_64():
    """What is recorded on this machine. `at`: breakpoints, of which `hits` are taken, and from each so
    many `steps` of one instruction with every `stride`th captured. Without it: at random times."""
    plans = []
    zoo = [
        ("zoo", "deep", dict(count=3, at=["leaf"], steps=60, stride=23)),
        ("zoo", "signal", dict(count=5, at=["leaf"], steps=900, stride=5, **{"pass": ["SIGUSR1"]})),
        ("zoo-fp", "signal", dict(count=2, at=["handle"], steps=9, stride=4, **{"pass": ["SIGUSR1"]})),
        ("zoo", "alternate", dict(count=3, at=["leaf"], steps=40, stride=13, **{"pass": ["SIGUSR1"]})),
        ("zoo", "fault", dict(count=3, at=["handle_fault"], steps=30, stride=11, **{"pass": ["SIGSEGV"]})),
        ("zoo", "restorer", dict(count=3, at=["leaf"], steps=200, stride=9, **{"pass": ["SIGUSR1"]})),
        ("zoo", "restorer-fault", dict(count=2, at=["handle_fault"], steps=9, stride=5, **{"pass": ["SIGSEGV"]})),
        ("zoo", "grown", dict(count=4, at=["grown", "leaf"], hits=2, steps=30, stride=9)),
        ("zoo", "aligned", dict(count=12, at=["aligned", "leaf"], hits=2, steps=36, stride=3)),
        ("zoo-fp", "aligned", dict(count=3, at=["leaf"], steps=9, stride=3)),
        ("zoo", "bare-fp", dict(count=3, at=["bare_with_frame_pointer", "leaf"], hits=2, steps=2)),
        ("zoo", "bare", dict(count=3, at=["bare_without_frame_pointer", "leaf"], hits=2, steps=2)),
        ("zoo-fp", "bare-fp", dict(count=5, at=["bare_with_frame_pointer", "leaf"], hits=2, steps=4)),
        ("zoo-fp", "bare", dict(count=3, at=["bare_without_frame_pointer", "leaf"], hits=2, steps=2)),
        ("zoo", "sort", dict(count=2, at=["leaf"], hits=2)),
        ("zoo", "thread", dict(count=2, at=["leaf"], steps=3, stride=2)),
        ("zoo", "exit", dict(count=2, at=["leaf"], steps=30, stride=20)),
        ("zoo", "clock", dict(count=4, at=["clock_gettime"], steps=90, stride=12)),
        ("zoo-fp", "plt", dict(count=5, at=["*'getppid@plt'"], steps=900, stride=1)),
        ("zoo-static", "signal", dict(count=2, at=["leaf"], steps=20, stride=9, **{"pass": ["SIGUSR1"]})),
        ("zoo-static-pie", "sort", dict(count=2, at=["leaf"], steps=9, stride=4)),
        ("zoo-musl", "deep", dict(count=2, at=["leaf"], steps=20, stride=9)),
        ("zoo-musl", "signal", dict(count=3, at=["leaf"], steps=60, stride=9, **{"pass": ["SIGUSR1"]})),
        ("zoo-musl", "sort", dict(count=2, at=["leaf"], hits=2)),
        ("zoo-musl", "thread", dict(count=1, at=["leaf"])),
    ]
    for program, what, how in zoo:
        plans.append(plan(f"{program} {what}", [program, what], **how))
    plans.append(plan("zoo deepest", ["zoo", "deep", "300"], 1, at=["leaf"]))
    plans.append(plan("zoo plugin", ["zoo", "plugin", "./plugin.so"], 2, at=["leaf", "plugin_enter"], hits=2))
    plans.append(plan("throws random", ["throws"], 6, every=0.1))
    plans.append(plan("throws", ["throws", "once"], 5, at=["leaf"], steps=9000, stride=331))
    real = [
        ("openssl sha256", ["openssl", "speed", "-seconds", "9", "-evp", "sha256"], 4),
        ("openssl aes-128-gcm", ["openssl", "speed", "-seconds", "9", "-evp", "aes-128-gcm"], 4),
        ("openssl rsa2048", ["openssl", "speed", "-seconds", "9", "rsa2048"], 6),
        ("openssl ecdsap256", ["openssl", "speed", "-seconds", "9", "ecdsap256"], 4),
        ("python3", ["/usr/bin/python3", "-c", "import json; any(json.loads(json.dumps(list(range(99)))) is None for _ in iter(int, 1))"], 4),
        ("node", ["node", "-e", "for(;;) JSON.parse(JSON.stringify(Array.from({length:99},(_, i)=>String(i))))"], 4),
        ("perl", ["perl", "-e", "while (1) { $n{$_ % 99} .= sort { $a <=> $b } (3, 1, 2) for 1..999; %n = () }"], 3),
        ("sqlite3", ["sqlite3", ":memory:", "with recursive c(x) as (select 1 union all select x+1 from c) select sum(x*random()) from c limit 1"], 3),
        ("bash", ["bash", "-c", "while :; do x=${x:0:99}$((x + 1)); done"], 3),
        ("xz", ["xz", "-9", "-c", "/usr/bin/gdb"], 3),
    ]
    for name, argv, count in real:
        path = shutil.which(argv[0])
        if path:
            plans.append(plan(name, [os.path.realpath(path)] + argv[1:], count))
    return plans


def aarch64():
    """The same under qemu, where programs cannot be stopped at random times."""
    plans = []
    zoo = [
        ("zoo-arm", "deep", dict(count=3, at=["leaf"], steps=60, stride=23)),
        ("zoo-arm", "sort", dict(count=3, at=["leaf"], hits=2, steps=9, stride=4)),
        ("zoo-arm", "grown", dict(count=3, at=["grown", "leaf"], hits=2, steps=12, stride=5)),
        ("zoo-arm", "thread", dict(count=1, at=["leaf"])),
        ("zoo-arm", "exit", dict(count=2, at=["leaf"], steps=20, stride=12)),
        ("zoo-arm", "signal", dict(count=2, at=["leaf"], steps=20, stride=9, **{"pass": ["SIGUSR1"]})),
        ("zoo-arm", "fault", dict(count=2, at=["handle_fault"], steps=12, stride=9, **{"pass": ["SIGSEGV"]})),
        ("zoo-arm", "restorer", dict(count=3, at=["leaf"], steps=200, stride=9, **{"pass": ["SIGUSR1"]})),
        ("zoo-arm", "restorer-fault", dict(count=3, at=["handle_fault"], steps=12, stride=5, **{"pass": ["SIGSEGV"]})),
        ("zoo-arm", "bare-fp", dict(count=2, at=["bare_with_frame_pointer", "leaf"], hits=2, steps=3)),
        ("zoo-arm", "bare", dict(count=2, at=["bare_without_frame_pointer", "leaf"], hits=2, steps=3)),
        ("zoo-arm-signed", "deep", dict(count=4, at=["leaf"], steps=60, stride=17)),
        ("zoo-arm-signed", "sort", dict(count=4, at=["leaf"], hits=2, steps=9, stride=3)),
        ("zoo-arm-signed", "aligned", dict(count=4, at=["aligned", "leaf"], hits=2, steps=12, stride=4)),
        ("zoo-arm-signed", "signal", dict(count=2, at=["leaf"], steps=20, stride=9, **{"pass": ["SIGUSR1"]})),
        ("zoo-arm-signed", "restorer", dict(count=3, at=["leaf"], steps=200, stride=9, **{"pass": ["SIGUSR1"]})),
        ("zoo-arm-signed", "alternate", dict(count=2, at=["leaf"], steps=20, stride=9, **{"pass": ["SIGUSR1"]})),
        ("zoo-arm-signed", "plt", dict(count=4, at=["*'getppid@plt'"], steps=300, stride=1)),
        ("zoo-arm-fp", "deep", dict(count=2, at=["leaf"], steps=20, stride=9)),
        ("zoo-arm-fp", "fault", dict(count=2, at=["handle_fault"], steps=12, stride=9, **{"pass": ["SIGSEGV"]})),
        ("zoo-arm-static", "sort", dict(count=3, at=["leaf"], steps=20, stride=9)),
        ("zoo-arm-static", "exit", dict(count=2, at=["leaf"], steps=20, stride=9)),
    ]
    for program, what, how in zoo:
        plans.append(plan(f"{program} {what}", [program, what], **how))
    plans.append(plan("zoo-arm-signed deepest", ["zoo-arm-signed", "deep", "300"], 1, at=["leaf"]))
    plans.append(plan("zoo-arm-signed plugin", ["zoo-arm-signed", "plugin", "./plugin-arm.so"], 2, at=["leaf", "plugin_enter"], hits=2))
    plans.append(plan("throws-arm", ["throws-arm", "once"], 6, at=["leaf"], steps=4000, stride=331))
    for one in plans:
        one |= {"machine": "aarch64", "remote": f"localhost:{PORT}", "sysroot": ARM}
    return plans


def build(programs):
    os.makedirs(programs, exist_ok=True)
    for name, compiler, arguments in BUILDS:
        made = os.path.join(programs, name)
        if not os.path.exists(made):
            sources = [os.path.join(HERE, a) if a.endswith((".c", ".cc", ".S")) else a for a in arguments]
            subprocess.run([compiler, "-o", made] + sources, check=True)


def record(one, programs, out):
    if os.path.exists(os.path.join(programs, one["argv"][0])):
        one["argv"][0] = os.path.join(programs, one["argv"][0])
    one["out"] = os.path.join(out, one["name"].replace(" ", "-") + ".raw")
    if os.path.exists(one["out"]):
        os.remove(one["out"])
    server = None
    gdb = "gdb"
    if "remote" in one:
        gdb = "gdb-multiarch"
        # `max` signs return addresses; of its vectors gdb takes the wrong length in signal frames.
        words = ["qemu-aarch64", "-cpu", "max,sve=off,sme=off", "-g", str(PORT), "-L", ARM]
        server = subprocess.Popen(words + one["argv"], cwd=programs, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    environment = os.environ | {"STACKS_PLAN": json.dumps(one)}
    words = ["timeout", "120", gdb, "-nx", "-batch", "-q", "-x", os.path.join(HERE, "in_gdb.py")]
    done = subprocess.run(words, cwd=programs, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if server:
        server.terminate()
        server.wait()
    lines = [line for line in done.stdout.splitlines() if line.startswith(one["name"] + ":")]
    if not lines:
        print(f"{one['name']}: gdb failed:\n{done.stdout[-500:]}{done.stderr[-1500:]}")
    else:
        print(lines[0], flush=True)


def main():
    out = os.path.abspath(sys.argv[1])
    programs = os.path.join(out, "programs")
    build(programs)
    for one in x86_64() + aarch64():
        if len(sys.argv) < 3 or any(one["name"].startswith(name) for name in sys.argv[2:]):
            record(one, programs, out)


main()
