//! Conversions and removals of guest memory while the drive uses it.

use std::sync::mpsc;
use std::time::Duration;

use passgate::gate::{OnStuckDma, Policy};
use passgate_bindings::{Gpa, PageRange};
use passgate_client::{Answer, Channel, Outcome, PageState};
use passgate_sim::nvme::{CommandFilter, FaultAction, opcode};

use crate::guest::{DATA_GPA, Guest, IN, IOERR, MEMORY_BYTES, OK, OUT, UNTOUCHED};
use crate::world::{Setup, World};

/// The longest time that a test waits.
const TIMEOUT: Duration = Duration::from_secs(20);
/// The time within which nothing must happen by itself.
const QUIET_TIME: Duration = Duration::from_millis(100);

fn pages(from: u64, count: u64) -> PageRange<Gpa> {
    PageRange::new(from, count * 4096).unwrap()
}

fn begin(channel: &mut Channel, range: PageRange<Gpa>, to: PageState) -> u64 {
    match channel.begin(range, to, Some(TIMEOUT.as_millis() as u32)).unwrap() {
        Answer::Granted { invalidation } => invalidation,
        other => panic!("{other:?}"),
    }
}

fn convert(channel: &mut Channel, range: PageRange<Gpa>, to: PageState) {
    let invalidation = begin(channel, range, to);
    channel.end(invalidation, Outcome::Committed).unwrap();
}

/// Returns the number of data commands that the controller has taken.
fn data_commands(world: &World) -> usize {
    let data = |opcode: u8| matches!(opcode, opcode::READ | opcode::WRITE);
    world.sim.history().iter().filter(|taken| taken.queue > 0 && data(taken.opcode)).count()
}

#[test]
fn request_to_private_memory_fails_without_dma() {
    let mut world = World::new();
    let (mut guest, mut channel) = (world.guest(), world.channel());
    convert(&mut channel, pages(DATA_GPA + 4096, 1), PageState::Private);
    let before = data_commands(&world);
    assert_eq!(guest.run_request(0, IN, 0, &[(DATA_GPA, 12288)]), IOERR);
    assert_eq!(guest.run_request(0, OUT, 0, &[(DATA_GPA + 4096, 512)]), IOERR);
    assert_eq!(data_commands(&world), before, "a command was submitted to the drive");
    assert_eq!(
        guest.run_request(0, IN, 0, &[(DATA_GPA, 4096), (DATA_GPA + 8192, 4096)]),
        OK,
        "its neighbours must be accessible"
    );
    convert(&mut channel, pages(DATA_GPA + 4096, 1), PageState::Shared);
    assert_eq!(guest.run_request(0, IN, 0, &[(DATA_GPA, 12288)]), OK);
}

#[test]
fn request_during_conversion_waits_for_its_end() {
    let mut world = World::new();
    let (mut guest, mut channel) = (world.guest(), world.channel());
    for (outcome, status) in [(Outcome::NotCommitted, OK), (Outcome::Committed, IOERR)] {
        let open = begin(&mut channel, pages(DATA_GPA, 1), PageState::Private);
        let before = data_commands(&world);
        guest.request(0, 0, IN, 0, &[(DATA_GPA, 4096)]);
        guest.kick(0);
        assert_eq!(guest.used_within(0, 1, QUIET_TIME), [], "the request must be held");
        assert_eq!((guest.status(0, 0), data_commands(&world)), (UNTOUCHED, before));
        assert_eq!(
            guest.run_request(1, IN, 0, &[(DATA_GPA + 8192, 4096)]),
            OK,
            "other requests must be served"
        );
        channel.end(open, outcome).unwrap();
        guest.await_used(0, 1);
        assert_eq!(guest.status(0, 0), status, "{outcome:?}");
    }
}

/// Begins on a thread of its own; the receiver gets the channel and the answer.
fn begin_in_thread(mut channel: Channel, range: PageRange<Gpa>) -> mpsc::Receiver<(Channel, Answer)> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let answer = channel.begin(range, PageState::Private, Some(TIMEOUT.as_millis() as u32)).unwrap();
        let _ = sender.send((channel, answer));
    });
    receiver
}

/// Starts a read of 8 KiB whose data transfer the drive holds.
fn start_held_read(world: &World, guest: &mut Guest, data: u64) {
    let held = world.sim.stalled_commands();
    world.sim.fault(CommandFilter::io(opcode::READ).times(1), FaultAction::StallData);
    guest.request(0, 0, IN, 0, &[(data, 8192)]);
    guest.kick(0);
    assert!(world.sim.await_stalled(held + 1, TIMEOUT));
}

#[test]
fn grant_waits_for_in_flight_dma() {
    let mut world = World::new();
    let mut guest = world.guest();
    start_held_read(&world, &mut guest, DATA_GPA);
    // A page of the same large mapping that the read does not touch is granted at once.
    let mut channel = world.channel();
    convert(&mut channel, pages(DATA_GPA + 8192, 1), PageState::Private);
    let answer = begin_in_thread(channel, pages(DATA_GPA + 4096, 1));
    assert!(answer.recv_timeout(QUIET_TIME).is_err(), "the grant must wait for the read in flight");
    assert_eq!(guest.used(0), [], "the read must not have been ended");
    assert_eq!(world.sim.release(), 1);
    let (_, answer) = answer.recv_timeout(TIMEOUT).unwrap();
    assert!(matches!(answer, Answer::Granted { .. }), "{answer:?}");
    guest.await_used(0, 1);
    assert_eq!(guest.status(0, 0), OK, "the read must have completed before the grant");
    assert_eq!(world.sim.dma_faults(), 0);
}

