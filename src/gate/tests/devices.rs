//! When devices are stopped, paused and brought back.

use super::*;

const PLAIN: DeviceTraits = DeviceTraits { ats: false, tdi: false, tolerant: false };

fn far() -> Policy {
    Policy { on_stuck_dma: OnStuckDma::Reset, hitless: Hitless::Off, ..Policy::default() }
}

/// Eight pages, one mapping each, in one domain with these devices.
fn world_of(devices: &[&[Step]]) -> World {
    let mut world = World::new(far(), &[SPLITS]);
    for (device, steps) in (0..).zip(devices) {
        world.device(device, 0, steps, PLAIN);
    }
    world.add(0, 8, 0, 1);
    world.settle();
    world
}

/// An unmap that leaves operations in flight, and its job.
fn leaves_dma_in_flight(world: &mut World) -> JobId {
    let unmap = world.take(is_unmap).unwrap();
    let Effect::Unmap { job, bytes: Some(bytes), .. } = unmap else { unreachable!() };
    world.unmapped(&unmap, UnmapResult::InFlight { bytes });
    job
}

#[test]
fn failed_unmap_is_tried_again_behind_each_fence() {
    for step in [Step::Drain, Step::Stop, Step::Master, Step::Detach, Step::Reset] {
        let mut world = world_of(&[&[step]]);
        let id = world.begin(&[(2, 1)], PageState::Private);
        for _ in 0..2 {
            let unmap = world.take(is_unmap).unwrap();
            world.unmapped(&unmap, UnmapResult::Failed { errno: 16, bytes: 0 });
        }
        assert!(matches!(world.calls[..], [Effect::Fence { step: asked, .. }] if asked == step), "{step:?}");
        let fence = world.take(is_fence).unwrap();
        world.succeeds(&fence);
        let unmap = world.take(is_unmap).unwrap_or_else(|| panic!("{step:?}: {:?}", world.said));
        world.succeeds(&unmap);
        assert_eq!(world.verdict(id), Some(Verdict::Done), "{step:?}");
    }
}

#[test]
fn detach_and_reset_that_were_asked_for_during_a_drain_are_both_made() {
    let mut world = world_of(&[&[Step::Drain, Step::Detach, Step::Reset]]);
    let invalidation = world.begin(&[(2, 1)], PageState::Private);
    let job = leaves_dma_in_flight(&mut world);
    // The drain takes so long that time asks for the two others.
    for rung in Rung::LADDER.into_iter().take(5) {
        world.tell(Event::Expired { invalidation, rung });
    }
    let mut fences = Vec::new();
    while let Some(fence) = world.take(is_fence) {
        let Effect::Fence { step, .. } = fence else { unreachable!() };
        fences.push(step);
        world.succeeds(&fence);
    }
    assert_eq!(fences, [Step::Drain, Step::Detach, Step::Reset]);
    world.tell(Event::FlightEnded { job });
    assert_eq!(world.verdict(invalidation), Some(Verdict::Done));
}

#[test]
fn attach_waits_for_every_fence_of_the_domain() {
    for step in [Step::Drain, Step::Stop, Step::Detach] {
        let mut world = world_of(&[&[step], &[step]]);
        let invalidation = world.begin(&[(2, 1)], PageState::Private);
        let job = leaves_dma_in_flight(&mut world);
        world.tell(Event::Expired { invalidation, rung: Rung::Unmap });
        let fences = [world.take(is_fence).unwrap(), world.take(is_fence).unwrap()];
        world.succeeds(&fences[0]);
        world.tell(Event::FlightEnded { job });
        assert_eq!(world.verdict(invalidation), Some(Verdict::Done), "{step:?}");
        assert_eq!(world.calls, [], "{step:?}: the other device is still being stopped");
        world.succeeds(&fences[1]);
        let attaches = world.calls.iter().filter(|call| matches!(call, Effect::Attach { .. })).count();
        assert_eq!((attaches, world.calls.len()), (2, 2), "{step:?}");
    }
}

#[test]
fn strict_conversion_waits_for_the_detach_in_every_domain() {
    for first in [0, 1] {
        let policy = Policy { platform: Platform::Strict, ..far() };
        let mut world = World::new(policy, &[SPLITS; 2]);
        for domain in [0, 1] {
            world.device(domain, domain, &[Step::Detach], DeviceTraits { ats: true, ..PLAIN });
        }
        world.add(0, 8, 0, 1);
        world.settle();
        let id = world.begin(&[(2, 1)], PageState::Private);
        let fence = world.calls.remove(first);
        world.succeeds(&fence);
        assert!(matches!(world.calls[..], [Effect::Fence { step: Step::Detach, .. }]), "{:?}", world.calls);
        assert_eq!(world.verdict(id), None);
        world.settle();
        assert_eq!(world.verdict(id), Some(Verdict::Done));
    }
}

/// One domain whose mappings are split while its devices are drained.
fn pausing(devices: u16) -> World {
    let mut world = World::new(Policy { hitless: Hitless::Prefer, ..far() }, &[SPLITS]);
    for device in 0..devices {
        world.device(device, 0, &[Step::Drain], PLAIN);
    }
    world
}

#[test]
fn mapping_is_split_only_after_every_device_has_paused() {
    let mut world = pausing(3);
    world.add(0, 16, 0, 8);
    world.settle();
    let id = world.begin(&[(2, 1)], PageState::Private);
    for _ in 0..3 {
        assert!(!world.calls.iter().any(is_unmap), "{:?}", world.calls);
        let fence = world.take(is_fence).unwrap();
        world.succeeds(&fence);
    }
    assert!(matches!(world.calls[..], [Effect::Unmap { iova, .. }] if pages(iova) == (0, 8)));
    world.settle();
    assert_eq!(world.verdict(id), Some(Verdict::Done));
}

#[test]
fn batch_pauses_devices_whichever_of_its_ranges_splits_a_mapping() {
    for (large, small) in [(0, 16), (16, 0)] {
        let mut world = pausing(1);
        world.add(large, 8, large, 8);
        world.add(small, 8, small, 1);
        world.settle();
        world.begin(&[(2, 1), (18, 1)], PageState::Private);
        assert!(matches!(world.calls[..], [Effect::Fence { step: Step::Drain, .. }]), "{:?}", world.calls);
    }
}
