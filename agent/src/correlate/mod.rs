//! From recorded series to incidents: which pod is slower than usual, and which layer is to blame.
//!
//! Pure: no I/O, no clock, no kernel, no protobuf. Whoever measures tells [`Observation`]s on slots of
//! 100 ms, says for which slots its numbers are whole ([`Correlator::cover`]), and then that slots are
//! complete ([`Correlator::tick`]), which returns what is to be told.
//!
//! How an answer comes about:
//!
//! 1. *What is usual* ([`baseline`]): median and median absolute deviation of bins of 5 s, over ten
//!    minutes. The last half minute is no part of it yet, and what an incident covers never will be.
//! 2. *What is wrong* ([`detect`]): a window of 5 s is compared with that every second.
//! 3. *Who pays* ([`payers`]): the extra time of a request, item by item, all in nanoseconds a request.
//! 4. *Why* ([`why`]): each payer's cause, by what else changed: a wait for a peer by retransmits on its
//!    path, or by the peer's own response time; a wait for a CPU by throttling, or by a neighbour.
//! 5. *How sure* ([`rank`]): the share that it pays, times lift, lead or lag, directness and data.
//!
//! What is unknown is not zero: a slot that nobody vouches for is in no sum, and lowers confidence.

mod baseline;
mod detect;
mod engine;
mod histogram;
mod incident;
mod lead;
mod observe;
mod payers;
mod persist;
mod rank;
mod scene;
mod sentence;
mod series;
#[cfg(test)]
mod tests;
mod track;
mod why;
mod workload;

pub use self::{
    baseline::Baseline,
    detect::CLOSE_SECONDS,
    engine::{Correlator, MAX_SERIES, MAX_WORKLOADS, Refused},
    histogram::{BUCKETS, Times, bucket},
    incident::{
        Cause, CauseKind, End, Event, Evidence, Incident, Layer, MoreWork, Root, Symptom,
        SymptomKind, Verdict,
    },
    lead::Lead,
    observe::{
        Kind, Metric, Name, Observation, SECOND, SLOT_NS, Slot, Source, Subject, Unit, Value,
    },
    persist::{Baselines, Error, MAX_BYTES, decode, encode},
    rank::MAX_CAUSES,
    series::{BIN, BINS, MAX_SPAN, REACH, RING},
    workload::MIN_VALUES,
};
