//! The report as a table for a person.

use std::fmt::Write;

use super::{Report, Status};

/// The report as aligned text, a line a finding, with what follows from it below. `color` puts the
/// status in colours of a terminal (ECMA-48). Control characters do not come through.
#[must_use]
pub fn render(report: &Report, color: bool) -> String {
    let mut text = format!("kernel {}\n\nSIGNALS\n", clean(&report.kernel));
    let subjects = report.findings.iter().map(|f| f.subject.chars().count());
    let width = subjects.chain(report.signals.iter().map(|s| s.signal.len())).max().unwrap_or(0);
    // Writing to a String cannot fail.
    for signal in &report.signals {
        let because = if signal.because.is_empty() {
            String::new()
        } else {
            format!("because of {}", signal.because.join(", "))
        };
        line(&mut text, signal.status, signal.signal, width, &because, color);
    }
    text.push_str("\nFINDINGS\n");
    for finding in &report.findings {
        line(&mut text, finding.status, &finding.subject, width, &finding.detail, color);
        for (label, value) in [("effect", &finding.effect), ("remedy", &finding.remedy)] {
            if !value.is_empty() {
                let _infallible = writeln!(text, "{:12}{label}: {}", "", clean(value));
            }
        }
    }
    text
}

fn line(text: &mut String, status: Status, name: &str, width: usize, detail: &str, color: bool) {
    let (word, code) = match status {
        Status::Ok => ("ok", 32),
        Status::Degraded => ("degraded", 33),
        Status::Missing => ("missing", 31),
    };
    let word = if color { format!("\x1b[{code}m{word:8}\x1b[0m") } else { format!("{word:8}") };
    let row = format!("  {word}  {:width$}  {}", clean(name), clean(detail));
    let _infallible = writeln!(text, "{}", row.trim_end());
}

fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}
