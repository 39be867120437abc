//! What is said of some faults, word by word.
//!
//! `PODFLAME_BLESS=1 cargo test` writes the golden file anew.

use std::{fmt::Write as _, fs, path::Path};

use super::sim::{Fault, Sim};
use crate::correlate::{Baselines, Correlator, Event, SECOND};

const BEFORE: u64 = 110;
const ALL: u64 = 140;

#[test]
fn incidents_read_as_before() {
    const FAULTS: [Fault; 11] = [
        Fault::PathLoss,
        Fault::PodLoss,
        Fault::Code,
        Fault::Lock,
        Fault::Allocation,
        Fault::PageCache,
        Fault::CpuLimit,
        Fault::Neighbour,
        Fault::SlowPeer,
        Fault::Storm,
        Fault::Load,
    ];
    let mut text = String::new();
    for (seed, fault) in FAULTS.into_iter().enumerate() {
        let _ = writeln!(text, "# {fault:?}");
        let mut sim = Sim::new(seed as u64, fault, 1, BEFORE, ALL);
        let begin = sim.slot(0).0;
        let events = sim.run(&mut Correlator::new(Baselines::default()), ALL);
        let since = |slot: u64| format!("{} s", (slot - begin) / SECOND);
        let mut last = std::collections::BTreeMap::new();
        for event in events {
            match event {
                Event::Opened(i) | Event::Updated(i) | Event::Closed(i) => {
                    last.insert(i.workload.to_string(), i.report(&since(i.start.0)));
                }
                Event::MoreWork(work) => {
                    let name = work.workload.to_string();
                    last.insert(name, work.sentence(&since(work.start.0)));
                }
            }
        }
        for report in last.values() {
            let _ = writeln!(text, "{report}");
        }
        text.push('\n');
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/incidents.txt");
    if std::env::var_os("PODFLAME_BLESS").is_some() {
        fs::write(&path, &text).unwrap();
    }
    let expected = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        text == expected,
        "{} differs (PODFLAME_BLESS=1 writes it anew); now:\n{text}",
        path.display()
    );
}
