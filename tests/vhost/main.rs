//! The vhost-user door with real front-ends of the `vhost` crate, a real gate, and a simulated drive.

#![allow(unreachable_pub, missing_docs, clippy::unwrap_used, clippy::expect_used)]

mod command;
mod conversion;
mod guest;
mod hostile;
mod metrics;
mod platform;
mod reconnect;
mod requests;
mod world;

/// What the back-end says, where RUST_LOG asks for it.
pub fn listen() {
    let _ = env_logger::builder().is_test(true).try_init();
}
