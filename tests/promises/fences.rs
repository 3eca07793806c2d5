//! The ladder, rung by rung: what each fence ends, who shares it, when a device comes back, and what is proof on a
//! strict platform or with a TDI.

use passgate::gate::{
    Able, DeviceId, Event, Hitless, OnStuckDma, Outcome, PageState, Platform, Policy, Step,
};
use passgate_backends::iommu::sim::{Call, Fault, FaultPlan};
use passgate_backends::{Nature, StopClass};
use passgate_bindings::{Iova, PAGE};
use rustix::io::Errno;

use crate::action::Action;
use crate::saboteur::Plant;
use crate::world::{Setup, World, able};

const ATS: Nature = Nature { ats: true, tdi: false };
const TDI: Nature = Nature { ats: false, tdi: true };
const PLAIN: Nature = Nature { ats: false, tdi: false };
/// A part of the deadline of [`begin`]: one for each rung, one of slack.
const PART: u64 = 100;

fn world(policy: Policy, domains: &[&[(StopClass, Nature)]]) -> World {
    let domains = domains.iter().map(|devices| (able(256, 1 << 30), devices.to_vec())).collect();
    let setup = Setup { policy, domains, seeds: Vec::new(), tolerant: false, clean: false };
    let mut world = World::new(&setup, Plant::Nothing).unwrap();
    world.trace = Some(Default::default());
    play(&mut world, &[add(0), Action::Settle]);
    world
}

fn far(on_stuck_dma: OnStuckDma) -> Policy {
    Policy { on_stuck_dma, hitless: Hitless::Off, ..Policy::default() }
}

fn strict() -> Policy {
    Policy { platform: Platform::Strict, hitless: Hitless::Off, ..Policy::default() }
}

/// Eight pages, one mapping each.
fn add(gpa: u16) -> Action {
    let (client, pages, file, offset, piece) = (0, 8, 0, gpa, 0);
    Action::Add { client, gpa, pages, file, offset, piece, initial: PageState::Shared, writable: true }
}

fn begin(page: u16) -> Action {
    let (client, region, pages, to, passgate) = (0, 0, 1, PageState::Private, false);
    Action::Begin { client, region, page, pages, to, passgate, deadline_ns: 7 * PART, batch: 0 }
}

const REMOVE: Action = Action::Remove { region: 0, stranger: false };

fn play(world: &mut World, actions: &[Action]) {
    for action in actions {
        world.apply(action).unwrap_or_else(|broken| panic!("{broken}"));
    }
}

/// A begin, and every rung of its ladder in time.
fn begin_and_climb(world: &mut World) {
    play(world, &[begin(2), Action::Settle]);
    for _ in Step::LADDER {
        play(world, &[Action::Advance { ns: PART }, Action::Settle]);
    }
}

fn fail(world: &World, bus: usize, call: Call, fault: Fault) {
    world.hands.buses[bus].sim.fail_next(call, fault);
}

/// The call fails, however often it is made.
fn fail_always(world: &World, bus: usize, call: Call) {
    let fault = Fault::Errno(Errno::IO);
    let from = world.hands.buses[bus].sim.calls(call) + 1;
    let plan = (from..from + 100).fold(FaultPlan::new(), |plan, nth| plan.at(call, nth, fault));
    world.hands.buses[bus].sim.plan(plan);
}

/// Whether the first device of a domain meets anything in a page.
fn sees(world: &World, bus: usize, page: u64) -> bool {
    world.hands.buses[bus].devices[0].1.dma(Iova(page * PAGE)).is_some()
}

fn was(world: &World, what: &str) -> bool {
    world.trace.iter().flatten().any(|line| line.contains(what))
}

fn causes(world: &World) -> Vec<&'static str> {
    world.gate.snapshot().quarantine.iter().map(|held| held.reason.cause.word()).collect()
}

