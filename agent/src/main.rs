//! podflame
fn main() {}
