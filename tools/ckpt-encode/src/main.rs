//! Encodes JSON as checkpoint images.
fn main() {}
