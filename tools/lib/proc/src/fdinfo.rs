//! /proc/PID/fdinfo.
