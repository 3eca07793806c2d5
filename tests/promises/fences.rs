//! The ladder, rung by rung: the DMA that each fence ends, fences shared by invalidations, the attach after a fence, and what
//! counts as proof on a strict platform or with a TDI.

use passgate::gate::{
    DeviceId, DomainCaps, Event, Hitless, OnStuckDma, Outcome, PageState, Platform, Policy, Rung, Step,
};
use passgate_backends::{DeviceTraits, Steps};
use passgate_bindings::{Iova, PAGE};
use passgate_sim::iommu::{Call, Fault, FaultPlan};
use rustix::io::Errno;

use crate::action::Action;
use crate::mutant::Plant;
use crate::world::{Setup, World};

const ATS: DeviceTraits = DeviceTraits { ats: true, tdi: false, tolerant: false };
const TDI: DeviceTraits = DeviceTraits { ats: false, tdi: true, tolerant: false };
const PLAIN: DeviceTraits = DeviceTraits { ats: false, tdi: false, tolerant: false };
/// One part of the deadline of [`begin`], in nanoseconds: there is one for each rung, and one of slack.
const RUNG_NS: u64 = 100;

fn world(policy: Policy, domains: &[&[(Steps, DeviceTraits)]]) -> World {
    let domains = domains.iter().map(|devices| (DomainCaps::new(256, 1 << 30), devices.to_vec())).collect();
    let setup = Setup {
        policy,
        domains,
        earlier_quarantine: Vec::new(),
        tolerant: false,
        clean: false,
        small_calls: false,
    };
    let mut world = World::new(&setup, Plant::Nothing).unwrap();
    world.trace = Some(Default::default());
    play(&mut world, &[add(0), Action::Settle]);
    world
}

fn policy_up_to(on_stuck_dma: OnStuckDma) -> Policy {
    Policy { on_stuck_dma, hitless: Hitless::Off, ..Policy::default() }
}

fn strict_policy() -> Policy {
    Policy { platform: Platform::Strict, hitless: Hitless::Off, ..Policy::default() }
}

/// Returns an action that adds eight pages, one mapping each.
fn add(gpa: u16) -> Action {
    let (client, pages, file, offset, piece) = (0, 8, 0, gpa, 0);
    Action::Add { client, gpa, pages, file, offset, piece, initial: PageState::Shared, writable: true }
}

fn begin(page: u16) -> Action {
    let (client, region, pages, to, passgate) = (0, 0, 1, PageState::Private, false);
    Action::Begin { client, region, page, pages, to, passgate, deadline_ns: 7 * RUNG_NS, batch: 0 }
}

const REMOVE: Action = Action::Remove { region: 0, by_other: false };

fn play(world: &mut World, actions: &[Action]) {
    for action in actions {
        world.apply(action).unwrap_or_else(|broken| panic!("{broken}"));
    }
}

/// Begins an invalidation and lets the timer of every rung expire, with all calls returned in between.
fn begin_and_expire_rungs(world: &mut World) {
    play(world, &[begin(2), Action::Settle]);
    for _ in Rung::LADDER {
        play(world, &[Action::Advance { ns: RUNG_NS }, Action::Settle]);
    }
}

fn fail_next(world: &World, bus: usize, call: Call, fault: Fault) {
    world.executor.buses[bus].sim.fail_next(call, fault);
}

/// Makes every further call of this kind fail.
fn fail_always(world: &World, bus: usize, call: Call) {
    let fault = Fault::Errno(Errno::IO);
    let from = world.executor.buses[bus].sim.calls(call) + 1;
    let plan = (from..from + 100).fold(FaultPlan::new(), |plan, nth| plan.at(call, nth, fault));
    world.executor.buses[bus].sim.plan(plan);
}

/// True if the first device of a domain reaches a page.
fn reaches(world: &World, bus: usize, page: u64) -> bool {
    world.executor.buses[bus].devices[0].1.dma(Iova(page * PAGE)).is_some()
}

