//! Golden files of every format, and what holds for all of them.
//!
//! `PODFLAME_BLESS=1 cargo test` writes the golden files anew.
#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::{fs, path::Path};

use super::{fixture::sampled, *};
use crate::profile::Signal;

/// Compares with `tests/golden/NAME`, or writes it.
pub(super) fn golden(name: &str, actual: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(name);
    if std::env::var_os("PODFLAME_BLESS").is_some() {
        fs::write(&path, actual).unwrap();
    }
    let expected = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        actual == expected,
        "{} differs (PODFLAME_BLESS=1 writes it anew); now:\n{actual}",
        path.display()
    );
}

pub(super) fn options() -> Options {
    Options {
        title: "CPU time on <node>".to_owned(),
        subtitle: "10 s at 99 Hz; 3 events lost".to_owned(),
        root: Root::WorkloadThenComm,
        start_unix_ns: 1_700_000_000_000_000_000,
    }
}

#[test]
fn folded_is_as_before() {
    let bytes = render(&sampled(Signal::Cpu).profile(), Format::Folded, &options()).unwrap();
    golden("export.folded", str::from_utf8(&bytes).unwrap());
}

#[test]
fn equal_profiles_give_equal_bytes() {
    let profile = sampled(Signal::PageFault).profile();
    let mut shuffled = profile.clone();
    shuffled.samples.reverse();
    for format in Format::ALL {
        let bytes = render(&profile, format, &options()).unwrap();
        assert!(!bytes.is_empty());
        assert_eq!(bytes, render(&shuffled, format, &options()).unwrap(), "{format}");
    }
}

#[test]
fn formats_go_by_their_names() {
    for format in Format::ALL {
        assert_eq!(format.to_string().parse(), Ok(format));
    }
    let error = "png".parse::<Format>().unwrap_err().to_string();
    assert!(Format::ALL.iter().all(|f| error.contains(f.name())), "{error}");
}
