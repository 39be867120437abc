//! How much work the programs are for the verifier, which refuses those that it looks at for too long.
//!
//! `tests/golden/verified-insns.txt` has what was committed: kernel, program, instructions.

use std::fs;

use anyhow::{Context as _, Result};

use crate::{Test, bpf, running::Agent};

pub(crate) const TESTS: &[Test] =
    &[("instructions_are_those_that_were_committed", instructions_are_those_that_were_committed)];

/// A fifth of what the kernel takes (`BPF_COMPLEXITY_LIMIT_INSNS`): kernels count differently.
const BUDGET: u32 = 200_000;

/// Of what was committed, in percent: the kernel's own updates change the count a little.
const TOLERANCE: u32 = 10;

const COMMITTED: &str = include_str!("../golden/verified-insns.txt");

fn instructions_are_those_that_were_committed() -> Result<()> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let agent = Agent::start(&[])?;
    let verified = bpf::verified(agent.running.pid())?;
    let mut known = 0;
    for line in COMMITTED.lines() {
        let mut words = line.split(' ');
        let (Some(kernel), Some(program), Some(count)) = (words.next(), words.next(), words.next())
        else {
            anyhow::bail!("not a kernel, a program and a number: {line}");
        };
        let count: u32 = count.parse().with_context(|| line.to_owned())?;
        let now = verified.get(program).with_context(|| format!("{program} is not loaded"))?;
        assert!(*now < BUDGET, "{program}: {now} instructions");
        if release.split('.').take(2).eq(kernel.split('.')) {
            let apart = now.abs_diff(count) * 100;
            assert!(
                apart <= count * TOLERANCE,
                "{program}: {now} instructions, and {count} were committed: if that is right, \
                 change tests/golden/verified-insns.txt; all: {verified:?}"
            );
            known += 1;
        }
    }
    println!("{known} programs compared on {}: {verified:?}", release.trim());
    assert!(verified.len() >= 6, "not all programs are loaded: {verified:?}");
    Ok(())
}
