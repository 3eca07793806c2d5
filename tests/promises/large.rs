//! Large mappings: pages leave them in each way (cut, split, replace, page by page), and fragments are merged again.

use passgate::gate::{
    Answer, Backing, Caller, ClientId, DomainCaps, Door, Effect, Event, FileId, Hitless, OnStuckDma, Outcome,
    PageState, Performer, Policy, Ranges, RegionSpec, Step,
};
use passgate_backends::{DeviceTraits, Steps};
use passgate_bindings::units::Offset;
use passgate_bindings::{Iova, PAGE, PageRange};
use passgate_sim::iommu::{Call, Fault};
use rustix::io::Errno;

use crate::action::{Action, PIECE_AUTO};
use crate::mutant::Plant;
use crate::world::{Setup, World};

/// Adds 512 pages from the file's start.
const ADD: Action = Action::Add {
    client: 0,
    gpa: 512,
    pages: 512,
    file: 0,
    offset: 0,
    piece: PIECE_AUTO,
    initial: PageState::Shared,
    writable: true,
};
const END: Action = Action::End { granted: 0, outcome: Outcome::Committed, by_other: false };

fn world_of(hitless: Hitless, caps: DomainCaps, class: Steps) -> World {
    let policy = Policy { hitless, on_stuck_dma: OnStuckDma::Refuse, ..Policy::default() };
    let domains = vec![(caps, vec![(class, DeviceTraits::default())])];
    let setup = Setup {
        policy,
        domains,
        tolerant: false,
        earlier_quarantine: Vec::new(),
        clean: true,
        small_calls: false,
    };
    World::new(&setup, Plant::Nothing).unwrap()
}

fn begin(page: u16, to: PageState, batch: u8) -> Action {
    let (client, region, pages, passgate, deadline_ns) = (0, 0, 1, false, 7000);
    Action::Begin { client, region, page, pages, to, passgate, deadline_ns, batch }
}

fn play(world: &mut World, actions: &[Action]) {
    for action in actions {
        world.apply(action).unwrap_or_else(|broken| panic!("{broken}"));
    }
}

/// Begins and ends a conversion of one page (or of a batch), with all calls returned.
fn convert(world: &mut World, page: u16, to: PageState, batch: u8) {
    play(world, &[begin(page, to, batch), Action::Settle, END, Action::Settle]);
}

fn calls(world: &World) -> [u64; 3] {
    [Call::Map, Call::Unmap, Call::Replace].map(|call| world.executor.buses[0].sim.calls(call))
}

fn mappings(world: &World) -> u64 {
    let sim = world.executor.buses[0].sim.mapping_count();
    assert_eq!(world.gate.snapshot().mappings[0].used, sim, "the ledger agrees with the domain");
    sim
}

fn reaches(world: &World, page: u64) -> bool {
    world.executor.buses[0].sim.dma(Iova((512 + page) * PAGE)).is_some()
}

#[test]
fn page_is_cut_out_without_touching_the_rest_of_the_mapping() {
    let cuts = DomainCaps { cut: true, ..DomainCaps::new(1 << 20, 1 << 30) };
    for hitless in [Hitless::Require, Hitless::Prefer, Hitless::Off] {
        let mut world = world_of(hitless, cuts, Steps::DETACH);
        play(&mut world, &[ADD, Action::Settle]);
        assert_eq!((mappings(&world), calls(&world)), (1, [1, 0, 0]), "{hitless:?}");
        convert(&mut world, 100, PageState::Private, 0);
        assert_eq!((mappings(&world), calls(&world)), (2, [1, 1, 0]), "{hitless:?}: no map but the first");
        assert!(reaches(&world, 99) && !reaches(&world, 100) && reaches(&world, 101));
        assert_eq!(world.fences, []);
        convert(&mut world, 100, PageState::Shared, 0);
        assert_eq!((mappings(&world), calls(&world)), (3, [2, 1, 0]), "{hitless:?}");
    }
}

