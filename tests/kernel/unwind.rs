//! Whole stacks of programs that nobody built for profiling: Debian's own, and what compilers make by
//! default. Figures for a table: `PODFLAME_UNWIND_SECONDS=60 cargo xtask test --filter unwind::`.

use std::{
    fs,
    io::{Read as _, Write as _},
    os::unix::{net::UnixStream, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use podflame_tests::{Cgroup, tool, wait_for};
use serde_json::Value;

use crate::{
    Test,
    agreement::Beside,
    record::{Recorded, Recording},
    running::{Agent, count},
};

pub(crate) const TESTS: &[Test] = &[
    ("redis", redis),
    ("nginx", nginx),
    ("postgres", postgres),
    ("sqlite3", sqlite3),
    ("python3", python3),
    ("node", node),
    ("openssl", openssl),
    ("cpp_that_throws", cpp_that_throws),
    ("rust_release", rust_release),
    ("go", go),
    ("go_without_symbols", go_without_symbols),
    ("processes_are_ready_soon", processes_are_ready_soon),
    ("nothing_is_lost_to_a_large_table", nothing_is_lost_to_a_large_table),
];

/// Longer than a server takes to start on a busy machine.
const STARTED: Duration = Duration::from_secs(30);

/// CPU time after which a program has started, and compiled what it compiles while it runs.
const WARM: Duration = Duration::from_secs(1);

/// Seconds of a recording: enough for a check, too few for figures of programs with flat profiles.
fn seconds() -> Result<u64> {
    let text = std::env::var("PODFLAME_UNWIND_SECONDS").unwrap_or_else(|_| "10".into());
    text.parse().with_context(|| format!("PODFLAME_UNWIND_SECONDS: {text:?}"))
}

/// A process beside the one that is profiled; ended when dropped.
struct Client(Child);

impl Drop for Client {
    fn drop(&mut self) {
        // Both fail only if it has ended already.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// What is profiled, and its files. The processes end with the cgroup.
struct Profiled {
    cgroup: Cgroup,
    dir: tempfile::TempDir,
    children: Vec<Child>,
}

impl Profiled {
    fn new() -> Result<Self> {
        let (cgroup, dir) = (Cgroup::new("podflame-unwind")?, tempfile::tempdir()?);
        Ok(Self { cgroup, dir, children: Vec::new() })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn start(&mut self, command: &mut Command) -> Result<()> {
        self.cgroup.enter(command)?;
        self.children.push(quiet(command)?);
        Ok(())
    }

    /// Records it, and holds the account to the promise: of the stacks that were walked once the tables
    /// were there, 99 of a hundred are complete.
    fn record(self, name: &str) -> Result<Recorded> {
        wait_for("a program to do its work", STARTED, || {
            Ok((self.cgroup.cpu_time()? > WARM).then_some(()))
        })?;
        let cgroup = self.cgroup.path();
        let seconds = seconds()?.to_string();
        let words: [&std::ffi::OsStr; 6] = [
            "--cgroup".as_ref(),
            cgroup.as_ref(),
            "--frequency".as_ref(),
            "997".as_ref(),
            "--seconds".as_ref(),
            seconds.as_ref(),
        ];
        let pids = self.cgroup.processes()?;
        let beside = Beside::start()?;
        let recorded = Recording::start(&words)?.finish()?;
        let compared = beside.compare(&pids, &recorded)?;
        let end = |reason: &str| recorded.count("on_cpu", &format!("/stack_ends/{reason}"));
        let early = end("no_frame_pointer");
        let walked = recorded.count("on_cpu", "/stored") - end("none") - early;
        let complete = end("complete");
        let percent = 100.0 * complete as f64 / walked as f64;
        println!("{name}: {percent:.2} % of {walked} stacks complete, {early} before its tables");
        let ends = &recorded.summary["account"]["on_cpu"]["stack_ends"];
        assert!(walked > 150, "{name}: {walked} samples only: {ends}");
        assert!(percent >= 99.0, "{name}: {percent} %: {ends}");
        assert!(early < walked, "{name}: not ready for long: {ends}");
        compared.check(name);
        Ok(recorded)
    }
}

impl Drop for Profiled {
    fn drop(&mut self) {
        for child in &mut self.children {
            // It fails only if it has ended already; its own children end with the cgroup.
            drop(child.kill());
            drop(child.wait());
        }
    }
}

fn quiet(command: &mut Command) -> Result<Child> {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().with_context(|| format!("start {command:?}"))
}

fn there(path: &Path) -> Result<()> {
    wait_for("a server's socket", STARTED, || Ok(UnixStream::connect(path).is_ok().then_some(())))
}

fn redis() -> Result<()> {
    let mut server = Profiled::new()?;
    let socket = server.path("socket");
    let mut command = Command::new("redis-server");
    command.args(["--port", "0", "--save", "", "--unixsocket"]).arg(&socket);
    server.start(&mut command)?;
    there(&socket)?;
    let mut command = Command::new("redis-benchmark");
    command.args(["-q", "-n", "100000000", "-t", "lpush,lrange_100", "-s"]).arg(&socket);
    let _clients = Client(quiet(&mut command)?);
    let recorded = server.record("redis-server")?;
    has(&recorded, "aeMain", 90.0);
    Ok(())
}

fn nginx() -> Result<()> {
    let mut server = Profiled::new()?;
    let (socket, configuration) = (server.path("socket"), server.path("nginx.conf"));
    let text = format!(
        "user root; worker_processes 1; daemon off; error_log /dev/null; pid {pid}; events {{}}
        http {{ access_log off; gzip on; gzip_types *; gzip_min_length 1; keepalive_requests 1000000;
        server {{ listen unix:{socket}; location / {{ root /usr/share/doc; autoindex on; }} }} }}",
        pid = server.path("pid").display(),
        socket = socket.display(),
    );
    fs::write(&configuration, text)?;
    server.start(Command::new("nginx").arg("-c").arg(&configuration))?;
    there(&socket)?;
    let stop = Arc::new(AtomicBool::new(false));
    let client = thread::spawn({
        let stop = Arc::clone(&stop);
        move || -> Result<u64> {
            let mut bytes = 0;
            while !stop.load(Ordering::Relaxed) {
                let mut stream = UnixStream::connect(&socket)?;
                stream.write_all(
                    b"GET / HTTP/1.1\r\nHost: a\r\nAccept-Encoding: gzip\r\nConnection: close\r\n\r\n",
                )?;
                bytes += stream.read_to_end(&mut Vec::new())? as u64;
            }
            Ok(bytes)
        }
    });
    let recorded = server.record("nginx");
    stop.store(true, Ordering::Relaxed);
    // Its last request fails when the server ends.
    drop(client.join());
    has(&recorded?, "__libc_start_call_main", 90.0);
    Ok(())
}

fn postgres() -> Result<()> {
    let mut server = Profiled::new()?;
    let programs = fs::read_dir("/usr/lib/postgresql").context("PostgreSQL is not installed")?;
    let version = programs.filter_map(Result::ok).next().context("PostgreSQL has no version")?;
    let programs = version.path().join("bin");
    // It does not run as root.
    let id = |which: &str| -> Result<u32> {
        let output = Command::new("id").args([which, "postgres"]).output()?;
        Ok(String::from_utf8(output.stdout)?.trim().parse()?)
    };
    let (user, group) = (id("-u")?, id("-g")?);
    std::os::unix::fs::chown(server.dir.path(), Some(user), Some(group))?;
    let (data, socket) = (server.path("data"), server.path(".s.PGSQL.5432"));
    let as_postgres = |program: &str| {
        let mut command = Command::new(programs.join(program));
        command.uid(user).gid(group).current_dir("/");
        command
    };
    let made = as_postgres("initdb").arg("-D").arg(&data).output()?;
    ensure!(made.status.success(), "initdb: {}", String::from_utf8_lossy(&made.stderr));
    let mut command = as_postgres("postgres");
    command.arg("-D").arg(&data).args(["-c", "listen_addresses=", "-k"]).arg(server.dir.path());
    server.start(&mut command)?;
    there(&socket)?;
    let mut fill = as_postgres("pgbench");
    fill.args(["-i", "-q", "-h"]).arg(server.dir.path()).arg("postgres");
    wait_for("a database to be filled", STARTED, || {
        Ok(fill.output()?.status.success().then_some(()))
    })?;
    let mut command = as_postgres("pgbench");
    command.args(["-S", "-T", "600", "-h"]).arg(server.dir.path()).arg("postgres");
    let _client = Client(quiet(&mut command)?);
    let recorded = server.record("postgres")?;
    has(&recorded, "PostgresMain", 80.0);
    Ok(())
}

fn sqlite3() -> Result<()> {
    let mut shell = Profiled::new()?;
    let query =
        "with recursive c(x) as (select 1 union all select x + 1 from c where x < 1000000000)
        select sum(x * x % 7), count(distinct x % 1000) from c";
    shell.start(Command::new("sqlite3").args([":memory:", query]))?;
    let recorded = shell.record("sqlite3")?;
    has(&recorded, "sqlite3_step", 90.0);
    Ok(())
}

fn python3() -> Result<()> {
    let mut interpreter = Profiled::new()?;
    let script = "
def fib(n): return n if n < 2 else fib(n - 1) + fib(n - 2)
while True: sorted(range(1000), key=lambda x: -x); fib(15)";
    interpreter.start(Command::new("/usr/bin/python3").args(["-c", script]))?;
    let recorded = interpreter.record("python3")?;
    has(&recorded, "Py_BytesMain", 90.0);
    Ok(())
}

fn node() -> Result<()> {
    let mut interpreter = Profiled::new()?;
    let script = "function fib(n) { return n < 2 ? n : fib(n - 1) + fib(n - 2) }
        for (;;) { fib(20); [...Array(1000).keys()].sort((a, b) => b - a); }";
    interpreter.start(Command::new("node").args(["-e", script]))?;
    let recorded = interpreter.record("node")?;
    has(&recorded, "node::Start", 80.0);
    Ok(())
}

fn openssl() -> Result<()> {
    let mut program = Profiled::new()?;
    // Ten things, each so long: together longer than the recording.
    let each = (seconds()? / 5).max(2).to_string();
    let words = ["speed", "-seconds", &each, "rsa2048", "ecdsap256", "sha256"];
    program.start(Command::new("openssl").args(words))?;
    let recorded = program.record("openssl speed")?;
    has(&recorded, "__libc_start_call_main", 90.0);
    Ok(())
}

/// Compiles a program of `tests/programs` and starts it.
fn compiled(compiler: &mut Command, source: &str) -> Result<Profiled> {
    let mut program = Profiled::new()?;
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("programs").join(source);
    let output = compiler.arg("-o").arg(program.path("program")).arg(source).output();
    let output = output.with_context(|| format!("start {compiler:?}"))?;
    ensure!(output.status.success(), "{compiler:?}: {}", String::from_utf8_lossy(&output.stderr));
    program.start(&mut Command::new(program.path("program")))?;
    Ok(program)
}

fn cpp_that_throws() -> Result<()> {
    let program = compiled(Command::new("g++").arg("-O2"), "throw.cc")?;
    let recorded = program.record("C++ that throws")?;
    has(&recorded, "_Unwind_RaiseException", 20.0);
    has(&recorded, "main", 90.0);
    Ok(())
}

fn rust_release() -> Result<()> {
    let program = compiled(Command::new("rustc").args(["--edition", "2024", "-O"]), "trees.rs")?;
    let recorded = program.record("Rust release")?;
    has(&recorded, "main", 90.0);
    Ok(())
}

fn go() -> Result<()> {
    let cache = tempfile::tempdir()?;
    let mut compiler = go_build(cache.path())?;
    let program = compiled(&mut compiler, "work.go")?;
    let recorded = program.record("Go")?;
    has(&recorded, "runtime.goexit.abi0", 50.0);
    Ok(())
}

/// Without a symbol table and DWARF, Go still knows its functions by itself. perf does not.
fn go_without_symbols() -> Result<()> {
    let cache = tempfile::tempdir()?;
    let mut compiler = go_build(cache.path())?;
    let program = compiled(compiler.args(["-ldflags", "-s -w"]), "work.go")?;
    wait_for("a program to do its work", STARTED, || {
        Ok((program.cgroup.cpu_time()? > WARM).then_some(()))
    })?;
    let cgroup = program.cgroup.path();
    let words = ["--cgroup".as_ref(), cgroup.as_os_str(), "--seconds".as_ref(), "4".as_ref()];
    let recorded = Recording::start(&words)?.finish()?;
    // Go itself has no suffix for what is called from assembler.
    has(&recorded, "runtime.goexit", 50.0);
    has(&recorded, "main.fib", 2.0);
    Ok(())
}

fn go_build(cache: &Path) -> Result<Command> {
    let mut compiler = Command::new(tool("PODFLAME_GO")?);
    compiler.arg("build").env("GOCACHE", cache).env("GO111MODULE", "off");
    Ok(compiler)
}

/// A function, by its whole name, is on at least so many percent of the stacks.
fn has(recorded: &Recorded, function: &str, least: f64) {
    let percent = recorded.percent(|sample| {
        let mut frames = sample.frames("user");
        frames.any(|name| name == function || name.split('(').next() == Some(function))
            || sample.has(function)
    });
    assert!(percent >= least, "{function} is on {percent} % of the stacks");
}

/// Of the processes that start while podflame runs, 90 of a hundred are walked by tables within 300 ms
/// of the first event that podflame has of them. One after the other, since so many busy ones at once
/// would wait for a CPU, and podflame with them.
fn processes_are_ready_soon() -> Result<()> {
    let mut programs = Profiled::new()?;
    let cgroup = programs.cgroup.path();
    let agent = Agent::start(&["--cgroup", cgroup.to_str().context("a path that is not text")?])?;
    let script = "import re, json, ssl, sqlite3
while True: json.dumps(list(range(100)))";
    let (mut ready, mut early) = (0, 0);
    for started in 1..=20 {
        programs.start(Command::new("/usr/bin/python3").args(["-c", script]))?;
        (ready, early) = wait_for("a process to be ready", STARTED, || {
            let status = agent.answer(&["status", "--format", "json"])?;
            let status: Value = serde_json::from_slice(&status)?;
            let ready = count(&status, "/unwinding/processes_ready")?;
            let early = count(&status, "/unwinding/processes_ready_early")?;
            Ok((ready >= started).then_some((ready, early)))
        })?;
        for mut child in programs.children.drain(..) {
            child.kill()?;
            child.wait()?;
        }
    }
    println!("{early} of {ready} processes were ready within 300 ms");
    assert!(early * 10 >= ready * 9, "{early} of {ready} processes within 300 ms");
    Ok(())
}

/// Node has 370,000 rows in 94 MB, more than most: while its table is made, samples go on, by frame
/// pointers, and none is lost. The thread that makes it gives way to others.
fn nothing_is_lost_to_a_large_table() -> Result<()> {
    let mut program = Profiled::new()?;
    let cgroup = program.cgroup.path();
    let words = ["--frequency", "997", "--cgroup", cgroup.to_str().context("a path not of text")?];
    let recording = Recording::start(&words)?;
    program.start(Command::new("node").args(["-e", "for (;;) [...Array(1000).keys()].sort()"]))?;
    wait_for("a program to run for long", STARTED, || {
        Ok((program.cgroup.cpu_time()? > 3 * WARM).then_some(()))
    })?;
    let niceness = niceness(recording.pid(), "unwinder")?;
    assert!(niceness > 0, "the niceness of the thread that makes tables is {niceness}");
    // Its end checks E1 to E4.
    let recorded = recording.stop()?;
    let account = &recorded.summary["account"]["on_cpu"];
    for whose in ["dropped_in_kernel", "dropped_in_agent"] {
        let lost = account[whose].as_object().into_iter().flatten();
        assert!(lost.into_iter().all(|(_, count)| count == 0), "{account}");
    }
    let end = |reason: &str| recorded.count("on_cpu", &format!("/stack_ends/{reason}"));
    let (early, complete) = (end("no_frame_pointer"), end("complete"));
    println!("{early} samples while there was no table, {complete} complete ones, none lost");
    assert!(early > 0 && complete > early, "{account}");
    Ok(())
}

/// The niceness of a process's thread, by the thread's name.
fn niceness(pid: u32, name: &str) -> Result<i32> {
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        let stat = fs::read_to_string(thread?.path().join("stat"))?;
        let (head, rest) = stat.rsplit_once(") ").context("no name in a thread's stat")?;
        if head.ends_with(&format!("({name}")) {
            // The 19th field of proc_pid_stat(5); the name is the second.
            let field = rest.split(' ').nth(16).context("no niceness in a thread's stat")?;
            return Ok(field.parse()?);
        }
    }
    anyhow::bail!("{pid} has no thread {name}")
}