fn trace_contains(world: &World, text: &str) -> bool {
    world.trace.iter().flatten().any(|line| line.contains(text))
}

fn quarantine_causes(world: &World) -> Vec<&'static str> {
    world.gate.snapshot().quarantine.iter().map(|quarantined| quarantined.reason.cause.word()).collect()
}

#[test]
fn each_fence_ends_dma_that_weaker_fences_did_not() {
    use Step::{Detach, Drain, Master, Reset, Stop};
    let late = Steps::all();
    let rungs = [
        (late, Fault::Late, vec![Drain]),
        (late - Steps::DRAIN, Fault::Late, vec![Stop]),
        (late - Steps::DRAIN - Steps::STOP, Fault::Late, vec![Master]),
        (late, Fault::Stuck, vec![Drain, Stop, Master, Detach]),
        (late - Steps::DETACH, Fault::Stuck, vec![Drain, Stop, Master, Reset]),
        (Steps::DETACH | Steps::RESET, Fault::Late, vec![Detach]),
        (Steps::RESET, Fault::Late, vec![Reset]),
    ];
    for (class, fault, fences) in rungs {
        let mut world = world(policy_up_to(OnStuckDma::Reset), &[&[(class, PLAIN)]]);
        fail_next(&world, 0, Call::Unmap, fault);
        play(&mut world, &[begin(2)]);
        // No flush completes by itself here: only fences end the DMA.
        while world.verdicts == [0, 0, 0] {
            let task = Action::RunTask { task: 0, deliver: true, fault: None };
            let action = if world.executor.tasks.is_empty() { Action::Advance { ns: RUNG_NS } } else { task };
            play(&mut world, &[action]);
        }
        assert_eq!((world.verdicts, &world.fences), ([1, 0, 0], &fences), "{class:?}");
        play(&mut world, &[Action::Settle]);
        assert!(reaches(&world, 0, 1) && !reaches(&world, 0, 2), "{class:?}: it is attached again");
    }
}

#[test]
fn every_rung_has_an_equal_part_of_the_deadline() {
    let mut world = world(policy_up_to(OnStuckDma::Reset), &[&[(Steps::all(), PLAIN)]]);
    fail_always(&world, 0, Call::Fence);
    fail_next(&world, 0, Call::Unmap, Fault::Stuck);
    play(&mut world, &[begin(2), Action::Settle]);
    for rungs in 1..Rung::LADDER.len() {
        assert_eq!(world.fences.len(), rungs - 1);
        play(&mut world, &[Action::Advance { ns: RUNG_NS - 1 }, Action::Settle]);
        assert_eq!(world.fences.len(), rungs - 1, "no fence before the rung's part is over");
        play(&mut world, &[Action::Advance { ns: 1 }, Action::Settle]);
    }
    assert_eq!((world.verdicts, &world.fences[..]), ([0, 0, 0], &Step::ALL[..]));
    play(&mut world, &[Action::Advance { ns: RUNG_NS }]);
    assert_eq!(world.verdicts, [0, 1, 0]);
}

#[test]
fn fence_is_shared_by_all_waiting_invalidations() {
    let mut world = world(policy_up_to(OnStuckDma::Fence), &[&[(Steps::all(), PLAIN)]]);
    for page in [1, 3, 5] {
        fail_next(&world, 0, Call::Unmap, Fault::Stuck);
        play(&mut world, &[begin(page), Action::Settle]);
    }
    for _ in 0..4 {
        play(&mut world, &[Action::Advance { ns: RUNG_NS }, Action::Settle]);
    }
    let fences = [Step::Drain, Step::Stop, Step::Master, Step::Detach];
    assert_eq!((world.verdicts, &world.fences[..]), ([3, 0, 0], &fences[..]));
}

