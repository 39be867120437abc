//! Waiting for a condition instead of for time to pass.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};

/// How often the condition is looked at: rare enough to cost nothing, and far below any limit.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// Calls `condition` until it gives a value, and returns that.
///
/// # Errors
/// When the limit passes first; the message holds `what` was waited for. An error of the condition
/// itself ends the waiting.
pub fn wait_for<T>(
    what: &str,
    limit: Duration,
    mut condition: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let start = Instant::now();
    loop {
        if let Some(value) = condition()? {
            return Ok(value);
        }
        if start.elapsed() > limit {
            bail!("waited {limit:?} for {what}");
        }
        thread::sleep(LOOK_EVERY);
    }
}
