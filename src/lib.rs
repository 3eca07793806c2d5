//! passgate.
