//! What only a person ends: quarantine after an owner's *unknown*, quarantine of an earlier daemon, and a release.

use passgate::gate::{Hitless, OnStuckDma, Outcome, PageState, Policy};
use passgate_backends::iommu::sim::{Call, Fault, FaultPlan};
use passgate_backends::{Nature, StopClass};
use passgate_bindings::{Iova, PAGE};
use rustix::io::Errno;

use crate::action::Action;
use crate::saboteur::Plant;
use crate::world::{Setup, World, able};

/// The page of the file that nobody knows.
const LOST: u16 = 2;
const UNKNOWN: Outcome = Outcome::Unknown { errno: 5, offset: 0 };
const NOBODY: u16 = 0;

fn world(seeds: &[(u8, u16, u16, u64)]) -> World {
    let policy = Policy {
        on_stuck_dma: OnStuckDma::Refuse,
        close_deadline_ns: 700,
        hitless: Hitless::Off,
        ..Policy::default()
    };
    let device = vec![(StopClass::DRAIN, Nature::default())];
    let domains = vec![(able(256, 1 << 30), device.clone()), (able(256, 1 << 30), device)];
    World::new(
        &Setup { policy, domains, seeds: seeds.to_vec(), tolerant: false, clean: false },
        Plant::Nothing,
    )
    .unwrap()
}

/// Eight pages from the file's start.
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

/// In how many of the two domains devices see a page of guest memory.
fn seen(world: &World, page: u64) -> usize {
    world.hands.buses.iter().filter(|bus| bus.sim.dma(Iova(page * PAGE)).is_some()).count()
}

fn quarantined(world: &World) -> Vec<(&'static str, u64, u64)> {
    let held = |q: &passgate::gate::QuarantineStatus| {
        (q.reason.cause.word(), q.range.start().0 / PAGE, q.invalidation.0)
    };
    world.gate.snapshot().quarantine.iter().map(held).collect()
}

/// No door gets at the lost page: not by begin, by convert, by an alias, nor by taking the memory away and back.
fn nobody_gets_at_it(world: &mut World) {
    let before = world.verdicts;
    for passgate in [false, true] {
        for region in 0..world.gate.snapshot().regions.len() as u16 {
            play(world, &[begin(region, LOST, passgate), Action::Settle]);
        }
    }
    assert_eq!(world.verdicts, before, "a begin is refused before it is one");
    for (client, gpa) in [(1, 64), (2, 128)] {
        play(world, &[add(client, gpa), Action::Settle]);
        assert_eq!((seen(world, gpa.into()), seen(world, u64::from(gpa + LOST))), (2, 0));
    }
    play(world, &[Action::Remove { region: 0, stranger: false }, Action::Settle, add(0, 0), Action::Settle]);
    assert_eq!((seen(world, 1), seen(world, LOST.into())), (2, 0));
    // A neighbour that changes, at every alias, does not bring it back.
    play(world, &[begin(0, 1, false), Action::Settle]);
    play(
        world,
        &[Action::End { granted: 0, outcome: Outcome::NotCommitted, stranger: false }, Action::Settle],
    );
    for gpa in [0, 64, 128] {
        assert_eq!((seen(world, gpa + 1), seen(world, gpa + u64::from(LOST))), (2, 0));
    }
}

#[test]
fn what_an_owner_does_not_know_is_out_of_reach_of_every_door_and_device_until_a_person_knows() {
    for to in [PageState::Shared, PageState::Private, PageState::Hole] {
        let mut world = world(&[]);
        play(&mut world, &[add(0, 0), Action::Settle, begin(0, LOST, false), Action::Settle]);
        let end = Action::End { granted: 0, outcome: UNKNOWN, stranger: false };
        play(&mut world, &[end, Action::Settle]);
        assert_eq!(quarantined(&world), [("owner-unknown", LOST.into(), 1)]);
        nobody_gets_at_it(&mut world);
        play(&mut world, &[Action::Release { client: 1, held: NOBODY, to }, Action::Settle]);
        let shared = if to == PageState::Shared { 2 } else { 0 };
        for gpa in [0, 64, 128] {
            assert_eq!(seen(&world, gpa + u64::from(LOST)), shared, "{to:?}");
        }
        assert_eq!(quarantined(&world), []);
        let done = world.verdicts[0];
        play(&mut world, &[begin(0, LOST, false), Action::Settle]);
        assert_eq!(world.verdicts[0], done + 1, "it may be converted again");
    }
}

#[test]
fn what_an_earlier_daemon_had_in_quarantine_stays_there_whatever_its_cause() {
    for since in 1..9 {
        let mut world = world(&[(0, LOST, 1, since), (0, LOST, 1, since + 1), (1, 5, 2, since)]);
        let causes = quarantined(&world);
        assert_eq!(
            causes.iter().map(|(_, page, since)| (*page, *since)).collect::<Vec<_>>(),
            [(LOST.into(), since), (5, since)]
        );
        play(&mut world, &[add(0, 0), Action::Settle]);
        assert_eq!((seen(&world, 1), seen(&world, LOST.into())), (2, 0));
        nobody_gets_at_it(&mut world);
        assert_eq!(quarantined(&world), causes, "nothing that this daemon does proves anything of it");
        // Its own numbers count on.
        let newest = world
            .model
            .truth
            .open
            .iter()
            .map(|open| open.id.0)
            .chain(world.model.receipts.iter().map(|id| id.0));
        assert!(newest.min().unwrap() > since + 1);
        play(&mut world, &[Action::ReleaseWild { client: 0, id: since + 1, to: PageState::Shared }]);
        assert_eq!(quarantined(&world), causes, "of that one nothing is left");
        play(
            &mut world,
            &[Action::ReleaseWild { client: 0, id: since, to: PageState::Shared }, Action::Settle],
        );
        assert_eq!((quarantined(&world).len(), seen(&world, LOST.into())), (0, 2));
    }
}

