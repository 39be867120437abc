//! Lead and lag: at which shift two series go together best.

/// How two series go together.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Lead {
    /// By how many slots the first one comes before the second; negative if after.
    pub slots: i32,
    /// Pearson's correlation coefficient at that shift, from -1 to 1.
    pub correlation: f64,
}

/// Fewest slots that both series know.
const MIN_PAIRS: usize = 30;

/// Another shift than none must correlate better by this much: noise alone finds one that does a
/// little.
const MARGIN: f64 = 0.03;

/// Compares two series of equal length, NaN where unknown, at shifts up to `max` slots either way.
/// `None` if too little is known, or if one of them never changes.
pub(super) fn lead(cause: &[f64], effect: &[f64], max: usize) -> Option<Lead> {
    let still = Lead { slots: 0, correlation: pearson(cause, effect)? };
    let mut best = Lead { correlation: still.correlation + MARGIN, ..still };
    for shift in 1..=max.min(cause.len().min(effect.len()).saturating_sub(MIN_PAIRS)) {
        let slots = shift as i32;
        let first = pearson(cause, &effect[shift..]).map(|r| (slots, r));
        let later = pearson(&cause[shift..], effect).map(|r| (-slots, r));
        for (slots, correlation) in [first, later].into_iter().flatten() {
            if correlation > best.correlation {
                best = Lead { slots, correlation };
            }
        }
    }
    Some(if best.slots == 0 { still } else { best })
}

/// Over the slots that both know, of the shorter length.
fn pearson(x: &[f64], y: &[f64]) -> Option<f64> {
    let pairs = || x.iter().zip(y).filter(|(x, y)| x.is_finite() && y.is_finite());
    let count = pairs().count();
    if count < MIN_PAIRS {
        return None;
    }
    let (sx, sy) = pairs().fold((0.0, 0.0), |(a, b), (x, y)| (a + x, b + y));
    let (mx, my) = (sx / count as f64, sy / count as f64);
    let (mut xx, mut yy, mut xy) = (0.0, 0.0, 0.0);
    for (x, y) in pairs() {
        let (dx, dy) = (x - mx, y - my);
        xx += dx * dx;
        yy += dy * dy;
        xy += dx * dy;
    }
    let scale = (xx * yy).sqrt();
    (scale > 0.0 && scale.is_finite()).then(|| (xy / scale).clamp(-1.0, 1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wave(shift: usize) -> Vec<f64> {
        (0..200)
            .map(|i| ((i + shift) as f64 * 0.37).sin() + ((i + shift) as f64 * 0.11).sin())
            .collect()
    }

    #[test]
    fn the_shift_is_found() {
        let found =
            |cause: usize, effect: usize| lead(&wave(cause), &wave(effect), 30).map(|l| l.slots);
        assert_eq!(found(7, 0), Some(7));
        assert_eq!(found(0, 7), Some(-7));
        assert_eq!(found(3, 3), Some(0));
    }

    #[test]
    fn what_cannot_be_compared() {
        assert_eq!(lead(&[1.0; 200], &wave(0), 30), None);
        assert_eq!(lead(&[f64::NAN; 200], &wave(0), 30), None);
        assert_eq!(lead(&wave(0)[..20], &wave(0)[..20], 30), None);
    }

    #[test]
    fn unknown_slots_are_left_out() {
        let (cause, mut effect) = (wave(5), wave(0));
        effect.iter_mut().step_by(3).for_each(|v| *v = f64::NAN);
        assert_eq!(lead(&cause, &effect, 30).map(|l| l.slots), Some(5));
    }
}