#[test]
fn stronger_fence_follows_the_fence_in_progress() {
    let mut world = world(policy_up_to(OnStuckDma::Fence), &[&[(Steps::all(), PLAIN)]]);
    fail_next(&world, 0, Call::Unmap, Fault::Stuck);
    play(&mut world, &[begin(1), Action::Settle]);
    // Two more rungs expire while the drain is in progress.
    play(&mut world, &[Action::Advance { ns: 3 * RUNG_NS }]);
    assert_eq!(world.fences, [Step::Drain]);
    play(&mut world, &[Action::RunTask { task: 0, deliver: true, fault: None }]);
    assert_eq!(world.fences, [Step::Drain, Step::Master]);
    // The invalidation is refused meanwhile: nothing needs the detach any more.
    play(&mut world, &[Action::Advance { ns: 3 * RUNG_NS }]);
    assert_eq!(world.verdicts, [0, 1, 0]);
    play(&mut world, &[Action::Settle]);
    assert_eq!(world.fences, [Step::Drain, Step::Master]);
}

#[test]
fn device_is_attached_again_once_its_domain_is_settled() {
    let device: &[_] = &[(Steps::all(), PLAIN)];
    let mut world = world(policy_up_to(OnStuckDma::Fence), &[device, &[(Steps::empty(), PLAIN)]]);
    fail_next(&world, 0, Call::Unmap, Fault::Stuck);
    begin_and_expire_rungs(&mut world);
    assert_eq!(world.verdicts, [1, 0, 0]);
    assert!(reaches(&world, 0, 1));
    // The invalidation still waits for the other domain, but this one is settled.
    fail_next(&world, 0, Call::Unmap, Fault::Stuck);
    fail_next(&world, 1, Call::Unmap, Fault::Stuck);
    play(&mut world, &[begin(4), Action::Settle]);
    for _ in 0..4 {
        play(&mut world, &[Action::Advance { ns: RUNG_NS }, Action::Settle]);
    }
    assert_eq!(world.verdicts, [1, 0, 0]);
    assert!(reaches(&world, 0, 1) && !reaches(&world, 0, 4));
}

#[test]
fn device_stopped_by_a_failed_fence_is_attached_again() {
    let mut world = world(policy_up_to(OnStuckDma::Fence), &[&[(Steps::STOP, PLAIN)]]);
    fail_next(&world, 0, Call::Unmap, Fault::Stuck);
    begin_and_expire_rungs(&mut world);
    assert_eq!((world.verdicts, &world.fences[..]), ([0, 1, 0], &[Step::Stop][..]));
    assert!(!reaches(&world, 0, 1), "the device is stopped, although its fence failed");
    play(&mut world, &[Action::Flush { domain: 0, stuck: true }, Action::Settle]);
    assert!(reaches(&world, 0, 1) && reaches(&world, 0, 2));
}

#[test]
fn fence_that_one_device_lacks_proves_nothing_for_the_domain() {
    let devices: &[_] = &[(Steps::all(), PLAIN), (Steps::empty(), PLAIN)];
    let mut world = world(policy_up_to(OnStuckDma::Reset), &[devices]);
    fail_next(&world, 0, Call::Unmap, Fault::Stuck);
    begin_and_expire_rungs(&mut world);
    assert_eq!(world.verdicts, [0, 1, 0], "the other device's operation is still in flight");
    assert_eq!(quarantine_causes(&world), ["dma-in-flight"]);
}

#[test]
fn strict_device_with_ats_is_detached_before_the_unmap_under_any_policy() {
    for (policy, fences) in [(strict_policy(), vec![Step::Detach]), (Policy::default(), vec![])] {
        let mut world = world(policy, &[&[(Steps::all(), ATS)], &[(Steps::all(), PLAIN)]]);
        fail_next(&world, 0, Call::Unmap, Fault::Errno(Errno::BUSY));
        play(&mut world, &[begin(2)]);
        let unmaps = world.executor.tasks.len() - fences.len();
        assert_eq!(unmaps == 0, !fences.is_empty(), "first detached, then unmapped");
        play(&mut world, &[Action::Settle]);
        assert_eq!((world.verdicts, &world.fences), ([1, 0, 0], &fences));
        assert!(reaches(&world, 0, 1) && !reaches(&world, 0, 2), "it is attached again");
    }
}

