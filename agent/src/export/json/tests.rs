//! Documents are read back by serde_json.
#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

use proptest::prelude::*;
use serde_json::Value;

use super::*;
use crate::{
    export::{
        fixture::{Fixture, HOSTILE, profiles, sampled, user},
        tests::{golden, options},
    },
    profile::Signal,
};

fn document(profile: &Profile) -> (String, Value) {
    let text = String::from_utf8(render(profile, &options()).unwrap()).unwrap();
    let value = serde_json::from_str(&text).unwrap();
    (text, value)
}

#[test]
fn the_document_is_as_before() {
    let (_, value) = document(&sampled(Signal::Cpu).profile());
    golden("export.json", &(serde_json::to_string_pretty(&value).unwrap() + "\n"));
}

#[test]
fn hostile_names_are_kept_but_not_raw() {
    for hostile in HOSTILE {
        let mut fixture = Fixture::new(Signal::Cpu);
        fixture.sample((hostile, 1, hostile), &[user(hostile, hostile, 1)], (1, 1));
        let (text, value) = document(&fixture.profile());
        assert_eq!(text.trim_end_matches('\n').find(is_unprintable), None, "{hostile:?}");
        let sample = &value["samples"][0];
        assert_eq!(sample["comm"], *hostile);
        assert_eq!(sample["workload"]["name"], *hostile);
        assert_eq!(sample["stack"][0]["name"], *hostile);
        assert_eq!(sample["stack"][0]["module"], *hostile);
    }
}

proptest! {
    #[test]
    fn sums_are_kept(profile in profiles()) {
        let (_, value) = document(&profile);
        let samples = value["samples"].as_array().unwrap();
        prop_assert_eq!(samples.len(), profile.samples.len());
        for field in ["count", "weight"] {
            let sum = samples.iter().fold(0_u64, |sum, s| {
                sum.saturating_add(s[field].as_u64().unwrap())
            });
            prop_assert_eq!(value["total"][field].as_u64(), Some(sum));
        }
    }
}