#[test]
fn each_rung_ends_what_the_one_below_did_not() {
    use Step::{Detach, Drain, Master, Reset, Stop};
    let late = StopClass::all();
    let rungs = [
        (late, Fault::Late, vec![Drain]),
        (late - StopClass::DRAIN, Fault::Late, vec![Stop]),
        (late - StopClass::DRAIN - StopClass::STOP, Fault::Late, vec![Master]),
        (late, Fault::Stuck, vec![Drain, Stop, Master, Detach]),
        (late - StopClass::DETACH, Fault::Stuck, vec![Drain, Stop, Master, Reset]),
        (StopClass::DETACH | StopClass::RESET, Fault::Late, vec![Detach]),
        (StopClass::RESET, Fault::Late, vec![Reset]),
    ];
    for (class, fault, fences) in rungs {
        let mut world = world(far(OnStuckDma::Reset), &[&[(class, PLAIN)]]);
        fail(&world, 0, Call::Unmap, fault);
        play(&mut world, &[begin(2)]);
        // Nothing is flushed by itself: only fences end it.
        while world.verdicts == [0, 0, 0] {
            let task = Action::Work { task: 0, deliver: true, fault: None };
            let action = if world.hands.tasks.is_empty() { Action::Advance { ns: PART } } else { task };
            play(&mut world, &[action]);
        }
        assert_eq!((world.verdicts, &world.fences), ([1, 0, 0], &fences), "{class:?}");
        play(&mut world, &[Action::Settle]);
        assert!(sees(&world, 0, 1) && !sees(&world, 0, 2), "{class:?}: it comes back");
    }
}

#[test]
fn every_rung_has_its_part_of_the_deadline() {
    let mut world = world(far(OnStuckDma::Reset), &[&[(StopClass::all(), PLAIN)]]);
    fail_always(&world, 0, Call::Fence);
    fail(&world, 0, Call::Unmap, Fault::Stuck);
    play(&mut world, &[begin(2), Action::Settle]);
    for rungs in 1..Step::LADDER.len() {
        assert_eq!(world.fences.len(), rungs - 1);
        play(&mut world, &[Action::Advance { ns: PART - 1 }, Action::Settle]);
        assert_eq!(world.fences.len(), rungs - 1, "the time of a rung is its own");
        play(&mut world, &[Action::Advance { ns: 1 }, Action::Settle]);
    }
    assert_eq!((world.verdicts, &world.fences[..]), ([0, 0, 0], &Step::LADDER[1..]));
    play(&mut world, &[Action::Advance { ns: PART }]);
    assert_eq!(world.verdicts, [0, 1, 0]);
}

#[test]
fn one_fence_serves_all_who_wait_for_it() {
    let mut world = world(far(OnStuckDma::Fence), &[&[(StopClass::all(), PLAIN)]]);
    for page in [1, 3, 5] {
        fail(&world, 0, Call::Unmap, Fault::Stuck);
        play(&mut world, &[begin(page), Action::Settle]);
    }
    for _ in 0..4 {
        play(&mut world, &[Action::Advance { ns: PART }, Action::Settle]);
    }
    let fences = [Step::Drain, Step::Stop, Step::Master, Step::Detach];
    assert_eq!((world.verdicts, &world.fences[..]), ([3, 0, 0], &fences[..]));
}

#[test]
fn whoever_needs_a_stronger_fence_than_the_one_under_way_has_it_next() {
    let mut world = world(far(OnStuckDma::Fence), &[&[(StopClass::all(), PLAIN)]]);
    fail(&world, 0, Call::Unmap, Fault::Stuck);
    play(&mut world, &[begin(1), Action::Settle]);
    // The drain is under way while time asks for two rungs more.
    play(&mut world, &[Action::Advance { ns: 3 * PART }]);
    assert_eq!(world.fences, [Step::Drain]);
    play(&mut world, &[Action::Work { task: 0, deliver: true, fault: None }]);
    assert_eq!(world.fences, [Step::Drain, Step::Master]);
    // Whoever asked is refused meanwhile: nobody needs the detach any more.
    play(&mut world, &[Action::Advance { ns: 3 * PART }]);
    assert_eq!(world.verdicts, [0, 1, 0]);
    play(&mut world, &[Action::Settle]);
    assert_eq!(world.fences, [Step::Drain, Step::Master]);
}

