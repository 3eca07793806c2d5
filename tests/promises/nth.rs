//! One scenario, and every fault at every call of it: the Nth call fails, falls short, flushes late, sticks or
//! never returns, for each N, under each policy. The ledger never forgets, and no verdict is a false *done*.

use passgate::gate::{Able, Hitless, OnStuckDma, Outcome, PageState, Policy, Step};
use passgate_backends::iommu::sim::{Call, Fault, FaultPlan};
use passgate_backends::{Nature, StopClass};
use passgate_bindings::PAGE;
use rustix::io::Errno;

use crate::action::{AUTO, Action};
use crate::saboteur::Plant;
use crate::truth::Kept;
use crate::world::{Setup, World, able};

const FAULTS: [Fault; 8] = [
    Fault::Errno(Errno::BUSY),
    Fault::HalfDone(Errno::IO),
    Fault::HalfMapped(Errno::IO),
    Fault::HalfUnmapped(Errno::IO),
    Fault::Short,
    Fault::Late,
    Fault::ShortLate,
    Fault::Stuck,
];

const POLICIES: [OnStuckDma; 3] = [OnStuckDma::Refuse, OnStuckDma::Fence, OnStuckDma::Reset];

/// How a page leaves a large mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Cut,
    Split,
    Pause,
    Replace,
    Page,
}

const WAYS: [Way; 5] = [Way::Cut, Way::Split, Way::Pause, Way::Replace, Way::Page];

fn setup(on_stuck_dma: OnStuckDma, way: Way) -> Setup {
    let hitless = match way {
        Way::Page => Hitless::Require,
        Way::Pause => Hitless::Prefer,
        Way::Cut | Way::Split | Way::Replace => Hitless::Off,
    };
    let policy = Policy { on_stuck_dma, hitless, close_deadline_ns: 500, ..Policy::default() };
    let nature = Nature::default();
    let all = vec![(StopClass::all(), nature), (StopClass::DRAIN, nature)];
    let one = StopClass::DETACH | if way == Way::Pause { StopClass::STOP } else { StopClass::empty() };
    let (cut, replace) = (way == Way::Cut, way == Way::Replace);
    let able = |max_piece| Able { cut, replace, ..able(256, max_piece) };
    Setup {
        policy,
        domains: vec![(able(8 * PAGE), all), (able(1 << 30), vec![(one, nature)])],
        tolerant: false,
        seeds: Vec::new(),
        clean: false,
    }
}

/// Memory with an alias and a hole, converted back and forth, over region borders; two clients, of which one
/// dies in the middle of it.
fn scenario(way: Way) -> Vec<Action> {
    let piece = |piece| if way == Way::Page { AUTO } else { piece };
    let add = |client, gpa, pages, file, offset, piece, initial| Action::Add {
        client,
        gpa,
        pages,
        file,
        offset,
        piece,
        initial,
        writable: true,
    };
    let begin = |region, page, pages, to, passgate| Action::Begin {
        client: 0,
        region,
        page,
        pages,
        to,
        passgate,
        deadline_ns: 1000,
        batch: 0,
    };
    let batch = |region, page, to| Action::Begin {
        client: 0,
        region,
        page,
        pages: 1,
        to,
        passgate: false,
        deadline_ns: 1000,
        batch: 9,
    };
    let end = |outcome| Action::End { granted: 0, outcome, stranger: false };
    let (shared, private, hole) = (PageState::Shared, PageState::Private, PageState::Hole);
    let mut actions = vec![
        add(0, 0, 64, 0, 0, piece(3), shared),
        add(1, 128, 32, 0, 16, 0, shared),
        add(0, 64, 16, 1, 0, piece(2), private),
        batch(0, 1, private),
        end(Outcome::Committed),
        batch(0, 1, shared),
        end(Outcome::Committed),
        Action::Quiet,
        Action::Quiet,
        Action::Quiet,
        begin(0, 20, 4, private, false),
        Action::Touch { granted: 0 },
        end(Outcome::Committed),
        begin(0, 60, 8, hole, false),
        end(Outcome::NotCommitted),
        begin(2, 3, 5, shared, false),
        end(Outcome::Committed),
        begin(0, 20, 4, shared, true),
        begin(1, 0, 9, private, true),
        begin(1, 0, 9, shared, false),
        Action::Remove { region: 2, stranger: false },
        end(Outcome::Committed),
        begin(0, 8, 16, hole, false),
        Action::Gone { client: 1 },
        end(Outcome::Committed),
        begin(0, 0, 1, private, false),
        Action::Gone { client: 0 },
    ];
    // After each: what can come back comes back, and time goes on until every answer must be there.
    let rest = [Action::Settle, Action::Advance { ns: 250 }, Action::Settle, Action::Advance { ns: 1000 }];
    actions = actions.into_iter().flat_map(|action| std::iter::once(action).chain(rest.clone())).collect();
    actions
}