#[test]
fn strict_conversions_share_one_detach() {
    let mut world = world(strict_policy(), &[&[(Steps::DETACH, ATS)]]);
    play(&mut world, &[begin(2), begin(4), Action::Settle]);
    assert_eq!((world.verdicts, &world.fences[..]), ([2, 0, 0], &[Step::Detach][..]));
    // While it is being attached, it does not count as detached.
    play(&mut world, &[begin(5)]);
    play(&mut world, &[Action::RunTask { task: 0, deliver: true, fault: None }, begin(6), Action::Settle]);
    assert_eq!((world.verdicts, world.fences.len()), ([4, 0, 0], 2));
}

#[test]
fn strict_device_being_attached_is_detached_again_before_the_unmap() {
    let mut world = world(strict_policy(), &[&[(Steps::DETACH, ATS)]]);
    let next = Action::RunTask { task: 0, deliver: true, fault: None };
    // Detached, unmapped, granted: the attach is in progress.
    play(&mut world, &[begin(2), next.clone(), next.clone(), begin(4)]);
    assert_eq!((world.verdicts, &world.fences[..]), ([1, 0, 0], &[Step::Detach][..]));
    play(&mut world, &[next]);
    assert_eq!((world.verdicts, &world.fences[..]), ([1, 0, 0], &[Step::Detach, Step::Detach][..]));
    play(&mut world, &[Action::Settle]);
    assert_eq!(world.verdicts, [2, 0, 0]);
}

#[test]
fn strict_hanging_fence_in_another_domain_delays_no_conversion() {
    let mut world = world(strict_policy(), &[&[(Steps::DETACH, ATS)], &[(Steps::DRAIN, PLAIN)]]);
    fail_next(&world, 1, Call::Unmap, Fault::Stuck);
    play(&mut world, &[begin(4), Action::Settle, Action::Advance { ns: RUNG_NS }]);
    assert_eq!(world.fences, [Step::Detach, Step::Drain]);
    world.executor.tasks.iter_mut().for_each(|task| task.hangs = true);
    play(&mut world, &[begin(2), Action::Settle]);
    assert_eq!(world.verdicts, [1, 0, 0]);
}

#[test]
fn strict_conversion_under_an_undetachable_device_is_refused_unchanged() {
    let other: (Steps, DeviceTraits) = (Steps::all(), ATS);
    let mut world = world(strict_policy(), &[&[(Steps::RESET | Steps::DRAIN, ATS), other]]);
    play(&mut world, &[begin(2), Action::Settle]);
    assert_eq!((world.verdicts, world.fences.len()), ([0, 1, 0], 0));
    assert!(trace_contains(&world, "cause: AtsNotFenced, device: Some(DeviceId(0)), rung: Detach"));
    assert_eq!((quarantine_causes(&world).len(), reaches(&world, 0, 2)), (0, true));
}

#[test]
fn strict_failed_or_hanging_detach_refuses_conversion() {
    for hangs in [false, true] {
        let mut world = world(strict_policy(), &[&[(Steps::all(), ATS)]]);
        if !hangs {
            fail_next(&world, 0, Call::Fence, Fault::Errno(Errno::IO));
        }
        play(&mut world, &[begin(2)]);
        world.executor.tasks[0].hangs = hangs;
        for _ in Rung::LADDER {
            play(&mut world, &[Action::Settle, Action::Advance { ns: RUNG_NS }]);
        }
        assert_eq!((world.verdicts, &world.fences[..]), ([0, 1, 0], &[Step::Detach][..]), "hangs: {hangs}");
        world.executor.tasks.iter_mut().for_each(|task| task.hangs = false);
        play(&mut world, &[Action::Settle]);
        assert_eq!(
            (quarantine_causes(&world).len(), reaches(&world, 0, 2)),
            (0, true),
            "nothing has changed; hangs: {hangs}"
        );
        play(&mut world, &[begin(2), Action::Settle]);
        assert_eq!(world.verdicts, [1, 1, 0], "the next begin is granted; hangs: {hangs}");
    }
}

