//! Quarantine that only an operator ends: after an owner's *unknown* outcome, and from an earlier daemon; and its release.

use passgate::gate::{Hitless, OnStuckDma, Outcome, PageState, Policy};
use passgate_backends::{DeviceTraits, DomainCaps, Steps};
use passgate_bindings::{Iova, PAGE};
use passgate_sim::iommu::{Call, Fault, FaultPlan};
use rustix::io::Errno;

use crate::action::Action;
use crate::mutant::Plant;
use crate::world::{Setup, World};

/// The page of the file whose state is unknown.
const UNKNOWN_PAGE: u16 = 2;
const UNKNOWN_OUTCOME: Outcome = Outcome::Unknown { errno: 5, offset: 0 };
const FIRST_QUARANTINE: u16 = 0;

fn world(earlier_quarantine: &[(u8, u16, u16, u64)]) -> World {
    let policy = Policy {
        on_stuck_dma: OnStuckDma::Refuse,
        close_deadline_ns: 700,
        hitless: Hitless::Off,
        ..Policy::default()
    };
    let device = vec![(Steps::DRAIN, DeviceTraits::default())];
    let domains =
        vec![(DomainCaps::new(256, 1 << 30), device.clone()), (DomainCaps::new(256, 1 << 30), device)];
    World::new(
        &Setup {
            policy,
            domains,
            earlier_quarantine: earlier_quarantine.to_vec(),
            tolerant: false,
            clean: false,
            small_calls: false,
        },
        Plant::Nothing,
    )
    .unwrap()
}

/// Returns an action that adds eight pages from the file's start.
fn add(client: u8, gpa: u16) -> Action {
    let (pages, file, offset, piece, initial) = (8, 0, 0, 0, PageState::Shared);
    Action::Add { client, gpa, pages, file, offset, piece, initial, writable: true }
}

fn begin(region: u16, page: u16, passgate: bool) -> Action {
    let (client, pages, to, deadline_ns) = (0, 1, PageState::Private, 700);
    Action::Begin { client, region, page, pages, to, passgate, deadline_ns, batch: 0 }
}

fn play(world: &mut World, actions: &[Action]) {
    for action in actions {
        world.apply(action).unwrap_or_else(|broken| panic!("{broken}"));
    }
}

/// Returns the number of domains (of two) in which devices reach a page of guest memory.
fn domains_reaching(world: &World, page: u64) -> usize {
    world.executor.buses.iter().filter(|bus| bus.sim.dma(Iova(page * PAGE)).is_some()).count()
}

fn quarantined(world: &World) -> Vec<(&'static str, u64, u64)> {
    let quarantined = |q: &passgate::gate::QuarantineStatus| {
        (q.reason.cause.word(), q.range.start().0 / PAGE, q.invalidation.0)
    };
    world.gate.snapshot().quarantine.iter().map(quarantined).collect()
}

/// Checks that nothing makes the unknown page reachable: no begin, no convert, no alias, no removing and adding the memory.
fn assert_out_of_reach(world: &mut World) {
    let before = world.verdicts;
    for passgate in [false, true] {
        for region in 0..world.gate.snapshot().regions.len() as u16 {
            play(world, &[begin(region, UNKNOWN_PAGE, passgate), Action::Settle]);
        }
    }
    assert_eq!(world.verdicts, before, "the begin is refused without a verdict");
    for (client, gpa) in [(1, 64), (2, 128)] {
        play(world, &[add(client, gpa), Action::Settle]);
        assert_eq!(
            (domains_reaching(world, gpa.into()), domains_reaching(world, u64::from(gpa + UNKNOWN_PAGE))),
            (2, 0)
        );
    }
    play(world, &[Action::Remove { region: 0, by_other: false }, Action::Settle, add(0, 0), Action::Settle]);
    assert_eq!((domains_reaching(world, 1), domains_reaching(world, UNKNOWN_PAGE.into())), (2, 0));
    // A conversion of its neighbour does not map it again, at any alias.
    play(world, &[begin(0, 1, false), Action::Settle]);
    play(
        world,
        &[Action::End { granted: 0, outcome: Outcome::NotCommitted, by_other: false }, Action::Settle],
    );
    for gpa in [0, 64, 128] {
        assert_eq!(
            (domains_reaching(world, gpa + 1), domains_reaching(world, gpa + u64::from(UNKNOWN_PAGE))),
            (2, 0)
        );
    }
}

