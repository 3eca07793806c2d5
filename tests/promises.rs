//! The gate keeps its promises (SPECIFICATION.md), whatever happens around it.
//!
//! A [`world::World`] has clients, files whose pages have physical frames, regions with aliases and holes, simulated domains and
//! devices, and an [`executor::Executor`] that executes the gate's effects in any order, late or never. A checker
//! ([`model::Model`]) sees every event and every effect. It consists of the true state of the world ([`oracle::Oracle`]), a second
//! ledger derived from the results that were reported to the gate ([`shadow_ledger::ShadowLedger`]), and the requests that wait
//! for an answer. It judges each promise after every event; then every translation that a device can still use is checked.
//!
//! - `random_events`: a million random events by seed; prints rates. A failure prints its seed and the last events.
//! - `arbitrary`: shrinking cases, with made-up ids and numbers at the limits of their types.
//! - `fault_each_call`: one scenario, every fault at every call, under each policy.
//! - `scenes`, `fences`, `large`, `operator_release`: behaviour by example: when no fence is requested; the ladder, rung by
//!   rung; large mappings; quarantine that only an operator ends.
//! - `planted`: a fault at the gate's interface for each promise ([`mutant::Mutant`]); the checker must find it.
//!
//! The table lists mistakes inside the gate, the tests that find each, and the promise that these report as broken (each mistake
//! was made once, by hand; `tests/long/mutation` makes more):
//!
//! | mistake | found by | promise |
//! |---|---|---|
//! | results: a short unmap taken for complete; one in flight for gone; a half-made map forgotten | random_events, arbitrary, fault_each_call | 2 |
//! | results: a refused map taken for made | random_events, arbitrary, fault_each_call | 6 |
//! | results: quarantine lifted while in doubt | random_events, fault_each_call | 2, 6 |
//! | results: the file of a region not forgotten after its quarantine | random_events, arbitrary, fault_each_call | 8 |
//! | conversion: what failed not quarantined | random_events, arbitrary, fault_each_call | 6 |
//! | conversion: an end accepted from any connection | random_events, arbitrary | 3 |
//! | conversion: a page state not recorded, or not unknown after an unknown outcome | random_events, arbitrary, fault_each_call | 1, 2 |
//! | invalidations: granted during an unmap; only the first alias cleared | random_events, arbitrary, fault_each_call | 2 |
//! | ladder: no timer for the next rung | random_events, arbitrary, fault_each_call | 4 |
//! | ladder: no rung climbed when its time is over | scenes | – |
//! | ladder: a device stopped because a map is slow; a retry lost under a fence | scenes | – |
//! | invalidations: a begin over a region being closed; one begin too many | random_events, arbitrary | 8, 7 |
//! | mapping: over an exclusion; though private; though its region is being closed | all | 3; 1; 8 |
//! | mapping, regions: a budget exceeded, of mappings, of regions | random_events, arbitrary | 7 |
//! | regions: a file forgotten while in quarantine | random_events, arbitrary, fault_each_call | 6 |
//! | regions: devices not stopped when their client dies; another client's region removed | random_events, arbitrary, fault_each_call | 8, 4 |
//! | devices: attached again while in doubt, or before a dead client's memory is gone | random_events, fault_each_call | 2, 8 |
//! | devices: a failed fence taken for done; nothing resumed when a fence ends | random_events, fault_each_call | 2, 4 |
//! | devices: a stronger fence lost that was requested during another; a failed fence's device left stopped | random_events, fences | 2 |
//! | devices: a TDI ended unannounced, or where policy forbids it; bus mastering off taken for proof | random_events, arbitrary, fences | 6; 4; 2 |
//! | ATS: a grant without detach; a reset, or a device being attached, taken for detached | random_events, arbitrary, fences | 2 |
//! | ATS: the ranges that a detach proves swept one by one | random_events | 4 |
//! | must-unmap: removals, or what a dead client leaves, within policy; forgotten at its death; conversions beyond policy | random_events, arbitrary | 5; 5, 8; 4 |
//! | quarantine: a release that lifts more, forgets a mapping, comes while a conversion hangs | random_events, arbitrary, operator_release | 6; 2; 1 |
//! | quarantine: an earlier daemon's forgotten, or lifted by proof | random_events, arbitrary, operator_release | 6 |
//! | ledger: a run cut at the wrong border; a run overlooked | random_events, fault_each_call | 2, 6 |
//!
//! Not found, because it cannot be observed from outside: the errno of an unmap that reports too many bytes, and whether pages
//! are folded back into large leaves.

// A violated assumption fails the test; nothing links this crate.
#![allow(clippy::unwrap_used, clippy::expect_used, unreachable_pub)]

#[path = "promises/action.rs"]
mod action;
#[path = "promises/arbitrary.rs"]
mod arbitrary;
#[path = "promises/effects.rs"]
mod effects;
#[path = "promises/executor.rs"]
mod executor;
#[path = "promises/fault_each_call.rs"]
mod fault_each_call;
#[path = "promises/fences.rs"]
mod fences;
#[path = "promises/hitless.rs"]
mod hitless;
#[path = "promises/ids.rs"]
mod ids;
#[path = "promises/large.rs"]
mod large;
#[path = "promises/model.rs"]
mod model;
#[path = "promises/must_unmap.rs"]
mod must_unmap;
#[path = "promises/mutant.rs"]
mod mutant;
#[path = "promises/operator_release.rs"]
mod operator_release;
#[path = "promises/oracle.rs"]
mod oracle;
#[path = "promises/planted.rs"]
mod planted;
#[path = "promises/random_events.rs"]
mod random_events;
#[path = "promises/refusals.rs"]
mod refusals;
#[path = "promises/rng.rs"]
mod rng;
#[path = "promises/scenes.rs"]
mod scenes;
#[path = "promises/shadow_ledger.rs"]
mod shadow_ledger;
#[path = "promises/world.rs"]
mod world;
