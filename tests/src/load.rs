//! What every workload needs: its options, when to start being observed, and when to stop.
//!
//! A workload writes `ready` to standard output once it does what it is for, stops after
//! `--seconds`, on SIGTERM or on SIGINT, and dies with the process that started it.

use std::{
    env,
    io::Write as _,
    str::FromStr,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow};

static STOP: AtomicBool = AtomicBool::new(false);

/// The life of a workload.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    until: Option<Instant>,
}

impl Load {
    /// Begins the life of a workload: for `--seconds`, or until a signal.
    ///
    /// # Errors
    /// When `--seconds` is not a number.
    pub fn start() -> Result<Self> {
        extern "C" fn stop(_: libc::c_int) {
            STOP.store(true, Ordering::Relaxed);
        }
        let handler = stop as extern "C" fn(libc::c_int);
        // SAFETY: an all-zero sigaction is a valid one; the handler only stores to an atomic, and
        // both structures live through the calls.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            // No SA_RESTART: a blocking call returns, so that the workload sees that it shall stop.
            action.sa_sigaction = handler as libc::sighandler_t;
            libc::sigaction(libc::SIGTERM, &raw const action, std::ptr::null_mut());
            libc::sigaction(libc::SIGINT, &raw const action, std::ptr::null_mut());
        }
        // SAFETY: this option takes a signal number and touches no memory.
        unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
        let seconds: f64 = option("--seconds", f64::INFINITY)?;
        let life = Duration::try_from_secs_f64(seconds).ok();
        Ok(Self { until: life.and_then(|life| Instant::now().checked_add(life)) })
    }

    /// Whether the workload shall go on.
    ///
    /// A part of its caller: stacks by frame pointers have no caller of a function that has just begun.
    #[inline]
    #[must_use]
    pub fn running(self) -> bool {
        !STOP.load(Ordering::Relaxed) && self.until.is_none_or(|until| Instant::now() < until)
    }
}

/// Says that the workload runs, with what the observer has to know, such as an address.
///
/// # Errors
/// When standard output is closed.
pub fn ready(detail: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", format!("ready {detail}").trim_end())?;
    out.flush().context("write to standard output")
}

/// The value after an option such as `--seconds`, or the default where the option is absent.
///
/// # Errors
/// When the value is missing or does not parse.
pub fn option<T: FromStr>(name: &str, default: T) -> Result<T> {
    let mut words = env::args().skip_while(|word| word != name);
    if words.next().is_none() {
        return Ok(default);
    }
    let value = words.next().with_context(|| format!("{name} needs a value"))?;
    value.parse().map_err(|_| anyhow!("{name}: cannot read {value:?}"))
}
