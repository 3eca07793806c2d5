//! The checker can fail: each planted fault breaks the promise that it is against, and is found.
//!
//! Of number 8, the guardian is tested with the process that it is.

use crate::bulk::run;
use crate::saboteur::Plant;

/// Runs worlds until the planted fault is found as a breach of `promise`. In some worlds it shows as another first.
fn found(plant: Plant, promise: u8) {
    for seed in 0..400 {
        let (world, kept) = run(seed, plant, false);
        if let Err(broken) = kept {
            println!("{plant:?}: seed {seed}, {} events: {broken}", world.events);
            if broken.promise == promise {
                return;
            }
        }
    }
    panic!("{plant:?} was never found as a breach of promise {promise}");
}

#[test]
fn promise_1_done_is_only_said_when_no_device_sees_the_range() {
    found(Plant::PretendUnmaps, 1);
}

#[test]
fn promise_2_a_mapping_whose_removal_failed_is_never_forgotten() {
    found(Plant::ErrorsAreSuccess, 2);
    found(Plant::ShortIsWhole, 2);
    found(Plant::FlightIsOver, 2);
    found(Plant::HalfIsNothing, 2);
    found(Plant::MasterIsProof, 2);
    found(Plant::NotStrict, 2);
}

#[test]
fn promise_3_nothing_is_mapped_between_begin_and_end_and_nobody_waits_for_one() {
    found(Plant::MapsBeforeEnd, 3);
    found(Plant::AddWaitsForEnd, 3);
}

#[test]
fn promise_4_every_begin_is_answered_once_and_in_time() {
    found(Plant::NoTimers, 4);
    found(Plant::AnswersTwice, 4);
    found(Plant::EndsTdis, 4);
    found(Plant::AllInsist, 4);
}

#[test]
fn promise_5_who_cannot_be_told_no_is_told_so_only_when_nothing_is_left_to_try() {
    found(Plant::DeafToInsistence, 5);
}

#[test]
fn promise_6_what_failed_is_told_twice_and_stays_in_quarantine() {
    found(Plant::SilentQuarantine, 6);
    found(Plant::SilentRefusal, 6);
    found(Plant::UnknownIsCommitted, 6);
    found(Plant::SilentTdi, 6);
    found(Plant::SilentRelease, 6);
    found(Plant::GenerousRelease, 6);
    found(Plant::ForgottenSeed, 6);
}

#[test]
fn promise_7_budgets_hold() {
    found(Plant::GenerousBudget, 7);
    found(Plant::ManyRegions, 7);
}

#[test]
fn promise_8_devices_stop_before_mappings_go_before_files_are_let_go() {
    found(Plant::DeafToDeath, 8);
    found(Plant::EarlyForget, 8);
    found(Plant::FencesSkipped, 8);
    found(Plant::EarlyClosed, 8);
}
