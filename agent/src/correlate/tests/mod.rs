//! The whole correlator, on simulated nodes.
#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

mod kinds;
mod rng;
mod sim;
