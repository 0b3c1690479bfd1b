//! Address spaces and pages.
