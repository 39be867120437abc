//! On the real machine.