#[test]
fn a_device_comes_back_as_soon_as_its_own_domain_is_calm() {
    let device: &[_] = &[(StopClass::all(), PLAIN)];
    let mut world = world(far(OnStuckDma::Fence), &[device, &[(StopClass::empty(), PLAIN)]]);
    fail(&world, 0, Call::Unmap, Fault::Stuck);
    begin_and_climb(&mut world);
    assert_eq!(world.verdicts, [1, 0, 0]);
    assert!(sees(&world, 0, 1));
    // Somebody still waits for the other domain; this one has nothing to do with it.
    fail(&world, 0, Call::Unmap, Fault::Stuck);
    fail(&world, 1, Call::Unmap, Fault::Stuck);
    play(&mut world, &[begin(4), Action::Settle]);
    for _ in 0..4 {
        play(&mut world, &[Action::Advance { ns: PART }, Action::Settle]);
    }
    assert_eq!(world.verdicts, [1, 0, 0]);
    assert!(sees(&world, 0, 1) && !sees(&world, 0, 4));
}

#[test]
fn a_device_that_a_failed_fence_has_stopped_comes_back_too() {
    let mut world = world(far(OnStuckDma::Fence), &[&[(StopClass::STOP, PLAIN)]]);
    fail(&world, 0, Call::Unmap, Fault::Stuck);
    begin_and_climb(&mut world);
    assert_eq!((world.verdicts, &world.fences[..]), ([0, 1, 0], &[Step::Stop][..]));
    assert!(!sees(&world, 0, 1), "it is silent, though its fence failed");
    play(&mut world, &[Action::Flush { domain: 0, stuck: true }, Action::Settle]);
    assert!(sees(&world, 0, 1) && sees(&world, 0, 2));
}

#[test]
fn a_rung_that_one_device_cannot_take_proves_nothing_by_itself() {
    let devices: &[_] = &[(StopClass::all(), PLAIN), (StopClass::empty(), PLAIN)];
    let mut world = world(far(OnStuckDma::Reset), &[devices]);
    fail(&world, 0, Call::Unmap, Fault::Stuck);
    begin_and_climb(&mut world);
    assert_eq!(world.verdicts, [0, 1, 0], "the other device has its operation still");
    assert_eq!(causes(&world), ["dma-in-flight"]);
}

#[test]
fn strictly_what_caches_translations_is_detached_before_the_unmap_whatever_the_policy() {
    for (policy, fences) in [(strict(), vec![Step::Detach]), (Policy::default(), vec![])] {
        let mut world = world(policy, &[&[(StopClass::all(), ATS)], &[(StopClass::all(), PLAIN)]]);
        fail(&world, 0, Call::Unmap, Fault::Errno(Errno::BUSY));
        play(&mut world, &[begin(2)]);
        let unmaps = world.hands.tasks.len() - fences.len();
        assert_eq!(unmaps == 0, !fences.is_empty(), "first out, then unmapped");
        play(&mut world, &[Action::Settle]);
        assert_eq!((world.verdicts, &world.fences), ([1, 0, 0], &fences));
        assert!(sees(&world, 0, 1) && !sees(&world, 0, 2), "it comes back");
    }
}

