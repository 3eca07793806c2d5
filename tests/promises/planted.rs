//! Shows that the checker can fail: it finds each planted fault as a breach of the promise that the fault breaks.
//!
//! The guardian's part of promise 8 is tested with the guardian process itself.

use crate::mutant::Plant;
use crate::random_events::run_world;

/// Runs worlds until the planted fault is found as a breach of `promise`. In some worlds it breaks another promise first.
fn assert_found(plant: Plant, promise: u8) {
    for seed in 0..400 {
        let (world, kept) = run_world(seed, plant, false);
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
fn promise_1_done_only_when_no_device_reaches_the_range() {
    assert_found(Plant::UnmapsSkipped, 1);
}

#[test]
fn promise_2_failed_removal_is_never_forgotten() {
    assert_found(Plant::FailedUnmapIsWhole, 2);
    assert_found(Plant::ShortUnmapIsWhole, 2);
    assert_found(Plant::InFlightIsGone, 2);
    assert_found(Plant::HalfMapIsRefused, 2);
    assert_found(Plant::MasterIsProof, 2);
    assert_found(Plant::NotStrict, 2);
}

#[test]
fn promise_3_nothing_is_mapped_and_no_reply_waits_between_begin_and_end() {
    assert_found(Plant::MapsBeforeEnd, 3);
    assert_found(Plant::AddWaitsForEnd, 3);
}

#[test]
fn promise_4_every_begin_is_answered_once_and_in_time() {
    assert_found(Plant::NoTimers, 4);
    assert_found(Plant::AnswersTwice, 4);
    assert_found(Plant::EndsTdis, 4);
    assert_found(Plant::AllMustUnmap, 4);
}

#[test]
fn promise_5_must_unmap_client_is_refused_only_after_every_fence() {
    assert_found(Plant::MustUnmapLost, 5);
}

#[test]
fn promise_6_failed_range_is_reported_twice_and_quarantined() {
    assert_found(Plant::QuarantineUnreported, 6);
    assert_found(Plant::RefusalUnreported, 6);
    assert_found(Plant::UnknownIsCommitted, 6);
    assert_found(Plant::TdiEndUnreported, 6);
    assert_found(Plant::ReleaseUnreported, 6);
    assert_found(Plant::ReleasesTooMuch, 6);
    assert_found(Plant::EarlierQuarantineLost, 6);
}

#[test]
fn promise_7_budgets_are_never_exceeded() {
    assert_found(Plant::BudgetTooLarge, 7);
    assert_found(Plant::RegionLimitTooLarge, 7);
}

#[test]
fn promise_8_devices_stop_before_unmap_before_files_are_forgotten() {
    assert_found(Plant::ClientGoneLost, 8);
    assert_found(Plant::FilesForgottenEarly, 8);
    assert_found(Plant::FencesSkipped, 8);
    assert_found(Plant::ClosedEarly, 8);
}
