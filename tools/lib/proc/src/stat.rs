//! /proc/PID/stat.