#[test]
fn uncuttable_memory_is_mapped_page_by_page_where_no_gap_is_allowed() {
    for (hitless, class) in [
        (Hitless::Require, Steps::all()),
        // It can be neither drained nor stopped, and tolerates no fault.
        (Hitless::Prefer, Steps::DETACH | Steps::RESET),
    ] {
        let mut world = world_of(hitless, DomainCaps::new(1 << 20, 1 << 30), class);
        play(&mut world, &[ADD, Action::Settle]);
        assert_eq!(mappings(&world), 512, "{hitless:?}");
        convert(&mut world, 100, PageState::Private, 0);
        assert_eq!((mappings(&world), world.fences.len()), (511, 0), "{hitless:?}");
        // It is refused at once if larger pieces are requested all the same, or the mapping budget is too small.
        for (caps, piece) in
            [(DomainCaps::new(1 << 20, 1 << 30), 9), (DomainCaps::new(500, 1 << 30), PIECE_AUTO)]
        {
            let mut world = world_of(hitless, caps, class);
            let Action::Add { client, gpa, pages, file, offset, initial, writable, .. } = ADD else {
                unreachable!()
            };
            play(
                &mut world,
                &[Action::Add { client, gpa, pages, file, offset, piece, initial, writable }, Action::Settle],
            );
            assert_eq!((world.gate.snapshot().regions.len(), calls(&world)), (0, [0; 3]), "{hitless:?}");
        }
    }
}

#[test]
fn split_maps_the_rest_of_the_mapping_again_where_gaps_are_allowed() {
    let mut world = world_of(Hitless::Off, DomainCaps::new(1 << 20, 1 << 30), Steps::all());
    play(&mut world, &[ADD, Action::Settle]);
    assert_eq!(mappings(&world), 1);
    convert(&mut world, 100, PageState::Private, 0);
    assert_eq!((mappings(&world), calls(&world), world.fences.len()), (2, [3, 1, 0], 0));
    assert!(reaches(&world, 99) && !reaches(&world, 100) && reaches(&world, 101));
}

#[test]
fn device_is_paused_until_the_rest_of_a_split_mapping_is_mapped() {
    let room = DomainCaps::new(600, 1 << 30);
    let mut world = world_of(Hitless::Prefer, room, Steps::DRAIN);
    play(&mut world, &[ADD, Action::Settle]);
    // Half of the mapping budget is reserved for the fragments of conversions: so mappings of two pages.
    assert_eq!(mappings(&world), 256);
    play(&mut world, &[begin(100, PageState::Private, 0)]);
    assert_eq!(
        (world.fences.clone(), calls(&world)),
        (vec![Step::Drain], [1, 0, 0]),
        "the pause comes first"
    );
    let next = Action::RunTask { task: 0, deliver: true, fault: None };
    play(&mut world, std::slice::from_ref(&next));
    assert_eq!(world.verdicts, [0; 3], "the unmap comes next");
    play(&mut world, &[next]);
    assert_eq!((world.verdicts, calls(&world)), ([1, 0, 0], [1, 1, 0]));
    assert!(!reaches(&world, 101), "the device is still paused");
    play(&mut world, &[Action::Settle]);
    assert!(reaches(&world, 101) && !reaches(&world, 100), "the rest is mapped once it is attached again");
}

#[test]
fn failed_or_late_pause_refuses_no_conversion() {
    for late in [false, true] {
        let mut world = world_of(Hitless::Prefer, DomainCaps::new(600, 1 << 30), Steps::DRAIN);
        world.model.clean = false;
        play(&mut world, &[ADD, Action::Settle]);
        play(&mut world, &[begin(100, PageState::Private, 0)]);
        if late {
            play(&mut world, &[Action::HangTask { task: 0, done: false }, Action::Advance { ns: 1000 }]);
        } else {
            let fault = Some(Fault::Errno(Errno::IO));
            play(&mut world, &[Action::RunTask { task: 0, deliver: true, fault }]);
        }
        play(&mut world, &[Action::Settle]);
        assert_eq!(world.verdicts, [1, 0, 0], "late: {late}");
        assert_eq!(world.fences, [Step::Drain], "one drain is requested, late: {late}");
    }
}

