//! The vhost-user door with real front-ends of the `vhost` crate, a real gate, and a simulated drive.

mod guest;
mod requests;
mod world;
