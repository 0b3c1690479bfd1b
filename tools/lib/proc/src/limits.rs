//! /proc/PID/limits.
