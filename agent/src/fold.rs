//! Folds a profile: each distinct stack once, outermost frame first, with the sum of its weights.
//!
//! The result is what flame graphs are drawn from, and as text the "folded" or "collapsed" format of
//! the FlameGraph tools: frames joined by `;`, a space, and a number. Not for pprof or JSON, which
//! keep what folding throws away (counts, addresses, lines, labels).
//!
//! # Values
//! The number is the sum of [`Sample::weight`](crate::profile::Sample), in
//! [`Signal::unit`](crate::profile::Signal::unit): nanoseconds, faults or segments. Weights, unlike
//! counts, stay comparable when the sampling rate changed within the profile.
//!
//! # Marks
//! As `stackcollapse-perf.pl --all` does, a kernel frame ends in `_[k]` and an inlined one in `_[i]`.
//! A Python function has its file in parentheses behind it, and ends in `_[p]`. An annotation is in
//! brackets. A program may call its functions what it likes: a name of user space
//! that ends like a mark gets `_[u]`, so that it cannot pass for the kernel.
//!
//! # Escapes
//! Names come from profiled processes, so that they may hold anything. In text, a backslash is `\\`,
//! and these characters are `\xNN` (up to U+00FF) or `\u{N}`:
//! - `;`, controls, and characters that are invisible or reorder text (see [`is_unprintable`]);
//! - a space at either end of a name, or before a last word of digits and dots, where readers would
//!   trim it or take the word for another number;
//! - a `#` at the start of a name, where readers would see a comment.
//!
//! [`Folded::parse`] undoes exactly this.

use std::{borrow::Cow, fmt::Write as _};

use hashbrown::HashMap;

use crate::profile::{FrameKind, Profile, Workload};

/// What stands for a name that is empty.
pub const UNKNOWN: &str = "[unknown]";

/// The outermost frames.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Root {
    /// The thread's name.
    #[default]
    Comm,
    /// The workload's name, and then the thread's: for a profile of several workloads.
    WorkloadThenComm,
}

/// Folded stacks, sorted by the names of their frames, so that equal profiles fold to equal text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Folded {
    /// Sorted, each once. A stack refers to them by index, so that indices compare as names do.
    names: Vec<String>,
    /// Sorted by `frames`, each once.
    stacks: Vec<Stack>,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Stack {
    /// Outermost first.
    frames: Vec<u32>,
    value: u64,
}

/// A line that is not a folded stack.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("folded stacks, line {line}: no whole number after the last space (expected `a;b;c 42`)")]
pub struct ParseError {
    /// Counted from 1.
    pub line: usize,
}

/// Folds the samples of a profile. Every stack has at least one frame: the thread's name.
#[must_use]
pub fn fold(profile: &Profile, root: Root) -> Folded {
    let dictionary = &*profile.dictionary;
    let mut builder = Builder::default();
    let mut known: Vec<Option<u32>> = vec![None; dictionary.all.frames.len()];
    for sample in &profile.samples {
        let stack = dictionary.stack(sample.stack);
        let mut frames = Vec::with_capacity(stack.len() + 2);
        if root == Root::WorkloadThenComm {
            let name = dictionary.workload(sample.workload).map(|w| workload_name(w));
            frames.push(builder.name(&unmarked(name.as_deref().unwrap_or_default())));
        }
        frames.push(builder.name(&unmarked(dictionary.string(sample.comm))));
        for id in stack.iter().rev() {
            let cached = known.get(id.0 as usize).copied().flatten();
            frames.push(cached.unwrap_or_else(|| {
                let name = match dictionary.frame(*id) {
                    Some((frame, function)) => {
                        let name = dictionary.string(function.name);
                        let file = dictionary.string(function.file);
                        marked(name, file, frame.kind, frame.inlined)
                    }
                    None => UNKNOWN.into(),
                };
                let name = builder.name(&name);
                if let Some(slot) = known.get_mut(id.0 as usize) {
                    *slot = Some(name);
                }
                name
            }));
        }
        builder.stacks.push(Stack { frames, value: sample.weight });
    }
    builder.finish()
}

/// A word for a workload: its name, or why there is none.
#[must_use]
pub fn workload_name(workload: &Workload) -> Cow<'_, str> {
    if !workload.name.is_empty() {
        workload.name.as_str().into()
    } else if workload.unattributed.is_empty() {
        "[unattributed]".into()
    } else {
        format!("[unattributed: {}]", workload.unattributed).into()
    }
}

