//! Adding and removing memory.

use super::*;

/// Pages in mappings of one page: more than one effect maps.
const MANY: u64 = 2048;

#[test]
fn quarantined_page_in_a_long_region_leaves_what_is_behind_it_mapped() {
    for page in [500, 1023, 1024, 1500] {
        let mut world = World::new(Policy::default(), &[SPLITS]);
        let reason = Reason { cause: Cause::OwnerUnknown, device: None, rung: Rung::Unmap, errno: 0 };
        let invalidation = InvalidationId(1);
        world.tell(Event::Quarantine { file: FILE, range: range(page, 1), invalidation, reason });
        world.add(0, MANY, 0, 1);
        world.settle();
        assert_eq!(world.live(0), [(0, page), (page + 1, MANY - page - 1)]);
    }
}

#[test]
fn nothing_more_is_mapped_of_a_region_of_which_a_part_failed() {
    let refused = Refusal::MapFailed { errno: 12 };
    let half = Refusal::HalfMapped { errno: 12 };
    for (result, refusal) in
        [(MapResult::Refused { errno: 12 }, refused), (MapResult::Unknown { errno: 12 }, half)]
    {
        let mut world = World::new(Policy::default(), &[SPLITS]);
        world.add(0, MANY, 0, 1);
        let Some(Effect::Map { job, .. }) = world.take(is_map) else { panic!("{:?}", world.calls) };
        world.tell(Event::Mapped { job, result });
        assert!(!world.calls.iter().any(is_map), "{result:?}: {:?}", world.calls);
        world.settle();
        assert_eq!(world.answers().collect::<Vec<_>>(), [&Answer::Refused(refusal)]);
        assert!(world.gate.snapshot().regions.is_empty(), "{result:?}");
    }
}

#[test]
fn region_stays_while_a_conversion_is_open_behind_a_quarantined_page() {
    for (lost, open) in [(1, 5), (5, 1)] {
        let mut world = World::new(Policy::default(), &[SPLITS]);
        let region = world.add(0, 8, 0, 1);
        world.settle();
        let id = world.begin(&[(lost, 1)], PageState::Private);
        world.settle();
        world.end(id, Outcome::Unknown { errno: 5, offset: 0 });
        let invalidation = world.begin(&[(open, 1)], PageState::Private);
        world.settle();
        world.tell(Event::RemoveRegion { caller: OWNER, region });
        let busy = Refusal::Busy { invalidation, gpa: Gpa(open * PAGE) };
        assert_eq!(world.answers().last(), Some(&Answer::Refused(busy)));
        world.end(invalidation, Outcome::Committed);
        world.tell(Event::RemoveRegion { caller: OWNER, region });
        world.settle();
        assert_eq!(world.answers().last(), Some(&Answer::RegionRemoved { region }));
    }
}

#[test]
fn region_that_could_not_be_removed_is_closed_once_a_conversion_has_taken_its_last_page() {
    let mut world = World::new(Policy::default(), &[SPLITS]);
    let all = world.add(0, 8, 0, 1);
    let alias = world.add(64, 1, 3, 1);
    world.settle();
    world.tell(Event::RemoveRegion { caller: OWNER, region: alias });
    while let Some(unmap) = world.take(is_unmap) {
        world.unmapped(&unmap, UnmapResult::Failed { errno: 16, bytes: 0 });
    }
    assert_eq!(world.quarantine(), [(3, 1, Cause::UnmapFailed)]);
    let invalidation = InvalidationId(world.gate.last().1);
    world.tell(Event::Release { caller: OWNER, invalidation, to: PageState::Shared });
    let id = world.begin(&[(3, 1)], PageState::Private);
    world.settle();
    assert_eq!(world.verdict(id), Some(Verdict::Done));
    let regions: Vec<_> = world.gate.snapshot().regions.iter().map(|status| status.region).collect();
    assert_eq!(regions, [all]);
    assert!(world.said.contains(&Effect::Notice(Notice::RegionClosed { region: alias })));
}

#[test]
fn large_region_is_closed_in_pieces_each_of_which_renews_the_deadline() {
    const PIECES: u64 = 20;
    let piece = MAX_CALL_BYTES / PAGE;
    let mut world = World::new(Policy::default(), &[SPLITS]);
    let region = world.add(0, PIECES * piece, 0, 512);
    world.settle();
    world.tell(Event::RemoveRegion { caller: OWNER, region });
    let id = InvalidationId(world.gate.last().1);
    let mut unmapped = Vec::new();
    while let Some(unmap) = world.take(is_unmap) {
        let Effect::Unmap { iova, .. } = unmap else { unreachable!() };
        assert!(
            world.calls.len() < CallLimits::default().close_calls,
            "more calls at a time than there are threads for"
        );
        unmapped.push(pages(iova));
        // The last part of the deadline ends, just after something was unmapped.
        world.succeeds(&unmap);
        world.said.clear();
        world.tell(Event::Expired { invalidation: id, rung: Rung::Fence(Step::Reset) });
        if unmapped.len() < PIECES as usize {
            assert!(matches!(world.said[..], [Effect::Arm { rung: Rung::Unmap, .. }]), "{:?}", world.said);
        }
    }
    assert_eq!(unmapped, (0..PIECES).map(|nth| (nth * piece, piece)).collect::<Vec<_>>());
    assert!(world.live(0).is_empty() && world.gate.snapshot().regions.is_empty());
}

#[test]
fn close_without_progress_is_given_up_after_its_deadline() {
    let mut world = World::new(Policy::default(), &[SPLITS]);
    let pages = 2 * CallLimits::default().close_calls as u64 * MAX_CALL_BYTES / PAGE;
    let region = world.add(0, pages, 0, 512);
    world.settle();
    world.tell(Event::RemoveRegion { caller: OWNER, region });
    let id = InvalidationId(world.gate.last().1);
    Rung::LADDER.into_iter().for_each(|rung| world.tell(Event::Expired { invalidation: id, rung }));
    assert!(matches!(world.verdict(id), Some(Verdict::Unknown { .. })), "{:?}", world.said);
    assert_eq!(world.quarantine().iter().map(|(_, count, _)| count).sum::<u64>(), pages);
    world.settle();
    assert!(world.quarantine().is_empty() && world.gate.snapshot().regions.is_empty());
}

#[test]
fn part_of_a_region_that_stays_does_not_hide_the_cause_or_the_rest() {
    let mut world = World::new(Policy::default(), &[SPLITS]);
    world.gate.set_call_limits(CallLimits { call_bytes: 2 * PAGE, close_calls: 2 });
    let region = world.add(0, 20, 0, 1);
    world.settle();
    world.tell(Event::RemoveRegion { caller: OWNER, region });
    let id = InvalidationId(world.gate.last().1);
    let mut failures = 0;
    while let Some(unmap) = world.take(is_unmap) {
        let Effect::Unmap { iova, .. } = unmap else { unreachable!() };
        if pages(iova) == (2, 2) {
            failures += 1;
            world.unmapped(&unmap, UnmapResult::Failed { errno: 16, bytes: 0 });
        } else {
            world.succeeds(&unmap);
        }
    }
    assert!(failures > 1, "it was not tried again");
    let verdict = world.verdict(id);
    let reason = Reason { cause: Cause::UnmapFailed, device: None, rung: Rung::Unmap, errno: 16 };
    assert!(matches!(verdict, Some(Verdict::Refused { reason: why, .. }) if why == reason), "{verdict:?}");
    assert_eq!(world.quarantine(), [(2, 2, Cause::UnmapFailed)]);
}
