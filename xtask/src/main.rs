//! The chores of podflame.
fn main() {}
