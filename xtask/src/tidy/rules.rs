//! The table of rules, and the pure function that applies it to the text of one file.

/// What a line must not hold.
pub(super) struct Line(String);

impl Line {
    pub(super) fn new(pattern: &str) -> Self {
        Self(pattern.to_owned())
    }
}

/// Which lines a rule looks at.
#[derive(Clone, Copy, PartialEq)]
enum Part {
    /// All of the file, comments too.
    Everything,
    /// Rust code, test code too, without comments.
    Code,
    /// Rust code outside of tests, without comments.
    ProductCode,
    /// Rust code of tests, without comments.
    TestCode,
}

/// Words that must not stand in some place.
struct Rule {
    name: &'static str,
    /// Any of these at the start of a word breaks the rule.
    patterns: &'static [&'static str],
    part: Part,
    /// Files, directories or modules where the rule holds; empty for everywhere.
    within: &'static [&'static str],
    /// Files, directories or modules where it does not hold.
    except: &'static [&'static str],
    remedy: &'static str,
}

/// This file names what it forbids.
const HERE: &str = "xtask/src/tidy";

const RULES: &[Rule] = &[
    Rule {
        name: "wire layout stays at the edge",
        patterns: &["podflame_wire"],
        part: Part::Code,
        within: &["agent/src"],
        except: &[
            "agent/src/kernel",
            "agent/src/decode",
            "agent/src/event",
            "agent/src/account",
            // What it finds is what the walk in the kernel is given.
            "agent/src/python",
            // It writes the tables that the walk reads, as they are.
            "agent/src/unwind",
            "agent/src/unwinder",
        ],
        remedy: "use the types of `event`, which `decode` makes of the records",
    },
    Rule {
        name: "aya stays in kernel",
        patterns: &["aya::", "aya_obj::", "aya_log::"],
        part: Part::Code,
        within: &["agent/src"],
        except: &["agent/src/kernel"],
        remedy: "add what is needed to the interface of `kernel`",
    },
    Rule {
        name: "protobuf stays at the edge",
        patterns: &["podflame_proto", "prost::", "tonic::"],
        part: Part::Code,
        within: &["agent/src"],
        except: &["agent/src/serve", "agent/src/export", "agent/src/command", "agent/src/pods/cri"],
        remedy: "pass types of the core and convert them in `serve` or `export`",
    },
    Rule {
        name: "one place reads the wall clock",
        patterns: &["SystemTime::now"],
        part: Part::ProductCode,
        within: &["agent/src"],
        except: &["agent/src/clock"],
        remedy: "carry monotonic times and convert them in `clock`",
    },
    Rule {
        name: "ignored test without a reason",
        patterns: &["#[ignore]"],
        part: Part::Code,
        within: &[],
        except: &[HERE],
        remedy: "write #[ignore = \"why\"], or make the test run",
    },
    Rule {
        name: "test waits by sleeping",
        patterns: &["thread::sleep(", "time::sleep("],
        part: Part::TestCode,
        within: &[],
        // `wait_for` looks again and again; workloads are what is observed, not the observers; and a
        // measurement lasts as long as it shall.
        except: &[HERE, "tests/src/wait", "tests/workloads", "tests/bench"],
        remedy: "wait for the condition itself: podflame_tests::wait_for",
    },
    Rule {
        name: "panic in BPF code",
        patterns: &[".unwrap()", ".expect(", "panic!", "todo!", "unimplemented!", "unreachable!"],
        part: Part::Code,
        within: &["agent-ebpf/src"],
        except: &["agent-ebpf/src/wire"],
        remedy: "return early and count the drop",
    },
    Rule {
        name: "unfinished",
        patterns: &["TODO", "FIXME"],
        part: Part::Everything,
        within: &[],
        // Pictures hold the script of the library that draws them.
        except: &[HERE, "tests/golden"],
        remedy: "finish it, or open an issue and say in the text what does not work",
    },
    Rule {
        name: "path of a developer's machine",
        patterns: &["/root/", "/home/", "/work/", "/Users/"],
        part: Part::Everything,
        within: &[],
        except: &[HERE, "Cargo.lock"],
        remedy: "use a relative path or a variable",
    },
    Rule {
        name: "host of a package registry",
        patterns: &[
            "crates.io",
            "index.crates.io",
            "static.crates.io",
            "pypi.org",
            "files.pythonhosted.org",
            "registry.npmjs.org",
            "proxy.golang.org",
            "deb.debian.org",
            "security.debian.org",
        ],
        part: Part::Everything,
        within: &[],
        except: &[HERE, "Cargo.lock"],
        remedy: "name the package only: where it comes from is the user's configuration",
    },
];

