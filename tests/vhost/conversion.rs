//! Guest memory that is converted and taken away while the drive works.

use std::sync::mpsc;
use std::time::Duration;

use passgate::client::{Answer, Channel, Outcome, PageState};
use passgate::gate::{OnStuckDma, Policy};
use passgate_backends::nvme::sim::{Does, When, opcode};
use passgate_bindings::{Gpa, PageRange};

use crate::guest::{DATA, Guest, IN, IOERR, OK, OUT, SIZE, UNTOUCHED};
use crate::world::{Setup, World};

/// Longer than anything here takes, short enough that a test which waits in vain ends.
const LONG: Duration = Duration::from_secs(20);
/// What does not come within that, does not come by itself.
const SHORT: Duration = Duration::from_millis(100);

fn pages(from: u64, count: u64) -> PageRange<Gpa> {
    PageRange::new(from, count * 4096).unwrap()
}

fn begin(channel: &mut Channel, range: PageRange<Gpa>, to: PageState) -> u64 {
    match channel.begin(range, to, Some(LONG.as_millis() as u32)).unwrap() {
        Answer::Granted { invalidation } => invalidation,
        other => panic!("{other:?}"),
    }
}

fn convert(channel: &mut Channel, range: PageRange<Gpa>, to: PageState) {
    let invalidation = begin(channel, range, to);
    channel.end(invalidation, Outcome::Committed).unwrap();
}

/// The data commands that the controller has taken.
fn moved(world: &World) -> usize {
    let data = |opcode: u8| matches!(opcode, opcode::READ | opcode::WRITE);
    world.sim.history().iter().filter(|taken| taken.queue > 0 && data(taken.opcode)).count()
}

#[test]
fn memory_that_is_private_is_an_error_and_no_dma() {
    let mut world = World::new();
    let (mut guest, mut channel) = (world.guest(), world.channel());
    convert(&mut channel, pages(DATA + 4096, 1), PageState::Private);
    let before = moved(&world);
    assert_eq!(guest.ask(0, IN, 0, &[(DATA, 12288)]), IOERR);
    assert_eq!(guest.ask(0, OUT, 0, &[(DATA + 4096, 512)]), IOERR);
    assert_eq!(moved(&world), before, "no command was given");
    assert_eq!(guest.ask(0, IN, 0, &[(DATA, 4096), (DATA + 8192, 4096)]), OK, "its neighbours are open");
    convert(&mut channel, pages(DATA + 4096, 1), PageState::Shared);
    assert_eq!(guest.ask(0, IN, 0, &[(DATA, 12288)]), OK);
}

#[test]
fn a_request_between_begin_and_end_is_held_until_it_is_known_what_its_pages_are() {
    let mut world = World::new();
    let (mut guest, mut channel) = (world.guest(), world.channel());
    for (outcome, status) in [(Outcome::NotCommitted, OK), (Outcome::Committed, IOERR)] {
        let open = begin(&mut channel, pages(DATA, 1), PageState::Private);
        let before = moved(&world);
        guest.request(0, 0, IN, 0, &[(DATA, 4096)]);
        guest.kick(0);
        assert_eq!(guest.used_within(0, 1, SHORT), [], "held");
        assert_eq!((guest.status(0, 0), moved(&world)), (UNTOUCHED, before));
        assert_eq!(guest.ask(1, IN, 0, &[(DATA + 8192, 4096)]), OK, "others go on");
        channel.end(open, outcome).unwrap();
        guest.await_used(0, 1);
        assert_eq!(guest.status(0, 0), status, "{outcome:?}");
    }
}

/// Begins in a thread of its own; what the answer is, and when.
fn begin_aside(mut channel: Channel, range: PageRange<Gpa>) -> mpsc::Receiver<(Channel, Answer)> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let answer = channel.begin(range, PageState::Private, Some(LONG.as_millis() as u32)).unwrap();
        let _ = sender.send((channel, answer));
    });
    receiver
}

fn fly(world: &World, guest: &mut Guest, data: u64) {
    let held = world.sim.held();
    world.sim.fault(When::io(opcode::READ).times(1), Does::HoldData);
    guest.request(0, 0, IN, 0, &[(data, 8192)]);
    guest.kick(0);
    assert!(world.sim.await_held(held + 1, LONG));
}

#[test]
fn pages_are_given_only_once_what_is_in_flight_over_them_has_ended() {
    let mut world = World::new();
    let mut guest = world.guest();
    fly(&world, &mut guest, DATA);
    // A page that it does not touch, in the same large mapping: at once.
    let mut channel = world.channel();
    convert(&mut channel, pages(DATA + 8192, 1), PageState::Private);
    let answer = begin_aside(channel, pages(DATA + 4096, 1));
    assert!(answer.recv_timeout(SHORT).is_err(), "it is in flight");
    assert_eq!(guest.used(0), [], "and nothing has made it end");
    assert_eq!(world.sim.release(), 1);
    let (_, answer) = answer.recv_timeout(LONG).unwrap();
    assert!(matches!(answer, Answer::Granted { .. }), "{answer:?}");
    guest.await_used(0, 1);
    assert_eq!(guest.status(0, 0), OK, "it has moved before its pages went");
    assert_eq!(world.sim.dma_faults(), 0);
}