#[test]
fn strictly_two_conversions_share_one_detach_and_both_are_granted() {
    let mut world = world(strict(), &[&[(StopClass::DETACH, ATS)]]);
    play(&mut world, &[begin(2), begin(4), Action::Settle]);
    assert_eq!((world.verdicts, &world.fences[..]), ([2, 0, 0], &[Step::Detach][..]));
    // On its way back it does not count as detached.
    play(&mut world, &[begin(5)]);
    play(&mut world, &[Action::Work { task: 0, deliver: true, fault: None }, begin(6), Action::Settle]);
    assert_eq!((world.verdicts, world.fences.len()), ([4, 0, 0], 2));
}

#[test]
fn strictly_a_device_on_its_way_back_is_detached_again_first() {
    let mut world = world(strict(), &[&[(StopClass::DETACH, ATS)]]);
    let next = Action::Work { task: 0, deliver: true, fault: None };
    // Detached, unmapped, granted: the attach is under way.
    play(&mut world, &[begin(2), next.clone(), next.clone(), begin(4)]);
    assert_eq!((world.verdicts, &world.fences[..]), ([1, 0, 0], &[Step::Detach][..]));
    play(&mut world, &[next]);
    assert_eq!((world.verdicts, &world.fences[..]), ([1, 0, 0], &[Step::Detach, Step::Detach][..]));
    play(&mut world, &[Action::Settle]);
    assert_eq!(world.verdicts, [2, 0, 0]);
}

#[test]
fn strictly_a_fence_that_hangs_elsewhere_delays_nobody() {
    let mut world = world(strict(), &[&[(StopClass::DETACH, ATS)], &[(StopClass::DRAIN, PLAIN)]]);
    fail(&world, 1, Call::Unmap, Fault::Stuck);
    play(&mut world, &[begin(4), Action::Settle, Action::Advance { ns: PART }]);
    assert_eq!(world.fences, [Step::Detach, Step::Drain]);
    world.hands.tasks.iter_mut().for_each(|task| task.hangs = true);
    play(&mut world, &[begin(2), Action::Settle]);
    assert_eq!(world.verdicts, [1, 0, 0]);
}

#[test]
fn strictly_what_cannot_be_detached_is_refused_and_nothing_changes() {
    let other: (StopClass, Nature) = (StopClass::all(), ATS);
    let mut world = world(strict(), &[&[(StopClass::RESET | StopClass::DRAIN, ATS), other]]);
    play(&mut world, &[begin(2), Action::Settle]);
    assert_eq!((world.verdicts, world.fences.len()), ([0, 1, 0], 0));
    assert!(was(&world, "cause: AtsNotFenced, device: Some(DeviceId(0)), rung: Detach"));
    assert_eq!((causes(&world).len(), sees(&world, 0, 2)), (0, true));
}

#[test]
fn strictly_a_detach_that_fails_or_never_returns_is_no_done() {
    for hangs in [false, true] {
        let mut world = world(strict(), &[&[(StopClass::all(), ATS)]]);
        if !hangs {
            fail(&world, 0, Call::Fence, Fault::Errno(Errno::IO));
        }
        play(&mut world, &[begin(2)]);
        world.hands.tasks[0].hangs = hangs;
        for _ in Step::LADDER {
            play(&mut world, &[Action::Settle, Action::Advance { ns: PART }]);
        }
        assert_eq!((world.verdicts, &world.fences[..]), ([0, 1, 0], &[Step::Detach][..]), "hangs: {hangs}");
        world.hands.tasks.iter_mut().for_each(|task| task.hangs = false);
        play(&mut world, &[Action::Settle]);
        assert_eq!((causes(&world).len(), sees(&world, 0, 2)), (0, true), "all is as before; hangs: {hangs}");
        play(&mut world, &[begin(2), Action::Settle]);
        assert_eq!(world.verdicts, [1, 1, 0], "and it may be tried again; hangs: {hangs}");
    }
}

