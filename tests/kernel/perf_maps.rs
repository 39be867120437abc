//! Names that processes give to the code they compile at run time, by their perf maps.

use std::{
    fs,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result};
use podflame_tests::{Cgroup, wait_for};

use crate::{
    Test, python,
    record::{Recorded, Recording},
};

pub(crate) const TESTS: &[Test] = &[
    ("node_names_its_functions", node_names_its_functions),
    ("python_names_its_functions", python_names_its_functions),
];

/// A process that writes a perf map. It is ended, and the map removed, when dropped.
struct Mapped {
    child: Child,
    cgroup: Cgroup,
}

impl Mapped {
    fn start(command: &mut Command) -> Result<Self> {
        let cgroup = Cgroup::new("podflame-perf-map")?;
        cgroup.enter(command)?;
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let child = command.spawn().with_context(|| format!("start {command:?}"))?;
        Ok(Self { child, cgroup })
    }

    fn map(&self) -> PathBuf {
        format!("/tmp/perf-{}.map", self.child.id()).into()
    }

    /// Records it for some seconds once it has compiled its functions.
    fn record(self) -> Result<Recorded> {
        wait_for("a program to compile its functions", Duration::from_secs(30), || {
            Ok((self.cgroup.cpu_time()? > Duration::from_secs(1)).then_some(()))
        })?;
        let pid = self.child.id().to_string();
        Recording::start(&["--pid", &pid, "--seconds", "4", "--frequency", "299"])?.finish()
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // These fail only if it has ended already, or has written no map.
        drop(self.child.kill());
        drop(self.child.wait());
        drop(fs::remove_file(self.map()));
    }
}

/// The part of the stacks, in percent, with a user frame whose name holds this.
fn with(recorded: &Recorded, name: &str) -> f64 {
    recorded.percent(|sample| sample.frames("user").any(|frame| frame.contains(name)))
}

fn node_names_its_functions() -> Result<()> {
    let script = "function fib(n) { return n < 2 ? n : fib(n - 1) + fib(n - 2) }
        function sorts() { [...Array(1000).keys()].sort((a, b) => b - a) }
        for (;;) { fib(20); sorts(); }";
    let mapped = Mapped::start(Command::new("node").args([
        "--perf-basic-prof",
        "--logfile=/dev/null",
        "--no-logfile-per-isolate",
        "-e",
        script,
    ]))?;
    let recorded = mapped.record()?;
    // What is called in a loop may become a part of the script's own code.
    let [fib, all] = ["fib [eval]", "[eval]"].map(|name| with(&recorded, name));
    println!("fib on {fib:.1} % of the stacks, functions of the script on {all:.1} %");
    assert!(fib > 20.0 && all > 90.0, "{fib} % and {all} %");
    Ok(())
}

fn python_names_its_functions() -> Result<()> {
    // It came with 3.12.
    let found = [13, 12].into_iter().find_map(python::find);
    let Some(python) = found else {
        println!("neither Python 3.12 nor 3.13 is here");
        return Ok(());
    };
    let script = "
def fib(n): return n if n < 2 else fib(n - 1) + fib(n - 2)
def sorts(): return sorted(range(1000), key=lambda x: -x)
while True: fib(15); sorts()";
    let mapped = Mapped::start(Command::new(python).args(["-X", "perf", "-c", script]))?;
    let recorded = mapped.record()?;
    // Each function is called by a piece of code of its own (Python/perf_trampoline.c), which keeps no
    // frame pointer: native frames end at the innermost such. The walk over Python's own frames does not.
    let by_map = with(&recorded, "py::");
    let outside =
        |name: &str| recorded.percent(|sample| sample.frames("python").any(|f| f == name));
    let [fib, sorts] = ["fib", "sorts"].map(outside);
    println!("{by_map:.1} % with names of the map; fib on {fib:.1} %, sorts on {sorts:.1} %");
    assert!(by_map > 50.0, "{by_map} %");
    assert!(fib > 10.0 && sorts > 10.0 && fib + sorts > 90.0, "{fib} % and {sorts} %");
    for name in recorded.samples().flat_map(|sample| sample.frames("user").collect::<Vec<_>>()) {
        let known = ["py::fib:", "py::sorts:", "py::sorts.<locals>.<lambda>:", "py::<module>:"];
        let of_map = name.starts_with("py::");
        assert!(!of_map || known.iter().any(|known| name.starts_with(known)), "{name}");
    }
    Ok(())
}
