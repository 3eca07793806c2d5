//! The main job, end to end: a real session, its real sockets, real guest_memfd, real pins, a device doing DMA.
//!
//! Client and server are in one process, and the device is at hand: what it meets is what the kernel lets it meet.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a test that cannot go on fails

#[path = "../common/mod.rs"]
mod common;

mod death;
mod hanging;
mod order;
mod refusal;
