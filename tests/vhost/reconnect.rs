//! Front-ends that go and come back, and a back-end that does.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use passgate::client::{Answer, Outcome, PageState};
use passgate_backends::nvme::sim::{Does, When, opcode};
use passgate_bindings::PageRange;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::guest::{DATA, Guest, IN, OK, OUT, UNTOUCHED};
use crate::world::World;

/// Longer than anything takes here: whoever waits in vain fails after that.
const LONG: Duration = Duration::from_secs(60);

#[test]
fn the_next_front_end_is_served_after_one_has_left() {
    let world = World::new();
    for round in 0..5 {
        let mut guest = world.guest();
        assert_eq!(guest.ask(0, OUT, round, &[(DATA, 512)]), OK);
        drop(guest);
    }
    has_no_memory(&world);
}

/// Waits until the memory of a front-end that has left is nobody's.
#[track_caller]
fn has_no_memory(world: &World) {
    let (mut control, until) = (world.control(), Instant::now() + LONG);
    while !control.status().unwrap().regions.is_empty() {
        assert!(Instant::now() < until, "memory of a front-end that has left stays");
        std::thread::yield_now();
    }
}

/// Requests that a back-end had taken and not answered are done by the next, in the order in which they came, and not
/// those that it had answered.
#[test]
fn what_was_in_flight_when_a_back_end_went_is_done_by_the_next() {
    let mut world = World::new();
    let mut guest = Guest::connect(&world.path(), 2);
    guest.greet().unwrap();
    guest.track();
    use vhost::VhostBackend;
    let region = guest.region();
    guest.frontend.set_mem_table(&[region]).unwrap();
    (0..2).for_each(|ring| guest.start_ring(ring).unwrap());
    guest.frontend.set_config(32, VhostUserConfigFlags::empty(), &[0]).unwrap();
    // Pages between begin and end: what touches them is held, and was not given to the drive.
    let mut channel = world.channel();
    let range = PageRange::new(DATA, 4096).unwrap();
    let Answer::Granted { invalidation } = channel.begin(range, PageState::Private, None).unwrap() else {
        panic!("not granted")
    };
    for (nth, head) in [4, 0, 8].into_iter().enumerate() {
        guest.memory.write(DATA + 512 * nth as u64, &[nth as u8 + 1; 512]).unwrap();
        guest.request(0, head, OUT, 100, &[(DATA + 512 * nth as u64, 512)]);
        if nth == 0 {
            // One that overtakes it: by the used index alone nobody could tell which was done.
            guest.request(0, 12, OUT, 200, &[(DATA + 4096, 512)]);
        }
    }
    guest.kick(0);
    assert_eq!(guest.await_used(0, 1), [(12, 1)]);
    assert_eq!(guest.ask(1, IN, 0, &[(DATA + 4096, 512)]), OK);
    assert_eq!(guest.status(0, 0), UNTOUCHED);
    world.shut_door();
    assert_eq!(guest.used(0), [], "nobody has done it, and nobody has said so");
    channel.end(invalidation, Outcome::NotCommitted).unwrap();
    world.open_door_again();
    let before = world.sim.taken();
    let mut guest = guest.again(&world.path());
    guest.greet().unwrap();
    guest.track();
    let mut cache = [1];
    cache.copy_from_slice(&guest.frontend.get_config(32, 1, VhostUserConfigFlags::empty(), &[0]).unwrap().1);
    assert_eq!(cache, [0], "the guest has switched its cache off");
    let region = guest.region();
    guest.frontend.set_mem_table(&[region]).unwrap();
    (0..2).for_each(|ring| guest.start_ring(ring).unwrap());
    let used: Vec<_> = guest.await_used(0, 3).into_iter().map(|(head, _)| head).collect();
    assert_eq!(used.len(), 3);
    assert!([0, 4, 8].iter().all(|head| guest.status(0, *head) == OK && used.contains(&u32::from(*head))));
    assert_eq!(world.sim.medium().read(100, 1), vec![3; 512], "the last came last");
    assert_eq!(world.sim.taken() - before, 3, "the read of the other ring was not done again");
    assert_eq!(guest.ask(1, IN, 0, &[(DATA + 4096, 512)]), OK);
    assert_eq!(guest.ask(0, IN, 0, &[(DATA + 4096, 512)]), OK);
}

/// The door cannot remove memory that is being converted: that goes when the conversion has ended, and whoever comes
/// meanwhile is not refused for it.
#[test]
fn a_front_end_that_comes_back_waits_for_a_conversion_of_what_it_had() {
    let mut world = World::new();
    let guest = world.guest();
    let (mut channel, mut control) = (world.channel(), world.control());
    let range = PageRange::new(DATA, 4096).unwrap();
    let Answer::Granted { invalidation } = channel.begin(range, PageState::Private, None).unwrap() else {
        panic!("not granted")
    };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let until = Instant::now() + LONG;
            while !control.metrics().unwrap().contains("\npassgate_disk_front_ends_total 2\n") {
                assert!(Instant::now() < until, "it has not come back");
                std::thread::yield_now();
            }
            // It wants the same memory now, which cannot go yet.
            std::thread::sleep(Duration::from_millis(100));
            assert_eq!(control.status().unwrap().regions.len(), 1);
            channel.end(invalidation, Outcome::NotCommitted).unwrap();
        });
        let mut guest = guest.again(&world.path());
        guest.start().unwrap();
        assert_eq!(guest.ask(0, OUT, 0, &[(DATA, 4096)]), OK);
    });
}

