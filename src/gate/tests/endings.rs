//! Every page in doubt is in quarantine, and no other, until it is proved gone.

use super::*;

#[test]
fn client_gone_quarantines_all_pages_in_flight() {
    let mut world = World::new(Policy::default(), &[SPLITS; 2]);
    world.add(0, 8, 0, 1);
    world.settle();
    let caller = Caller { client: ClientId(2), ..OWNER };
    world.begin_by(caller, &[(1, 1), (3, 1)], PageState::Private);
    let mut jobs = Vec::new();
    // In the first domain the one page, in the second the other.
    for (domain, first) in [(0, 1), (1, 3)] {
        while let Some(unmap) =
            world.take(|call| matches!(call, Effect::Unmap { domain: at, .. } if at.0 == domain))
        {
            let Effect::Unmap { job, iova, bytes: Some(bytes), .. } = unmap else { unreachable!() };
            if pages(iova) == (first, 1) {
                jobs.push(job);
                world.unmapped(&unmap, UnmapResult::InFlight { bytes });
            } else {
                world.succeeds(&unmap);
            }
        }
    }
    world.tell(Event::ClientGone { client: caller.client });
    let in_flight = Cause::DmaInFlight;
    assert_eq!(world.quarantine(), [(1, 1, in_flight), (3, 1, in_flight)]);
    jobs.into_iter().for_each(|job| world.tell(Event::FlightEnded { job }));
    world.settle();
    assert_eq!((world.quarantine(), world.live(0), world.live(1)), (vec![], vec![(0, 8)], vec![(0, 8)]));
}

#[test]
fn unmap_that_fails_in_one_region_leaves_its_neighbour_region_alone() {
    let mut world = World::new(Policy::default(), &[SPLITS]);
    world.add(0, 8, 0, 1);
    world.add(8, 8, 8, 1);
    world.settle();
    let id = world.begin(&[(7, 2)], PageState::Private);
    while let Some(unmap) = world.take(is_unmap) {
        let Effect::Unmap { iova, .. } = unmap else { unreachable!() };
        // A domain in which nothing of the second region can be unmapped.
        if iova.end().raw() > 8 * PAGE {
            world.unmapped(&unmap, UnmapResult::Failed { errno: 16, bytes: 0 });
        } else {
            world.succeeds(&unmap);
        }
    }
    world.settle();
    assert!(matches!(world.verdict(id), Some(Verdict::Refused { .. })), "{:?}", world.said);
    assert_eq!(world.quarantine(), [(8, 1, Cause::UnmapFailed)]);
    assert_eq!(world.live(0), [(0, 8), (9, 7)]);
}

#[test]
fn strict_replace_under_a_device_that_turns_out_to_cache_is_proved_by_a_detach_only() {
    let policy = Policy { platform: Platform::Strict, hitless: Hitless::Off, ..Policy::default() };
    let mut world = World::new(policy, &[DomainCaps { replace: true, ..SPLITS }]);
    world.device(0, 0, &[Step::Detach], DeviceTraits::default());
    world.add(0, 64, 0, 64);
    world.add(128, 8, 128, 1);
    world.settle();
    let odd: Vec<_> = (0..8).map(|n| (2 * n + 1, 1)).collect();
    let id = world.begin(&odd, PageState::Private);
    let replace = world.take(|call| matches!(call, Effect::Replace { .. })).unwrap();
    world.tell(Event::DeviceTraits { device: DeviceId(0), ats: true, tdi: false });
    assert!(matches!(world.verdict(id), Some(Verdict::Unknown { .. })), "{:?}", world.said);
    world.succeeds(&replace);
    let doubtful = |world: &World| world.quarantine().iter().map(|(_, count, _)| count).sum::<u64>();
    assert_eq!((doubtful(&world), &world.calls[..]), (64, &[][..]), "the device may have kept copies");
    // Somebody else's conversion gets the device detached: that is proof.
    let id = world.begin(&[(130, 1)], PageState::Private);
    world.settle();
    assert_eq!((world.verdict(id), doubtful(&world)), (Some(Verdict::Done), 0));
    assert_eq!(world.live(0), [(0, 64), (128, 2), (131, 5)]);
}
