//! What descriptors refer to.
