//! Spends 70 % of its CPU time in `hot_a` and 30 % in `hot_b`.
//!
//! `split [--seconds N] [--threads N]`. Both functions do units of equal cost, 7 to 3, in slices of
//! varying length, so that no sampling frequency can keep in step with them.

use std::hint::black_box;

use anyhow::Result;
use podflame_tests::load::{Load, option, ready};

/// Steps of a unit: some 20 µs.
const UNIT: u64 = 16_384;

fn main() -> Result<()> {
    let load = Load::start()?;
    let threads: u64 = option("--threads", 1)?;
    std::thread::scope(|scope| {
        for seed in 1..threads {
            scope.spawn(move || split_loop(load, seed));
        }
        ready("")?;
        split_loop(load, threads);
        Ok(())
    })
}

#[inline(never)]
fn split_loop(load: Load, seed: u64) {
    let mut random = seed;
    while load.running() {
        // xorshift64.
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let units = 1 + random % 8;
        black_box(hot_a(7 * units * UNIT));
        black_box(hot_b(3 * units * UNIT));
    }
}

// Each step waits for the one before, so that both take the same time whatever the compiler does.
// The constants differ, or the two functions could be merged into one.

#[inline(never)]
fn hot_a(steps: u64) -> u64 {
    let mut x = steps;
    for _ in 0..steps {
        x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    }
    black_box(x)
}

#[inline(never)]
fn hot_b(steps: u64) -> u64 {
    let mut x = steps;
    for _ in 0..steps {
        x = x.wrapping_mul(2_862_933_555_777_941_757).wrapping_add(3_037_000_493_141_592_653);
    }
    black_box(x)
}