#[test]
fn batch_leaves_a_mapping_by_one_replace_where_a_second_table_exists() {
    let replaces = DomainCaps { replace: true, ..DomainCaps::new(1 << 20, 1 << 30) };
    let mut world = world_of(Hitless::Off, replaces, Steps::all());
    play(&mut world, &[ADD, Action::Settle]);
    convert(&mut world, 10, PageState::Private, 15);
    assert_eq!((mappings(&world), calls(&world)), (17, [1, 0, 1]), "sixteen holes in one mapping");
    assert!((0..16).all(|n| !reaches(&world, 10 + 2 * n) && reaches(&world, 11 + 2 * n)));
    // Few pages leave by a split.
    convert(&mut world, 200, PageState::Private, 3);
    assert_eq!(calls(&world)[2], 1);
}

#[test]
fn failed_replace_is_settled_by_an_unmap_of_the_whole_mapping() {
    let replaces = DomainCaps { replace: true, ..DomainCaps::new(1 << 20, 1 << 30) };
    let mut world = world_of(Hitless::Off, replaces, Steps::all());
    world.model.clean = false;
    play(&mut world, &[ADD, Action::Settle]);
    world.executor.buses[0].sim.fail_next(Call::Replace, Fault::Errno(Errno::IO));
    convert(&mut world, 10, PageState::Private, 15);
    assert_eq!((world.verdicts, calls(&world)[1..].to_vec()), ([1, 0, 0], vec![1, 1]));
    assert!((0..16).all(|n| !reaches(&world, 10 + 2 * n) && reaches(&world, 11 + 2 * n)));
}

#[test]
fn quiet_fragments_are_merged_into_one_mapping() {
    for (hitless, cut, large) in [
        (Hitless::Off, false, 1),
        (Hitless::Off, true, 1),
        (Hitless::Prefer, true, 5),
        (Hitless::Require, true, 5),
    ] {
        let mut world =
            world_of(hitless, DomainCaps { cut, ..DomainCaps::new(1 << 20, 1 << 30) }, Steps::DRAIN);
        play(&mut world, &[ADD, Action::Settle]);
        for page in [100, 300] {
            convert(&mut world, page, PageState::Private, 0);
        }
        play(&mut world, &[Action::Quiet, Action::Quiet, Action::Quiet, Action::Settle]);
        assert_eq!(mappings(&world), 3, "{hitless:?}, cut: {cut}: no merge while pages of it are private");
        for page in [100, 300] {
            convert(&mut world, page, PageState::Shared, 0);
        }
        assert_eq!(mappings(&world), 5, "{hitless:?}, cut: {cut}");
        play(&mut world, &[Action::Quiet, Action::Settle]);
        assert_eq!(mappings(&world), 5, "{hitless:?}, cut: {cut}: no merge after one tick");
        play(&mut world, &[Action::Quiet, Action::Settle]);
        assert_eq!(mappings(&world), large, "{hitless:?}, cut: {cut}");
        assert!((0..512).all(|page| reaches(&world, page)));
        assert_eq!(world.fences, []);
    }
}

#[test]
fn device_is_paused_for_a_merge() {
    let mut world = world_of(Hitless::Prefer, DomainCaps::new(600, 1 << 30), Steps::DRAIN);
    play(&mut world, &[ADD, Action::Settle]);
    convert(&mut world, 100, PageState::Private, 0);
    convert(&mut world, 100, PageState::Shared, 0);
    assert_eq!((mappings(&world), world.fences.len()), (257, 1));
    play(&mut world, &[Action::Quiet, Action::Quiet]);
    assert_eq!((calls(&world)[1], world.fences.len()), (1, 2), "the pause comes first");
    play(&mut world, &[Action::Settle]);
    assert_eq!((mappings(&world), calls(&world)[1]), (256, 2));
    assert!((0..512).all(|page| reaches(&world, page)));
}

