//! The whole correlator, on simulated nodes.
#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

mod golden;
mod kinds;
mod properties;
mod rng;
mod sim;
