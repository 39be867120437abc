//! What a sample costs, by the depth of its stack, beside bpftrace. Run by `cargo xtask bench stacks`.
//!
//! Both profilers run at the same time, at the same rate, on the same programs; the kernel counts the time
//! that each one's program takes (`BPF_ENABLE_STATS`). bpftrace follows frame pointers only, so that its
//! figure for a program without them is of a stack that it does not see.

use std::{
    collections::BTreeMap,
    env, fs,
    io::{self, Read as _},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use podflame_tests::{podflame, wait_for};
use serde_json::{Value, json};

/// The programs by how they are compiled.
const KINDS: [(&str, &str, &[&str]); 3] = [
    (
        "fp",
        "frame pointers, no table",
        &["-fno-omit-frame-pointer", "-fno-asynchronous-unwind-tables", "-fno-unwind-tables"],
    ),
    ("both", "frame pointers and a table", &["-fno-omit-frame-pointer"]),
    ("table", "a table, no frame pointers", &["-fomit-frame-pointer"]),
];

/// Frames of their stacks. What is the same for all depths is in the first.
const DEPTHS: [usize; 4] = [1, 10, 50, 100];

/// Until both profilers know a program, and the caches are as they will be.
const WARM_UP: Duration = Duration::from_millis(700);

/// Until what ran beside it is gone.
const SETTLE: Duration = Duration::from_millis(100);

/// Longer than a profiler takes to start or to end on a machine that is busy with others.
const LIMIT: Duration = Duration::from_secs(60);

const USAGE: &str = "usage: stacks [--rounds N] [--seconds S] [--frequency HZ] [--json FILE]";

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let (mut rounds, mut seconds, mut frequency, mut file) = (5_u32, 2.0_f64, 99_u32, None);
    // cargo adds `--bench`.
    let mut words = env::args().skip(1).filter(|word| word != "--bench");
    while let Some(word) = words.next() {
        let value = words.next().with_context(|| format!("{word} needs a value; {USAGE}"))?;
        match word.as_str() {
            "--rounds" => rounds = value.parse().context(USAGE)?,
            "--seconds" => seconds = value.parse().context(USAGE)?,
            "--frequency" => frequency = value.parse().context(USAGE)?,
            "--json" => file = Some(PathBuf::from(value)),
            _ => bail!("{USAGE}"),
        }
    }
    let time = Duration::try_from_secs_f64(seconds).context(USAGE)?;
    ensure!(rounds > 0 && !time.is_zero(), "{USAGE}");
    let _counting = aya::sys::enable_stats(aya::sys::Stats::RunTime)
        .context("have the kernel count the time of BPF programs")?;
    let dir = tempfile::tempdir()?;
    compile(dir.path())?;
    let mut figures = Figures::default();
    for number in 1..=rounds {
        eprintln!("round {number} of {rounds}");
        round(dir.path(), time, frequency, &mut figures)?;
    }
    figures.print();
    if let Some(file) = file {
        let text = serde_json::to_vec_pretty(&figures.json(rounds, seconds))?;
        fs::write(&file, text).with_context(|| format!("write {}", file.display()))?;
    }
    Ok(())
}

/// Compiles the program in each way, under a name for each depth: the profilers tell them apart by it.
fn compile(dir: &Path) -> Result<()> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("programs/depth.c");
    for (kind, _, options) in KINDS {
        let program = dir.join(kind);
        let mut gcc = Command::new("gcc");
        gcc.args(["-O2", "-nostdlib", "-static", "-ffreestanding", "-fno-stack-protector"])
            .args(["-fno-pie", "-no-pie"])
            .args(options)
            .arg("-o")
            .arg(&program)
            .arg(&source);
        ensure!(gcc.status().context("start gcc")?.success(), "{gcc:?} failed");
        for depth in DEPTHS {
            fs::hard_link(&program, dir.join(name(kind, depth)))?;
        }
    }
    Ok(())
}

fn name(kind: &str, depth: usize) -> String {
    format!("{kind}-{depth}")
}

