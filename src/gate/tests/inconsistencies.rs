//! A ledger that contradicts the calls in progress: nothing is granted, and it is reported.

use super::*;

/// A region of eight pages with a device that can be drained.
fn world() -> World {
    let mut world = World::new(Policy::default(), &[SPLITS]);
    world.device(0, 0, &[Step::Drain], DeviceTraits::default());
    world.add(0, 8, 0, 1);
    world.settle();
    world
}

/// The ledger loses what it knew of these pages.
fn lose(world: &mut World, page: u64) {
    let domain = world.gate.mappings.get_mut(DomainId(0)).unwrap();
    for run in domain.mapped().runs(range(page, 1)).collect::<Vec<_>>() {
        domain.end_leftover(run.range, UnmapResult::Gone { bytes: 0 }, false);
    }
}

/// The contradictions that were reported.
fn reported(world: &World) -> Vec<PageRange<passgate_bindings::Iova>> {
    let iova = |effect: &Effect| match effect {
        Effect::Notice(Notice::Inconsistent { iova, .. }) => *iova,
        _ => None,
    };
    assert!(world.gate.snapshot().inconsistencies > 0);
    world.said.iter().filter_map(iova).collect()
}

#[test]
fn map_of_which_the_ledger_knows_nothing_is_quarantined_until_an_operator_releases_it() {
    let mut world = world();
    let id = world.begin(&[(3, 1)], PageState::Private);
    world.settle();
    world.end(id, Outcome::NotCommitted);
    lose(&mut world, 3);
    let call = world.take(is_map).expect("it is mapped again");
    world.succeeds(&call);
    assert_eq!(reported(&world), [range(3, 1)]);
    world.settle();
    assert_eq!(world.quarantine(), [(3, 1, Cause::Inconsistent)]);
    // The doubtful run there is unmapped before the page is given to anybody.
    let since = world.gate.snapshot().quarantine[0].invalidation;
    world.tell(Event::Release { caller: OWNER, invalidation: since, to: PageState::Shared });
    assert!(world.quarantine().is_empty());
    world.begin(&[(3, 1)], PageState::Private);
    assert_eq!(world.calls.iter().filter(|call| is_unmap(call)).count(), 1);
}

#[test]
fn unmap_of_which_the_ledger_knows_nothing_is_made_again_before_the_grant() {
    let mut world = world();
    let id = world.begin(&[(3, 1)], PageState::Private);
    let call = world.take(is_unmap).expect("it is unmapped");
    lose(&mut world, 3);
    world.succeeds(&call);
    assert_eq!(reported(&world), [range(3, 1)]);
    assert_eq!(world.verdict(id), None, "the ledger lost the page: that is no proof");
    let call = world.take(is_unmap).expect("it is unmapped again");
    world.unmapped(&call, UnmapResult::Gone { bytes: 0 });
    assert_eq!(world.verdict(id), Some(Verdict::Done));
}

#[test]
fn fence_that_was_not_in_progress_leaves_the_device_uncertain() {
    let mut world = world();
    let device = DeviceId(0);
    assert!(!world.gate.devices.fence_ended(device, Step::Drain, true));
    assert_eq!(world.gate.stopped().collect::<Vec<_>>(), [device]);
    assert!(!world.gate.devices.attach_ended(device, true));
    assert_eq!(world.gate.stopped().collect::<Vec<_>>(), [device]);
}

#[test]
fn late_and_invented_results_are_no_contradiction() {
    let mut world = world();
    world.begin(&[(3, 1)], PageState::Private);
    let Some(Effect::Unmap { job, .. }) = world.take(is_unmap) else { panic!("it is unmapped") };
    world.tell(Event::FlightEnded { job });
    world.tell(Event::Unmapped { job, result: UnmapResult::InFlight { bytes: PAGE }, took_ns: 1 });
    for _ in 0..2 {
        world.tell(Event::Unmapped { job, result: UnmapResult::Gone { bytes: PAGE }, took_ns: 1 });
        world.tell(Event::Mapped { job, result: MapResult::Mapped });
        world.tell(Event::Fenced { job, errno: 0, took_ns: 1 });
        world.tell(Event::Attached { job, errno: 0 });
    }
    for _ in 0..2 {
        world.tell(Event::FlightEnded { job });
    }
    assert_eq!(world.gate.snapshot().inconsistencies, 0);
    assert!(world.gate.snapshot().quarantine.is_empty());
}
