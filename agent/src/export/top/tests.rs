//! Sums by function.

use proptest::prelude::*;

use super::*;
use crate::{
    export::fixture::{Fixture, about, kernel, profiles, sampled, user},
    profile::Signal,
};

fn sums(profile: &Profile) -> Vec<(String, u64, u64)> {
    top(profile, 9).into_iter().map(|r| (r.name, r.self_value, r.total_value)).collect()
}

#[test]
fn self_and_total() {
    let rows = sums(&sampled(Signal::Cpu).profile());
    let expected: Vec<(String, u64, u64)> = [
        ("copy", 303_030_300, 303_030_300),
        ("tcp_sendmsg", 101_010_100, 101_010_100),
        ("handle", 50_505_050, 454_545_450),
        ("[no symbols]", 40_404_040, 40_404_040),
        ("main", 10_101_010, 505_050_500),
        ("fill", 0, 303_030_300),
        ("entry_SYSCALL_64", 0, 101_010_100),
    ]
    .map(|(name, own, total)| (name.to_owned(), own, total))
    .into();
    assert_eq!(rows, expected);
}

#[test]
fn recursion_counts_once_and_lines_are_one_function() {
    let mut fixture = Fixture::new(Signal::Cpu);
    let recursive = [user("f", "/bin/f", 1), user("f", "/bin/f", 2), user("f", "/bin/f", 3)];
    fixture.sample(("w", 1, "t"), &recursive, (1, 6));
    fixture.sample(("w", 1, "t"), &[kernel("f"), user("f", "/bin/f", 2)], (1, 2));
    assert_eq!(sums(&fixture.profile()), [("f".to_owned(), 6, 8), ("f".to_owned(), 2, 2)]);
    assert_eq!(top(&fixture.profile(), 1).len(), 1);
}

#[test]
fn a_stack_without_code_has_a_row() {
    let mut fixture = Fixture::new(Signal::Retransmit);
    fixture.sample(("w", 1, "t"), &[about("no sender known")], (1, 2));
    fixture.sample(("w", 1, "t"), &[], (1, 1));
    assert_eq!(
        sums(&fixture.profile()),
        [("no sender known".to_owned(), 2, 2), (UNKNOWN.to_owned(), 1, 1)]
    );
}

proptest! {
    #[test]
    fn self_values_sum_to_all(profile in profiles()) {
        let all: u128 = profile.samples.iter().map(|s| u128::from(s.weight)).sum();
        prop_assume!(all < u128::from(u64::MAX));
        let rows = top(&profile, usize::MAX);
        prop_assert_eq!(rows.iter().map(|r| u128::from(r.self_value)).sum::<u128>(), all);
        prop_assert!(rows.iter().all(|r| r.self_value <= r.total_value && r.total_share <= 1.0));
    }
}