#[test]
fn unknown_outcome_quarantines_pages_until_an_operator_releases_them() {
    for to in [PageState::Shared, PageState::Private, PageState::Hole] {
        let mut world = world(&[]);
        play(&mut world, &[add(0, 0), Action::Settle, begin(0, UNKNOWN_PAGE, false), Action::Settle]);
        let end = Action::End { granted: 0, outcome: UNKNOWN_OUTCOME, by_other: false };
        play(&mut world, &[end, Action::Settle]);
        assert_eq!(quarantined(&world), [("owner-unknown", UNKNOWN_PAGE.into(), 1)]);
        assert_out_of_reach(&mut world);
        play(&mut world, &[Action::Release { client: 1, quarantine: FIRST_QUARANTINE, to }, Action::Settle]);
        let shared = if to == PageState::Shared { 2 } else { 0 };
        for gpa in [0, 64, 128] {
            assert_eq!(domains_reaching(&world, gpa + u64::from(UNKNOWN_PAGE)), shared, "{to:?}");
        }
        assert_eq!(quarantined(&world), []);
        let done = world.verdicts[0];
        play(&mut world, &[begin(0, UNKNOWN_PAGE, false), Action::Settle]);
        assert_eq!(world.verdicts[0], done + 1, "it may be converted again");
    }
}

#[test]
fn earlier_daemons_quarantine_stays_for_any_cause() {
    for since in 1..9 {
        let mut world =
            world(&[(0, UNKNOWN_PAGE, 1, since), (0, UNKNOWN_PAGE, 1, since + 1), (1, 5, 2, since)]);
        let causes = quarantined(&world);
        assert_eq!(
            causes.iter().map(|(_, page, since)| (*page, *since)).collect::<Vec<_>>(),
            [(UNKNOWN_PAGE.into(), since), (5, since)]
        );
        play(&mut world, &[add(0, 0), Action::Settle]);
        assert_eq!((domains_reaching(&world, 1), domains_reaching(&world, UNKNOWN_PAGE.into())), (2, 0));
        assert_out_of_reach(&mut world);
        assert_eq!(quarantined(&world), causes, "nothing that this daemon does is proof for it");
        // This gate's invalidation ids continue after those of the earlier daemon.
        let newest = world
            .model
            .oracle
            .open
            .iter()
            .map(|open| open.id.0)
            .chain(world.model.receipts.iter().map(|id| id.0));
        assert!(newest.min().unwrap() > since + 1);
        play(&mut world, &[Action::ReleaseMadeUp { client: 0, id: since + 1, to: PageState::Shared }]);
        assert_eq!(quarantined(&world), causes, "nothing is in quarantine by that invalidation");
        play(
            &mut world,
            &[Action::ReleaseMadeUp { client: 0, id: since, to: PageState::Shared }, Action::Settle],
        );
        assert_eq!((quarantined(&world).len(), domains_reaching(&world, UNKNOWN_PAGE.into())), (0, 2));
    }
}

#[test]
fn released_range_is_unmapped_by_the_next_begin_before_done() {
    let mut world = world(&[]);
    play(&mut world, &[add(0, 0), Action::Settle]);
    let plan =
        (1..=3).fold(FaultPlan::new(), |plan, nth| plan.at(Call::Unmap, nth, Fault::Errno(Errno::BUSY)));
    world.executor.buses[0].sim.plan(plan);
    play(&mut world, &[begin(0, UNKNOWN_PAGE, false), Action::Settle]);
    assert_eq!(
        (world.verdicts, quarantined(&world)),
        ([0, 1, 0], vec![("unmap-failed", UNKNOWN_PAGE.into(), 1)])
    );
    play(
        &mut world,
        &[Action::Release { client: 0, quarantine: FIRST_QUARANTINE, to: PageState::Shared }, Action::Settle],
    );
    assert_eq!((quarantined(&world), domains_reaching(&world, UNKNOWN_PAGE.into())), (vec![], 2));
    let before = world.executor.buses[0].sim.calls(Call::Unmap);
    play(&mut world, &[begin(0, UNKNOWN_PAGE, false)]);
    assert_eq!(world.verdicts, [0, 1, 0], "no verdict before the mapping is gone");
    play(&mut world, &[Action::Settle]);
    assert_eq!((world.verdicts, domains_reaching(&world, UNKNOWN_PAGE.into())), ([1, 1, 0], 0));
    assert_eq!(world.executor.buses[0].sim.calls(Call::Unmap), before + 1);
}

