//! Starts many processes that do not live long.
//!
//! `forks [--per-second N] [--ms M] [--seconds N]`: starts this program N times a second (100 by
//! default), each to spin M milliseconds (2 by default) in `short_lived_work`. Ends with one line of
//! JSON: how many were started.

use std::{
    env,
    hint::black_box,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use podflame_tests::load::{Load, option, ready};

fn main() -> Result<()> {
    let ms: u64 = option("--ms", 2)?;
    if env::args().nth(1).as_deref() == Some("short-lived") {
        black_box(short_lived_work(Duration::from_millis(ms)));
        return Ok(());
    }
    let load = Load::start()?;
    let per_second: u32 = option("--per-second", 100)?;
    let pause = Duration::from_secs(1) / per_second.max(1);
    let itself = env::current_exe().context("find this program")?;
    // SAFETY: no handler is set. Ignored, the signal lets the kernel clear away children that end.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
    ready("")?;
    let mut started = 0;
    let mut next = Instant::now();
    while load.running() {
        Command::new(&itself)
            .args(["short-lived", "--ms", &ms.to_string()])
            .stdout(Stdio::null())
            .spawn()
            .context("start a process")?;
        started += 1;
        next += pause;
        // Behind time, it goes on at once, so that the rate holds on average.
        thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    println!("{{\"started\":{started}}}");
    Ok(())
}

#[inline(never)]
fn short_lived_work(life: Duration) -> u64 {
    let start = Instant::now();
    let mut turns = 0;
    while start.elapsed() < life {
        turns = black_box(turns + 1);
    }
    black_box(turns)
}
