//! The stages of podflame, in the order data flows through them.
//!
//! kernel → decode → aggregate → resolve (symbols, attribute) → store and serve → fold → export.
//! A stage knows the types of [`event`] and [`profile`], and nothing of a later stage; only
//! [`pipeline`] and the commands wire them.

pub mod account;
pub mod aggregate;
pub mod attribute;
pub mod baselines;
pub mod clock;
pub mod command;
pub mod correlate;
pub mod decode;
pub mod doctor;
pub mod event;
pub mod export;
#[cfg(test)]
mod fixture;
pub mod fold;
pub mod follow;
pub mod intern;
pub mod kernel;
pub mod pipeline;
pub mod pods;
pub mod profile;
pub mod python;
pub mod redact;
pub mod resolve;
pub mod select;
pub mod serve;
pub mod store;
pub mod symbols;
pub mod unwind;
pub mod unwinder;