/// A process that ends with this one.
struct Running(Child);

impl Running {
    fn start(command: &mut Command, cpu: Option<usize>) -> Result<Self> {
        // SAFETY: between fork and exec only system calls are made, and no memory is allocated.
        unsafe {
            command.pre_exec(move || {
                if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                    return Err(io::Error::last_os_error());
                }
                let Some(cpu) = cpu else { return Ok(()) };
                let mut set: libc::cpu_set_t = std::mem::zeroed();
                libc::CPU_SET(cpu, &mut set);
                match libc::sched_setaffinity(0, size_of_val(&set), &raw const set) {
                    0 => Ok(()),
                    _ => Err(io::Error::last_os_error()),
                }
            });
        }
        Ok(Self(command.spawn().with_context(|| format!("start {command:?}"))?))
    }

    fn interrupt(&self) {
        // SAFETY: it touches no memory, and the child was not waited for, so that the ID is its own.
        unsafe { libc::kill(self.0.id().cast_signed(), libc::SIGINT) };
    }

    /// From now on hardly anything else runs beside it, and so nothing else is sampled.
    fn go_first(&self) -> Result<()> {
        for thread in fs::read_dir(format!("/proc/{}/task", self.0.id()))? {
            let name = thread?.file_name();
            let thread = name.to_string_lossy().parse()?;
            // SAFETY: it takes no pointer. On Linux it is a thread that gets the priority.
            let result = unsafe { libc::setpriority(libc::PRIO_PROCESS, thread, -20) };
            ensure!(result == 0, "setpriority: {}", io::Error::last_os_error());
        }
        Ok(())
    }

    /// Waits for its end.
    fn finish(mut self, what: &str) -> Result<()> {
        let status = wait_for(what, LIMIT, || Ok(self.0.try_wait()?))?;
        ensure!(status.success(), "{what}: {status}");
        Ok(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only if it has ended already.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// How often a BPF program ran, and for how long.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Runs {
    count: u64,
    nanoseconds: u64,
}

impl Runs {
    /// Of the one `perf_event` program that a process holds; `None` while it holds none.
    fn of(pid: u32) -> Result<Option<Self>> {
        /// `BPF_PROG_TYPE_PERF_EVENT` of `include/uapi/linux/bpf.h`.
        const PERF_EVENT: u64 = 7;
        let mut found = BTreeMap::new();
        for descriptor in fs::read_dir(format!("/proc/{pid}/fdinfo"))? {
            // A descriptor may be closed by now.
            let info = fs::read_to_string(descriptor?.path()).unwrap_or_default();
            let value = |key: &str| {
                let mut lines = info.lines();
                lines.find_map(|line| line.strip_prefix(key)?.trim().parse::<u64>().ok())
            };
            if value("prog_type:") == Some(PERF_EVENT)
                && let (Some(id), Some(count), Some(nanoseconds)) =
                    (value("prog_id:"), value("run_cnt:"), value("run_time_ns:"))
            {
                found.insert(id, Self { count, nanoseconds });
            }
        }
        ensure!(found.len() < 2, "process {pid} has {} programs", found.len());
        Ok(found.into_values().next())
    }

    /// Microseconds a run since then.
    fn since(self, before: Self) -> Result<f64> {
        let count = self.count - before.count;
        ensure!(count > 0, "a program did not run");
        Ok((self.nanoseconds - before.nanoseconds) as f64 / count as f64 / 1000.0)
    }
}

/// A profiler.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Contender {
    Podflame,
    Bpftrace,
}

const CONTENDERS: [Contender; 2] = [Contender::Podflame, Contender::Bpftrace];

/// What was measured, by program.
#[derive(Default)]
struct Figures {
    /// Microseconds a run, one for each round.
    cost: BTreeMap<(String, Contender), Vec<f64>>,
    /// User frames of a sample, the median of each round.
    frames: BTreeMap<(String, Contender), Vec<f64>>,
}