/// Lines after which a file is too long to be one subject.
const LONGEST: usize = 700;

/// Files that may be longer, and why.
const LONG: &[(&str, &str)] = &[];

/// All violations in one file, as `file:line: rule: remedy`.
///
/// `path` is relative to the repository, with slashes. `private` is forbidden everywhere.
pub(super) fn violations(path: &str, text: &str, private: &[Line]) -> Vec<String> {
    let mut found = Vec::new();
    let mut report = |line: usize, rule: &str, remedy: &str| {
        found.push(format!("{path}:{line}: {rule}: {remedy}"));
    };
    let rust = path.ends_with(".rs");
    let tests = test_lines(path, text);
    let named_private = !is_in(path, HERE) && path != "Cargo.lock";
    for (number, (line, test)) in text.lines().zip(tests).enumerate() {
        let number = number + 1;
        let code = code_of(line);
        for rule in RULES.iter().filter(|rule| rule.holds_in(path)) {
            let seen = match rule.part {
                Part::Everything => line,
                Part::Code if rust => code,
                Part::ProductCode if rust && !test => code,
                Part::TestCode if rust && test => code,
                _ => continue,
            };
            if rule.patterns.iter().any(|pattern| has_word(seen, pattern)) {
                report(number, rule.name, rule.remedy);
            }
        }
        if named_private && private.iter().any(|pattern| has_word(line, &pattern.0)) {
            report(number, "path of this machine", "use a relative path or a variable");
        }
    }
    if rust {
        if !text.starts_with("//!") {
            report(1, "file without documentation", "begin with `//!` and what the file is for");
        }
        let length = text.lines().count();
        if length > LONGEST && !LONG.iter().any(|(long, _)| *long == path) {
            let remedy = format!("{length} lines: split it, or list it in {HERE} with the reason");
            report(length, "file too long", &remedy);
        }
    }
    found
}

impl Rule {
    fn holds_in(&self, path: &str) -> bool {
        let among = |places: &[&str]| places.iter().any(|place| is_in(path, place));
        (self.within.is_empty() || among(self.within)) && !among(self.except)
    }
}

/// Whether a path is a place: the file itself, the module of that name, or something below it.
fn is_in(path: &str, place: &str) -> bool {
    path.strip_prefix(place)
        .is_some_and(|rest| rest.is_empty() || rest == ".rs" || rest.starts_with('/'))
}

/// Whether a word of the line begins with the pattern.
///
/// `/proc/1/root/x` does not hold `/root/`, nor `my_aya::` the crate `aya`.
fn has_word(line: &str, pattern: &str) -> bool {
    let joins = |c: char| c.is_alphanumeric() || "_-.}~)".contains(c);
    // Only a pattern that begins like a word or a path can be the tail of a longer one.
    let whole = !pattern.starts_with(['.', '#']);
    line.match_indices(pattern).any(|(at, _)| {
        let before = line.get(..at).and_then(|head| head.chars().next_back());
        !(whole && before.is_some_and(joins))
    })
}

/// The line without its comment.
fn code_of(line: &str) -> &str {
    let comment = line.match_indices("//").map(|(at, _)| at).find(|at| {
        // The two slashes of a URL begin no comment.
        !line.get(..*at).is_some_and(|head| head.ends_with(':'))
    });
    comment.and_then(|at| line.get(..at)).unwrap_or(line)
}