#[test]
fn nothing_is_merged_while_anything_is_in_progress() {
    let mut world = world_of(Hitless::Off, DomainCaps::new(1 << 20, 1 << 30), Steps::DRAIN);
    play(&mut world, &[ADD, Action::Settle]);
    convert(&mut world, 100, PageState::Private, 0);
    convert(&mut world, 100, PageState::Shared, 0);
    let quiet = [Action::Quiet, Action::Quiet, Action::Quiet];
    // One invalidation is granted and not ended; then another waits for its unmap.
    play(&mut world, &[begin(50, PageState::Private, 0), Action::Settle]);
    let before = calls(&world);
    play(&mut world, &quiet);
    play(&mut world, &[begin(200, PageState::Private, 0)]);
    play(&mut world, &quiet);
    play(&mut world, &[Action::Settle]);
    assert_eq!(calls(&world)[1], before[1] + 1, "only the unmap of the second begin");
}

#[test]
fn begin_during_a_merge_waits_for_it_and_is_granted() {
    let mut world = world_of(Hitless::Off, DomainCaps::new(1 << 20, 1 << 30), Steps::DRAIN);
    play(&mut world, &[ADD, Action::Settle]);
    convert(&mut world, 100, PageState::Private, 0);
    convert(&mut world, 100, PageState::Shared, 0);
    play(&mut world, &[Action::Quiet, Action::Quiet]);
    assert_eq!(world.executor.tasks.len(), 1, "the merge is in progress: {:?}", world.executor.tasks);
    play(&mut world, &[begin(7, PageState::Private, 0), Action::Settle, END, Action::Settle]);
    assert_eq!((world.verdicts, mappings(&world)), ([3, 0, 0], 2));
    assert!(!reaches(&world, 7) && reaches(&world, 8) && reaches(&world, 100));
}

#[test]
fn repeatedly_split_mapping_is_mapped_page_by_page_until_quiet() {
    let mut world = world_of(Hitless::Off, DomainCaps::new(1 << 20, 1 << 30), Steps::DRAIN);
    play(&mut world, &[ADD, Action::Settle]);
    for page in (100..200).step_by(20) {
        convert(&mut world, page, PageState::Private, 0);
    }
    assert!(mappings(&world) > 300, "{} mappings", mappings(&world));
    let before = calls(&world);
    convert(&mut world, 333, PageState::Private, 0);
    assert_eq!(calls(&world), [before[0], before[1] + 1, 0], "nothing had to be mapped again");
    for page in (100..200).step_by(20).chain([333]) {
        convert(&mut world, page, PageState::Shared, 0);
    }
    play(&mut world, &[Action::Quiet, Action::Quiet, Action::Quiet, Action::Settle]);
    assert_eq!(mappings(&world), 1);
}

#[test]
fn conversion_beyond_the_mapping_budget_is_refused_before_anything_changes() {
    // One mapping at the start; each page that leaves it adds one.
    let mut world =
        world_of(Hitless::Off, DomainCaps { cut: true, ..DomainCaps::new(5, 1 << 30) }, Steps::DRAIN);
    play(&mut world, &[ADD, Action::Settle]);
    for page in [10, 20] {
        convert(&mut world, page, PageState::Private, 0);
    }
    assert_eq!((mappings(&world), world.verdicts), (3, [2, 0, 0]));
    let before = calls(&world);
    convert(&mut world, 30, PageState::Private, 0);
    assert_eq!((mappings(&world), world.verdicts, calls(&world)), (3, [2, 0, 0], before), "refused");
    // A conversion that needs no more mappings than there are is granted.
    convert(&mut world, 10, PageState::Shared, 0);
    assert_eq!((mappings(&world), world.verdicts), (4, [3, 0, 0]));
    let status = world.gate.snapshot().mappings[0];
    assert_eq!((status.used, status.reserved, status.worst, status.limit), (4, 0, 256, 5));
}

#[test]
fn conversion_during_a_map_reserves_the_mappings_of_its_cut() {
    for (room, verdicts) in [(2, [0, 0, 0]), (4, [1, 0, 0])] {
        let mut world =
            world_of(Hitless::Off, DomainCaps { cut: true, ..DomainCaps::new(room, 1 << 30) }, Steps::DRAIN);
        // The region's only mapping is being made.
        play(&mut world, &[ADD, begin(10, PageState::Private, 0), Action::Settle]);
        assert_eq!(world.verdicts, verdicts, "room for {room}");
        play(&mut world, &[END, Action::Settle]);
        let status = world.gate.snapshot().mappings[0];
        assert_eq!((status.used, status.reserved), (1 + verdicts[0], 0), "room for {room}");
    }
}

