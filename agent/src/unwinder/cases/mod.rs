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
fn judge(case: &Case, frames: &[u64], end: StackEnd) -> Result<(), String> {
    let found: Vec<u64> = frames.iter().map(|frame| frame & !BY_FRAME_POINTER).collect();
    let same = found.iter().zip(&case.gdb).take_while(|(a, b)| a == b).count();
    let most = case.gdb.len().min(MAX_FRAMES);
    if same < found.len() {
        return Err(format!("frame {same} is {:x}, which gdb has not", found[same]));
    }
    if end.name() != case.end {
        return Err(format!("ends with {}, and was recorded with {}", end.name(), case.end));
    }
    match (end, found.len() == most, &case.differs) {
        (StackEnd::Complete, true, None) => Ok(()),
        (StackEnd::Truncated, true, None) if most == MAX_FRAMES => Ok(()),
        (StackEnd::Complete | StackEnd::Truncated | StackEnd::None, ..) => {
            Err(format!("{} of {most} frames are not {}", found.len(), end.name()))
        }
        (_, _, Some(_)) => Ok(()),
        (_, _, None) => Err(format!("{} of {most} frames, and no reason", found.len())),
    }
}

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
            let shorter = if case.differs.is_some() { "shorter" } else { "equal" };
            *count.entry((case.machine.clone(), shorter)).or_default() += 1;
            if let Err(why) = judge(&case, &frames, end) {
                wrong.push(format!("{}: {why}\n  walk {frames:x?}\n  gdb  {:x?}", case.name, case.gdb));
            }
        }
    }
    println!("{count:?}, {bytes} bytes");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(count.values().sum::<usize>() >= LEAST, "{count:?}");
    assert!(bytes < MOST_BYTES, "{bytes}");
}

/// Cases that there are at least, so that none is lost unseen.
const LEAST: usize = 30;

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