#[test]
fn a_window_over_shared_memory_fails_nothing() {
    // Mappings that cannot be cut are taken away whole for a moment, with the drive paused.
    let mut world = World::with(Setup { cut: false, ..Setup::default() });
    let (mut guest, mut channel) = (world.guest(), world.channel());
    let victim = DATA + 0x40_0000;
    let converting = std::thread::spawn(move || {
        for _ in 0..50 {
            convert(&mut channel, pages(victim, 1), PageState::Private);
            convert(&mut channel, pages(victim, 1), PageState::Shared);
        }
    });
    let mut rounds = 0;
    while !converting.is_finished() || rounds < 50 {
        for ring in 0..2 {
            let kind = if rounds % 2 == 0 { OUT } else { IN };
            assert_eq!(guest.ask(ring, kind, rounds % 64, &[(DATA + 512 * (rounds % 32), 16384)]), OK);
        }
        rounds += 1;
    }
    converting.join().unwrap();
    assert_eq!(world.sim.dma_faults(), 0);
}

#[test]
fn dma_that_does_not_end_is_fenced_where_that_is_allowed_and_refused_where_not() {
    for (on_stuck_dma, granted) in [(OnStuckDma::Refuse, false), (OnStuckDma::Fence, true)] {
        let policy = Policy { on_stuck_dma, ..Policy::default() };
        let mut world = World::with(Setup { policy, deadline: Duration::from_secs(60), ..Setup::default() });
        let (mut guest, mut channel) = (world.guest(), world.channel());
        fly(&world, &mut guest, DATA);
        let begun = std::time::Instant::now();
        // A seventh of it is left for the answer to travel.
        let deadline = Duration::from_secs(5);
        let asked = Some(deadline.as_millis() as u32);
        let answer = channel.begin(pages(DATA, 1), PageState::Private, asked).unwrap();
        assert!(begun.elapsed() < deadline, "{:?}", begun.elapsed());
        assert_eq!(matches!(answer, Answer::Granted { .. }), granted, "{answer:?}");
        assert_eq!(guest.used(0), [], "the request itself has not ended");
        match answer {
            Answer::Granted { invalidation } => {
                // Its page is not what it was: the request fails, and the drive serves all others again.
                channel.end(invalidation, Outcome::Committed).unwrap();
                guest.await_used(0, 1);
                assert_eq!(guest.status(0, 0), IOERR);
                assert_eq!(guest.ask(1, IN, 0, &[(DATA + 8192, 4096)]), OK);
            }
            _ => {
                world.sim.release();
                guest.await_used(0, 1);
                assert_eq!(guest.status(0, 0), OK);
            }
        }
        world.sim.behave();
    }
}

#[test]
fn a_region_that_is_removed_is_given_back_once_nothing_is_in_flight() {
    let world = World::new();
    let mut guest = Guest::connect(&world.path(), 2);
    guest.greet().unwrap();
    let (low, high) = (guest.part(0, SIZE / 2), guest.part(SIZE / 2, SIZE / 2));
    use vhost::VhostBackend;
    use vhost::vhost_user::VhostUserFrontend;
    guest.frontend.set_mem_table(&[low, high]).unwrap();
    (0..2).for_each(|ring| guest.start_ring(ring).unwrap());
    let data = SIZE / 2 + 0x1000;
    assert_eq!(guest.ask(0, IN, 0, &[(data, 4096)]), OK);
    fly(&world, &mut guest, data);
    let (sim, (sender, released)) = (&world.sim, mpsc::channel());
    std::thread::scope(|scope| {
        scope.spawn(move || {
            // Long enough that a removal which does not wait would be over.
            std::thread::sleep(SHORT);
            // Said before it is so: the removal may be answered before this thread comes to say more.
            sender.send(()).unwrap();
            assert_eq!(sim.release(), 1);
        });
        guest.frontend.remove_mem_region(&high).unwrap();
        assert_eq!(released.try_recv(), Ok(()), "the removal was answered while its memory was in flight");
    });
    assert_eq!(world.control().status().unwrap().regions.len(), 1);
    guest.await_used(0, 1);
    assert_eq!(guest.status(0, 0), OK);
    assert_eq!(guest.ask(0, IN, 0, &[(data, 4096)]), IOERR, "it is a hole now");
    assert_eq!(guest.ask(0, IN, 0, &[(DATA, 4096)]), OK);
    guest.frontend.add_mem_region(&high).unwrap();
    assert_eq!(guest.ask(1, IN, 0, &[(data, 4096)]), OK);
}

#[test]
fn a_removal_hears_no_no_and_is_never_answered_falsely() {
    let world = World::with(Setup { deadline: Duration::from_secs(60), ..Setup::default() });
    let mut guest = Guest::connect(&world.path(), 2);
    guest.greet().unwrap();
    let (low, high) = (guest.part(0, SIZE / 2), guest.part(SIZE / 2, SIZE / 2));
    use vhost::VhostBackend;
    use vhost::vhost_user::VhostUserFrontend;
    guest.frontend.set_mem_table(&[low, high]).unwrap();
    (0..2).for_each(|ring| guest.start_ring(ring).unwrap());
    fly(&world, &mut guest, SIZE / 2);
    let enabled = world.sim.enabled();
    // A command that never ends: the drive is fenced by more than a drain, although nobody allowed that to others.
    guest.frontend.remove_mem_region(&high).unwrap();
    guest.await_used(0, 1);
    assert_eq!(guest.status(0, 0), IOERR);
    assert_eq!(guest.ask(1, IN, 0, &[(DATA, 4096)]), OK, "the drive is back");
    assert!(world.sim.enabled() > enabled, "it was brought up anew");
    assert_eq!(world.sim.dma_faults(), 0);
}
