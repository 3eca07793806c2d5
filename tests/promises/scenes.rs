//! Behaviour that docs/design.md states beyond the promises: how far fences go, when none is requested, and what is retried.

use passgate::gate::{Hitless, OnStuckDma, PageState, Platform, Policy};
use passgate_backends::{DeviceTraits, DomainCaps, Steps};
use passgate_bindings::PAGE;
use passgate_sim::iommu::{Call, Fault, FaultPlan};
use rustix::io::Errno;

use crate::action::Action;
use crate::mutant::Plant;
use crate::world::{EVENT_KINDS, Setup, World};

const ADD: Action = Action::Add {
    client: 0,
    gpa: 0,
    pages: 8,
    file: 0,
    offset: 0,
    piece: 0,
    initial: PageState::Shared,
    writable: true,
};

const BEGIN: Action = Action::Begin {
    client: 0,
    region: 0,
    page: 2,
    pages: 1,
    to: PageState::Private,
    passgate: false,
    deadline_ns: 1000,
    batch: 0,
};

/// Adds a second region, in one mapping of 2 MiB.
const ADD_OTHER: Action = Action::Add {
    client: 0,
    gpa: 512,
    pages: 512,
    file: 1,
    offset: 0,
    piece: 9,
    initial: PageState::Shared,
    writable: true,
};

const BEGIN_OTHER: Action = Action::Begin {
    client: 0,
    region: 1,
    page: 100,
    pages: 1,
    to: PageState::Private,
    passgate: false,
    deadline_ns: 1000,
    batch: 0,
};

fn world(on_stuck_dma: OnStuckDma) -> World {
    let policy = Policy { on_stuck_dma, hitless: Hitless::Off, ..Policy::default() };
    let domains = vec![(DomainCaps::new(256, 1 << 30), vec![(Steps::all(), DeviceTraits::default())])];
    let mut world = World::new(
        &Setup {
            policy,
            domains,
            earlier_quarantine: Vec::new(),
            tolerant: false,
            clean: false,
            small_calls: false,
        },
        Plant::Nothing,
    )
    .unwrap();
    play(&mut world, &[ADD, Action::Settle]);
    world
}

fn play(world: &mut World, actions: &[Action]) {
    for action in actions {
        world.apply(action).unwrap_or_else(|broken| panic!("{broken}"));
    }
}

fn fence_count(world: &World) -> u64 {
    world.event_counts[EVENT_KINDS.iter().position(|kind| *kind == "fenced").unwrap()]
}

/// Begins an invalidation and lets the timer of every rung expire, with all calls returned in between.
fn begin_and_expire_rungs(world: &mut World) {
    play(world, &[BEGIN, Action::Settle]);
    for _ in 0..5 {
        play(world, &[Action::Advance { ns: PAGE / 20 }, Action::Settle]);
    }
}

#[test]
fn stuck_dma_is_fenced_as_far_as_policy_allows() {
    for (policy, verdicts, fenced) in [
        (OnStuckDma::Refuse, [0, 1, 0], 1),
        (OnStuckDma::Fence, [1, 0, 0], 4),
        (OnStuckDma::Reset, [1, 0, 0], 4),
    ] {
        let mut world = world(policy);
        world.executor.buses[0].sim.fail_next(Call::Unmap, Fault::Stuck);
        begin_and_expire_rungs(&mut world);
        assert_eq!((world.verdicts, fence_count(&world)), (verdicts, fenced), "{policy:?}");
        let quarantined = world.gate.snapshot().quarantine.len();
        assert_eq!(quarantined as u64, verdicts[1], "{policy:?}");
        // The operation ends, which is proof: the quarantine is lifted.
        play(&mut world, &[Action::Flush { domain: 0, stuck: true }, Action::Settle]);
        assert!(world.gate.snapshot().quarantine.is_empty(), "{policy:?}");
        world.drain().unwrap_or_else(|broken| panic!("{policy:?}: {broken}"));
    }
}