/// Profiles each program with both, and adds what came of it.
fn round(dir: &Path, time: Duration, frequency: u32, figures: &mut Figures) -> Result<()> {
    let (profile, stacks) = (dir.join("profile.json"), dir.join("stacks"));
    let mut command = podflame()?;
    command.args(["record", "--seconds", "3600", "--format", "json"]);
    command.args(["--frequency", &frequency.to_string()]);
    command.arg("--output").arg(&profile).stdin(Stdio::null()).stderr(Stdio::null());
    let podflame = Running::start(&mut command, None)?;
    let script = format!("profile:hz:{frequency} {{ @[ustack, kstack, comm] = count(); }}");
    let mut command = Command::new("bpftrace");
    command.args(["-q", "-o"]).arg(&stacks).arg("-e").arg(script);
    // It would take minutes to name the functions. It complains of each stack that it lost.
    command.env("BPFTRACE_NO_USER_SYMBOLS", "1").stdin(Stdio::null()).stderr(Stdio::null());
    let bpftrace = Running::start(&mut command, None)?;
    // As the programs later, so that both always come to read what their programs wrote.
    podflame.go_first()?;
    bpftrace.go_first()?;
    let running = [&podflame, &bpftrace].map(|profiler| profiler.0.id());
    for pid in running {
        wait_for("a profiler to sample", LIMIT, || {
            Ok(Runs::of(pid)?.filter(|runs| runs.count > 0))
        })?;
    }
    let runs = || -> Result<Vec<Runs>> {
        running.iter().map(|pid| Runs::of(*pid)?.context("a profiler ended")).collect()
    };
    for (kind, _, _) in KINDS {
        for depth in DEPTHS {
            let name = name(kind, depth);
            let spinning = (0..thread::available_parallelism()?.get())
                .map(|cpu| {
                    let mut command = Command::new(dir.join(&name));
                    Running::start(command.arg(depth.to_string()), Some(cpu))
                })
                .collect::<Result<Vec<_>>>()?;
            thread::sleep(WARM_UP);
            spinning.iter().try_for_each(Running::go_first)?;
            thread::sleep(SETTLE);
            let before = runs()?;
            thread::sleep(time);
            let after = runs()?;
            for (contender, (after, before)) in CONTENDERS.into_iter().zip(after.iter().zip(before))
            {
                let key = (name.clone(), contender);
                figures.cost.entry(key).or_default().push(after.since(before)?);
            }
        }
    }
    podflame.interrupt();
    bpftrace.interrupt();
    podflame.finish("podflame to end")?;
    bpftrace.finish("bpftrace to end")?;
    for (contender, seen) in
        CONTENDERS.into_iter().zip([podflame_frames(&profile)?, bpftrace_frames(&stacks)?])
    {
        for (name, frames) in seen {
            figures.frames.entry((name, contender)).or_default().push(median(frames));
        }
    }
    Ok(())
}

/// Of podflame's profile: for each program of ours, the user frames of each sample.
fn podflame_frames(profile: &Path) -> Result<BTreeMap<String, Vec<f64>>> {
    let profile: Value = serde_json::from_slice(&fs::read(profile)?)?;
    let mut seen: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for sample in profile["samples"].as_array().context("a profile without samples")? {
        let Some(name) = ours(sample["comm"].as_str().unwrap_or_default()) else { continue };
        let stack = sample["stack"].as_array().context("a sample without a stack")?;
        let frames = stack.iter().filter(|frame| frame["kind"] == "user").count();
        let count = sample["count"].as_u64().unwrap_or(0);
        seen.entry(name).or_default().extend((0..count).map(|_| frames as f64));
    }
    Ok(seen)
}

