//! Spends its time in the kernel: reads zeros.
//!
//! `syscalls [--seconds N]`. All of it is below `read_zeros`.

use std::{fs::File, hint::black_box, io::Read as _};

use anyhow::{Context as _, Result};
use podflame_tests::load::{Load, ready};

fn main() -> Result<()> {
    let load = Load::start()?;
    let mut zeros = File::open("/dev/zero").context("open /dev/zero")?;
    let mut buffer = vec![1; 1 << 20];
    ready("")?;
    while load.running() {
        black_box(read_zeros(&mut zeros, &mut buffer)?);
    }
    Ok(())
}

#[inline(never)]
fn read_zeros(zeros: &mut File, buffer: &mut [u8]) -> Result<usize> {
    // Not `read_exact`: a signal ends the read, and then the workload.
    let read = zeros.read(black_box(buffer)).or_else(|error| match error.kind() {
        std::io::ErrorKind::Interrupted => Ok(0),
        _ => Err(error),
    });
    black_box(read).context("read /dev/zero")
}
