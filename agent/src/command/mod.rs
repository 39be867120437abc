//! The subcommands: what a user types, wired to the stages.
//!
//! Not for logic of their own.

pub mod doctor;
