//! Large mappings: how pages leave them, in each way, and how they become large again.

use passgate::gate::{
    Able, Answer, Backing, Caller, ClientId, Door, Effect, Event, FileId, Hitless, OnStuckDma, Outcome,
    PageState, Performer, Policy, Ranges, RegionSpec, Step,
};
use passgate_backends::iommu::sim::{Call, Fault};
use passgate_backends::{Nature, StopClass};
use passgate_bindings::units::Offset;
use passgate_bindings::{Iova, PAGE, PageRange};
use rustix::io::Errno;

use crate::action::{AUTO, Action};
use crate::saboteur::Plant;
use crate::world::{Setup, World, able};

/// 512 pages from the file's start.
const ADD: Action = Action::Add {
    client: 0,
    gpa: 512,
    pages: 512,
    file: 0,
    offset: 0,
    piece: AUTO,
    initial: PageState::Shared,
    writable: true,
};
const END: Action = Action::End { granted: 0, outcome: Outcome::Committed, stranger: false };

fn world_of(hitless: Hitless, able: Able, class: StopClass) -> World {
    let policy = Policy { hitless, on_stuck_dma: OnStuckDma::Refuse, ..Policy::default() };
    let domains = vec![(able, vec![(class, Nature::default())])];
    let setup = Setup { policy, domains, tolerant: false, seeds: Vec::new(), clean: true };
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

/// Begin and end of one page (or a batch), with every call made.
fn convert(world: &mut World, page: u16, to: PageState, batch: u8) {
    play(world, &[begin(page, to, batch), Action::Settle, END, Action::Settle]);
}

fn calls(world: &World) -> [u64; 3] {
    [Call::Map, Call::Unmap, Call::Replace].map(|call| world.hands.buses[0].sim.calls(call))
}

fn mappings(world: &World) -> u64 {
    let sim = world.hands.buses[0].sim.mapping_count();
    assert_eq!(world.gate.snapshot().mappings[0].used, sim, "the ledger counts what there is");
    sim
}

fn sees(world: &World, page: u64) -> bool {
    world.hands.buses[0].sim.dma(Iova((512 + page) * PAGE)).is_some()
}

#[test]
fn a_page_is_cut_out_and_nothing_else_is_touched() {
    let cuts = Able { cut: true, ..able(1 << 20, 1 << 30) };
    for hitless in [Hitless::Require, Hitless::Prefer, Hitless::Off] {
        let mut world = world_of(hitless, cuts, StopClass::DETACH);
        play(&mut world, &[ADD, Action::Settle]);
        assert_eq!((mappings(&world), calls(&world)), (1, [1, 0, 0]), "{hitless:?}");
        convert(&mut world, 100, PageState::Private, 0);
        assert_eq!((mappings(&world), calls(&world)), (2, [1, 1, 0]), "{hitless:?}: no map but the first");
        assert!(sees(&world, 99) && !sees(&world, 100) && sees(&world, 101));
        assert_eq!(world.fences, []);
        convert(&mut world, 100, PageState::Shared, 0);
        assert_eq!((mappings(&world), calls(&world)), (3, [2, 1, 0]), "{hitless:?}");
    }
}

#[test]
fn what_cannot_be_cut_is_mapped_page_by_page_where_no_window_is_allowed() {
    for (hitless, class) in [
        (Hitless::Require, StopClass::all()),
        // Nothing pauses it, and it bears no fault.
        (Hitless::Prefer, StopClass::DETACH | StopClass::RESET),
    ] {
        let mut world = world_of(hitless, able(1 << 20, 1 << 30), class);
        play(&mut world, &[ADD, Action::Settle]);
        assert_eq!(mappings(&world), 512, "{hitless:?}");
        convert(&mut world, 100, PageState::Private, 0);
        assert_eq!((mappings(&world), world.fences.len()), (511, 0), "{hitless:?}");
        // Where it is to be mapped in larger pieces all the same, or there is no room, it is refused at once.
        for (able, piece) in [(able(1 << 20, 1 << 30), 9), (able(500, 1 << 30), AUTO)] {
            let mut world = world_of(hitless, able, class);
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
fn where_windows_do_not_matter_the_mapping_goes_and_the_rest_comes_back() {
    let mut world = world_of(Hitless::Off, able(1 << 20, 1 << 30), StopClass::all());
    play(&mut world, &[ADD, Action::Settle]);
    assert_eq!(mappings(&world), 1);
    convert(&mut world, 100, PageState::Private, 0);
    assert_eq!((mappings(&world), calls(&world), world.fences.len()), (2, [3, 1, 0], 0));
    assert!(sees(&world, 99) && !sees(&world, 100) && sees(&world, 101));
}

#[test]
fn where_no_dma_may_be_lost_the_device_is_paused_until_the_rest_is_back() {
    let room = able(600, 1 << 30);
    let mut world = world_of(Hitless::Prefer, room, StopClass::DRAIN);
    play(&mut world, &[ADD, Action::Settle]);
    // Half of the room is for what conversions leave: so mappings of two pages and more.
    assert_eq!(mappings(&world), 256);
    play(&mut world, &[begin(100, PageState::Private, 0)]);
    assert_eq!((world.fences.clone(), calls(&world)), (vec![Step::Drain], [1, 0, 0]), "first the pause");
    let next = Action::Work { task: 0, deliver: true, fault: None };
    play(&mut world, std::slice::from_ref(&next));
    assert_eq!(world.verdicts, [0; 3], "then the unmap");
    play(&mut world, &[next]);
    assert_eq!((world.verdicts, calls(&world)), ([1, 0, 0], [1, 1, 0]));
    assert!(!sees(&world, 101), "it is paused still");
    play(&mut world, &[Action::Settle]);
    assert!(sees(&world, 101) && !sees(&world, 100), "and the rest is there when it comes back");
}

#[test]
fn a_pause_that_fails_or_takes_too_long_refuses_nobody() {
    for late in [false, true] {
        let mut world = world_of(Hitless::Prefer, able(600, 1 << 30), StopClass::DRAIN);
        world.model.clean = false;
        play(&mut world, &[ADD, Action::Settle]);
        play(&mut world, &[begin(100, PageState::Private, 0)]);
        if late {
            play(&mut world, &[Action::Hang { task: 0, done: false }, Action::Advance { ns: 1000 }]);
        } else {
            let fault = Some(Fault::Errno(Errno::IO));
            play(&mut world, &[Action::Work { task: 0, deliver: true, fault }]);
        }
        play(&mut world, &[Action::Settle]);
        assert_eq!(world.verdicts, [1, 0, 0], "late: {late}");
        assert_eq!(world.fences, [Step::Drain], "it is asked once, late: {late}");
    }
}

#[test]
fn many_pages_leave_by_one_replace_where_there_is_a_second_table() {
    let replaces = Able { replace: true, ..able(1 << 20, 1 << 30) };
    let mut world = world_of(Hitless::Off, replaces, StopClass::all());
    play(&mut world, &[ADD, Action::Settle]);
    convert(&mut world, 10, PageState::Private, 15);
    assert_eq!((mappings(&world), calls(&world)), (17, [1, 0, 1]), "sixteen holes in one mapping");
    assert!((0..16).all(|n| !sees(&world, 10 + 2 * n) && sees(&world, 11 + 2 * n)));
    // Few are split.
    convert(&mut world, 200, PageState::Private, 3);
    assert_eq!(calls(&world)[2], 1);
}

#[test]
fn a_replace_that_fails_leaves_the_whole_mapping_in_doubt_and_is_settled_by_its_unmap() {
    let replaces = Able { replace: true, ..able(1 << 20, 1 << 30) };
    let mut world = world_of(Hitless::Off, replaces, StopClass::all());
    world.model.clean = false;
    play(&mut world, &[ADD, Action::Settle]);
    world.hands.buses[0].sim.fail_next(Call::Replace, Fault::Errno(Errno::IO));
    convert(&mut world, 10, PageState::Private, 15);
    assert_eq!((world.verdicts, calls(&world)[1..].to_vec()), ([1, 0, 0], vec![1, 1]));
    assert!((0..16).all(|n| !sees(&world, 10 + 2 * n) && sees(&world, 11 + 2 * n)));
}

#[test]
fn what_was_quiet_for_a_while_is_one_mapping_again() {
    for (hitless, cut, large) in [
        (Hitless::Off, false, 1),
        (Hitless::Off, true, 1),
        (Hitless::Prefer, true, 5),
        (Hitless::Require, true, 5),
    ] {
        let mut world = world_of(hitless, Able { cut, ..able(1 << 20, 1 << 30) }, StopClass::DRAIN);
        play(&mut world, &[ADD, Action::Settle]);
        for page in [100, 300] {
            convert(&mut world, page, PageState::Private, 0);
        }
        play(&mut world, &[Action::Quiet, Action::Quiet, Action::Quiet, Action::Settle]);
        assert_eq!(mappings(&world), 3, "{hitless:?}, cut: {cut}: not while pages of it are private");
        for page in [100, 300] {
            convert(&mut world, page, PageState::Shared, 0);
        }
        assert_eq!(mappings(&world), 5, "{hitless:?}, cut: {cut}");
        play(&mut world, &[Action::Quiet, Action::Settle]);
        assert_eq!(mappings(&world), 5, "{hitless:?}, cut: {cut}: a moment is not enough");
        play(&mut world, &[Action::Quiet, Action::Settle]);
        assert_eq!(mappings(&world), large, "{hitless:?}, cut: {cut}");
        assert!((0..512).all(|page| sees(&world, page)));
        assert_eq!(world.fences, []);
    }
}

#[test]
fn where_no_dma_may_be_lost_the_device_is_paused_for_a_merge_too() {
    let mut world = world_of(Hitless::Prefer, able(600, 1 << 30), StopClass::DRAIN);
    play(&mut world, &[ADD, Action::Settle]);
    convert(&mut world, 100, PageState::Private, 0);
    convert(&mut world, 100, PageState::Shared, 0);
    assert_eq!((mappings(&world), world.fences.len()), (257, 1));
    play(&mut world, &[Action::Quiet, Action::Quiet]);
    assert_eq!((calls(&world)[1], world.fences.len()), (1, 2), "first the pause");
    play(&mut world, &[Action::Settle]);
    assert_eq!((mappings(&world), calls(&world)[1]), (256, 2));
    assert!((0..512).all(|page| sees(&world, page)));
}

#[test]
fn nothing_is_merged_while_anything_is_in_progress() {
    let mut world = world_of(Hitless::Off, able(1 << 20, 1 << 30), StopClass::DRAIN);
    play(&mut world, &[ADD, Action::Settle]);
    convert(&mut world, 100, PageState::Private, 0);
    convert(&mut world, 100, PageState::Shared, 0);
    let quiet = [Action::Quiet, Action::Quiet, Action::Quiet];
    // Granted and not ended; and asked, with its unmap under way.
    play(&mut world, &[begin(50, PageState::Private, 0), Action::Settle]);
    let before = calls(&world);
    play(&mut world, &quiet);
    play(&mut world, &[begin(200, PageState::Private, 0)]);
    play(&mut world, &quiet);
    play(&mut world, &[Action::Settle]);
    assert_eq!(calls(&world)[1], before[1] + 1, "one unmap: that of the second begin");
}

#[test]
fn a_begin_that_meets_a_merge_waits_for_it_and_is_granted() {
    let mut world = world_of(Hitless::Off, able(1 << 20, 1 << 30), StopClass::DRAIN);
    play(&mut world, &[ADD, Action::Settle]);
    convert(&mut world, 100, PageState::Private, 0);
    convert(&mut world, 100, PageState::Shared, 0);
    play(&mut world, &[Action::Quiet, Action::Quiet]);
    assert_eq!(world.hands.tasks.len(), 1, "the merge is under way: {:?}", world.hands.tasks);
    play(&mut world, &[begin(7, PageState::Private, 0), Action::Settle, END, Action::Settle]);
    assert_eq!((world.verdicts, mappings(&world)), ([3, 0, 0], 2));
    assert!(!sees(&world, 7) && sees(&world, 8) && sees(&world, 100));
}

#[test]
fn a_place_that_is_split_again_and_again_is_mapped_page_by_page_until_it_is_quiet() {
    let mut world = world_of(Hitless::Off, able(1 << 20, 1 << 30), StopClass::DRAIN);
    play(&mut world, &[ADD, Action::Settle]);
    for page in (100..200).step_by(20) {
        convert(&mut world, page, PageState::Private, 0);
    }
    assert!(mappings(&world) > 300, "{} mappings", mappings(&world));
    let before = calls(&world);
    convert(&mut world, 333, PageState::Private, 0);
    assert_eq!(calls(&world), [before[0], before[1] + 1, 0], "nothing had to come back");
    for page in (100..200).step_by(20).chain([333]) {
        convert(&mut world, page, PageState::Shared, 0);
    }
    play(&mut world, &[Action::Quiet, Action::Quiet, Action::Quiet, Action::Settle]);
    assert_eq!(mappings(&world), 1);
}

#[test]
fn a_conversion_for_which_there_is_no_room_is_refused_before_anything_changes() {
    // Three mappings at the start; each page that goes leaves one more.
    let mut world = world_of(Hitless::Off, Able { cut: true, ..able(5, 1 << 30) }, StopClass::DRAIN);
    play(&mut world, &[ADD, Action::Settle]);
    for page in [10, 20] {
        convert(&mut world, page, PageState::Private, 0);
    }
    assert_eq!((mappings(&world), world.verdicts), (3, [2, 0, 0]));
    let before = calls(&world);
    convert(&mut world, 30, PageState::Private, 0);
    assert_eq!((mappings(&world), world.verdicts, calls(&world)), (3, [2, 0, 0], before), "refused");
    // What needs no more than there is goes on.
    convert(&mut world, 10, PageState::Shared, 0);
    assert_eq!((mappings(&world), world.verdicts), (4, [3, 0, 0]));
    let status = world.gate.snapshot().mappings[0];
    assert_eq!((status.used, status.reserved, status.worst, status.limit), (4, 0, 256, 5));
}

#[test]
fn a_conversion_that_meets_a_map_in_flight_keeps_room_for_what_it_will_cut() {
    for (room, verdicts) in [(2, [0, 0, 0]), (4, [1, 0, 0])] {
        let mut world = world_of(Hitless::Off, Able { cut: true, ..able(room, 1 << 30) }, StopClass::DRAIN);
        // Its one mapping is being made.
        play(&mut world, &[ADD, begin(10, PageState::Private, 0), Action::Settle]);
        assert_eq!(world.verdicts, verdicts, "room for {room}");
        play(&mut world, &[END, Action::Settle]);
        let status = world.gate.snapshot().mappings[0];
        assert_eq!((status.used, status.reserved), (1 + verdicts[0], 0), "room for {room}");
    }
}

#[test]
fn a_cut_needs_room_for_its_ends_while_what_is_between_is_still_there() {
    let mut world = world_of(Hitless::Off, Able { cut: true, ..able(5, 1 << 30) }, StopClass::DRAIN);
    play(&mut world, &[ADD, Action::Settle]);
    for to in [PageState::Private, PageState::Shared] {
        [10, 12].into_iter().for_each(|page| convert(&mut world, page, to, 0));
    }
    assert_eq!((mappings(&world), world.verdicts), (5, [4, 0, 0]), "three pages by themselves");
    // They and one page more on either side: fewer mappings when it is over, two more until it is.
    let (to, deadline_ns) = (PageState::Private, 7000);
    let (client, region, page, pages, passgate, batch) = (0, 0, 9, 5, false, 0);
    play(&mut world, &[Action::Begin { client, region, page, pages, to, passgate, deadline_ns, batch }]);
    let status = world.gate.snapshot().mappings[0];
    assert!(status.used <= status.limit, "{status:?}");
    play(&mut world, &[Action::Settle]);
    assert_eq!((mappings(&world), world.verdicts), (5, [4, 0, 0]), "refused");
}

#[test]
fn a_batch_is_one_invalidation_whose_neighbours_go_by_one_call() {
    let mut world = world_of(Hitless::Off, Able { cut: true, ..able(1 << 20, 1 << 30) }, StopClass::DRAIN);
    play(&mut world, &[ADD, Action::Settle]);
    // Every other page: one call each, one verdict, one end.
    convert(&mut world, 0, PageState::Private, 15);
    assert_eq!((world.verdicts, calls(&world)), ([1, 0, 0], [1, 16, 0]));
    // The pages between, all neighbours of what is gone: one call takes them away, gaps and all.
    convert(&mut world, 1, PageState::Private, 14);
    assert_eq!((world.verdicts, calls(&world)), ([2, 0, 0], [1, 17, 0]));
    assert!((0..30).all(|page| !sees(&world, page)) && sees(&world, 31));
}

#[test]
fn as_many_ranges_are_held_as_there_is_room_for_in_the_ledger() {
    let mut world = world_of(Hitless::Off, Able { cut: true, ..able(1 << 40, 1 << 30) }, StopClass::DRAIN);
    world.model.clean = false;
    let tell = |world: &mut World, event| {
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
    tell(&mut world, Event::AddRegion { caller: caller(0), spec });
    let begin = |world: &mut World, nth: u64, count: u64| {
        let ranges: Vec<_> = (0..count).map(|n| range((nth * 4096 + n) * 2, 1)).collect();
        let (to, performer) = (PageState::Private, Performer::Client);
        let ranges = Ranges::try_from(ranges).unwrap();
        tell(world, Event::Begin { caller: caller(nth), ranges, to, performer, deadline_ns: 1000 })
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
        refusal.to_string().contains("65537 held ranges, the limit is 65536: end conversions"),
        "{refusal}"
    );
}
