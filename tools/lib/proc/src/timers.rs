//! /proc/PID/timers.