#[test]
fn strict_device_whose_attach_failed_late_is_detached_again_before_the_next_unmap() {
    let mut world = world(strict_policy(), &[&[(Steps::DETACH, ATS)]]);
    fail_next(&world, 0, Call::Attach, Fault::HalfDone(Errno::IO));
    play(&mut world, &[begin(2), Action::Settle]);
    assert_eq!((world.verdicts, &world.fences[..]), ([1, 0, 0], &[Step::Detach][..]));
    assert!(reaches(&world, 0, 1), "it is in its domain, although the attach reported an error");
    // The kernel does not report a device-TLB invalidation that timed out.
    fail_next(&world, 0, Call::Unmap, Fault::Cached);
    play(&mut world, &[begin(4), Action::Settle]);
    assert_eq!((world.verdicts, &world.fences[..]), ([2, 0, 0], &[Step::Detach, Step::Detach][..]));
    assert!(!reaches(&world, 0, 4));
    // The attach is retried when memory is added.
    play(&mut world, &[add(16), Action::Settle]);
    assert!(reaches(&world, 0, 1) && !reaches(&world, 0, 2) && !reaches(&world, 0, 4));
}

#[test]
fn failed_attach_is_retried_at_the_end_of_a_conversion() {
    for fault in [Fault::Errno(Errno::BUSY), Fault::HalfDone(Errno::IO)] {
        let mut world = world(strict_policy(), &[&[(Steps::DETACH, ATS)]]);
        fail_next(&world, 0, Call::Attach, fault);
        play(&mut world, &[begin(2), Action::Settle]);
        assert!(world.gate.snapshot().devices[0].lost, "{fault:?}");
        let end = Action::End { granted: 0, outcome: Outcome::Committed, by_other: false };
        play(&mut world, &[end, Action::Settle]);
        assert!(!world.gate.snapshot().devices[0].lost && reaches(&world, 0, 1) && !reaches(&world, 0, 2));
    }
}

#[test]
fn fence_proves_nothing_after_a_failed_attach() {
    for step in [Steps::STOP, Steps::MASTER, Steps::DETACH] {
        let mut world = world(policy_up_to(OnStuckDma::Fence), &[&[(step, PLAIN)]]);
        fail_next(&world, 0, Call::Attach, Fault::HalfDone(Errno::IO));
        fail_next(&world, 0, Call::Unmap, Fault::Stuck);
        begin_and_expire_rungs(&mut world);
        let fences = world.fences.len();
        fail_next(&world, 0, Call::Unmap, Fault::Stuck);
        play(
            &mut world,
            &[Action::Flush { domain: 0, stuck: true }, Action::Settle, begin(4), Action::Settle],
        );
        for _ in Rung::LADDER {
            play(&mut world, &[Action::Advance { ns: RUNG_NS }, Action::Settle]);
        }
        assert!(world.fences.len() > fences, "{step:?}: it must be fenced again: {:?}", world.fences);
    }
}

#[test]
fn strict_detach_follows_the_ats_state_read_from_the_device() {
    let traits = |ats| Action::Raw(Event::DeviceTraits { device: DeviceId(0), ats, tdi: false });
    for (believed, is, fences) in [(PLAIN, true, vec![Step::Detach]), (ATS, false, vec![])] {
        let mut world = world(strict_policy(), &[&[(Steps::DETACH, believed)]]);
        play(&mut world, &[traits(is), begin(2), Action::Settle]);
        assert_eq!((world.verdicts, &world.fences), ([1, 0, 0], &fences), "{believed:?}");
    }
    // A range that waits for an undetachable device is proved gone once the device is found to have ATS off.
    let mut world = world(strict_policy(), &[&[(Steps::RESET, ATS)]]);
    play(&mut world, &[begin(2), Action::Settle]);
    assert_eq!(world.verdicts, [0, 1, 0]);
    play(&mut world, &[REMOVE, Action::Settle]);
    assert_eq!(world.gate.snapshot().regions.len(), 1);
    play(&mut world, &[traits(false), Action::Settle]);
    assert_eq!((quarantine_causes(&world).len(), world.gate.snapshot().regions.len()), (0, 0));
}

