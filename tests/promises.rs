//! The gate keeps its promises (SPECIFICATION.md), whatever happens around it.

// What cannot be is a failed test; and nobody links this crate.
#![allow(clippy::unwrap_used, clippy::expect_used, unreachable_pub)]

#[path = "promises/action.rs"]
mod action;
#[path = "promises/anything.rs"]
mod anything;
#[path = "promises/bulk.rs"]
mod bulk;
#[path = "promises/effects.rs"]
mod effects;
#[path = "promises/hands.rs"]
mod hands;
#[path = "promises/model.rs"]
mod model;
#[path = "promises/nth.rs"]
mod nth;
#[path = "promises/planted.rs"]
mod planted;
#[path = "promises/refusals.rs"]
mod refusals;
#[path = "promises/rng.rs"]
mod rng;
#[path = "promises/saboteur.rs"]
mod saboteur;
#[path = "promises/scenes.rs"]
mod scenes;
#[path = "promises/told.rs"]
mod told;
#[path = "promises/truth.rs"]
mod truth;
#[path = "promises/world.rs"]
mod world;