/// The same of what bpftrace printed: `@[`, a line for each user frame, one that begins with a comma and
/// one for each kernel frame behind it, a comma and the name, `]: ` and how often.
fn bpftrace_frames(stacks: &Path) -> Result<BTreeMap<String, Vec<f64>>> {
    let mut text = String::new();
    fs::File::open(stacks)?.read_to_string(&mut text)?;
    let mut seen: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for block in text.split("@[").skip(1) {
        let (stack, rest) = block.split_once("]: ").context("a stack without a count")?;
        let frames = stack.lines().take_while(|line| !line.starts_with(','));
        let frames = frames.filter(|line| !line.trim().is_empty()).count();
        let last = stack.rsplit(',').next().unwrap_or_default().trim();
        let Some(name) = ours(last) else { continue };
        let count: u64 = rest.lines().next().unwrap_or_default().trim().parse()?;
        seen.entry(name).or_default().extend((0..count).map(|_| frames as f64));
    }
    Ok(seen)
}

/// The name, if it is of a program that is measured.
fn ours(name: &str) -> Option<String> {
    let (kind, depth) = name.split_once('-')?;
    let known = KINDS.iter().any(|(known, _, _)| *known == kind);
    (known && DEPTHS.iter().any(|known| known.to_string() == depth)).then(|| name.to_owned())
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

impl Figures {
    fn cost(&self, kind: &str, depth: usize, contender: Contender) -> [f64; 3] {
        let values = self.cost.get(&(name(kind, depth), contender)).cloned().unwrap_or_default();
        let least = values.iter().copied().fold(f64::INFINITY, f64::min);
        let most = values.iter().copied().fold(0.0, f64::max);
        [median(values), least, most]
    }

    fn frames(&self, kind: &str, depth: usize, contender: Contender) -> f64 {
        median(self.frames.get(&(name(kind, depth), contender)).cloned().unwrap_or_default())
    }

    /// podflame's cost by bpftrace's for the same depth by frame pointers: the median of the rounds. No number
    /// where podflame did not see all frames, as on a machine so busy that its tables come late.
    fn ratio(&self, kind: &str, depth: usize) -> f64 {
        if self.frames(kind, depth, Contender::Podflame) < depth as f64 {
            return f64::NAN;
        }
        let of = |kind: &str, contender| {
            self.cost.get(&(name(kind, depth), contender)).cloned().unwrap_or_default()
        };
        // In the same program if it has frame pointers, otherwise in the same round.
        let theirs = of(if kind == "table" { "fp" } else { kind }, Contender::Bpftrace);
        let ours = of(kind, Contender::Podflame);
        median(ours.iter().zip(theirs).map(|(ours, theirs)| ours / theirs).collect())
    }

    fn print(&self) {
        println!("microseconds a sample: median (least to most), and user frames");
        for (kind, title, _) in KINDS {
            println!("{title}");
            println!(
                "  depth  podflame                frames  bpftrace                frames  ratio"
            );
            for depth in DEPTHS {
                let cell = |contender| {
                    let [middle, least, most] = self.cost(kind, depth, contender);
                    let range = format!("{middle:.2} ({least:.2} to {most:.2})");
                    format!("{range:22}  {:6}", self.frames(kind, depth, contender))
                };
                println!(
                    "  {depth:5}  {}  {}  {:.2}",
                    cell(Contender::Podflame),
                    cell(Contender::Bpftrace),
                    self.ratio(kind, depth)
                );
            }
        }
    }

    fn json(&self, rounds: u32, seconds: f64) -> Value {
        let rows = KINDS.iter().flat_map(|(kind, title, _)| {
            DEPTHS.iter().map(move |&depth| {
                let of = |contender| {
                    let [median, min, max] = self.cost(kind, depth, contender);
                    let frames = self.frames(kind, depth, contender);
                    json!({ "median_us": median, "min_us": min, "max_us": max, "frames": frames })
                };
                json!({
                    "program": title,
                    "depth": depth,
                    "podflame": of(Contender::Podflame),
                    "bpftrace": of(Contender::Bpftrace),
                    "ratio": self.ratio(kind, depth),
                })
            })
        });
        json!({ "rounds": rounds, "seconds": seconds, "rows": rows.collect::<Vec<_>>() })
    }
}
