//! One scenario, with every fault at every call: for each N and under each policy, the Nth call fails, is short, flushes late,
//! leaves DMA stuck, or never returns. Every promise must be kept in each run.

use passgate::gate::{DomainCaps, Hitless, OnStuckDma, Outcome, PageState, Policy, Step};
use passgate_backends::{DeviceTraits, Steps};
use passgate_bindings::PAGE;
use passgate_sim::iommu::{Call, Fault, FaultPlan};
use rustix::io::Errno;

use crate::action::{Action, PIECE_AUTO};
use crate::mutant::Plant;
use crate::oracle::CheckResult;
use crate::world::{Setup, World};

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

/// The way in which a page leaves a large mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum RemovalMethod {
    Cut,
    Split,
    Pause,
    Replace,
    Page,
}

const METHODS: [RemovalMethod; 5] = [
    RemovalMethod::Cut,
    RemovalMethod::Split,
    RemovalMethod::Pause,
    RemovalMethod::Replace,
    RemovalMethod::Page,
];

fn setup(on_stuck_dma: OnStuckDma, method: RemovalMethod) -> Setup {
    let hitless = match method {
        RemovalMethod::Page => Hitless::Require,
        RemovalMethod::Pause => Hitless::Prefer,
        RemovalMethod::Cut | RemovalMethod::Split | RemovalMethod::Replace => Hitless::Off,
    };
    let policy = Policy { on_stuck_dma, hitless, close_deadline_ns: 500, ..Policy::default() };
    let traits = DeviceTraits::default();
    let all = vec![(Steps::all(), traits), (Steps::DRAIN, traits)];
    let one = Steps::DETACH | if method == RemovalMethod::Pause { Steps::STOP } else { Steps::empty() };
    let (cut, replace) = (method == RemovalMethod::Cut, method == RemovalMethod::Replace);
    let caps = |max_piece| DomainCaps { cut, replace, ..DomainCaps::new(256, max_piece) };
    Setup {
        policy,
        domains: vec![(caps(8 * PAGE), all), (caps(1 << 30), vec![(one, traits)])],
        tolerant: false,
        earlier_quarantine: Vec::new(),
        clean: false,
        small_calls: method == RemovalMethod::Split,
    }
}

/// Returns a scenario: memory with an alias and a hole, converted back and forth, also across region borders, by two clients, of
/// which one dies half-way.
fn scenario(method: RemovalMethod) -> Vec<Action> {
    let piece = |piece| if method == RemovalMethod::Page { PIECE_AUTO } else { piece };
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
    let end = |outcome| Action::End { granted: 0, outcome, by_other: false };
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
        Action::ChangePages { granted: 0 },
        end(Outcome::Committed),
        begin(0, 60, 8, hole, false),
        end(Outcome::NotCommitted),
        begin(2, 3, 5, shared, false),
        end(Outcome::Committed),
        begin(0, 20, 4, shared, true),
        begin(1, 0, 9, private, true),
        begin(1, 0, 9, shared, false),
        Action::Remove { region: 2, by_other: false },
        end(Outcome::Committed),
        begin(0, 8, 16, hole, false),
        Action::ClientGone { client: 1 },
        end(Outcome::Committed),
        begin(0, 0, 1, private, false),
        Action::ClientGone { client: 0 },
    ];
    // After each action, every call returns that can, and time passes until every answer is due.
    let rest = [Action::Settle, Action::Advance { ns: 250 }, Action::Settle, Action::Advance { ns: 1000 }];
    actions = actions.into_iter().flat_map(|action| std::iter::once(action).chain(rest.clone())).collect();
    actions
}

fn play(world: &mut World, method: RemovalMethod) -> CheckResult {
    for action in scenario(method) {
        world.apply(&action)?;
    }
    world.drain()
}

fn calls(world: &World) -> u64 {
    world.executor.buses.iter().map(|bus| bus.sim.all_calls()).max().unwrap_or(0)
}

fn world(policy: OnStuckDma, method: RemovalMethod) -> World {
    World::new(&setup(policy, method), Plant::Nothing).expect("an empty world keeps every promise")
}

#[test]
fn scenario_without_faults_is_granted_throughout() {
    for method in METHODS {
        let setup = Setup { clean: true, ..setup(OnStuckDma::Refuse, method) };
        let mut world = World::new(&setup, Plant::Nothing).unwrap();
        play(&mut world, method).unwrap_or_else(|broken| panic!("{method:?}: {broken}"));
        assert_eq!(world.verdicts, [10, 0, 0], "{method:?}: every begin is granted");
        assert!(calls(&world) > 25, "only {} calls: the scenario tests too little", calls(&world));
        let replaces: u64 = world.executor.buses.iter().map(|bus| bus.sim.calls(Call::Replace)).sum();
        assert_eq!(replaces > 0, method == RemovalMethod::Replace, "{method:?}: {replaces} replaces");
        // Only the first fence counts: later ones are for clients that are gone.
        let paused = world.fences.first().is_some_and(|step| *step <= Step::Stop);
        assert_eq!(paused, method == RemovalMethod::Pause, "{method:?}: {:?}", world.fences);
    }
}

/// Plays the scenario with every fault at every call, under one policy.
fn every_fault_at_every_call(policy: OnStuckDma) {
    let mut runs = 0;
    for (method, bus) in METHODS.iter().flat_map(|method| [(*method, 0), (*method, 1)]) {
        for (fault, repeats) in FAULTS.iter().flat_map(|fault| [(*fault, 1), (*fault, 50)]) {
            for nth in 1.. {
                let mut world = world(policy, method);
                let plan = (nth..nth + repeats).fold(FaultPlan::new(), |plan, n| plan.at_any(n, fault));
                world.executor.buses[bus].sim.plan(plan);
                if let Err(broken) = play(&mut world, method) {
                    panic!(
                        "{policy:?}, {method:?}, {repeats} times {fault:?} from call {nth} of bus {bus} on: {broken}"
                    );
                }
                runs += 1;
                // The run made fewer than `nth` calls: every one of them has had the fault.
                if nth > world.executor.buses[bus].sim.all_calls() {
                    break;
                }
            }
        }
    }
    println!("{runs} runs");
}

// One test for each policy, so that they run side by side.

#[test]
fn every_fault_at_every_call_breaks_no_promise_under_refuse() {
    every_fault_at_every_call(OnStuckDma::Refuse);
}

#[test]
fn every_fault_at_every_call_breaks_no_promise_under_fence() {
    every_fault_at_every_call(OnStuckDma::Fence);
}

#[test]
fn every_fault_at_every_call_breaks_no_promise_under_reset() {
    every_fault_at_every_call(OnStuckDma::Reset);
}

#[test]
fn hang_at_every_call_delays_no_answer() {
    for (policy, method) in POLICIES.iter().flat_map(|policy| METHODS.map(|method| (*policy, method))) {
        for done in [false, true] {
            for nth in 0.. {
                let mut world = world(policy, method);
                world.hang_at = Some((nth, done));
                if let Err(broken) = play(&mut world, method) {
                    panic!("{policy:?}, {method:?}, call {nth} never returns (done: {done}): {broken}");
                }
                // The run made fewer calls: every one of them has hung.
                if world.hang_at.is_some() {
                    break;
                }
            }
        }
    }
}