/// The name of an annotation: in brackets.
#[must_use]
pub fn annotation(name: &str) -> Cow<'_, str> {
    if name.starts_with('[') && name.ends_with(']') {
        name.into()
    } else {
        format!("[{name}]").into()
    }
}

/// The folded name of a frame.
fn marked<'a>(name: &'a str, file: &str, kind: FrameKind, inlined: bool) -> Cow<'a, str> {
    let name = if name.is_empty() { UNKNOWN } else { name };
    match kind {
        FrameKind::Annotation => annotation(name),
        FrameKind::Kernel => format!("{name}_[k]").into(),
        // Python's names say little without the file: each has a `<module>`.
        FrameKind::Python if file.is_empty() => format!("{name}_[p]").into(),
        FrameKind::Python => {
            let file = file.rsplit('/').next().unwrap_or(file);
            format!("{name} ({file})_[p]").into()
        }
        FrameKind::User if inlined => format!("{name}_[i]").into(),
        FrameKind::User => unmarked(name),
    }
}

/// A name that carries no mark, even if it tries to.
fn unmarked(name: &str) -> Cow<'_, str> {
    let mark = name.len().checked_sub(4).and_then(|start| name.get(start..));
    match mark {
        _ if name.is_empty() => UNKNOWN.into(),
        Some(mark) if mark.starts_with("_[") && mark.ends_with(']') => format!("{name}_[u]").into(),
        _ => name.into(),
    }
}

#[derive(Default)]
struct Builder {
    ids: HashMap<String, u32>,
    stacks: Vec<Stack>,
}

impl Builder {
    fn name(&mut self, name: &str) -> u32 {
        let next = u32::try_from(self.ids.len()).unwrap_or(u32::MAX);
        *self.ids.entry_ref(name).or_insert(next)
    }

    /// Renumbers the names in their order, sorts the stacks, and merges equal ones.
    fn finish(self) -> Folded {
        let mut by_name: Vec<(String, u32)> = self.ids.into_iter().collect();
        by_name.sort_unstable();
        let mut renumbered = vec![0; by_name.len()];
        for (new, (_, old)) in (0..).zip(&by_name) {
            renumbered[*old as usize] = new;
        }
        let mut stacks = self.stacks;
        for frame in stacks.iter_mut().flat_map(|s| &mut s.frames) {
            *frame = renumbered[*frame as usize];
        }
        stacks.sort_unstable();
        merge(&mut stacks);
        Folded { names: by_name.into_iter().map(|(name, _)| name).collect(), stacks }
    }
}

/// Makes one of neighbours with the same frames.
fn merge(stacks: &mut Vec<Stack>) {
    stacks.dedup_by(|from, into| {
        let same = from.frames == into.frames;
        if same {
            into.value = into.value.saturating_add(from.value);
        }
        same
    });
}

impl Folded {
    /// Each stack with its value: the indices of its frames' names, outermost first.
    pub fn stacks(&self) -> impl ExactSizeIterator<Item = (&[u32], u64)> {
        self.stacks.iter().map(|s| (&*s.frames, s.value))
    }

    /// The names that the stacks refer to.
    #[must_use]
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// The sum of all values.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.stacks.iter().fold(0, |sum, s| sum.saturating_add(s.value))
    }

    /// Removes every frame (that is: path from the root) whose value with all its callees is below
    /// `minimum`; its value stays with its caller. The total is kept: an outermost frame stays.
    pub fn prune(&mut self, minimum: u64) {
        // Nodes of the call tree are numbered in the order in which the sorted stacks open them.
        let mut totals: Vec<u64> = Vec::new();
        self.walk(|open, opened, value| {
            totals.resize(totals.len() + opened, 0);
            for node in open {
                totals[*node] = totals[*node].saturating_add(value);
            }
        });
        let mut kept = Vec::with_capacity(self.stacks.len());
        self.walk(|open, _, _| {
            kept.push(open.iter().take_while(|node| totals[**node] >= minimum).count().max(1));
        });
        for (stack, kept) in self.stacks.iter_mut().zip(kept) {
            stack.frames.truncate(kept);
        }
        self.stacks.sort();
        merge(&mut self.stacks);
    }

    /// Visits each stack with the nodes of the call tree on its path, how many of these are new, and
    /// its value.
    fn walk(&self, mut visit: impl FnMut(&[usize], usize, u64)) {
        let mut open: Vec<usize> = Vec::new();
        let mut nodes = 0;
        let mut last: &[u32] = &[];
        for stack in &self.stacks {
            let shared = last.iter().zip(&stack.frames).take_while(|(a, b)| a == b).count();
            let opened = stack.frames.len() - shared;
            open.truncate(shared);
            open.extend(nodes..nodes + opened);
            nodes += opened;
            visit(&open, opened, stack.value);
            last = &stack.frames;
        }
    }

    /// The folded text, one stack a line.
    #[must_use]
    pub fn to_text(&self) -> String {
        let names: Vec<String> = self.names.iter().map(|n| escape(n)).collect();
        let mut text = String::new();
        for stack in &self.stacks {
            for (i, frame) in stack.frames.iter().enumerate() {
                text.push_str(if i == 0 { "" } else { ";" });
                text.push_str(names.get(*frame as usize).map_or("", |n| n));
            }
            let _infallible = writeln!(text, " {}", stack.value);
        }
        text
    }

    /// Reads folded text. Reads that of other tools as well: a backslash that starts no escape
    /// stands for itself.
    ///
    /// # Errors
    /// The first line that does not end in a space and a whole number. Empty lines are skipped.
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        let mut builder = Builder::default();
        for (line, content) in (1..).zip(text.lines()).filter(|(_, content)| !content.is_empty()) {
            let (stack, value) = content.rsplit_once(' ').ok_or(ParseError { line })?;
            let value = value.parse().map_err(|_| ParseError { line })?;
            let frames = stack.split(';').map(|name| builder.name(&unescape(name))).collect();
            builder.stacks.push(Stack { frames, value });
        }
        Ok(builder.finish())
    }
}