/// For each line, whether it belongs to a test.
///
/// Relies on rustfmt: the item after `#[cfg(test)]` ends at a brace of the attribute's own indent.
fn test_lines(path: &str, text: &str) -> Vec<bool> {
    let all = is_in(path, "tests") || path.contains("/tests/") || path.ends_with("/tests.rs");
    let mut until: Option<String> = None;
    let mut lines = Vec::new();
    for line in text.lines() {
        let indent = &line[..line.len() - line.trim_start().len()];
        if until.is_none() && line.trim_start().starts_with("#[cfg(test)]") {
            until = Some(format!("{indent}}}"));
        }
        lines.push(all || until.is_some());
        if until.as_deref() == Some(line.trim_end()) {
            until = None;
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The lines of a file that break a rule, as `line rule`.
    fn broken(path: &str, text: &str) -> Vec<String> {
        let private = [Line::new("/srv/build/podflame/")];
        let found = violations(path, text, &private);
        let short = |violation: &String| {
            let mut parts = violation.strip_prefix(path).unwrap_or_default().splitn(4, ':');
            let (_, line, rule) = (parts.next(), parts.next(), parts.next());
            format!("{}{}", line.unwrap_or_default(), rule.unwrap_or_default())
        };
        found.iter().map(short).collect()
    }

    /// Every rule is broken by its first pattern in a place where it holds, and by nothing where
    /// it does not.
    #[test]
    fn every_rule_can_fail_and_can_pass() {
        for rule in RULES {
            for pattern in rule.patterns {
                let place = rule.within.first().copied().unwrap_or("agent/src");
                let line = match rule.part {
                    Part::TestCode => format!("#[cfg(test)]\nmod tests {{\n{pattern}x\n}}"),
                    _ => format!("\n\n{pattern}x"),
                };
                let text = format!("//! Docs.\n{line}\n");
                let expect = format!("4 {}", rule.name);
                assert_eq!(broken(&format!("{place}/some.rs"), &text), [expect], "{pattern}");
                for except in rule.except {
                    let found = broken(&format!("{except}/some.rs"), &text);
                    assert!(!found.iter().any(|found| found.ends_with(rule.name)), "{pattern}");
                }
            }
        }
    }

    #[test]
    fn modules_are_files_or_directories_of_that_name() {
        let text = "//! D.\nuse podflame_wire::Probe;\n";
        assert_eq!(broken("agent/src/decode.rs", text), [""; 0]);
        assert_eq!(broken("agent/src/decode/fault.rs", text), [""; 0]);
        let name = "2 wire layout stays at the edge";
        assert_eq!(broken("agent/src/decoder.rs", text), [name]);
        assert_eq!(broken("xtask/src/some.rs", text), [""; 0]);
    }

    #[test]
    fn comments_are_not_code_but_can_hold_paths() {
        let text = "//! D.\n/// See [`aya::Ebpf`].\nlet a = 1; // aya::Ebpf\n// /home/me/x\n";
        assert_eq!(broken("agent/src/some.rs", text), ["4 path of a developer's machine"]);
        assert_eq!(code_of("get(\"http://a\") // b"), "get(\"http://a\") ");
    }

    #[test]
    fn tests_are_told_from_the_product() {
        let test =
            "#[cfg(test)]\nmod tests {\n    fn a() {\n        std::thread::sleep(x);\n    }\n}";
        let text = format!("//! D.\n{test}\nfn b() {{\n    std::thread::sleep(x);\n}}\n");
        assert_eq!(broken("agent/src/some.rs", &text), ["5 test waits by sleeping"]);
        let text = "//! D.\ntokio::time::sleep(x);\n";
        assert_eq!(broken("tests/kernel/main.rs", text), ["2 test waits by sleeping"]);
        assert_eq!(broken("agent/src/some/tests.rs", text), ["2 test waits by sleeping"]);
        assert_eq!(broken("agent/src/some.rs", text), [""; 0]);
    }

    #[test]
    fn machine_paths_are_told_from_paths_of_other_roots() {
        let fine = "/proc/1/root/etc /proc/{pid}/root/etc ./home/x a/work/b\n";
        assert_eq!(broken("README.md", fine), [""; 0]);
        assert_eq!(broken("README.md", "x\ncd /root/x\n"), ["2 path of a developer's machine"]);
        assert_eq!(broken("a.bin", "\u{fffd}/srv/build/podflame/a"), ["1 path of this machine"]);
    }

    #[test]
    fn files_are_documented_and_short() {
        assert_eq!(broken("agent/src/some.rs", "fn a() {}\n"), ["1 file without documentation"]);
        assert_eq!(broken("README.md", "text\n"), [""; 0]);
        let line = "//! D.\n";
        assert_eq!(broken("agent/src/some.rs", &line.repeat(LONGEST)), [""; 0]);
        assert_eq!(broken("agent/src/some.rs", &line.repeat(LONGEST + 1)), ["701 file too long"]);
    }
}