#[test]
fn dma_gap_over_shared_memory_fails_no_request() {
    // Mappings that cannot be cut are unmapped as a whole for a short time (a DMA gap), with the drive paused.
    let mut world = World::with(Setup { cut: false, ..Setup::default() });
    let (mut guest, mut channel) = (world.guest(), world.channel());
    let victim = DATA_GPA + 0x40_0000;
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
            assert_eq!(
                guest.run_request(ring, kind, rounds % 64, &[(DATA_GPA + 512 * (rounds % 32), 16384)]),
                OK
            );
        }
        rounds += 1;
    }
    converting.join().unwrap();
    assert_eq!(world.sim.dma_faults(), 0);
}

#[test]
fn stuck_dma_is_fenced_or_refused_by_policy() {
    for (on_stuck_dma, granted) in [(OnStuckDma::Refuse, false), (OnStuckDma::Fence, true)] {
        let policy = Policy { on_stuck_dma, ..Policy::default() };
        let mut world = World::with(Setup { policy, deadline: Duration::from_secs(60), ..Setup::default() });
        let (mut guest, mut channel) = (world.guest(), world.channel());
        start_held_read(&world, &mut guest, DATA_GPA);
        let begun = std::time::Instant::now();
        // The answer is sent when a seventh of the deadline remains.
        let deadline = Duration::from_secs(5);
        let asked = Some(deadline.as_millis() as u32);
        let answer = channel.begin(pages(DATA_GPA, 1), PageState::Private, asked).unwrap();
        assert!(begun.elapsed() < deadline, "{:?}", begun.elapsed());
        assert_eq!(matches!(answer, Answer::Granted { .. }), granted, "{answer:?}");
        assert_eq!(guest.used(0), [], "the request itself must not have ended");
        match answer {
            Answer::Granted { invalidation } => {
                // Its page was converted: the request fails, and the drive serves the others again.
                channel.end(invalidation, Outcome::Committed).unwrap();
                guest.await_used(0, 1);
                assert_eq!(guest.status(0, 0), IOERR);
                assert_eq!(guest.run_request(1, IN, 0, &[(DATA_GPA + 8192, 4096)]), OK);
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
fn region_removal_waits_for_in_flight_dma() {
    let world = World::new();
    let mut guest = Guest::connect(&world.socket_path(), 2);
    guest.negotiate().unwrap();
    let (low, high) =
        (guest.region_of(0, MEMORY_BYTES / 2), guest.region_of(MEMORY_BYTES / 2, MEMORY_BYTES / 2));
    use vhost::VhostBackend;
    use vhost::vhost_user::VhostUserFrontend;
    guest.frontend.set_mem_table(&[low, high]).unwrap();
    (0..2).for_each(|ring| guest.start_ring(ring).unwrap());
    let data = MEMORY_BYTES / 2 + 0x1000;
    assert_eq!(guest.run_request(0, IN, 0, &[(data, 4096)]), OK);
    start_held_read(&world, &mut guest, data);
    let (sim, (sender, release_started)) = (&world.sim, mpsc::channel());
    std::thread::scope(|scope| {
        scope.spawn(move || {
            // Long enough that a removal that does not wait would have ended.
            std::thread::sleep(QUIET_TIME);
            // Sent before the data moves, because the removal may be answered before this thread runs again.
            sender.send(()).unwrap();
            assert_eq!(sim.release(), 1);
        });
        guest.frontend.remove_mem_region(&high).unwrap();
        assert_eq!(
            release_started.try_recv(),
            Ok(()),
            "the removal was answered while its memory was in flight"
        );
    });
    assert_eq!(world.control().status().unwrap().regions.len(), 1);
    guest.await_used(0, 1);
    assert_eq!(guest.status(0, 0), OK);
    assert_eq!(guest.run_request(0, IN, 0, &[(data, 4096)]), IOERR, "the removed region must be a hole");
    assert_eq!(guest.run_request(0, IN, 0, &[(DATA_GPA, 4096)]), OK);
    guest.frontend.add_mem_region(&high).unwrap();
    assert_eq!(guest.run_request(1, IN, 0, &[(data, 4096)]), OK);
}

#[test]
fn region_removal_fences_stuck_drive() {
    let world = World::with(Setup { deadline: Duration::from_secs(60), ..Setup::default() });
    let mut guest = Guest::connect(&world.socket_path(), 2);
    guest.negotiate().unwrap();
    let (low, high) =
        (guest.region_of(0, MEMORY_BYTES / 2), guest.region_of(MEMORY_BYTES / 2, MEMORY_BYTES / 2));
    use vhost::VhostBackend;
    use vhost::vhost_user::VhostUserFrontend;
    guest.frontend.set_mem_table(&[low, high]).unwrap();
    (0..2).for_each(|ring| guest.start_ring(ring).unwrap());
    start_held_read(&world, &mut guest, MEMORY_BYTES / 2);
    let enabled = world.sim.enabled();
    // The command never ends: the drive is fenced by more than a drain, although the policy allows that for no other client.
    guest.frontend.remove_mem_region(&high).unwrap();
    guest.await_used(0, 1);
    assert_eq!(guest.status(0, 0), IOERR);
    assert_eq!(guest.run_request(1, IN, 0, &[(DATA_GPA, 4096)]), OK, "the drive must serve again");
    assert!(world.sim.enabled() > enabled, "the controller must have been reset");
    assert_eq!(world.sim.dma_faults(), 0);
}