#[test]
fn strictly_a_device_whose_attach_failed_late_is_detached_again_before_the_next_unmap() {
    let mut world = world(strict(), &[&[(StopClass::DETACH, ATS)]]);
    fail(&world, 0, Call::Attach, Fault::HalfDone(Errno::IO));
    play(&mut world, &[begin(2), Action::Settle]);
    assert_eq!((world.verdicts, &world.fences[..]), ([1, 0, 0], &[Step::Detach][..]));
    assert!(sees(&world, 0, 1), "it is in its domain, whatever the attach said");
    // The kernel says nothing of a cache that it could not empty.
    fail(&world, 0, Call::Unmap, Fault::Cached);
    play(&mut world, &[begin(4), Action::Settle]);
    assert_eq!((world.verdicts, &world.fences[..]), ([2, 0, 0], &[Step::Detach, Step::Detach][..]));
    assert!(!sees(&world, 0, 4));
    // It is tried again with the next memory.
    play(&mut world, &[add(16), Action::Settle]);
    assert!(sees(&world, 0, 1) && !sees(&world, 0, 2) && !sees(&world, 0, 4));
}

#[test]
fn a_device_that_could_not_be_brought_back_is_tried_again_at_the_end_of_a_conversion() {
    for fault in [Fault::Errno(Errno::BUSY), Fault::HalfDone(Errno::IO)] {
        let mut world = world(strict(), &[&[(StopClass::DETACH, ATS)]]);
        fail(&world, 0, Call::Attach, fault);
        play(&mut world, &[begin(2), Action::Settle]);
        assert!(world.gate.snapshot().devices[0].lost, "{fault:?}");
        let end = Action::End { granted: 0, outcome: Outcome::Committed, stranger: false };
        play(&mut world, &[end, Action::Settle]);
        assert!(!world.gate.snapshot().devices[0].lost && sees(&world, 0, 1) && !sees(&world, 0, 2));
    }
}

#[test]
fn a_fence_counts_for_nothing_once_an_attach_after_it_has_failed() {
    for step in [StopClass::STOP, StopClass::MASTER, StopClass::DETACH] {
        let mut world = world(far(OnStuckDma::Fence), &[&[(step, PLAIN)]]);
        fail(&world, 0, Call::Attach, Fault::HalfDone(Errno::IO));
        fail(&world, 0, Call::Unmap, Fault::Stuck);
        begin_and_climb(&mut world);
        let fences = world.fences.len();
        fail(&world, 0, Call::Unmap, Fault::Stuck);
        play(
            &mut world,
            &[Action::Flush { domain: 0, stuck: true }, Action::Settle, begin(4), Action::Settle],
        );
        for _ in Step::LADDER {
            play(&mut world, &[Action::Advance { ns: PART }, Action::Settle]);
        }
        assert!(world.fences.len() > fences, "{step:?}: it is fenced anew: {:?}", world.fences);
    }
}

#[test]
fn strictly_what_is_read_off_a_device_decides_whether_it_is_detached() {
    let nature = |ats| Action::Raw(Event::DeviceNature { device: DeviceId(0), ats, tdi: false });
    for (believed, is, fences) in [(PLAIN, true, vec![Step::Detach]), (ATS, false, vec![])] {
        let mut world = world(strict(), &[&[(StopClass::DETACH, believed)]]);
        play(&mut world, &[nature(is), begin(2), Action::Settle]);
        assert_eq!((world.verdicts, &world.fences), ([1, 0, 0], &fences), "{believed:?}");
    }
    // What waits for a device that cannot be detached is gone as soon as that is known to keep no copies.
    let mut world = world(strict(), &[&[(StopClass::RESET, ATS)]]);
    play(&mut world, &[begin(2), Action::Settle]);
    assert_eq!(world.verdicts, [0, 1, 0]);
    play(&mut world, &[REMOVE, Action::Settle]);
    assert_eq!(world.gate.snapshot().regions.len(), 1);
    play(&mut world, &[nature(false), Action::Settle]);
    assert_eq!((causes(&world).len(), world.gate.snapshot().regions.len()), (0, 0));
}

