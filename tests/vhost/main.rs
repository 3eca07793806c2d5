//! The vhost-user door with real front-ends of the `vhost` crate, a real gate, and a simulated drive.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a panic fails the test
#![allow(dead_code, unreachable_pub)] // each test uses its part of the guest and the world

mod guest;
mod hostile;
mod requests;
mod world;
