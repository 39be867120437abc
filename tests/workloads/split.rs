//! Spends 70 % of its CPU time in `hot_a` and 30 % in `hot_b`.
//!
//! `split [--seconds N] [--threads N]`. Both functions do units of equal cost, 7 to 3, in turns of
//! 100 ms on average: of varying length, so that no sampling frequency keeps in step with them, and
//! much longer than a sampling period, which makes the measured shares far more exact than shares of
//! independent samples would be (a tenth of a point after 8 s at 999 Hz).

use std::hint::black_box;

use anyhow::Result;
use podflame_tests::load::{Load, option, ready};

/// Steps of a unit: some 2 ms.
const UNIT: u64 = 1 << 20;

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

// Each step waits for the one before, and the shift keeps the compiler from taking several at once,
// so that both take the same time. The constants differ, or the two could be merged into one. The
// first `black_box` has the frame made before the loop, not after it, so that frame pointers show
// the caller.

#[inline(never)]
fn hot_a(steps: u64) -> u64 {
    let mut x = black_box(steps);
    for _ in 0..steps {
        x = (x ^ (x >> 29)).wrapping_mul(6_364_136_223_846_793_005);
    }
    black_box(x)
}

#[inline(never)]
fn hot_b(steps: u64) -> u64 {
    let mut x = black_box(steps);
    for _ in 0..steps {
        x = (x ^ (x >> 29)).wrapping_mul(2_862_933_555_777_941_757);
    }
    black_box(x)
}
