//! The audit log is the evidence: what it holds replays to what was said, it outlives its daemon, and whoever changes a
//! line of it is found out.
//!
//! `PASSGATE_CONVERSIONS=1000000` makes the long run as long as issue 3 wants it.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a panic fails the test
#![allow(unreachable_pub)] // its modules are one program

#[path = "../daemon/mod.rs"]
mod daemon;

mod broken;
mod clean;
mod killed;
mod play;
mod restart;
