//! Folding and its text. The hostile names are those of the export fixture.
#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

use proptest::prelude::*;

use super::*;
use crate::{
    export::fixture::{Fixture, HOSTILE, inlined, kernel, name, profiles, sampled, user},
    profile::Signal,
};

/// What parsing must give for a stack of names.
fn folded(stacks: &[(Vec<String>, u64)]) -> Folded {
    let mut builder = Builder::default();
    for (names, value) in stacks {
        let frames = names.iter().map(|n| builder.name(n)).collect();
        builder.stacks.push(Stack { frames, value: *value });
    }
    builder.finish()
}

#[test]
fn stacks_are_root_first_and_marked() {
    let profile = sampled(Signal::Cpu).profile();
    assert_eq!(
        fold(&profile, Root::WorkloadThenComm).to_text().lines().collect::<Vec<_>>(),
        [
            "batch;batch;main;[file /data/db] 10101010",
            "batch;batch;main;[no symbols] 40404040",
            "web-1/nginx;nginx: worker\\x201;main;handle 50505050",
            "web-1/nginx;nginx: worker\\x201;main;handle;entry_SYSCALL_64_[k];tcp_sendmsg_[k] 101010100",
            "web-1/nginx;nginx: worker\\x201;main;handle;fill_[i];copy_[i] 303030300",
        ]
    );
}

#[test]
fn equal_stacks_of_different_processes_and_lines_merge() {
    let mut fixture = Fixture::new(Signal::PageFault);
    for (pid, line) in [(1, 10), (2, 11), (3, 12)] {
        fixture.sample(("w", pid, "t"), &[user("f", "/bin/f", line)], (1, 5));
    }
    assert_eq!(fold(&fixture.profile(), Root::Comm).to_text(), "t;f 15\n");
}

#[test]
fn a_user_name_cannot_pass_for_the_kernel() {
    let mut fixture = Fixture::new(Signal::Cpu);
    let stack = [kernel("real"), user("fake_[k]", "/bin/f", 1), inlined("x_[k]", "", 1)];
    fixture.sample(("w_[k]", 1, "t_[k]"), &stack, (1, 5));
    assert_eq!(
        fold(&fixture.profile(), Root::WorkloadThenComm).to_text(),
        "w_[k]_[u];t_[k]_[u];x_[k]_[i];fake_[k]_[u];real_[k] 5\n"
    );
}

#[test]
fn hostile_text_is_one_printable_line_a_stack() {
    for hostile in HOSTILE {
        let stacks = folded(&[(vec![(*hostile).to_owned(), (*hostile).to_owned()], 7)]);
        let text = stacks.to_text();
        assert_eq!(text.matches('\n').count(), 1, "{hostile:?}");
        assert_eq!(text.matches(';').count(), 1, "{hostile:?}");
        assert!(!text.trim_end_matches('\n').contains(is_unprintable), "{hostile:?}: {text:?}");
        assert_eq!(Folded::parse(&text).unwrap(), stacks, "{hostile:?}");
    }
}

#[test]
fn escapes_are_as_documented() {
    let cases = [
        ("a;b", r"a\x3bb"),
        ("a\\b", r"a\\b"),
        ("\u{1b}[0m", r"\x1b[0m"),
        ("\u{202e}x", r"\u{202e}x"),
        (" a b 1.5", r"\x20a b\x201.5"),
        ("# a#", r"\x23 a#"),
    ];
    for (name, text) in cases {
        assert_eq!(escape(name), text);
    }
}

#[test]
fn text_of_other_tools_reads_too() {
    let text = "main;C:\\path\\q;a b 3\r\n\nmain;\\xzz;\\u{110000} 4\n";
    let read = Folded::parse(text).unwrap();
    let names: Vec<&str> = read.names().iter().map(String::as_str).collect();
    assert_eq!(names, ["C:\\path\\q", "\\u{110000}", "\\xzz", "a b", "main"]);
    assert_eq!(read.total(), 7);
}

#[test]
fn a_bad_line_is_named() {
    for text in ["a;b 1\nno number\n", "a 1\na;b\n", "a 1\na -1\n", "a 1\na 1.5\n"] {
        assert_eq!(Folded::parse(text), Err(ParseError { line: 2 }), "{text:?}");
    }
}

#[test]
fn pruning_leaves_the_value_with_the_caller() {
    let mut stacks = Folded::parse("a;b;c 1\na;b;d 2\na;e 10\na;f;g 1\nh 1\n").unwrap();
    stacks.prune(3);
    assert_eq!(stacks.to_text(), "a 1\na;b 3\na;e 10\nh 1\n");
}

proptest! {
    #[test]
    fn text_parses_back_to_the_same(
        stacks in prop::collection::vec(
            (prop::collection::vec(name(), 1..6), 0..u64::MAX / 16), 0..16)
    ) {
        let stacks = folded(&stacks);
        prop_assert_eq!(Folded::parse(&stacks.to_text()).unwrap(), stacks);
    }

    #[test]
    fn any_text_is_parsed_or_refused(text in any::<String>()) {
        if let Ok(stacks) = Folded::parse(&text) {
            prop_assert_eq!(Folded::parse(&stacks.to_text()).unwrap(), stacks);
        }
    }

    #[test]
    fn folding_and_pruning_keep_the_sum(profile in profiles(), minimum in 0..2_000_000_u64) {
        let sum = profile.samples.iter().fold(0, |sum: u64, s| sum.saturating_add(s.weight));
        let mut stacks = fold(&profile, Root::WorkloadThenComm);
        prop_assert_eq!(stacks.total(), sum);
        stacks.prune(minimum);
        prop_assert_eq!(stacks.total(), sum);
    }
}
