//! Exhaustive search: gate, session and restart keep their promises in every order of everything that can happen, in
//! small worlds.
//!
//! A [`world::World`] has a model of the kernel ([`kernel`]), a real session on it, one daemon after the other, and the
//! clients. It tells what may happen next, does one of these things, and judges what comes of it by what is true
//! ([`truth`]), which never looks into the gate. [`search`] goes through all states of a configuration breadth-first and
//! [`walk`] at random through worlds that are too large for that. What runs in every `cargo test` is in
//! [`configurations`]; docs/guide/testing.md says what all of it shows.

// What cannot be is a failed test; and nobody links this crate.
#![allow(clippy::unwrap_used, clippy::expect_used, unreachable_pub)]

mod action;
mod canonical;
mod clock;
mod config;
mod configurations;
mod kernel;
mod ledger;
mod plant;
mod search;
mod tests;
mod truth;
mod walk;
mod world;
