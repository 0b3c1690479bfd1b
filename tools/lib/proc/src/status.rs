//! /proc/PID/status.