#[test]
fn cut_needs_mappings_for_both_ends_while_its_middle_is_mapped() {
    let mut world =
        world_of(Hitless::Off, DomainCaps { cut: true, ..DomainCaps::new(5, 1 << 30) }, Steps::DRAIN);
    play(&mut world, &[ADD, Action::Settle]);
    for to in [PageState::Private, PageState::Shared] {
        [10, 12].into_iter().for_each(|page| convert(&mut world, page, to, 0));
    }
    assert_eq!(
        (mappings(&world), world.verdicts),
        (5, [4, 0, 0]),
        "five mappings in a row, of which three are single pages"
    );
    // The single pages and one more page on either side: fewer mappings in the end, but two more until the unmap returns.
    let (to, deadline_ns) = (PageState::Private, 7000);
    let (client, region, page, pages, passgate, batch) = (0, 0, 9, 5, false, 0);
    play(&mut world, &[Action::Begin { client, region, page, pages, to, passgate, deadline_ns, batch }]);
    let status = world.gate.snapshot().mappings[0];
    assert!(status.used <= status.limit, "{status:?}");
    play(&mut world, &[Action::Settle]);
    assert_eq!((mappings(&world), world.verdicts), (5, [4, 0, 0]), "refused");
}

#[test]
fn batch_is_one_invalidation_and_neighbours_are_unmapped_by_one_call() {
    let mut world =
        world_of(Hitless::Off, DomainCaps { cut: true, ..DomainCaps::new(1 << 20, 1 << 30) }, Steps::DRAIN);
    play(&mut world, &[ADD, Action::Settle]);
    // Every other page: one call for each, but one verdict and one end.
    convert(&mut world, 0, PageState::Private, 15);
    assert_eq!((world.verdicts, calls(&world)), ([1, 0, 0], [1, 16, 0]));
    // The pages between are neighbours once the gaps are counted in: one call unmaps them all.
    convert(&mut world, 1, PageState::Private, 14);
    assert_eq!((world.verdicts, calls(&world)), ([2, 0, 0], [1, 17, 0]));
    assert!((0..30).all(|page| !reaches(&world, page)) && reaches(&world, 31));
}

#[test]
fn number_of_excluded_ranges_is_limited() {
    let mut world =
        world_of(Hitless::Off, DomainCaps { cut: true, ..DomainCaps::new(1 << 40, 1 << 30) }, Steps::DRAIN);
    world.model.clean = false;
    let handle = |world: &mut World, event| {
        let mut effects = Vec::new();
        world.gate.handle(event, &mut effects);
        effects
    };
    let caller = |cookie| Caller { client: ClientId(1), door: Door::Channel, cookie };
    let range = |page, pages| PageRange::new(page * PAGE, pages * PAGE).unwrap();
    let spec = RegionSpec {
        gpa: range(0, 1 << 20),
        backing: Backing { file: FileId { device: 7, inode: 7 }, offset: Offset(0) },
        writable: true,
        piece: 0,
        page: PAGE,
        initial: PageState::Private,
    };
    handle(&mut world, Event::AddRegion { caller: caller(0), spec });
    let begin = |world: &mut World, nth: u64, count: u64| {
        let ranges: Vec<_> = (0..count).map(|n| range((nth * 4096 + n) * 2, 1)).collect();
        let (to, performer) = (PageState::Private, Performer::Client);
        let ranges = Ranges::try_from(ranges).unwrap();
        handle(world, Event::Begin { caller: caller(nth), ranges, to, performer, deadline_ns: 1000 })
    };
    for nth in 0..16 {
        let granted = begin(&mut world, nth, 4096);
        assert!(matches!(granted[..], [Effect::Answer { answer: Answer::Verdict { .. }, .. }]), "{nth}");
    }
    let refused = begin(&mut world, 17, 1);
    let [Effect::Answer { answer: Answer::Refused(refusal), .. }] = &refused[..] else {
        panic!("{refused:?}")
    };
    assert!(
        refusal.to_string().contains("65537 excluded ranges, the limit is 65536: end conversions"),
        "{refusal}"
    );
}
