//! The gate keeps its promises (SPECIFICATION.md), whatever happens around it.
//!
//! A `World` has clients, files whose pages have physical frames, regions with aliases and holes, several simulated
//! domains and devices (`Hands`), and a session that executes effects in any order, late or never. A checker
//! (`Model`) hears every event and every effect. It knows what is true (`Truth`), what the gate was told (`Told`)
//! and who waits for what, and it judges each promise after every event, while devices reach for every page that
//! any translation still shows them.
//!
//! - `bulk`: a million random events by seed; prints rates. A failure prints its seed and the last events.
//! - `anything`: shrinking cases, with made-up names and numbers at the edges.
//! - `nth`: one scenario, every fault at every call, under each policy.
//! - `scenes`: when there is no fence, and what the promises leave open; `fences`: the ladder, rung by rung;
//!   `person`: what only a person ends.
//! - `planted`: a fault at the gate's seam for each promise; the checker must find it.
//!
//! Which mistake inside the gate turns which of them red (each was made once, by hand; `cargo mutants` makes more):
//!
//! | mistake | found by | as |
//! |---|---|---|
//! | results: a short unmap taken for whole; one in flight for gone; a half-made map forgotten | bulk, anything, nth | 2 |
//! | results: a refused map taken for made | bulk, anything, nth | 6 |
//! | results: quarantine lifted while in doubt | bulk, nth | 2, 6 |
//! | results: the file of a region not let go of after its quarantine | bulk, anything, nth | 8 |
//! | ending: what failed not quarantined | bulk, anything, nth | 6 |
//! | ending: an end that counts from any connection | bulk, anything | 3 |
//! | ending: a page state not taken down, or not unknown after an end that said so | bulk, anything, nth | 1, 2 |
//! | invalidation: granted while an unmap is under way; only the first alias cleared | bulk, anything, nth | 2 |
//! | ladder: no timer for the next rung | bulk, anything, nth | 4 |
//! | ladder: no rung climbed when time is over | scenes | – |
//! | ladder: a device stopped because a map takes its time; a retry lost under a fence | scenes | – |
//! | invalidation: a region on its way out begun over; one begin too many | bulk, anything | 8, 7 |
//! | plan: mapped over a hold; mapped though private; mapped though its region goes | all | 3; 1; 8 |
//! | plan, region: a budget not kept, of mappings, of regions | bulk, anything | 7 |
//! | region: a file let go of while in quarantine | bulk, anything, nth | 6 |
//! | region: devices not stopped when their client dies; a stranger's region removed | bulk, anything, nth | 8, 4 |
//! | stop: a device brought back while in doubt, or before a dead client's memory is gone | bulk, nth | 2, 8 |
//! | stop: a failed fence taken for done; nobody told that a fence is over | bulk, nth | 2, 4 |
//! | stop: a stronger fence forgotten that came while one was under way; a failed fence's device left stopped | bulk, fences | 2 |
//! | stop: a TDI ended in silence, without leave; a bus mastering off taken for proof | bulk, anything, fences | 6; 4; 2 |
//! | cached: a grant without detach; a reset, or a device on its way back, taken for detached | bulk, anything, fences | 2 |
//! | cached: what a detach proves looked at one by one | bulk | 4 |
//! | insists: removals, or what is left behind, stay within policy; forgotten when it dies; conversions go beyond policy | bulk, anything | 5; 5, 8; 4 |
//! | person: a release that lifts more, forgets a mapping, comes while a conversion hangs | bulk, anything, person | 6; 2; 1 |
//! | person: an earlier daemon's quarantine forgotten, or lifted by proof | bulk, anything, person | 6 |
//! | ledger: a run cut at the wrong border; a run overlooked | bulk, nth | 2, 6 |
//!
//! Not found, because nothing outside can tell: which errno a boast gets, pages folded back into giants.

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
#[path = "promises/fences.rs"]
mod fences;
#[path = "promises/hands.rs"]
mod hands;
#[path = "promises/insists.rs"]
mod insists;
#[path = "promises/large.rs"]
mod large;
#[path = "promises/learn.rs"]
mod learn;
#[path = "promises/model.rs"]
mod model;
#[path = "promises/nth.rs"]
mod nth;
#[path = "promises/person.rs"]
mod person;
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
#[path = "promises/window.rs"]
mod window;
#[path = "promises/world.rs"]
mod world;
