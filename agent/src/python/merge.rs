//! Native and Python frames → one stack. Pure.
//!
//! Each native frame of the interpreter's loop stands for a run of Python frames, which ends with one
//! that has [`ENTRY`] set; the run takes its place.

use podflame_wire::python::ENTRY;

/// A frame of the merged stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Merged {
    /// The native frame of that index.
    Native(usize),
    /// A Python frame: its code object, and the place in it.
    Python(u64, u32),
}

/// Merges, innermost first. `native` says of each native frame whether it is of the interpreter's loop;
/// `python` are the words of the record; `complete` says that both stacks are.
///
/// If both are complete the outermost run is that of the outermost loop: a loop that was entered but has
/// no frame yet is then left as it is. If not, the innermost belong together, as far as they go. Runs for
/// which there is no loop come outside of all, or, where the stacks are complete, with the innermost
/// one.
#[must_use]
pub fn merge(native: &[bool], python: &[u64], complete: bool) -> Vec<Merged> {
    let (frames, _) = python.as_chunks::<2>();
    let runs: Vec<&[[u64; 2]]> = frames.split_inclusive(|[_, place]| place & ENTRY != 0).collect();
    let loops = native.iter().filter(|is_loop| **is_loop).count();
    let mut merged = Vec::with_capacity(native.len() + frames.len());
    // How many runs belong to no loop inside of the first, or loops to no run.
    let (spare, bare) = match complete && loops > 0 {
        true => (runs.len().saturating_sub(loops), loops.saturating_sub(runs.len())),
        false => (0, 0),
    };
    let mut runs = runs.into_iter();
    let mut seen = 0;
    for (index, is_loop) in native.iter().enumerate() {
        if !is_loop {
            merged.push(Merged::Native(index));
            continue;
        }
        seen += 1;
        if seen <= bare {
            merged.push(Merged::Native(index));
            continue;
        }
        let take = if seen == bare + 1 { spare + 1 } else { 1 };
        let mut found = false;
        for run in runs.by_ref().take(take) {
            found = true;
            push(&mut merged, run);
        }
        if !found {
            merged.push(Merged::Native(index));
        }
    }
    runs.for_each(|run| push(&mut merged, run));
    merged
}

/// Adds a run, without the frames that only mark its end.
fn push(merged: &mut Vec<Merged>, run: &[[u64; 2]]) {
    let shown = run.iter().filter(|[code, _]| *code != 0);
    merged.extend(shown.map(|[code, place]| Merged::Python(*code, *place as u32)));
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Native frames as letters, `L` for a loop; Python frames as numbers, `|` behind an entry, `0` for
    /// a shim; merged again as such.
    fn check(native: &str, python: &str, complete: bool, expected: &str) {
        let loops: Vec<bool> = native.chars().map(|c| c == 'L').collect();
        let mut words: Vec<u64> = Vec::new();
        for c in python.chars() {
            match c.to_digit(10) {
                Some(code) => words.extend([u64::from(code), 7]),
                None => *words.last_mut().unwrap_or(&mut 0) |= ENTRY,
            }
        }
        let merged = merge(&loops, &words, complete);
        let text: String = merged
            .iter()
            .map(|frame| match frame {
                Merged::Native(index) => native.chars().nth(*index).unwrap_or('?'),
                Merged::Python(code, 7) => char::from_digit(*code as u32, 10).unwrap_or('?'),
                Merged::Python(..) => '!',
            })
            .collect();
        assert_eq!(text, expected, "{native} and {python}");
    }

    #[test]
    fn each_loop_has_its_run() {
        check("aLbLc", "12|3|", true, "a12b3c");
        check("aLbLc", "120|30|", true, "a12b3c");
        check("ab", "", true, "ab");
        check("aLb", "1", true, "a1b");
    }

    #[test]
    fn a_loop_that_was_just_entered_is_left() {
        check("LbLc", "3|", true, "Lb3c");
        check("LbLc", "0|30|", true, "b3c");
    }

    #[test]
    fn what_was_cut_is_matched_from_inside() {
        check("aLb", "12|3|4|", false, "a12b34");
        check("aLbLcLd", "1|2", false, "a1b2cLd");
        check("ab", "12|3|", false, "ab123");
        check("ab", "12|3|", true, "ab123");
    }

    #[test]
    fn a_run_too_many_goes_with_the_innermost() {
        check("aLbLc", "1|2|3|", true, "a12b3c");
    }
}
