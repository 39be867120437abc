//! The loss account as JSON, for scripts: an object for each probe that ran, every count by name.

use serde_json::{Map, Value, json};

use crate::{
    account::{Account, AgentDrop, ProbeAccount, kernel_drops},
    event::{PythonEnd, StackEnd},
};

/// The account of every probe that was active.
#[must_use]
pub fn json(account: &Account) -> Value {
    let active = account.iter().filter(|(_, counts)| counts.active);
    Value::Object(active.map(|(probe, counts)| (probe.name().to_owned(), one(counts))).collect())
}

fn one(counts: &ProbeAccount) -> Value {
    json!({
        "run_count": counts.run_count,
        "run_time_ns": counts.run_time_ns,
        "hits": counts.hits,
        "stored": counts.stored,
        "filtered": counts.filtered,
        "dropped_in_kernel": named(kernel_drops().iter().map(|r| r.name()), &counts.dropped_in_kernel),
        "aggregated": counts.aggregated,
        "dropped_in_agent": named(AgentDrop::ALL.iter().map(|r| r.name()), &counts.dropped_in_agent),
        "weight": counts.weight,
        "stack_ends": named(StackEnd::ALL.iter().map(|end| end.name()), &counts.stack_ends),
        "python_ends": named(PythonEnd::ALL.iter().map(|end| end.name()), &counts.python_ends),
    })
}

fn named<'a>(names: impl Iterator<Item = &'a str>, counts: &[u64]) -> Value {
    let fields: Map<String, Value> =
        names.zip(counts).map(|(name, count)| (name.to_owned(), (*count).into())).collect();
    Value::Object(fields)
}