#[test]
fn a_tdi_that_was_bound_since_the_start_is_spared() {
    let ends = StopClass::DRAIN | StopClass::MASTER | StopClass::RESET;
    let mut world = world(far(OnStuckDma::Reset), &[&[(ends, PLAIN)]]);
    fail(&world, 0, Call::Unmap, Fault::Stuck);
    let bound = Event::DeviceNature { device: DeviceId(0), ats: false, tdi: true };
    play(&mut world, &[Action::Raw(bound)]);
    begin_and_climb(&mut world);
    assert_eq!((world.verdicts, &world.fences[..]), ([0, 1, 0], &[Step::Drain][..]));
}

#[test]
fn devices_that_a_failed_replace_left_out_come_back() {
    let able = Able { replace: true, ..able(256, 8 * PAGE) };
    let domains = vec![(able, vec![(StopClass::DETACH, PLAIN)])];
    let setup =
        Setup { policy: far(OnStuckDma::Refuse), domains, seeds: Vec::new(), tolerant: false, clean: false };
    let mut world = World::new(&setup, Plant::Nothing).unwrap();
    let (client, pages, file, offset, piece, initial) = (0, 64, 0, 0, 3, PageState::Shared);
    let large = Action::Add { client, gpa: 0, pages, file, offset, piece, initial, writable: true };
    play(&mut world, &[large, Action::Settle]);
    fail(&world, 0, Call::Replace, Fault::HalfDone(Errno::NODEV));
    let (region, to, passgate, batch) = (0, PageState::Private, false, 9);
    let begin =
        Action::Begin { client, region, page: 1, pages: 1, to, passgate, deadline_ns: 7 * PART, batch };
    play(&mut world, &[begin, Action::Settle]);
    assert!(world.hands.buses[0].sim.calls(Call::Replace) > 0, "the scenario has lost its subject");
    assert!(sees(&world, 0, 0) && !sees(&world, 0, 1));
}

#[test]
fn strictly_a_region_that_goes_waits_in_quarantine_for_a_detach() {
    let mut world = world(strict(), &[&[(StopClass::DETACH, ATS)]]);
    play(&mut world, &[add(16), Action::Settle]);
    fail_always(&world, 0, Call::Fence);
    play(&mut world, &[REMOVE, Action::Settle]);
    for _ in Step::LADDER {
        play(&mut world, &[Action::Advance { ns: 2_000_000_000 / 7 }, Action::Settle]);
    }
    assert_eq!(causes(&world), ["ats-not-fenced"]);
    assert!(!sees(&world, 0, 1), "unmapped it is");
    assert_eq!(world.gate.snapshot().regions.len(), 2);
    // Somebody else's conversion gets the device detached: that is proof of both.
    world.hands.buses[0].sim.plan(FaultPlan::new());
    let Action::Begin { client, page, pages, to, passgate, deadline_ns, .. } = begin(1) else {
        unreachable!()
    };
    play(
        &mut world,
        &[Action::Begin { client, region: 1, page, pages, to, passgate, deadline_ns, batch: 0 }],
    );
    play(&mut world, &[Action::Settle]);
    assert_eq!(world.verdicts, [1, 1, 0]);
    assert_eq!((causes(&world).len(), world.gate.snapshot().regions.len()), (0, 1));
}

#[test]
fn a_reset_is_not_a_detach() {
    let policy = Policy { on_stuck_dma: OnStuckDma::Reset, ..strict() };
    let mut world = world(policy, &[&[(StopClass::RESET, ATS)]]);
    play(&mut world, &[REMOVE, Action::Settle]);
    for _ in Step::LADDER {
        play(&mut world, &[Action::Advance { ns: 2_000_000_000 / 7 }, Action::Settle]);
    }
    assert_eq!((causes(&world), &world.fences[..]), (vec!["ats-not-fenced"], &[Step::Reset][..]));
}

