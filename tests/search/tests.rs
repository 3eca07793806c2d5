//! The tests. The figures of each configuration are printed to standard error, past the test harness, which captures the output
//! of tests that pass.

use std::io::Write;
use std::time::Duration;

use crate::config::Config;
use crate::configurations as with;
use crate::plant::Plant;
use crate::search::{Limits, SearchResult, describe_path, search};
use crate::walk::walk;

/// The maximum number of states of a configuration that runs in every `cargo test`.
const MAX_STATES: usize = 60_000;
/// The number of random walks through each configuration.
const WALKS: u64 = 40;
/// The maximum number of steps of a walk.
const WALK_STEPS: usize = 300;

fn print_line(line: &str) {
    // A closed standard error is no failure.
    let _ = writeln!(std::io::stderr(), "{line}");
}

fn report(config: &Config, limits: Limits) -> SearchResult {
    let found = search(config, limits);
    let SearchResult { states, transitions, depth, took, complete, .. } = &found;
    let (name, seconds) = (config.name, took.as_secs_f64());
    let rest = if *complete { "complete" } else { "incomplete" };
    print_line(&format!(
        "search: {name}: {states} states, {transitions} transitions, {depth} deep, {seconds:.1} s of processor time, {rest}"
    ));
    found
}

fn search_and_check(config: &Config, limits: Limits) -> SearchResult {
    let found = report(config, limits);
    if let Some((broken, path)) = &found.broken {
        panic!("{}: {broken}\nafter {path:?}\n{}", config.name, describe_path(config, path));
    }
    found
}

macro_rules! every_order_keeps_every_promise {
    ($($name:ident)*) => {$(
        #[test]
        fn $name() {
            let limits = Limits { states: MAX_STATES, time: Duration::MAX };
            assert!(search_and_check(&with::$name(), limits).complete, "the configuration has more than {MAX_STATES} states");
        }
    )*};
}

every_order_keeps_every_promise! {
    conversions_with_a_fault
    death_with_a_fault
    alias_with_a_fault
    alias_is_added
    pages_become_shared_again
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
    batched_events
    file_is_added_and_removed
    closed_in_pieces_with_a_fault
    closed_in_pieces_and_restarted
}

/// A search that finds nothing proves something only if it finds faults that are there.
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
        print_line(&format!("search: {plant:?} is found by `{name}` after {} steps: {broken}", path.len()));
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
                    panic!("{}, seed {seed}: {broken}\n{}", config.name, describe_path(&config, &path))
                }
            }
        }
        print_line(&format!("search: {}: {count} walks from seed {first}, {steps} steps", config.name));
    }
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

/// For `tests/long/search`: searches the configuration with the index `PASSGATE_SEARCH_FROM` of the larger ones for
/// `PASSGATE_SEARCH_SECONDS`, or takes random walks if there is none. Without `PASSGATE_SEARCH_SECONDS` it does nothing.
#[test]
fn larger_configurations_keep_every_promise() {
    let Some(seconds) = number("PASSGATE_SEARCH_SECONDS") else { return };
    let from = number("PASSGATE_SEARCH_FROM").unwrap_or(0);
    let limits = Limits { states: usize::MAX, time: Duration::from_secs(seconds) };
    match with::larger().get(from as usize) {
        Some(config) => _ = search_and_check(config, limits),
        None => walks(1_000_000 + from * 1_000_000, seconds * 4),
    }
}
