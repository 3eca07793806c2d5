//! Bad input at both sockets: a clear answer, nothing lost, no file left open.
//!
//! Client and server are in one process here, over the real soft domain, so that one count of `/proc/self/fd` sees
//! what either side forgets.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a test that cannot go on fails

#[path = "../common/mod.rs"]
mod common;

#[path = "../daemon/mod.rs"]
mod daemon;

mod batch;
mod budgets;
mod control;
mod events;
mod interface;
mod memory;
mod metrics;
mod processes;
mod records;
mod release;
mod silence;
mod sockets;
mod state;
