//! Python stacks, with each version of CPython that pyenv has here: what the interpreter says of itself
//! is what is seen of it from outside.
//!
//! `PODFLAME_BLESS=1` also writes what was read of each process for the unit tests, to
//! `tests/golden/python/stack.VERSION`.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    env,
    fmt::Write as _,
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use libtest_mimic::{Completion, Trial};
use podflame::{
    event::ProcessKey,
    python::{Code, Reader, code::Memory, version::VERSIONS},
    symbols::{Limits, Sights},
};
use podflame_tests::{NetPair, Workload, wait_for, workload};
use podflame_wire::python::{self, MAX_PYTHON_FRAMES, PythonEnd, Walk};
use serde_json::Value;
use zerocopy::IntoBytes as _;

use crate::{
    record::{Recorded, Recording, Sample},
    run,
};

/// A test of one version, by its minor number and its `python3`.
type Test = fn(u8, &Path) -> Result<()>;

/// Every version has these. What is not of the version alone is tested with the last one.
const TESTS: &[(&str, Test)] = &[
    ("offsets_are_those_of_the_headers", offsets_are_those_of_the_headers),
    ("a_stack_is_what_python_says", a_stack_is_what_python_says),
    ("shares_are_those_of_the_program", shares_are_those_of_the_program),
];

/// The tests of every version; those of a version that is not here are ignored.
pub(crate) fn trials() -> impl Iterator<Item = Trial> {
    let of_all = TESTS.iter().flat_map(|(name, test)| {
        VERSIONS.iter().map(move |version| trial(name, version.minor, *test))
    });
    let last = VERSIONS.last().map(|version| {
        let name = "a_retransmit_has_the_stack_of_its_sender";
        trial(name, version.minor, a_retransmit_has_the_stack_of_its_sender)
    });
    of_all.chain(last)
}

fn trial(name: &str, minor: u8, test: Test) -> Trial {
    Trial::ignorable_test(format!("python::{name}_3_{minor}"), move || match find(minor) {
        Some(python) => run(|| test(minor, &python)),
        None => Ok(Completion::ignored_with(format!("pyenv has no Python 3.{minor} here"))),
    })
}

/// The `python3` of a minor version.
pub(crate) fn find(minor: u8) -> Option<PathBuf> {
    let root = PathBuf::from(env::var_os("PODFLAME_PYENV")?).join("versions");
    let prefix = format!("3.{minor}.");
    let mut names = fs::read_dir(root).ok()?.filter_map(|entry| Some(entry.ok()?.path()));
    let found = names.find(|path| {
        path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&prefix))
    })?;
    let python = found.join("bin/python3");
    python.exists().then_some(python)
}

/// A script of `tests/python`.
fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("python").join(name)
}

/// What a program prints that is compiled against the headers of the version.
fn offsets_are_those_of_the_headers(minor: u8, python: &Path) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let include = python.with_file_name("../include").join(format!("python3.{minor}"));
    let program = dir.path().join("offsets");
    let status = Command::new("cc")
        .arg("-w")
        .arg("-I")
        .arg(&include)
        .arg("-I")
        .arg(include.join("internal"))
        .arg(script("offsets.c"))
        .arg("-o")
        .arg(&program)
        .status()
        .context("start cc")?;
    ensure!(status.success(), "cc: {status}");
    let printed = String::from_utf8(Command::new(&program).output()?.stdout)?;
    let version = podflame::python::version::version(minor).context("not known")?;
    let l = &version.layout;
    let known: Vec<(&str, u16)> = vec![
        ("thread_next", l.thread_next),
        ("thread_id", l.thread_id),
        ("thread_frame", l.thread_frame),
        ("current", l.current),
        ("frame_previous", l.frame_previous),
        ("frame_code", l.frame_code),
        ("frame_place", l.frame_place),
        ("frame_owner", l.frame_owner),
        ("code_start", l.code_start),
        ("first_line", version.first_line),
        ("filename", version.filename),
        ("name", version.name),
        ("lines", version.lines),
        ("traceable", version.traceable),
        ("ascii", version.ascii),
        ("compact", version.compact),
        // From 3.13 on the interpreter says these, and so is believed.
        ("interpreters", l.interpreters),
        ("interpreter_next", l.interpreter_next),
        ("interpreter_threads", l.interpreter_threads),
    ];
    let known = known.iter().filter(|(name, _)| minor < 13 || !name.starts_with("interpreter"));
    let known =
        known.fold(String::new(), |text, (name, offset)| text + &format!("{name} {offset}\n"));
    assert_eq!(known, printed, "3.{minor}");
    Ok(())
}

/// Memory of a process that remembers what was read of it.
struct Recorder {
    memory: File,
    read: RefCell<BTreeMap<u64, Vec<u8>>>,
}

