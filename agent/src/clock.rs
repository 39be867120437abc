//! The kernel's clock and the wall clock: the only place that knows both.
//!
//! Everything inside the agent is on `CLOCK_MONOTONIC` ([`KTime`]), which never jumps. The wall
//! clock is for people and for other machines, so a time is converted when it leaves, with what the
//! wall clock says then.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::event::KTime;

/// One reading of both clocks. Times converted with the same reading keep their distances, also when
/// the wall clock jumps in between.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Clock {
    /// `CLOCK_MONOTONIC`.
    pub monotonic: KTime,
    /// `CLOCK_REALTIME` at the same moment.
    pub wall: SystemTime,
}

impl Clock {
    /// Reads both clocks, the wall clock between two readings of the other.
    #[must_use]
    pub fn now() -> Self {
        let before = monotonic();
        let wall = SystemTime::now();
        let after = monotonic();
        Self { monotonic: KTime(before.0 + after.0.saturating_sub(before.0) / 2), wall }
    }

    /// The wall clock's time of a kernel time. What is before 1970 becomes 1970.
    #[must_use]
    pub fn to_wall(self, time: KTime) -> SystemTime {
        let wall = if time >= self.monotonic {
            self.wall.checked_add(Duration::from_nanos(time.0 - self.monotonic.0))
        } else {
            self.wall.checked_sub(Duration::from_nanos(self.monotonic.0 - time.0))
        };
        wall.unwrap_or(UNIX_EPOCH).max(UNIX_EPOCH)
    }

    /// The wall clock's time of a kernel time in nanoseconds since 1970.
    #[must_use]
    pub fn to_unix_ns(self, time: KTime) -> i64 {
        let since = self.to_wall(time).duration_since(UNIX_EPOCH).unwrap_or_default();
        i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
    }

    /// The kernel time of a wall clock's time; the ends of the range for what is outside it.
    #[must_use]
    pub fn to_kernel(self, wall: SystemTime) -> KTime {
        let nanos = |d: Duration| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX);
        match wall.duration_since(self.wall) {
            Ok(later) => KTime(self.monotonic.0.saturating_add(nanos(later))),
            Err(earlier) => KTime(self.monotonic.0.saturating_sub(nanos(earlier.duration()))),
        }
    }
}

/// The time now, by the kernel's clock.
#[must_use]
pub fn monotonic() -> KTime {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a timespec that the call may write, and the clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    KTime(time.tv_sec.unsigned_abs() * 1_000_000_000 + time.tv_nsec.unsigned_abs())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_kernel_clock_moves_forward() {
        let first = monotonic();
        let clock = Clock::now();
        assert!(first.0 > 0 && first <= clock.monotonic && clock.monotonic <= monotonic());
    }

    #[test]
    fn times_that_no_clock_has_are_clamped() {
        let clock = Clock { monotonic: KTime(2_000_000_000), wall: UNIX_EPOCH };
        assert_eq!(clock.to_wall(KTime(0)), UNIX_EPOCH);
        assert_eq!(clock.to_kernel(UNIX_EPOCH + Duration::from_secs(1 << 40)), KTime(u64::MAX));
        let later = Clock { monotonic: KTime(5), wall: UNIX_EPOCH + Duration::from_secs(1) };
        assert_eq!(later.to_kernel(UNIX_EPOCH), KTime(0));
    }

    proptest! {
        #[test]
        fn there_and_back(now in 1u64 << 50..1 << 60, time in 0u64..1 << 61) {
            let wall = UNIX_EPOCH + Duration::from_nanos(1 << 61);
            let clock = Clock { monotonic: KTime(now), wall };
            prop_assert_eq!(clock.to_kernel(clock.to_wall(KTime(time))), KTime(time));
        }
    }
}