#[test]
fn tdi_bound_after_start_is_not_ended() {
    let ends = Steps::DRAIN | Steps::MASTER | Steps::RESET;
    let mut world = world(policy_up_to(OnStuckDma::Reset), &[&[(ends, PLAIN)]]);
    fail_next(&world, 0, Call::Unmap, Fault::Stuck);
    let bound = Event::DeviceTraits { device: DeviceId(0), ats: false, tdi: true };
    play(&mut world, &[Action::Raw(bound)]);
    begin_and_expire_rungs(&mut world);
    assert_eq!((world.verdicts, &world.fences[..]), ([0, 1, 0], &[Step::Drain][..]));
}

#[test]
fn devices_left_detached_by_a_failed_replace_are_attached_again() {
    let caps = DomainCaps { replace: true, ..DomainCaps::new(256, 8 * PAGE) };
    let domains = vec![(caps, vec![(Steps::DETACH, PLAIN)])];
    let setup = Setup {
        policy: policy_up_to(OnStuckDma::Refuse),
        domains,
        earlier_quarantine: Vec::new(),
        tolerant: false,
        clean: false,
        small_calls: false,
    };
    let mut world = World::new(&setup, Plant::Nothing).unwrap();
    let (client, pages, file, offset, piece, initial) = (0, 64, 0, 0, 3, PageState::Shared);
    let large = Action::Add { client, gpa: 0, pages, file, offset, piece, initial, writable: true };
    play(&mut world, &[large, Action::Settle]);
    fail_next(&world, 0, Call::Replace, Fault::HalfDone(Errno::NODEV));
    let (region, to, passgate, batch) = (0, PageState::Private, false, 9);
    let begin =
        Action::Begin { client, region, page: 1, pages: 1, to, passgate, deadline_ns: 7 * RUNG_NS, batch };
    play(&mut world, &[begin, Action::Settle]);
    assert!(
        world.executor.buses[0].sim.calls(Call::Replace) > 0,
        "no replace was made: the test tests nothing"
    );
    assert!(reaches(&world, 0, 0) && !reaches(&world, 0, 1));
}

#[test]
fn strict_removed_region_stays_quarantined_until_a_detach() {
    let mut world = world(strict_policy(), &[&[(Steps::DETACH, ATS)]]);
    play(&mut world, &[add(16), Action::Settle]);
    fail_always(&world, 0, Call::Fence);
    play(&mut world, &[REMOVE, Action::Settle]);
    for _ in Rung::LADDER {
        play(&mut world, &[Action::Advance { ns: 2_000_000_000 / 7 }, Action::Settle]);
    }
    assert_eq!(quarantine_causes(&world), ["ats-not-fenced"]);
    assert!(!reaches(&world, 0, 1), "it is unmapped");
    assert_eq!(world.gate.snapshot().regions.len(), 2);
    // Another region's conversion gets the device detached, which is proof for both.
    world.executor.buses[0].sim.plan(FaultPlan::new());
    let Action::Begin { client, page, pages, to, passgate, deadline_ns, .. } = begin(1) else {
        unreachable!()
    };
    play(
        &mut world,
        &[Action::Begin { client, region: 1, page, pages, to, passgate, deadline_ns, batch: 0 }],
    );
    play(&mut world, &[Action::Settle]);
    assert_eq!(world.verdicts, [1, 1, 0]);
    assert_eq!((quarantine_causes(&world).len(), world.gate.snapshot().regions.len()), (0, 1));
}

