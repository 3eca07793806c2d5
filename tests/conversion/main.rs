//! Conversions end to end: a real session, its real sockets, real guest_memfd, real pins, a device doing DMA.
//!
//! Client and server are in one process, and the test drives the device directly: the kernel alone decides whether its DMA
//! faults.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a panic fails the test

#[path = "../common/mod.rs"]
mod common;

mod death;
mod hanging;
mod order;
mod refusal;
