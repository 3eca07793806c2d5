//! The audit log is evidence: it replays to the recorded answers, it survives its daemon, and a changed line is detected.
//!
//! `PASSGATE_CONVERSIONS=1000000` runs the long run at full length; the default is 100 000 conversions.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a panic fails the test
#![allow(unreachable_pub)] // its modules are one program

#[path = "../daemon/mod.rs"]
mod daemon;

mod harness;
mod killed;
mod replay;
mod restart;
mod tampering;
