//! Rebuilds the processes of a checkpoint.
