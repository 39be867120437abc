//! Stacks of real programs, recorded with gdb as the judge, walked again without a kernel.
//!
//! `cargo xtask record-stacks` stops programs under gdb (`tests/stacks`), and `record` cuts out of each
//! stop what the walk needs: the files in `testdata`. The walk must find gdb's frames, one by one. It
//! may find fewer, if it says why it ended, and the case says why that is right.
//!
//! Not for tables (`crate::unwind::tests`), nor for what happens in the kernel (`tests/kernel/cpu.rs`).

#![expect(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

mod case;
mod properties;
mod record;

use std::{collections::BTreeMap, fs, path::PathBuf};

use podflame_wire::{BY_FRAME_POINTER, MAX_FRAMES, StackEnd};

use self::case::{Case, Replay};

fn directory() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("src/unwinder/cases/testdata")
}

/// The files of cases, in the order of their names.
fn files() -> Vec<PathBuf> {
    let mut files: Vec<_> = fs::read_dir(directory()).unwrap().map(|e| e.unwrap().path()).collect();
    files.sort_unstable();
    files
}

/// What is wrong with the walk of a case, if anything is.
///
/// Frames that were found by frame pointer, and those behind them, may leave some of gdb's out: that is
/// what their mark says. They may also go on where gdb cannot.
fn judge(case: &Case, frames: &[u64], end: StackEnd) -> Result<(), String> {
    let marked = frames.iter().position(|frame| frame & BY_FRAME_POINTER != 0);
    let found: Vec<u64> = frames.iter().map(|frame| frame & !BY_FRAME_POINTER).collect();
    let sure = marked.unwrap_or(found.len());
    let most = case.gdb.len().min(MAX_FRAMES);
    let equal = found.len() == most && found == case.gdb[..most];
    if end.name() != case.end {
        return Err(format!("ends with {}, and was recorded with {}", end.name(), case.end));
    }
    match end {
        StackEnd::Complete if equal && case.stop == OUTERMOST => return Ok(()),
        StackEnd::Truncated if equal && most == MAX_FRAMES => return Ok(()),
        _ => {}
    }
    if found[..sure] != case.gdb[..sure.min(case.gdb.len())] {
        return Err("has a frame that gdb has not".into());
    }
    let mut others = case.gdb[sure..].iter();
    let skipping = found[sure..].iter().all(|frame| others.any(|other| other == frame));
    let beyond = case.stop != OUTERMOST && found.starts_with(&case.gdb);
    if !skipping && !beyond {
        return Err("has a frame by frame pointer that gdb has not".into());
    }
    if marked.is_none() && matches!(end, StackEnd::Complete | StackEnd::Truncated | StackEnd::None)
    {
        return Err(format!("{} of {most} frames are not {}", found.len(), end.name()));
    }
    if case.differs.is_none() {
        return Err(format!("{} of {most} frames, and no reason", found.len()));
    }
    Ok(())
}

/// What gdb says where it found the end.
const OUTERMOST: &str = "outermost";

#[test]
fn recorded_stacks_are_walked_as_gdb_does() {
    let mut count: BTreeMap<(String, &str), usize> = BTreeMap::new();
    let mut wrong = Vec::new();
    let mut bytes = 0;
    for path in files() {
        let text = fs::read_to_string(&path).unwrap();
        bytes += text.len();
        for case in Case::parse(&text) {
            let (frames, end) = Replay::new(&case).walk();
            let how = if case.differs.is_some() { "differs" } else { "equal" };
            *count.entry((case.machine.clone(), how)).or_default() += 1;
            if let Err(why) = judge(&case, &frames, end) {
                let (name, gdb, stop) = (&case.name, &case.gdb, &case.stop);
                wrong.push(format!(
                    "{name}: {why}\n  walk {frames:x?} {}\n  gdb  {gdb:x?} {stop}",
                    end.name()
                ));
            }
        }
    }
    println!("{count:?}, {bytes} bytes");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(count.values().sum::<usize>() >= LEAST, "{count:?}");
    assert!(bytes < MOST_BYTES, "{bytes}");
}

/// Cases that there are at least, so that none is lost unseen.
const LEAST: usize = 190;

/// Bytes of all files.
const MOST_BYTES: usize = 1 << 20;

#[test]
fn cases_are_read_as_they_were_written() {
    for path in files() {
        let text = fs::read_to_string(path).unwrap();
        let again: String = Case::parse(&text).iter().map(Case::text).collect();
        assert!(again == text);
    }
}
