//! The whole correlator, on simulated nodes.
#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

mod causes;
mod golden;
mod kinds;
mod properties;
mod rng;
mod sim;
