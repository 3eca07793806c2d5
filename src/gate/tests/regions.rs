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
            world.calls.len() <= CallLimits::default().close_calls,
            "more calls at a time than are allowed, and one beside those that are late"
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
    world.deadline_passes(id);
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

/// Two regions of eight pages in one domain, closed by calls of two pages of which two are in progress at a time.
fn small_calls(devices: &[&[Step]], policy: Policy, piece: u64) -> (World, RegionId, RegionId) {
    let mut world = World::new(policy, &[SPLITS]);
    world.gate.set_call_limits(CallLimits { call_bytes: 2 * PAGE, close_calls: 2 });
    for (device, steps) in (0..).zip(devices) {
        let traits = DeviceTraits { ats: false, tdi: false, tolerant: false };
        world.device(device, 0, steps, traits);
    }
    let first = world.add(0, 8, 0, 1);
    let second = world.add(64, 8, 64, piece);
    world.settle();
    (world, first, second)
}

#[test]
fn device_paused_for_a_conversion_is_attached_although_a_close_goes_on() {
    // A drain proves nothing, so it is not kept up for what is in doubt either.
    for doubt in [false, true] {
        let policy = Policy { hitless: Hitless::Prefer, ..Policy::default() };
        let (mut world, closing, _) = small_calls(&[&[Step::Drain]], policy, 4);
        world.tell(Event::RemoveRegion { caller: OWNER, region: closing });
        let mut unmaps = world.take_all(is_unmap);
        if doubt {
            world.unmapped(&unmaps.remove(0), UnmapResult::Failed { errno: 16, bytes: 0 });
        }
        let id = world.begin(&[(65, 1)], PageState::Private);
        let pause = world.take(is_fence).expect("the mapping of four pages is split");
        world.succeeds(&pause);
        assert_eq!(world.gate.stopped().count(), 1);
        world.settle();
        assert_eq!(world.verdict(id), Some(Verdict::Done));
        assert_eq!(world.gate.stopped().count(), 0, "in doubt: {doubt}");
        unmaps.iter().for_each(|unmap| world.succeeds(unmap));
        world.settle();
        assert_eq!((world.gate.region_count(), world.gate.stopped().count()), (1, 0));
    }
}

#[test]
fn device_stopped_for_a_close_is_attached_once_the_close_goes_on() {
    for goes_on in [true, false] {
        let (mut world, closing, _) = small_calls(&[&[Step::Drain]], Policy::default(), 1);
        world.tell(Event::RemoveRegion { caller: OWNER, region: closing });
        let id = InvalidationId(world.gate.last().1);
        world.tell(Event::Expired { invalidation: id, rung: Rung::Unmap });
        let fence = world.take(is_fence).unwrap();
        world.succeeds(&fence);
        assert_eq!(world.gate.stopped().count(), 1);
        if goes_on {
            let unmap = world.take(is_unmap).unwrap();
            world.succeeds(&unmap);
        }
        // With progress the deadline begins anew.
        world.tell(Event::Expired { invalidation: id, rung: Rung::Fence(Step::Drain) });
        let attach = world.take(|call| matches!(call, Effect::Attach { .. }));
        assert_eq!(attach.is_some(), goes_on, "{:?}", world.calls);
        assert!(world.calls.iter().all(is_unmap) && !world.calls.is_empty(), "{:?}", world.calls);
        attach.iter().for_each(|attach| world.succeeds(attach));
        world.settle();
        assert_eq!(world.gate.region_count(), 1);
    }
}

