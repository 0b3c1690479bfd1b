//! Checkpoints and restores process trees in one command.
