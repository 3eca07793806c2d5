//! Both sockets: the protocol, its limits, and invalid input, which gets a clear answer, changes nothing and leaks no file.
//!
//! Client and server are in one process here, over the real soft domain, so that one count of `/proc/self/fd` detects the
//! leaks of either side.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a panic fails the test

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
mod sockets;
mod state;
mod timeouts;
