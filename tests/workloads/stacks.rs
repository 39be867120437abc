//! Has many different stacks, or one deep one.
//!
//! `stacks --distinct N [--microseconds M] [--seconds N]`: visits N stacks in turn and spins M
//! microseconds (10 by default) in each. The stack of number n is a path of calls to `left` and
//! `right`, one for each binary digit.
//!
//! `stacks --depth N [--seconds N]`: spins in `at_the_bottom`, below N calls of `deeper`.
//!
//! Ends with one line of JSON: how many stacks it has visited.

use std::{
    hint::black_box,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};
use podflame_tests::load::{Load, option, ready};

fn main() -> Result<()> {
    let load = Load::start()?;
    let distinct: u64 = option("--distinct", 0)?;
    let depth: u64 = option("--depth", 0)?;
    let spin = Duration::from_micros(option("--microseconds", 10)?);
    if (distinct == 0) == (depth == 0) {
        bail!("usage: stacks --distinct N | --depth N");
    }
    ready("")?;
    let mut visited = 0;
    if depth > 0 {
        black_box(deeper(depth, load));
        visited = 1;
    } else {
        // Every number gets the digits of the largest, so that no stack is a part of another.
        let digits = u64::BITS - (distinct - 1).leading_zeros();
        while load.running() {
            black_box(turn(visited % distinct, digits, spin));
            visited += 1;
        }
    }
    println!("{{\"visited\":{visited}}}");
    Ok(())
}

/// Not inlined into `left` and `right`, where it would make calls to `left` a loop.
#[inline(never)]
fn turn(number: u64, digits: u32, spin: Duration) -> u64 {
    let way = if digits == 0 {
        at_the_end(spin)
    } else if number & 1 == 0 {
        left(number >> 1, digits - 1, spin)
    } else {
        right(number >> 1, digits - 1, spin)
    };
    black_box(way)
}

#[inline(never)]
fn left(number: u64, digits: u32, spin: Duration) -> u64 {
    black_box(turn(number, digits, spin)) ^ 0x1ef7
}

#[inline(never)]
fn right(number: u64, digits: u32, spin: Duration) -> u64 {
    black_box(turn(number, digits, spin)) ^ 0x2167
}

#[inline(never)]
fn at_the_end(spin: Duration) -> u64 {
    let start = Instant::now();
    let mut turns = 0;
    while start.elapsed() < spin {
        turns = black_box(turns + 1);
    }
    turns
}

#[inline(never)]
fn deeper(depth: u64, load: Load) -> u64 {
    let way = if depth <= 1 { at_the_bottom(load) } else { deeper(depth - 1, load) };
    // Work after the call: otherwise it would be a jump, without a frame of its own.
    black_box(way) + 1
}

#[inline(never)]
fn at_the_bottom(load: Load) -> u64 {
    let mut turns = 0;
    while load.running() {
        turns = black_box(turns + 1);
    }
    turns
}