fn play(world: &mut World, way: Way) -> Kept {
    for action in scenario(way) {
        world.apply(&action)?;
    }
    world.drain()
}

fn calls(world: &World) -> u64 {
    world.hands.buses.iter().map(|bus| bus.sim.all_calls()).max().unwrap_or(0)
}

fn world(policy: OnStuckDma, way: Way) -> World {
    World::new(&setup(policy, way), Plant::Nothing).expect("an empty world keeps every promise")
}

#[test]
fn the_scenario_goes_well_when_nothing_fails() {
    for way in WAYS {
        let setup = Setup { clean: true, ..setup(OnStuckDma::Refuse, way) };
        let mut world = World::new(&setup, Plant::Nothing).unwrap();
        play(&mut world, way).unwrap_or_else(|broken| panic!("{way:?}: {broken}"));
        assert_eq!(world.verdicts, [10, 0, 0], "{way:?}: every begin is granted");
        assert!(calls(&world) > 25, "only {} calls: the scenario has lost its subject", calls(&world));
        let replaces: u64 = world.hands.buses.iter().map(|bus| bus.sim.calls(Call::Replace)).sum();
        assert_eq!(replaces > 0, way == Way::Replace, "{way:?}: {replaces} replaces");
        // The first fence: later ones are for clients that are gone.
        let paused = world.fences.first().is_some_and(|step| *step <= Step::Stop);
        assert_eq!(paused, way == Way::Pause, "{way:?}: {:?}", world.fences);
    }
}

#[test]
fn each_fault_at_every_call_leaves_every_promise_kept() {
    let mut runs = 0;
    for (policy, way) in POLICIES.iter().flat_map(|policy| WAYS.map(|way| (*policy, way))) {
        for (bus, fault) in (0..2).flat_map(|bus| FAULTS.map(|fault| (bus, fault))) {
            for lasting in [1, 50] {
                for nth in 1.. {
                    let mut world = world(policy, way);
                    let plan = (nth..nth + lasting).fold(FaultPlan::new(), |plan, n| plan.at_any(n, fault));
                    world.hands.buses[bus].sim.plan(plan);
                    if let Err(broken) = play(&mut world, way) {
                        panic!(
                            "{policy:?}, {way:?}, {lasting} times {fault:?} from call {nth} of bus {bus} on: {broken}"
                        );
                    }
                    runs += 1;
                    if nth > world.hands.buses[bus].sim.all_calls() {
                        break;
                    }
                }
            }
        }
    }
    println!("{runs} runs");
}

#[test]
fn a_call_that_never_returns_delays_nobody_at_every_call() {
    for (policy, way) in POLICIES.iter().flat_map(|policy| WAYS.map(|way| (*policy, way))) {
        for done in [false, true] {
            for nth in 0.. {
                let mut world = world(policy, way);
                world.hang_at = Some((nth, done));
                if let Err(broken) = play(&mut world, way) {
                    panic!("{policy:?}, {way:?}, call {nth} never returns (done: {done}): {broken}");
                }
                if world.hang_at.is_some() {
                    break;
                }
            }
        }
    }
}