#[test]
fn release_lifts_only_the_named_invalidations_quarantine() {
    let mut world = world(&[]);
    play(&mut world, &[add(0, 0), Action::Settle]);
    for page in [UNKNOWN_PAGE, UNKNOWN_PAGE + 2] {
        play(&mut world, &[begin(0, page, false), Action::Settle]);
        play(
            &mut world,
            &[Action::End { granted: 0, outcome: UNKNOWN_OUTCOME, by_other: false }, Action::Settle],
        );
    }
    play(&mut world, &[Action::ReleaseMadeUp { client: 0, id: 7, to: PageState::Shared }]);
    assert_eq!(quarantined(&world).len(), 2);
    play(&mut world, &[Action::ReleaseMadeUp { client: 0, id: 2, to: PageState::Shared }, Action::Settle]);
    assert_eq!(quarantined(&world), [("owner-unknown", UNKNOWN_PAGE.into(), 1)]);
    assert_eq!(
        (
            domains_reaching(&world, UNKNOWN_PAGE.into()),
            domains_reaching(&world, u64::from(UNKNOWN_PAGE) + 2)
        ),
        (0, 2)
    );
}

#[test]
fn half_mapped_quarantines_have_invalidations_of_their_own() {
    let mut world = world(&[]);
    for (client, gpa) in [(0, 0), (0, 64)] {
        world.executor.buses[0].sim.plan(
            (1..=20)
                .fold(FaultPlan::new(), |p, nth| p.at(Call::Unmap, nth, Fault::Errno(Errno::BUSY)))
                .at_any(world.executor.buses[0].sim.all_calls() + 1, Fault::HalfMapped(Errno::IO)),
        );
        let (pages, offset, piece, initial) = (4, gpa, 0, PageState::Shared);
        let add = Action::Add { client, gpa, pages, file: 0, offset, piece, initial, writable: true };
        play(&mut world, &[add, Action::Settle]);
    }
    let quarantined = quarantined(&world);
    assert_eq!(quarantined.iter().map(|(cause, ..)| *cause).collect::<Vec<_>>(), ["half-mapped"; 2]);
    assert!(quarantined[0].2 != quarantined[1].2 && quarantined[0].2 != 0, "{quarantined:?}");
}

#[test]
fn release_is_refused_while_passgates_own_conversion_hangs() {
    let mut world = world(&[]);
    play(&mut world, &[add(0, 0), Action::Settle, begin(0, UNKNOWN_PAGE, true)]);
    play(&mut world, &[Action::RunTask { task: 0, deliver: true, fault: None }]);
    play(&mut world, &[Action::RunTask { task: 0, deliver: true, fault: None }]);
    world.executor.tasks[0].hangs = true;
    play(&mut world, &[Action::Settle, Action::Advance { ns: 700 }]);
    assert_eq!(world.verdicts, [0, 0, 1]);
    let release = Action::Release { client: 0, quarantine: FIRST_QUARANTINE, to: PageState::Shared };
    play(&mut world, &[release.clone(), Action::Settle]);
    assert_eq!(quarantined(&world), [("owner-unknown", UNKNOWN_PAGE.into(), 1)]);
    world.executor.tasks[0].hangs = false;
    play(&mut world, &[Action::Settle, release, Action::Settle]);
    assert_eq!((quarantined(&world), domains_reaching(&world, UNKNOWN_PAGE.into())), (vec![], 2));
}

#[test]
fn release_lets_a_dead_clients_region_close() {
    let mut world = world(&[]);
    play(&mut world, &[add(0, 0), Action::Settle]);
    let plan =
        (1..=20).fold(FaultPlan::new(), |plan, nth| plan.at(Call::Unmap, nth, Fault::Errno(Errno::BUSY)));
    world.executor.buses[0].sim.plan(plan);
    play(&mut world, &[Action::ClientGone { client: 0 }, Action::Settle]);
    assert_eq!(quarantined(&world).len(), 1);
    world.executor.buses[0].sim.plan(FaultPlan::new());
    play(
        &mut world,
        &[Action::Release { client: 1, quarantine: FIRST_QUARANTINE, to: PageState::Shared }, Action::Settle],
    );
    assert_eq!(
        (quarantined(&world).len(), world.gate.snapshot().regions.len(), domains_reaching(&world, 1)),
        (0, 0, 0)
    );
    world.drain().unwrap_or_else(|broken| panic!("{broken}"));
}
