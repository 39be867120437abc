//! Names out of files that nobody vouches for: valid UTF-8, of bounded length, demangled.
//!
//! Control characters stay as they are. Not for escaping, which each export does in its own way.

use std::{fmt, panic};

/// Most bytes of a name as it is in the file. Mangled C++ names of some kilobytes occur.
pub(super) const RAW_NAME: usize = 16 << 10;
/// Most bytes of a name as it is shown; what is longer ends in an ellipsis. A long one is a
/// template whose arguments nobody reads, and names are what the agent sends most of.
const SHOWN_NAME: usize = 4 << 10;

/// How deep the parts of a C++ name may nest. The demangler tries every reading of an ambiguous
/// part, so that its time can double with each level: a name of 80 bytes takes minutes at its
/// default of 96. At 48 the worst seeds found take 5 ms, and of 98,537 names in LLVM and libstdc++
/// 184 stay as they are.
const NESTING: u32 = 48;

/// A name as it is shown: Rust and C++ demangled, anything else as it is.
#[must_use]
pub fn demangle(raw: &[u8]) -> String {
    let Ok(text) = str::from_utf8(raw) else {
        return shown(&String::from_utf8_lossy(raw.get(..SHOWN_NAME + 8).unwrap_or(raw)));
    };
    if !(text.starts_with("_Z") || text.starts_with("_R")) {
        return shown(text);
    }
    // The name is hostile and the demanglers are large: a panic in one costs that name only.
    let demangled = panic::catch_unwind(|| {
        let mut name = Bounded::default();
        let written = if let Ok(rust) = rustc_demangle::try_demangle(text) {
            fmt::write(&mut name, format_args!("{rust:#}"))
        } else {
            let options = cpp_demangle::DemangleOptions::new();
            let limit = cpp_demangle::ParseOptions::default().recursion_limit(NESTING);
            let symbol = cpp_demangle::Symbol::new_with_options(text, &limit).ok()?;
            symbol.structured_demangle(&mut name, &options)
        };
        // What did not fit has been cut by `Bounded`; any other failure leaves the raw name.
        (written.is_ok() || name.full).then_some(name.text)
    });
    match demangled {
        Ok(Some(name)) if !name.is_empty() => name,
        _ => shown(text),
    }
}

/// Cuts a text to the length that is shown.
pub(super) fn shown(text: &str) -> String {
    let mut name = Bounded::default();
    let _cut = fmt::Write::write_str(&mut name, text);
    name.text
}

/// Text that stops taking more at [`SHOWN_NAME`] bytes, so that a small mangled name that stands
/// for gigabytes costs no more than another one.
#[derive(Default)]
struct Bounded {
    text: String,
    full: bool,
}

impl fmt::Write for Bounded {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = SHOWN_NAME.saturating_sub(self.text.len());
        if text.len() <= room && !self.full {
            self.text.push_str(text);
            return Ok(());
        }
        if !self.full {
            self.text.push_str(text.get(..text.floor_char_boundary(room)).unwrap_or_default());
            self.text.push('…');
            self.full = true;
        }
        Err(fmt::Error)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_are_demangled() {
        for (raw, name) in [
            ("main", "main"),
            ("_ZN3foo3barEi", "foo::bar(int)"),
            ("_ZN4core3fmt5write17h0123456789abcdefE", "core::fmt::write"),
            ("_RNvC6_123foo3bar", "123foo::bar"),
            ("_Znwm", "operator new(unsigned long)"),
            ("_Zbroken", "_Zbroken"),
            ("_Z", "_Z"),
            ("main.(*T).Run", "main.(*T).Run"),
            ("", ""),
        ] {
            assert_eq!(demangle(raw.as_bytes()), name);
        }
        assert_eq!(demangle(b"a\xffb\n"), "a\u{fffd}b\n");
    }

    #[test]
    fn names_are_bounded() {
        let long = demangle("é".repeat(10_000).as_bytes());
        assert!(long.ends_with('…') && long.len() <= SHOWN_NAME + '…'.len_utf8());
        // Each substitution doubles: 2^40 letters.
        let bomb = format!("_Z1fI1A{}E", "S_S_".repeat(2000));
        assert!(demangle(bomb.as_bytes()).len() <= SHOWN_NAME + '…'.len_utf8());
        // Each repetition multiplies the readings.
        for seed in ["cvT_I", "LSaI", "LS_I", "C1I", "IStC1", "ILSt", "L1aI"] {
            for name in ["_ZNK1acvT_I", "_Z1f", "_ZNK1aI"] {
                let name = format!("{name}{}v", seed.repeat(30));
                assert_eq!(demangle(name.as_bytes()), name);
            }
        }
        let invalid = demangle(&[0xff; 20_000]);
        assert!(invalid.len() <= SHOWN_NAME + '…'.len_utf8());
    }

    proptest! {
        #[test]
        fn any_name_is_bounded(raw: Vec<u8>, mangled in "_(Z|R)[A-Za-z0-9_]{0,80}") {
            prop_assert!(demangle(&raw).len() <= SHOWN_NAME + 3);
            prop_assert!(demangle(mangled.as_bytes()).len() <= SHOWN_NAME + 3);
        }
    }
}