#[test]
fn close_given_up_puts_few_ranges_into_quarantine_however_many_mappings_it_has() {
    let mut world = World::new(Policy::default(), &[SPLITS]);
    world.gate.set_call_limits(CallLimits { call_bytes: 2 * PAGE, close_calls: 2 });
    let region = world.add(0, 200, 0, 1);
    world.settle();
    (0..100).for_each(|nth| world.convert(2 * nth, PageState::Private));
    world.tell(Event::RemoveRegion { caller: OWNER, region });
    let id = InvalidationId(world.gate.last().1);
    world.deadline_passes(id);
    let quarantine = world.quarantine();
    // Each call, and one for all that is left.
    assert!(quarantine.len() <= 4, "{quarantine:?}");
    let covers = |page| quarantine.iter().any(|(first, count, _)| (*first..first + count).contains(&page));
    assert!((0..100).all(|nth| covers(2 * nth + 1)), "{quarantine:?}");
    world.settle();
    assert!(world.quarantine().is_empty() && world.gate.region_count() == 0);
}

#[test]
fn client_that_goes_during_its_own_removal_has_its_devices_stopped() {
    // Under this policy a removal may only drain.
    let (mut world, closing, other) = small_calls(&[&[Step::Detach]], Policy::default(), 1);
    world.tell(Event::RemoveRegion { caller: OWNER, region: other });
    world.settle();
    world.said.clear();
    world.tell(Event::RemoveRegion { caller: OWNER, region: closing });
    let [first, second] = [world.take(is_unmap).unwrap(), world.take(is_unmap).unwrap()];
    let failed = UnmapResult::Failed { errno: 16, bytes: 0 };
    world.unmapped(&first, failed);
    world.tell(Event::ClientGone { client: OWNER.client });
    let fence = world.take(is_fence).expect("its device is stopped");
    assert!(matches!(fence, Effect::Fence { step: Step::Detach, .. }));
    world.unmapped(&second, failed);
    assert!(world.take(is_unmap).is_none(), "nothing is unmapped before");
    world.succeeds(&fence);
    world.settle();
    assert_eq!(world.gate.region_count(), 0);
    assert_eq!(world.answers().count(), 0, "nobody waits");
    assert!(world.said.contains(&Effect::Notice(Notice::SessionClosed { client: OWNER.client })));
}

#[test]
fn client_that_goes_at_the_end_of_a_deadline_has_its_devices_stopped_before_the_rest_is_unmapped() {
    let (mut world, closing, _) = small_calls(&[&[Step::Drain, Step::Detach]], Policy::default(), 1);
    world.tell(Event::RemoveRegion { caller: OWNER, region: closing });
    let id = InvalidationId(world.gate.last().1);
    let last = Rung::Fence(Step::Reset);
    Rung::LADDER.into_iter().filter(|rung| *rung != last).for_each(|rung| {
        world.tell(Event::Expired { invalidation: id, rung });
    });
    let hanging = world.take_all(is_unmap);
    world.tell(Event::ClientGone { client: OWNER.client });
    world.said.clear();
    world.tell(Event::Expired { invalidation: id, rung: last });
    assert!(matches!(world.said[..], [Effect::Arm { rung: Rung::Unmap, .. }]), "{:?}", world.said);
    let mut steps = Vec::new();
    while let Some(fence) = world.take(is_fence) {
        let Effect::Fence { step, .. } = fence else { unreachable!() };
        assert!(!world.calls.iter().any(is_unmap), "{:?}", world.calls);
        steps.push(step);
        world.succeeds(&fence);
    }
    assert_eq!(steps.last(), Some(&Step::Detach), "{steps:?}");
    hanging.iter().for_each(|unmap| world.succeeds(unmap));
    world.settle();
    assert_eq!(world.gate.region_count(), 0);
}