#[test]
fn failed_unmap_is_retried_at_once_and_then_behind_the_weakest_fence() {
    for fault in [Fault::Errno(Errno::BUSY), Fault::Short] {
        for failures in [1, 2] {
            let mut world = world(OnStuckDma::Reset);
            let plan = (1..=failures).fold(FaultPlan::new(), |plan, nth| plan.at(Call::Unmap, nth, fault));
            world.executor.buses[0].sim.plan(plan);
            begin_and_expire_rungs(&mut world);
            assert_eq!((world.verdicts, fence_count(&world)), ([1, 0, 0], failures - 1), "{fault:?}");
            assert_eq!(world.executor.buses[0].sim.calls(Call::Unmap), failures + 1, "{fault:?}");
        }
    }
}

#[test]
fn hanging_map_stops_no_device() {
    let mut world = world(OnStuckDma::Reset);
    world.hang_at = Some((0, false));
    play(
        &mut world,
        &[Action::Add {
            client: 0,
            gpa: 16,
            pages: 8,
            file: 1,
            offset: 0,
            piece: 0,
            initial: PageState::Shared,
            writable: true,
        }],
    );
    play(&mut world, &[Action::Settle]);
    play(&mut world, &[BEGIN_OTHER]);
    for _ in 0..5 {
        play(&mut world, &[Action::Advance { ns: 200 }, Action::Settle]);
    }
    assert_eq!((world.verdicts, fence_count(&world)), ([0, 0, 1], 0));
    world.drain().unwrap_or_else(|broken| panic!("{broken}"));
}

#[test]
fn neighbours_in_a_split_mapping_are_mapped_again_at_once() {
    let mut world = world(OnStuckDma::Refuse);
    play(&mut world, &[ADD_OTHER, Action::Settle, BEGIN_OTHER, Action::Settle]);
    // Eight mappings of the first region; two of the second, which has lost one page.
    assert_eq!(world.executor.buses[0].sim.mapping_count(), 8 + 2);
    let dma =
        |page: u64| world.executor.buses[0].sim.dma(passgate_bindings::Iova((512 + page) * PAGE)).is_some();
    assert_eq!((dma(99), dma(100), dma(101)), (true, false, true));
}

#[test]
fn queued_fence_outlives_its_first_requester() {
    let policy = Policy { platform: Platform::Strict, hitless: Hitless::Off, ..Policy::default() };
    let device = (Steps::DETACH, DeviceTraits { ats: true, tdi: false, tolerant: false });
    let domains = vec![(DomainCaps::new(256, 1 << 30), vec![device])];
    let setup = Setup {
        policy,
        domains,
        earlier_quarantine: Vec::new(),
        tolerant: false,
        clean: false,
        small_calls: false,
    };
    let mut world = World::new(&setup, Plant::Nothing).unwrap();
    let next = Action::RunTask { task: 0, deliver: true, fault: None };
    // Detached, unmapped, granted; being attached when two more invalidations need it detached, one with a short deadline.
    play(&mut world, &[ADD, Action::Settle, BEGIN, next.clone(), next]);
    let begin = |page, deadline_ns| {
        let (client, region, pages, to, passgate) = (0, 0, 1, PageState::Private, false);
        Action::Begin { client, region, page, pages, to, passgate, deadline_ns, batch: 0 }
    };
    play(&mut world, &[begin(4, 7), begin(6, 7000), Action::Advance { ns: 7 }]);
    assert_eq!(world.verdicts, [1, 1, 0]);
    play(&mut world, &[Action::Settle]);
    assert_eq!(world.verdicts, [2, 1, 0]);
}

#[test]
fn failed_attach_is_retried_when_memory_is_added() {
    let mut world = world(OnStuckDma::Fence);
    world.executor.buses[0].sim.fail_next(Call::Unmap, Fault::Stuck);
    world.executor.buses[0].sim.fail_next(Call::Attach, Fault::Errno(Errno::NODEV));
    begin_and_expire_rungs(&mut world);
    let reaches = |world: &World| world.executor.buses[0].sim.dma(passgate_bindings::Iova(PAGE)).is_some();
    assert_eq!((world.verdicts, reaches(&world)), ([1, 0, 0], false));
    assert!(world.gate.snapshot().devices[0].lost);
    play(&mut world, &[ADD_OTHER, Action::Settle]);
    assert!(reaches(&world) && !world.gate.snapshot().devices[0].lost);
}
