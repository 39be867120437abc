//! The stages of podflame, in the order data flows through them.
//!
//! kernel → decode → aggregate → resolve (symbols, attribute) → store and serve → fold → export.
//! A stage knows the types of [`event`] and [`profile`], and nothing of a later stage; only the
//! commands wire them.

pub mod account;
pub mod attribute;
pub mod command;
pub mod doctor;
pub mod event;
pub mod profile;