#[test]
fn strictly_a_device_that_is_reset_is_detached_all_the_same() {
    let policy = Policy { on_stuck_dma: OnStuckDma::Reset, ..strict() };
    for under_way in [true, false] {
        let mut world = world(policy, &[&[(StopClass::DETACH | StopClass::RESET, ATS)]]);
        play(&mut world, &[add(16), Action::Settle]);
        let plan = FaultPlan::new().at(Call::Fence, 1, Fault::Errno(Errno::IO));
        world.hands.buses[0].sim.plan(plan.at(Call::Fence, 2, Fault::Errno(Errno::IO)));
        play(&mut world, &[REMOVE]);
        // The detach fails twice, before the unmap and behind it: what is left is the reset.
        while world.fences.last() != Some(&Step::Reset) {
            play(&mut world, &[Action::Work { task: 0, deliver: true, fault: None }]);
        }
        if !under_way {
            play(&mut world, &[Action::Settle]);
        }
        let Action::Begin { client, page, pages, to, passgate, deadline_ns, .. } = begin(1) else {
            unreachable!()
        };
        play(
            &mut world,
            &[Action::Begin { client, region: 1, page, pages, to, passgate, deadline_ns, batch: 0 }],
        );
        play(&mut world, &[Action::Settle]);
        assert_eq!(world.fences[2..], [Step::Reset, Step::Detach], "under way: {under_way}");
        assert_eq!(world.verdicts[0], 1, "under way: {under_way}");
        assert_eq!(world.gate.snapshot().regions.len(), 1, "and the detach is proof of the region too");
    }
}

#[test]
fn a_tdi_is_ended_only_with_leave_and_not_in_silence() {
    use Step::{Detach, Drain, Master, Reset, Stop};
    let ends = StopClass::DRAIN | StopClass::MASTER | StopClass::RESET;
    let cases = [
        (StopClass::all(), false, vec![Drain, Stop, Detach], [1, 0, 0]),
        (ends, false, vec![Drain], [0, 1, 0]),
        (ends, true, vec![Drain, Master, Reset], [1, 0, 0]),
    ];
    for (class, end_tdi, fences, verdicts) in cases {
        let mut world = world(Policy { end_tdi, ..far(OnStuckDma::Reset) }, &[&[(class, TDI)]]);
        fail(&world, 0, Call::Unmap, Fault::Stuck);
        begin_and_climb(&mut world);
        assert_eq!((world.verdicts, &world.fences), (verdicts, &fences), "{class:?}, {end_tdi}");
        for step in [Master, Reset] {
            let told = was(&world, &format!("TdiEnded {{ device: DeviceId(0), step: {step:?} }}"));
            assert_eq!(told, end_tdi, "{step:?}");
        }
    }
}

#[test]
fn a_dead_clients_devices_are_stopped_as_surely_as_they_can_be() {
    use Step::{Detach, Drain, Master, Reset, Stop};
    let [drain, stop, master] = [StopClass::DRAIN, StopClass::STOP, StopClass::MASTER];
    let reset = StopClass::RESET;
    let cases = [
        (StopClass::all(), PLAIN, OnStuckDma::Reset, Detach),
        (drain | stop | master | reset, PLAIN, OnStuckDma::Reset, Reset),
        (drain | stop | master | reset, PLAIN, OnStuckDma::Refuse, Stop),
        (drain | master | reset, PLAIN, OnStuckDma::Refuse, Master),
        (drain | master | reset, TDI, OnStuckDma::Reset, Drain),
    ];
    for (class, nature, policy, step) in cases {
        let mut world = world(far(policy), &[&[(class, nature)]]);
        play(&mut world, &[Action::Gone { client: 0 }]);
        assert_eq!(world.fences, [step], "{class:?}, {nature:?}");
        play(&mut world, &[Action::Settle]);
        assert!(world.gate.snapshot().devices[0].fenced.is_none(), "{class:?}: it comes back");
    }
}