#[test]
fn a_release_is_no_proof_the_next_begin_unmaps_before_it_is_done() {
    let mut world = world(&[]);
    play(&mut world, &[add(0, 0), Action::Settle]);
    let plan =
        (1..=3).fold(FaultPlan::new(), |plan, nth| plan.at(Call::Unmap, nth, Fault::Errno(Errno::BUSY)));
    world.hands.buses[0].sim.plan(plan);
    play(&mut world, &[begin(0, LOST, false), Action::Settle]);
    assert_eq!((world.verdicts, quarantined(&world)), ([0, 1, 0], vec![("unmap-failed", LOST.into(), 1)]));
    play(&mut world, &[Action::Release { client: 0, held: NOBODY, to: PageState::Shared }, Action::Settle]);
    assert_eq!((quarantined(&world), seen(&world, LOST.into())), (vec![], 2));
    let before = world.hands.buses[0].sim.calls(Call::Unmap);
    play(&mut world, &[begin(0, LOST, false)]);
    assert_eq!(world.verdicts, [0, 1, 0], "not before the mapping is gone");
    play(&mut world, &[Action::Settle]);
    assert_eq!((world.verdicts, seen(&world, LOST.into())), ([1, 1, 0], 0));
    assert_eq!(world.hands.buses[0].sim.calls(Call::Unmap), before + 1);
}

#[test]
fn a_release_lifts_what_dates_from_that_invalidation_and_nothing_else() {
    let mut world = world(&[]);
    play(&mut world, &[add(0, 0), Action::Settle]);
    for page in [LOST, LOST + 2] {
        play(&mut world, &[begin(0, page, false), Action::Settle]);
        play(&mut world, &[Action::End { granted: 0, outcome: UNKNOWN, stranger: false }, Action::Settle]);
    }
    play(&mut world, &[Action::ReleaseWild { client: 0, id: 7, to: PageState::Shared }]);
    assert_eq!(quarantined(&world).len(), 2);
    play(&mut world, &[Action::ReleaseWild { client: 0, id: 2, to: PageState::Shared }, Action::Settle]);
    assert_eq!(quarantined(&world), [("owner-unknown", LOST.into(), 1)]);
    assert_eq!((seen(&world, LOST.into()), seen(&world, u64::from(LOST) + 2)), (0, 2));
}

#[test]
fn half_made_mappings_are_released_one_by_one() {
    let mut world = world(&[]);
    for (client, gpa) in [(0, 0), (0, 64)] {
        world.hands.buses[0].sim.plan(
            (1..=20)
                .fold(FaultPlan::new(), |p, nth| p.at(Call::Unmap, nth, Fault::Errno(Errno::BUSY)))
                .at_any(world.hands.buses[0].sim.all_calls() + 1, Fault::HalfMapped(Errno::IO)),
        );
        let (pages, offset, piece, initial) = (4, gpa, 0, PageState::Shared);
        let add = Action::Add { client, gpa, pages, file: 0, offset, piece, initial, writable: true };
        play(&mut world, &[add, Action::Settle]);
    }
    let held = quarantined(&world);
    assert_eq!(held.iter().map(|(cause, ..)| *cause).collect::<Vec<_>>(), ["half-mapped"; 2]);
    assert!(held[0].2 != held[1].2 && held[0].2 != 0, "{held:?}");
}

#[test]
fn nothing_is_released_while_passgates_own_conversion_may_still_take_it_away() {
    let mut world = world(&[]);
    play(&mut world, &[add(0, 0), Action::Settle, begin(0, LOST, true)]);
    play(&mut world, &[Action::Work { task: 0, deliver: true, fault: None }]);
    play(&mut world, &[Action::Work { task: 0, deliver: true, fault: None }]);
    world.hands.tasks[0].hangs = true;
    play(&mut world, &[Action::Settle, Action::Advance { ns: 700 }]);
    assert_eq!(world.verdicts, [0, 0, 1]);
    let release = Action::Release { client: 0, held: NOBODY, to: PageState::Shared };
    play(&mut world, &[release.clone(), Action::Settle]);
    assert_eq!(quarantined(&world), [("owner-unknown", LOST.into(), 1)]);
    world.hands.tasks[0].hangs = false;
    play(&mut world, &[Action::Settle, release, Action::Settle]);
    assert_eq!((quarantined(&world), seen(&world, LOST.into())), (vec![], 2));
}

#[test]
fn a_release_lets_the_closing_of_a_dead_clients_memory_go_on() {
    let mut world = world(&[]);
    play(&mut world, &[add(0, 0), Action::Settle]);
    let plan =
        (1..=20).fold(FaultPlan::new(), |plan, nth| plan.at(Call::Unmap, nth, Fault::Errno(Errno::BUSY)));
    world.hands.buses[0].sim.plan(plan);
    play(&mut world, &[Action::Gone { client: 0 }, Action::Settle]);
    assert_eq!(quarantined(&world).len(), 1);
    world.hands.buses[0].sim.plan(FaultPlan::new());
    play(&mut world, &[Action::Release { client: 1, held: NOBODY, to: PageState::Shared }, Action::Settle]);
    assert_eq!((quarantined(&world).len(), world.gate.snapshot().regions.len(), seen(&world, 1)), (0, 0, 0));
    world.drain().unwrap_or_else(|broken| panic!("{broken}"));
}
