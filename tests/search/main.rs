//! Exhaustive search: gate, session and restart keep their promises in every order of everything that can happen, in
//! small worlds.
//!
//! A [`world::World`] consists of a model of the kernel ([`kernel`]), a real session on it, one daemon after the other, and the
//! clients. It lists the actions that are possible next, performs one of them, and judges its results by the true state
//! ([`oracle`]), which is never derived from the gate. [`search`] visits all states of a configuration breadth-first;
//! [`walk`] takes random paths through worlds that are too large for that. [`configurations`] has those that run in every
//! `cargo test`; docs/guide/testing.md describes what the search shows.

// A violated assumption fails the test; nothing links this crate.
#![allow(clippy::unwrap_used, clippy::expect_used, unreachable_pub)]

mod action;
mod canonical;
mod clock;
mod config;
mod configurations;
mod kernel;
mod ledger;
mod oracle;
mod plant;
mod search;
mod tests;
mod walk;
mod world;
