//! The tests. What each configuration came to is printed past the test harness, which keeps the output of what passes.

use std::io::Write;
use std::time::Duration;

use crate::config::Config;
use crate::configurations as with;
use crate::plant::Plant;
use crate::search::{Found, Limits, narrate, search};
use crate::walk::walk;

/// States after which a configuration is too large for every `cargo test`.
const MAX_STATES: usize = 60_000;
/// Random walks through each world, and steps of each.
const WALKS: u64 = 40;
const WALK_STEPS: usize = 300;

fn say(line: &str) {
    // Nobody reads it where it cannot be written.
    let _ = writeln!(std::io::stderr(), "{line}");
}

fn report(config: &Config, limits: Limits) -> Found {
    let found = search(config, limits);
    let Found { states, transitions, depth, took, complete, .. } = &found;
    let (name, seconds) = (config.name, took.as_secs_f64());
    let rest = if *complete { "complete" } else { "incomplete" };
    say(&format!(
        "search: {name}: {states} states, {transitions} transitions, {depth} deep, {seconds:.1} s of processor time, {rest}"
    ));
    found
}

fn keeps_every_promise(config: &Config, limits: Limits) -> Found {
    let found = report(config, limits);
    if let Some((broken, path)) = &found.broken {
        panic!("{}: {broken}\nafter {path:?}\n{}", config.name, narrate(config, path));
    }
    found
}

macro_rules! every_order_keeps_every_promise {
    ($($name:ident)*) => {$(
        #[test]
        fn $name() {
            let limits = Limits { states: MAX_STATES, time: Duration::MAX };
            assert!(keeps_every_promise(&with::$name(), limits).complete, "it has become too large");
        }
    )*};
}

every_order_keeps_every_promise! {
    conversions_with_a_fault
    death_with_a_fault
    alias_with_a_fault
    alias_comes
    pages_come_back
    strict_with_a_fault
    strict_with_two_devices
    restart
    restart_with_a_fault
    two_restarts
    strict_restart
    strict_restart_with_a_fence_that_fails
    second_connection_dies
    passgate_converts
    passgate_converts_and_restarts
    pauses_and_restarts
    dma_in_flight
    pages_are_cut
    every_fence
    calls_in_two_steps
    one_inbox
    file_comes_and_goes
}

/// A search that finds nothing shows nothing, unless it finds what is there.
#[test]
fn planted_faults_are_found() {
    let planted = [
        (with::strict_restart_between_two_conversions(), Plant::LiveAts),
        (with::conversions_with_a_fault(), Plant::UnmapLies),
        (with::strict_with_a_fault(), Plant::DetachLies),
        (with::strict_restart(), Plant::DetachLies),
        (with::restart(), Plant::HoldsLost),
        (with::strict_restart(), Plant::StopsLost),
        (with::second_connection_dies(), Plant::AllUnended),
    ];
    for (config, plant) in planted {
        let name = config.name;
        let found = report(&config.planted(plant), Limits { states: MAX_STATES, time: Duration::MAX });
        let Some((broken, path)) = found.broken else { panic!("{plant:?} is not found by `{name}`") };
        say(&format!("search: {plant:?} is found by `{name}` after {} steps: {broken}", path.len()));
    }
}

#[test]
fn random_walks_keep_every_promise() {
    walks(0, WALKS);
}

fn walks(first: u64, count: u64) {
    for config in with::walked() {
        let mut steps = 0;
        for seed in first..first + count {
            match walk(&config, seed, WALK_STEPS) {
                Ok(walked) => steps += walked,
                Err((broken, path)) => {
                    panic!("{}, seed {seed}: {broken}\n{}", config.name, narrate(&config, &path))
                }
            }
        }
        say(&format!("search: {}: {count} walks from seed {first}, {steps} steps", config.name));
    }
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

/// For `tests/long/search`: the next configuration of the larger ones, for so long, or random walks where there is no
/// next one. Without `PASSGATE_SEARCH_SECONDS` it does nothing.
#[test]
fn larger_configurations_keep_every_promise() {
    let Some(seconds) = number("PASSGATE_SEARCH_SECONDS") else { return };
    let from = number("PASSGATE_SEARCH_FROM").unwrap_or(0);
    let limits = Limits { states: usize::MAX, time: Duration::from_secs(seconds) };
    match with::larger().get(from as usize) {
        Some(config) => _ = keeps_every_promise(config, limits),
        None => walks(1_000_000 + from * 1_000_000, seconds * 4),
    }
}