#[test]
fn reset_does_not_count_as_a_detach() {
    let policy = Policy { on_stuck_dma: OnStuckDma::Reset, ..strict_policy() };
    let mut world = world(policy, &[&[(Steps::RESET, ATS)]]);
    play(&mut world, &[REMOVE, Action::Settle]);
    for _ in Rung::LADDER {
        play(&mut world, &[Action::Advance { ns: 2_000_000_000 / 7 }, Action::Settle]);
    }
    assert_eq!((quarantine_causes(&world), &world.fences[..]), (vec!["ats-not-fenced"], &[Step::Reset][..]));
}

#[test]
fn strict_device_being_reset_is_detached_as_well() {
    let policy = Policy { on_stuck_dma: OnStuckDma::Reset, ..strict_policy() };
    for under_way in [true, false] {
        let mut world = world(policy, &[&[(Steps::DETACH | Steps::RESET, ATS)]]);
        play(&mut world, &[add(16), Action::Settle]);
        let plan = FaultPlan::new().at(Call::Fence, 1, Fault::Errno(Errno::IO));
        world.executor.buses[0].sim.plan(plan.at(Call::Fence, 2, Fault::Errno(Errno::IO)));
        play(&mut world, &[REMOVE]);
        // The detach fails twice, before and after the unmap: only the reset remains.
        while world.fences.last() != Some(&Step::Reset) {
            play(&mut world, &[Action::RunTask { task: 0, deliver: true, fault: None }]);
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
        assert_eq!(world.gate.snapshot().regions.len(), 1, "the detach is proof for the removed region too");
    }
}

#[test]
fn tdi_is_ended_only_if_policy_allows_and_is_announced() {
    use Step::{Detach, Drain, Master, Reset, Stop};
    let ends = Steps::DRAIN | Steps::MASTER | Steps::RESET;
    let cases = [
        (Steps::all(), false, vec![Drain, Stop, Detach], [1, 0, 0]),
        (ends, false, vec![Drain], [0, 1, 0]),
        (ends, true, vec![Drain, Master, Reset], [1, 0, 0]),
    ];
    for (class, end_tdi, fences, verdicts) in cases {
        let mut world = world(Policy { end_tdi, ..policy_up_to(OnStuckDma::Reset) }, &[&[(class, TDI)]]);
        fail_next(&world, 0, Call::Unmap, Fault::Stuck);
        begin_and_expire_rungs(&mut world);
        assert_eq!((world.verdicts, &world.fences), (verdicts, &fences), "{class:?}, {end_tdi}");
        for step in [Master, Reset] {
            let announced =
                trace_contains(&world, &format!("TdiEnded {{ device: DeviceId(0), step: {step:?} }}"));
            assert_eq!(announced, end_tdi, "{step:?}");
        }
    }
}

#[test]
fn client_death_stops_devices_by_their_surest_allowed_fence() {
    use Step::{Detach, Drain, Master, Reset, Stop};
    let [drain, stop, master] = [Steps::DRAIN, Steps::STOP, Steps::MASTER];
    let reset = Steps::RESET;
    let cases = [
        (Steps::all(), PLAIN, OnStuckDma::Reset, Detach),
        (drain | stop | master | reset, PLAIN, OnStuckDma::Reset, Reset),
        (drain | stop | master | reset, PLAIN, OnStuckDma::Refuse, Stop),
        (drain | master | reset, PLAIN, OnStuckDma::Refuse, Master),
        (drain | master | reset, TDI, OnStuckDma::Reset, Drain),
    ];
    for (class, traits, policy, step) in cases {
        let mut world = world(policy_up_to(policy), &[&[(class, traits)]]);
        play(&mut world, &[Action::ClientGone { client: 0 }]);
        assert_eq!(world.fences, [step], "{class:?}, {traits:?}");
        play(&mut world, &[Action::Settle]);
        assert!(world.gate.snapshot().devices[0].fenced.is_none(), "{class:?}: it is attached again");
    }
}