impl Memory for Recorder {
    fn read(&self, address: u64, into: &mut [u8]) -> bool {
        let read = self.memory.read(address, into);
        let mut all = self.read.borrow_mut();
        let known = all.entry(address).or_default();
        if read && known.len() < into.len() {
            *known = into.to_vec();
        }
        read
    }
}

impl python::Memory for Recorder {
    fn read<const N: usize>(&self, into: &mut [u64; N], bytes: u32, address: u64) -> bool {
        let into = into.as_mut_bytes().get_mut(..bytes as usize);
        into.is_some_and(|into| Memory::read(self, address, into))
    }
}

/// The walk of the kernel, in user space, over a process that waits deep in Python and C.
fn a_stack_is_what_python_says(minor: u8, python: &Path) -> Result<()> {
    let mut command = Command::new(python);
    // The file's path must not be in what is recorded.
    let start = "import sys; exec(compile(open(sys.argv[1]).read(), 'deep.py', 'exec'))";
    command.args(["-X", "utf8", "-c", start]).arg(script("deep.py")).env_remove("PYTHONPATH");
    // It waits on its input for as long as this end of the pipe is open.
    let (input, _held) = std::io::pipe()?;
    let load = Workload::start_with(command, Stdio::from(input))?;
    let said: Value = serde_json::from_str(load.detail())?;
    let thread = said["thread"].as_u64().context("no thread")?;
    let expected: Vec<&str> =
        said["stack"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();

    let process = ProcessKey { pid: load.pid(), start_ns: 0, exec_id: 0 };
    let sighting = Sights::new(Limits::default()).read(process).context("it is gone")?;
    let program = Reader::default().look(process, &sighting).context("it is no Python")?;
    assert_eq!(program.version.minor, minor);
    let memory = File::open(format!("/proc/{}/mem", load.pid()))?;
    let memory = Recorder { memory, read: RefCell::default() };
    let mut walk = Walk::new();
    walk.begin(&program.process, thread);
    let mut words = [0; 256];
    let find = |walk: &mut Walk| walk.find(&memory, 0);
    let step = |walk: &mut Walk| walk.step(&memory);
    let (count, end) = walk.run(find, step, &mut words, 0, MAX_PYTHON_FRAMES);
    assert_eq!(end, PythonEnd::Complete);
    let mut found = Vec::new();
    for [address, place] in &words.as_chunks::<2>().0[..count.into()] {
        if *address != 0 {
            let code = Code::read(&memory, *address, &program.version, program.code_type)
                .map_err(|reason| anyhow::anyhow!("{}", reason.name()))?;
            if !code.hidden {
                found.push(format!("{} {} {}", code.name, code.file, code.line(*place as u32)));
            }
        }
    }
    assert_eq!(found, expected);
    if env::var_os("PODFLAME_BLESS").is_some() {
        let hex =
            |bytes: &[u8]| bytes.iter().fold(String::new(), |hex, b| hex + &format!("{b:02x}"));
        let mut text = format!("thread {thread:x}\ncode {:x}\n", program.code_type);
        writeln!(text, "process {}", hex(program.process.as_bytes()))?;
        for (address, bytes) in memory.read.borrow().iter() {
            writeln!(text, "{address:x} {}", hex(bytes))?;
        }
        for [address, place] in &words.as_chunks::<2>().0[..count.into()] {
            writeln!(text, "word {address:x} {place:x}")?;
        }
        for frame in &found {
            writeln!(text, "frame {frame}")?;
        }
        fs::write(script(&format!("../golden/python/stack.3.{minor}")), text)?;
    }
    Ok(())
}

/// Whether a function of a file is on the stack, with a line within these.
fn has(sample: &Sample<'_>, function: &str, lines: std::ops::Range<u64>) -> bool {
    sample.all().any(|frame| {
        let name = frame["name"].as_str().unwrap_or_default();
        frame["kind"] == "python"
            && name.rsplit('.').next() == Some(function)
            && frame["file"].as_str().is_some_and(|file| file.ends_with("split.py"))
            && frame["line"].as_u64().is_some_and(|line| lines.contains(&line))
    })
}

/// The lines of a function of `split.py`, as the file has them.
fn lines(function: &str) -> Result<std::ops::Range<u64>> {
    let text = fs::read_to_string(script("split.py"))?;
    let head = format!("def {function}(");
    let start = text.lines().position(|line| line.trim_start().starts_with(&head));
    let start = start.with_context(|| format!("no {function}"))? + 1;
    let len = text.lines().skip(start).position(str::is_empty).unwrap_or(0);
    Ok(start as u64..(start + len + 1) as u64)
}

fn shares_are_those_of_the_program(minor: u8, python: &Path) -> Result<()> {
    let mut command = Command::new(python);
    command.arg(script("split.py"));
    let load = Workload::start(command)?;
    let pid = load.pid().to_string();
    // At 499 Hz there are five samples in each round of 10 ms, always at the same places for seconds.
    let recording = Recording::start(&["--pid", &pid, "--seconds", "6", "--frequency", "433"])?;
    let recorded = recording.finish()?;
    load.stop()?;

    let share = |function: &str| -> Result<f64> {
        let lines = lines(function)?;
        Ok(recorded.percent(|sample| has(sample, function, lines.clone())))
    };
    // Before it was seen to be Python, it had no Python frames; and the calls between take some time.
    let [a, b] = [share("hot_a")?, share("hot_b")?];
    let known = recorded.percent(|sample| sample.frames("python").next().is_some());
    println!("3.{minor}: hot_a {a:.1} %, hot_b {b:.1} %, {known:.1} % with Python frames");
    assert!((a - 70.0).abs() <= 3.0, "hot_a: {a} %, in truth 70 %");
    assert!((b - 30.0).abs() <= 3.0, "hot_b: {b} %, in truth 30 %");
    // Python calls C, and C calls Python; the whole stack is there in both threads.
    assert!(share("hot_b_key")? > 10.0, "{} % in the sort's key", share("hot_b_key")?);
    for thread in ["in_main_thread", "in_second_thread"] {
        let percent = share(thread)?;
        assert!((40.0..60.0).contains(&percent), "{thread}: {percent} %");
    }
    check_order(&recorded);
    // The key function is called by the sort, and stands behind it.
    let between = recorded.percent(|sample| {
        let mut frames = sample.all().filter_map(|frame| frame["name"].as_str());
        frames.any(|name| name == "hot_b")
            && frames.any(|name| name == "builtin_sorted")
            && frames.any(|name| name == "hot_b_key")
    });
    let key = share("hot_b_key")?;
    assert!(between > 0.9 * key, "{between} % of {key} % have the sort between");
    // The interpreter's loop is only seen where it has no frame yet.
    let loops = recorded.percent(|sample| sample.has("_PyEval_EvalFrameDefault"));
    println!(
        "3.{minor}: {between:.1} % of {key:.1} % have C between, {loops:.1} % with a bare loop"
    );
    assert!(loops < 5.0, "{loops} % with a bare loop");
    let ends = |end: &str| recorded.count("on_cpu", &format!("/python_ends/{end}"));
    let complete = ends("complete") as f64 / (ends("complete") + ends("unreadable")) as f64;
    assert!(complete > 0.99, "{complete} of the stacks are complete");
    Ok(())
}

/// The stack is kept with the socket, and there is less room for it.
fn a_retransmit_has_the_stack_of_its_sender(_: u8, python: &Path) -> Result<()> {
    let pair = NetPair::new()?;
    let address = format!("{}:7010", NetPair::RECEIVER_V4);
    let mut listen = workload("pump")?;
    listen.args(["listen", &address]);
    pair.receiver.enter(&mut listen)?;
    let sink = Workload::start(listen)?;
    let lossy = pair.lose(5, 7010)?;
    let recording = Recording::start(&["--signal", "retransmit"])?;
    let mut command = Command::new(python);
    command.arg(script("send.py")).arg(&address);
    pair.sender.enter(&mut command)?;
    let load = Workload::start(command)?;
    wait_for("packets to be lost", Duration::from_secs(60), || {
        Ok((lossy.packets()? > 200).then_some(()))
    })?;
    let pid = load.pid();
    load.stop()?;
    let recorded = recording.stop()?;
    drop(lossy);
    sink.stop()?;
    let weight = |that: &dyn Fn(&Sample<'_>) -> bool| {
        recorded.weight(|sample| sample.pid() == pid && that(sample)) as f64
    };
    let whole = |sample: &Sample<'_>| {
        let names: Vec<&str> = sample.frames("python").collect();
        names == ["send_piece", "send_all", "<module>"]
    };
    let (known, all) = (weight(&whole), weight(&|_| true));
    assert!(all > 0.0 && known > 0.9 * all, "{known} of {all} have the stack");
    Ok(())
}

/// Callers are outside of what they call.
fn check_order(recorded: &Recorded) {
    for sample in recorded.samples() {
        let frames: Vec<&str> = sample.frames("python").collect();
        let place = |function: &str| {
            frames.iter().position(|name| name.rsplit('.').next() == Some(function))
        };
        for (inner, outer) in [("hot_a", "round"), ("hot_b_key", "hot_b"), ("hot_b", "other")] {
            if let (Some(inner), Some(outer)) = (place(inner), place(outer)) {
                assert!(inner < outer, "{frames:?}");
            }
        }
    }
}