/// Whether a character must not reach a terminal or a picture as it is: controls (C0, DEL, C1);
/// line breaks and spaces other than U+0020; marks that are invisible or reorder text (Unicode
/// UAX #9, UTS #39), as U+202E does; and what XML 1.0 forbids.
#[must_use]
pub fn is_unprintable(c: char) -> bool {
    if c.is_ascii() {
        return c.is_ascii_control();
    }
    c.is_control()
        || c.is_whitespace()
        || matches!(c,
            '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{fffe}'..='\u{ffff}'
            | '\u{e0000}'..='\u{e0fff}')
}

/// Text for a person's eyes: unprintable characters become `\xNN` or `\u{N}`. One way only.
#[must_use]
pub fn printable(text: &str) -> Cow<'_, str> {
    if !text.contains(is_unprintable) {
        return text.into();
    }
    let mut out = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        if is_unprintable(c) { push_escape(&mut out, c) } else { out.push(c) }
    }
    out.into()
}

/// A name as it is in folded text.
#[must_use]
pub fn escape(name: &str) -> String {
    escape_with(name, "\\x20")
}

/// As [`escape`], with another stand-in for a space before a last word of digits and dots.
pub(crate) fn escape_with(name: &str, space_before_number: &str) -> String {
    let word = name.trim_end_matches(|c: char| c.is_ascii_digit() || c == '.').len();
    let mut out = String::with_capacity(name.len());
    for (at, c) in name.char_indices() {
        let end = at + c.len_utf8();
        match c {
            '\\' => out.push_str("\\\\"),
            ' ' if at == 0 || end == name.len() => push_escape(&mut out, c),
            ' ' if end == word => out.push_str(space_before_number),
            '#' if at == 0 => push_escape(&mut out, c),
            ';' => push_escape(&mut out, c),
            c if is_unprintable(c) => push_escape(&mut out, c),
            c => out.push(c),
        }
    }
    out
}

fn push_escape(out: &mut String, c: char) {
    let code = u32::from(c);
    let _infallible =
        if code <= 0xff { write!(out, "\\x{code:02x}") } else { write!(out, "\\u{{{code:x}}}") };
}

/// The name that [`escape`] was given.
fn unescape(text: &str) -> Cow<'_, str> {
    if !text.contains('\\') {
        return text.into();
    }
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('\\') {
        out.push_str(before);
        let (c, used) = unescape_one(after).unwrap_or(('\\', 0));
        out.push(c);
        rest = after.get(used..).unwrap_or_default();
    }
    out.push_str(rest);
    out.into()
}

/// The character that the text behind a backslash stands for, and the length of that text.
fn unescape_one(after: &str) -> Option<(char, usize)> {
    if after.starts_with('\\') {
        return Some(('\\', 1));
    }
    let (digits, used) = if let Some(hex) = after.strip_prefix('x') {
        (hex.get(..2)?, 3)
    } else {
        let digits = after.strip_prefix("u{")?.split_once('}')?.0;
        (digits, digits.len() + 3)
    };
    if !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    Some((char::from_u32(u32::from_str_radix(digits, 16).ok()?)?, used))
}

#[cfg(test)]
mod tests;
