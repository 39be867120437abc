//! What a person gets for a wrong word, a missing thing or a missing privilege, and for Ctrl-C.

use std::{
    ffi::OsString,
    fs,
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    path::Path,
    process::{Output, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use podflame_tests::{Workload, podflame, workload};

use crate::{
    Test,
    record::{Recording, command, output},
};

pub(crate) const TESTS: &[Test] = &[
    ("wrong_words_are_named", wrong_words_are_named),
    ("missing_things_are_named", missing_things_are_named),
    ("without_root_it_says_what_is_missing", without_root_it_says_what_is_missing),
    ("an_old_file_survives_a_failure", an_old_file_survives_a_failure),
    ("ctrl_c_keeps_what_was_gathered", ctrl_c_keeps_what_was_gathered),
];

/// Far less than the ten seconds a recording takes by default: a mistake is told before the work.
const AT_ONCE: Duration = Duration::from_secs(5);

/// Nobody, on every distribution.
const NOBODY: u32 = 65534;

fn wrong_words_are_named() -> Result<()> {
    let cases: &[(&[&str], &[&str])] = &[
        (&["--nope"], &["--nope", "--help"]),
        (&["--frequency", "0"], &["--frequency", "1..=1000"]),
        (&["--frequency", "100000"], &["--frequency", "1..=1000"]),
        (&["--frequency", "fast"], &["--frequency", "fast"]),
        (&["--seconds", "0"], &["--seconds", "1..=86400"]),
        (&["--signal", "sleep"], &["--signal", "sleep", "cpu, page-fault, retransmit"]),
        (&["--format", "gif"], &["--format", "gif", "svg, folded, pprof or json"]),
        (&["--output", "profile.gif"], &["profile.gif", "--format"]),
        (&["--pid", "0"], &["--pid"]),
        (&["--pid", "1", "--cgroup", "x"], &["--pid", "--cgroup", "cannot be used with"]),
    ];
    for (words, parts) in cases {
        check(&words.iter().map(OsString::from).collect::<Vec<_>>(), 2, parts)?;
    }
    Ok(())
}

fn missing_things_are_named() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("a file");
    fs::write(&file, "old")?;
    let inside = file.join("x.svg");
    let nowhere = dir.path().join("missing/x.svg");
    // Greater than any PID (`PID_MAX_LIMIT` in `include/linux/threads.h`).
    let cases: &[(&str, &Path, &[&str])] = &[
        ("--pid", Path::new("4194305"), &["4194305", "no process", "ps -e"]),
        ("--cgroup", Path::new("not/there"), &["not/there", "cgroup2 mount"]),
        ("--output", &nowhere, &["missing/x.svg", "create it"]),
        ("--output", &inside, &["a file/x.svg", "not a directory", "choose another"]),
        ("--output", dir.path(), &["is a directory", "name a file in it"]),
        ("--summary", &nowhere, &["missing/x.svg", "create it"]),
    ];
    for (option, value, parts) in cases {
        check(&[OsString::from(option), value.into()], 1, parts)?;
    }
    assert_eq!(fs::read_to_string(&file)?, "old");
    assert_eq!(fs::read_dir(dir.path())?.count(), 1, "files were left behind");
    Ok(())
}

/// Runs `podflame record` in an empty directory, where it leaves nothing.
fn check(words: &[OsString], code: i32, parts: &[&str]) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let start = Instant::now();
    let out = command(words)?.current_dir(dir.path()).output().context("start podflame")?;
    assert!(start.elapsed() < AT_ONCE, "{words:?} took {:?}", start.elapsed());
    complains(&out, &format!("{words:?}"), code, parts);
    assert_eq!(fs::read_dir(dir.path())?.count(), 0, "{words:?} left a file behind");
    Ok(())
}

/// One error that holds those parts, nothing on standard output, and that exit code.
fn complains(out: &Output, what: &str, code: i32, parts: &[&str]) {
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(code), "{what}: {stderr}");
    assert!(stderr.starts_with("error: "), "{what}: {stderr}");
    assert!(out.stdout.is_empty(), "{what}: {:?}", out.stdout);
    for part in parts {
        assert!(stderr.contains(part), "{what}: no {part:?} in {stderr}");
    }
    // Said once: a cause in the message and in its chain would be there twice.
    let message = stderr.lines().next().unwrap_or_default();
    let last = message.rsplit(": ").next().unwrap_or_default();
    assert_eq!(message.matches(last).count(), 1, "{what}: {message}");
}

fn without_root_it_says_what_is_missing() -> Result<()> {
    let dir = tempfile::tempdir()?;
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777))?;
    // Others may not search the directory where it was built.
    let copy = dir.path().join("podflame");
    fs::copy(podflame()?.get_program(), &copy)?;
    let open = dir.path().join("open");
    fs::create_dir(&open)?;
    fs::set_permissions(&open, fs::Permissions::from_mode(0o777))?;
    let cases = [
        (open.join("x.svg"), &["CAP_BPF", "run as root", "podflame doctor"][..]),
        ("/etc/x.svg".into(), &["/etc/x.svg", "no permission", "choose another"][..]),
    ];
    for (file, parts) in cases {
        let mut command = std::process::Command::new(&copy);
        command.args(["record", "--seconds", "1", "--output"]).arg(&file).stdin(Stdio::null());
        command.current_dir(&open).uid(NOBODY).gid(NOBODY);
        let out = command.output().context("start podflame as nobody")?;
        complains(&out, &format!("as nobody to {}", file.display()), 1, parts);
        assert_eq!(fs::read_dir(&open)?.count(), 0, "a file was left behind");
    }
    Ok(())
}

fn an_old_file_survives_a_failure() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (file, nowhere) = (dir.path().join("old.svg"), dir.path().join("missing/summary"));
    fs::write(&file, "old")?;
    let out = output(&[
        "--seconds".into(),
        "1".into(),
        "--output".into(),
        file.clone(),
        "--summary".into(),
        nowhere,
    ])?;
    complains(&out, "a summary that cannot be written", 1, &["missing/summary"]);
    assert_eq!(fs::read_to_string(&file)?, "old");
    assert_eq!(fs::read_dir(dir.path())?.count(), 1);
    Ok(())
}

fn ctrl_c_keeps_what_was_gathered() -> Result<()> {
    let load = Workload::start(workload("split")?)?;
    let pid = load.pid().to_string();
    let recording = Recording::start(&["--seconds", "3600", "--pid", &pid])?;
    // Time passes by the workload's own clock.
    let mut timer = workload("split")?;
    timer.args(["--seconds", "1"]);
    Workload::start(timer)?.finish(Duration::from_secs(60))?;
    // Its end, its exit code and its files are looked at here.
    let recorded = recording.stop()?;
    load.stop()?;
    let seconds = recorded.summary["seconds"].as_f64().context("no seconds")?;
    assert!(seconds > 0.9 && seconds < 60.0, "{seconds} s");
    let samples = recorded.summary["samples"].as_u64().context("no samples")?;
    // Half a second of a CPU that it shares with two others.
    assert!(samples >= 10, "{samples} samples in {seconds} s");
    assert!(recorded.samples().all(|sample| sample.pid() == load_pid(&pid)));
    Ok(())
}

fn load_pid(pid: &str) -> u32 {
    pid.parse().unwrap_or(0)
}
