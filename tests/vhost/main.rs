//! The vhost-user back-end with the front-ends of the `vhost` crate, a real gate, and a simulated drive.

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

/// Prints the back-end's log as RUST_LOG sets it.
pub fn init_logging() {
    let _ = env_logger::builder().is_test(true).try_init();
}
