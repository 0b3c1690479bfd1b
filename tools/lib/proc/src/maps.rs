//! /proc/PID/maps.
