//! Prints checkpoint images and streams.