#[test]
fn call_that_never_returns_keeps_only_its_own_piece_however_many_regions_are_closed() {
    let mut world = World::new(Policy::default(), &[SPLITS]);
    world.gate.set_call_limits(CallLimits { call_bytes: 2 * PAGE, close_calls: 2 });
    (0..3).for_each(|nth| _ = world.add(16 * nth, 8, 16 * nth, 1));
    world.settle();
    world.tell(Event::ClientGone { client: OWNER.client });
    let hanging = world.take(is_unmap).unwrap();
    let Effect::Unmap { iova, .. } = hanging else { unreachable!() };
    let first = pages(iova).0;
    // A part of the deadline after the other, in each of which all other calls return.
    for rung in Rung::LADDER {
        world.settle();
        for id in world.gate.open_since(InvalidationId(0)).collect::<Vec<_>>() {
            world.tell(Event::Expired { invalidation: id, rung });
        }
    }
    world.settle();
    assert_eq!(world.gate.region_count(), 1);
    assert!(world.live(0).is_empty(), "{:?}", world.live(0));
    let held: Vec<_> = world.quarantine().iter().map(|(at, count, _)| (*at, *count)).collect();
    assert!(held.is_empty() || held == [(first, 2)], "{held:?}");
    world.succeeds(&hanging);
    world.settle();
    assert_eq!(world.gate.region_count(), 0);
}

#[test]
fn closes_share_the_calls() {
    let mut world = World::new(Policy::default(), &[SPLITS]);
    world.gate.set_call_limits(CallLimits { call_bytes: PAGE, close_calls: 4 });
    (0..10).for_each(|nth| _ = world.add(16 * nth, 8, 16 * nth, 1));
    world.settle();
    world.tell(Event::ClientGone { client: OWNER.client });
    let mut most = 0;
    while let Some(unmap) = world.take(is_unmap) {
        most = most.max(world.calls.len() + 1);
        world.succeeds(&unmap);
    }
    assert!(most <= 4 + 10, "{most} calls at a time");
    assert_eq!(world.gate.region_count(), 0);
}

#[test]
fn calls_of_a_close_that_was_given_up_are_progress_of_the_next() {
    let (mut world, region, _) = small_calls(&[], Policy::default(), 1);
    world.tell(Event::RemoveRegion { caller: OWNER, region });
    let id = InvalidationId(world.gate.last().1);
    world.deadline_passes(id);
    let unmaps = world.take_all(is_unmap);
    assert!(unmaps.len() > 1);
    world.tell(Event::RemoveRegion { caller: OWNER, region });
    let id = InvalidationId(world.gate.last().1);
    for unmap in &unmaps {
        assert!(world.verdict(id).is_none());
        world.succeeds(unmap);
        world.tell(Event::Expired { invalidation: id, rung: Rung::Fence(Step::Reset) });
    }
    assert_eq!(world.answers().last(), Some(&Answer::RegionRemoved { region }));
}

#[test]
fn region_in_progress_of_its_own_client_is_busy_and_not_foreign() {
    let mut world = World::new(Policy::default(), &[SPLITS]);
    let region = world.add(0, 8, 0, 1);
    let refusals = |world: &mut World, client| {
        world.tell(Event::RemoveRegion { caller: Caller { client: ClientId(client), ..OWNER }, region });
        world.answers().last().cloned()
    };
    let busy = Some(Answer::Refused(Refusal::RegionBusy { region }));
    let foreign = Some(Answer::Refused(Refusal::NotOwner { region }));
    assert_eq!(refusals(&mut world, 1), busy, "it is being added");
    world.settle();
    world.tell(Event::RemoveRegion { caller: OWNER, region });
    assert_eq!(refusals(&mut world, 1), busy, "it is being removed");
    assert_eq!(refusals(&mut world, 2), foreign);
    world.settle();
    assert_eq!(refusals(&mut world, 1), foreign, "it is gone");
}

#[test]
fn failed_map_of_a_region_that_goes_is_not_reported() {
    let mut world = World::new(Policy::default(), &[SPLITS]);
    world.add(0, 8, 0, 1);
    let Some(Effect::Map { job, .. }) = world.take(is_map) else { panic!("{:?}", world.calls) };
    world.tell(Event::ClientGone { client: OWNER.client });
    world.tell(Event::Mapped { job, result: MapResult::Refused { errno: 12 } });
    assert!(world.map_failures().is_empty(), "{:?}", world.said);
    world.settle();
    assert_eq!(world.gate.region_count(), 0);
}