/// Cloud Hypervisor comes back within microseconds, and gives its disk up where it is cut off while it greets.
#[test]
fn nobody_listens_any_more_when_a_front_end_hears_that_the_door_shuts() {
    let mut world = World::new();
    for round in 0..50 {
        let (guest, path) = (world.guest(), world.path());
        let comes_back = std::thread::spawn(move || {
            assert_eq!((&guest.socket).read(&mut [0]).unwrap(), 0, "the connection ends");
            UnixStream::connect(path).is_ok()
        });
        world.shut_door();
        assert!(!comes_back.join().unwrap(), "round {round}: it was taken by a back-end that ends");
        world.open_door_again();
    }
}

#[test]
fn a_ring_that_is_stopped_has_ended_what_it_had() {
    let world = World::new();
    let mut guest = world.guest();
    world.sim.fault(When::io(opcode::WRITE).times(3), Does::DelayCompletion(Duration::from_millis(50)));
    for head in [0, 4, 8] {
        guest.request(0, head, OUT, 0, &[(DATA, 4096)]);
    }
    guest.kick(0);
    assert!(world.sim.await_taken(3, LONG));
    use vhost::VhostBackend;
    assert_eq!(guest.frontend.get_vring_base(0).unwrap(), 3);
    assert_eq!(guest.used(0).len(), 3);
    // It goes on where it was.
    guest.start_ring(0).unwrap();
    assert_eq!(guest.ask(0, IN, 0, &[(DATA, 512)]), OK);
}

/// What was answered before may never have been told: by a back-end that died in between, or for want of a descriptor.
#[test]
fn new_call_descriptor_is_signalled_for_what_was_answered_before() {
    let world = World::new();
    let mut guest = world.guest();
    assert_eq!(guest.ask(0, IN, 0, &[(DATA, 512)]), OK);
    let call = EventFd::new(EFD_NONBLOCK).unwrap();
    use vhost::VhostBackend;
    guest.frontend.set_vring_call(0, &call).unwrap();
    assert_eq!(call.read().ok(), Some(1), "the guest waits for an answer that it has");
}

/// The guest chooses its cache before its driver is done, and the memory for what is in flight comes after that.
#[test]
fn what_the_guest_chose_of_its_cache_before_its_rings_ran_outlives_the_back_end() {
    let mut world = World::new();
    let mut guest = Guest::connect(&world.path(), 2);
    guest.greet().unwrap();
    guest.frontend.set_config(32, VhostUserConfigFlags::empty(), &[0]).unwrap();
    guest.track();
    world.shut_door();
    world.open_door_again();
    let mut guest = guest.again(&world.path());
    guest.greet().unwrap();
    guest.track();
    let told = guest.frontend.get_config(32, 1, VhostUserConfigFlags::empty(), &[7]).unwrap().1;
    assert_eq!(told, [0], "the guest has switched its cache off");
}

/// What a guest had in flight when its device was reset is done by nobody, whoever goes on with that memory.
#[test]
fn what_was_in_flight_before_a_reset_is_not_done_after_it() {
    let mut world = World::new();
    let mut guest = Guest::connect(&world.path(), 2);
    guest.greet().unwrap();
    guest.track();
    use vhost::VhostBackend;
    let region = guest.region();
    guest.frontend.set_mem_table(&[region]).unwrap();
    (0..2).for_each(|ring| guest.start_ring(ring).unwrap());
    let mut channel = world.channel();
    let range = PageRange::new(DATA, 4096).unwrap();
    let Answer::Granted { invalidation } = channel.begin(range, PageState::Private, None).unwrap() else {
        panic!("not granted")
    };
    guest.request(0, 4, OUT, 100, &[(DATA, 512)]);
    guest.kick(0);
    // Once the other ring is served, it is held.
    assert_eq!(guest.ask(1, IN, 0, &[(DATA + 4096, 512)]), OK);
    let until = Instant::now() + LONG;
    while guest.inflight_of(0, 4) == 0 {
        assert!(Instant::now() < until, "it is not noted");
        std::thread::yield_now();
    }
    guest.frontend.reset_owner().unwrap();
    channel.end(invalidation, Outcome::NotCommitted).unwrap();
    let before = world.sim.taken();
    // As a driver does after a reset: from the beginning, with other chains in the same places.
    for ring in 0..2 {
        guest.memory.write(guest.ring_base(ring), &[0; 3 * 4096]).unwrap();
        (guest.rings[ring].avail, guest.rings[ring].used) = (0, 0);
    }
    guest.write_header(0, 4, OUT, 300);
    guest.frontend.set_owner().unwrap();
    guest.frontend.set_features(guest.features).unwrap();
    (0..2).for_each(|ring| guest.start_ring(ring).unwrap());
    assert_eq!(guest.ask(0, IN, 0, &[(DATA + 4096, 512)]), OK);
    assert_eq!(guest.ask(1, IN, 0, &[(DATA + 4096, 512)]), OK);
    assert_eq!((world.sim.taken() - before, guest.status(0, 4)), (2, UNTOUCHED));
}
