//! How long a watch rests after a failure.
//!
//! kube's own pause starts anew at every event, and each attempt to list is announced by one
//! ([`kube::runtime::watcher::Event::Init`]): whoever is refused would come back every second, for
//! ever.

use std::time::Duration;

use kube::runtime::{utils::Backoff, watcher::DefaultBackoff};

/// kube's pauses, 0.8 s doubled up to 30 s with jitter, which start anew after an attempt that brought
/// more than its announcement, or two minutes without a failure.
#[derive(Default)]
pub(super) struct Pause {
    pauses: DefaultBackoff,
    /// Since the last failure.
    events: u32,
}

impl Iterator for Pause {
    type Item = Duration;

    /// The next one, after a failure.
    fn next(&mut self) -> Option<Duration> {
        if std::mem::take(&mut self.events) > 1 {
            self.pauses.reset();
        }
        self.pauses.next()
    }
}

impl Backoff for Pause {
    /// Something was told.
    fn reset(&mut self) {
        self.events = self.events.saturating_add(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The pause after an attempt that brought so many events, in seconds.
    fn after(pause: &mut Pause, events: u32) -> f64 {
        for _ in 0..events {
            pause.reset();
        }
        pause.next().map_or(0.0, |pause| pause.as_secs_f64())
    }

    #[test]
    fn who_is_refused_waits_longer_and_longer() {
        let mut pause = Pause::default();
        // With jitter, a pause is up to twice as long.
        for at_least in [0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30.0, 30.0] {
            let length = after(&mut pause, 1);
            assert!((at_least..=2.0 * at_least).contains(&length), "{length} s for {at_least} s");
        }
        // A watch that was listed, and breaks then.
        assert!(after(&mut pause, 3) <= 1.6);
        // It is not announced when it is tried again without a list.
        assert!(after(&mut pause, 0) >= 1.6);
    }
}
