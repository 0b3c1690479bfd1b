//! Encodes JSON as checkpoint images.
