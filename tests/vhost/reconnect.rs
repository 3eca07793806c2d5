//! Reconnecting front-ends, and a restarted back-end.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use passgate_bindings::PageRange;
use passgate_client::{Answer, Outcome, PageState};
use passgate_sim::nvme::{CommandFilter, FaultAction, opcode};
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::guest::{DATA_GPA, Guest, IN, OK, OUT, UNTOUCHED};
use crate::world::World;

/// The longest time that a test waits.
const TIMEOUT: Duration = Duration::from_secs(60);

#[test]
fn next_front_end_is_served_after_disconnect() {
    let world = World::new();
    for round in 0..5 {
        let mut guest = world.guest();
        assert_eq!(guest.run_request(0, OUT, round, &[(DATA_GPA, 512)]), OK);
        drop(guest);
    }
    wait_for_no_memory(&world);
}

/// Waits until the memory of a disconnected front-end is removed.
#[track_caller]
fn wait_for_no_memory(world: &World) {
    let (mut control, deadline) = (world.control(), Instant::now() + TIMEOUT);
    while !control.status().unwrap().regions.is_empty() {
        assert!(Instant::now() < deadline, "the memory of a disconnected front-end is not removed");
        std::thread::yield_now();
    }
}

/// The next back-end executes the requests that the one before had taken and not answered, in their order, and none that was
/// answered.
#[test]
fn in_flight_requests_are_resubmitted_by_next_back_end() {
    let mut world = World::new();
    let mut guest = Guest::connect(&world.socket_path(), 2);
    guest.negotiate().unwrap();
    guest.set_up_inflight();
    use vhost::VhostBackend;
    let region = guest.whole_region();
    guest.frontend.set_mem_table(&[region]).unwrap();
    (0..2).for_each(|ring| guest.start_ring(ring).unwrap());
    guest.frontend.set_config(32, VhostUserConfigFlags::empty(), &[0]).unwrap();
    // Requests to pages between begin and end are held, and not submitted to the drive.
    let mut channel = world.channel();
    let range = PageRange::new(DATA_GPA, 4096).unwrap();
    let Answer::Granted { invalidation } = channel.begin(range, PageState::Private, None).unwrap() else {
        panic!("not granted")
    };
    for (nth, head) in [4, 0, 8].into_iter().enumerate() {
        guest.memory.write(DATA_GPA + 512 * nth as u64, &[nth as u8 + 1; 512]).unwrap();
        guest.request(0, head, OUT, 100, &[(DATA_GPA + 512 * nth as u64, 512)]);
        if nth == 0 {
            // A request that overtakes it: the used index alone does not show which one was done.
            guest.request(0, 12, OUT, 200, &[(DATA_GPA + 4096, 512)]);
        }
    }
    guest.kick(0);
    assert_eq!(guest.await_used(0, 1), [(12, 1)]);
    assert_eq!(guest.run_request(1, IN, 0, &[(DATA_GPA + 4096, 512)]), OK);
    assert_eq!(guest.status(0, 0), UNTOUCHED);
    world.stop_back_end();
    assert_eq!(guest.used(0), [], "a held request must not be used");
    channel.end(invalidation, Outcome::NotCommitted).unwrap();
    world.restart_back_end();
    let before = world.sim.taken();
    let mut guest = guest.reconnect(&world.socket_path());
    guest.negotiate().unwrap();
    guest.set_up_inflight();
    let mut cache = [1];
    cache.copy_from_slice(&guest.frontend.get_config(32, 1, VhostUserConfigFlags::empty(), &[0]).unwrap().1);
    assert_eq!(cache, [0], "the guest has disabled its write cache");
    let region = guest.whole_region();
    guest.frontend.set_mem_table(&[region]).unwrap();
    (0..2).for_each(|ring| guest.start_ring(ring).unwrap());
    let used: Vec<_> = guest.await_used(0, 3).into_iter().map(|(head, _)| head).collect();
    assert_eq!(used.len(), 3);
    assert!([0, 4, 8].iter().all(|head| guest.status(0, *head) == OK && used.contains(&u32::from(*head))));
    assert_eq!(world.sim.medium().read(100, 1), vec![3; 512], "the last write must be executed last");
    assert_eq!(world.sim.taken() - before, 3, "an answered request was executed again");
    assert_eq!(guest.run_request(1, IN, 0, &[(DATA_GPA + 4096, 512)]), OK);
    assert_eq!(guest.run_request(0, IN, 0, &[(DATA_GPA + 4096, 512)]), OK);
}

/// Memory under conversion cannot be removed before the conversion has ended. A front-end that reconnects meanwhile waits for
/// that, and is not refused.
#[test]
fn reconnecting_front_end_waits_for_open_conversion() {
    let mut world = World::new();
    let guest = world.guest();
    let (mut channel, mut control) = (world.channel(), world.control());
    let range = PageRange::new(DATA_GPA, 4096).unwrap();
    let Answer::Granted { invalidation } = channel.begin(range, PageState::Private, None).unwrap() else {
        panic!("not granted")
    };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let deadline = Instant::now() + TIMEOUT;
            while !control.metrics().unwrap().contains("\npassgate_disk_front_ends_total 2\n") {
                assert!(Instant::now() < deadline, "the front-end has not reconnected");
                std::thread::yield_now();
            }
            // The front-end sets the same memory now, while the old region cannot be removed yet.
            std::thread::sleep(Duration::from_millis(100));
            assert_eq!(control.status().unwrap().regions.len(), 1);
            channel.end(invalidation, Outcome::NotCommitted).unwrap();
        });
        let mut guest = guest.reconnect(&world.socket_path());
        guest.start().unwrap();
        assert_eq!(guest.run_request(0, OUT, 0, &[(DATA_GPA, 4096)]), OK);
    });
}

/// Cloud Hypervisor reconnects within microseconds, and gives the disk up if the connection ends during the negotiation.
#[test]
fn listener_closes_before_front_end_sees_disconnect() {
    let mut world = World::new();
    for round in 0..50 {
        let (guest, path) = (world.guest(), world.socket_path());
        let reconnecting = std::thread::spawn(move || {
            assert_eq!((&guest.socket).read(&mut [0]).unwrap(), 0, "the connection must end");
            UnixStream::connect(path).is_ok()
        });
        world.stop_back_end();
        assert!(
            !reconnecting.join().unwrap(),
            "round {round}: a stopping back-end has accepted a connection"
        );
        world.restart_back_end();
    }
}

#[test]
fn stopped_ring_has_completed_its_requests() {
    let world = World::new();
    let mut guest = world.guest();
    world.sim.fault(
        CommandFilter::io(opcode::WRITE).times(3),
        FaultAction::DelayCompletion(Duration::from_millis(50)),
    );
    for head in [0, 4, 8] {
        guest.request(0, head, OUT, 0, &[(DATA_GPA, 4096)]);
    }
    guest.kick(0);
    assert!(world.sim.await_taken(3, TIMEOUT));
    use vhost::VhostBackend;
    assert_eq!(guest.frontend.get_vring_base(0).unwrap(), 3);
    assert_eq!(guest.used(0).len(), 3);
    // The ring continues at its base.
    guest.start_ring(0).unwrap();
    assert_eq!(guest.run_request(0, IN, 0, &[(DATA_GPA, 512)]), OK);
}

/// An earlier answer may not have been signalled: the back-end died in between, or had no call descriptor.
#[test]
fn new_call_descriptor_is_signalled_for_earlier_answers() {
    let world = World::new();
    let mut guest = world.guest();
    assert_eq!(guest.run_request(0, IN, 0, &[(DATA_GPA, 512)]), OK);
    let call = EventFd::new(EFD_NONBLOCK).unwrap();
    use vhost::VhostBackend;
    guest.frontend.set_vring_call(0, &call).unwrap();
    assert_eq!(call.read().ok(), Some(1), "the new call descriptor was not signalled");
}

/// The guest sets its cache mode before its rings run, and the front-end sets the inflight buffer after that.
#[test]
fn cache_mode_set_before_rings_run_survives_restart() {
    let mut world = World::new();
    let mut guest = Guest::connect(&world.socket_path(), 2);
    guest.negotiate().unwrap();
    guest.frontend.set_config(32, VhostUserConfigFlags::empty(), &[0]).unwrap();
    guest.set_up_inflight();
    world.stop_back_end();
    world.restart_back_end();
    let mut guest = guest.reconnect(&world.socket_path());
    guest.negotiate().unwrap();
    guest.set_up_inflight();
    let cache = guest.frontend.get_config(32, 1, VhostUserConfigFlags::empty(), &[7]).unwrap().1;
    assert_eq!(cache, [0], "the guest has disabled its write cache");
}

/// Requests in flight at a device reset are not executed afterwards, although the inflight buffer is used further.
#[test]
fn in_flight_requests_are_not_resubmitted_after_reset() {
    let mut world = World::new();
    let mut guest = Guest::connect(&world.socket_path(), 2);
    guest.negotiate().unwrap();
    guest.set_up_inflight();
    use vhost::VhostBackend;
    let region = guest.whole_region();
    guest.frontend.set_mem_table(&[region]).unwrap();
    (0..2).for_each(|ring| guest.start_ring(ring).unwrap());
    let mut channel = world.channel();
    let range = PageRange::new(DATA_GPA, 4096).unwrap();
    let Answer::Granted { invalidation } = channel.begin(range, PageState::Private, None).unwrap() else {
        panic!("not granted")
    };
    guest.request(0, 4, OUT, 100, &[(DATA_GPA, 512)]);
    guest.kick(0);
    // Once the other ring is served, the request is held.
    assert_eq!(guest.run_request(1, IN, 0, &[(DATA_GPA + 4096, 512)]), OK);
    let deadline = Instant::now() + TIMEOUT;
    while guest.inflight_mark(0, 4) == 0 {
        assert!(Instant::now() < deadline, "the request is not marked as in flight");
        std::thread::yield_now();
    }
    guest.frontend.reset_owner().unwrap();
    channel.end(invalidation, Outcome::NotCommitted).unwrap();
    let before = world.sim.taken();
    // As a driver does after a reset: new rings, with other chains at the same addresses.
    for ring in 0..2 {
        guest.memory.write(guest.ring_base(ring), &[0; 3 * 4096]).unwrap();
        (guest.rings[ring].avail, guest.rings[ring].used) = (0, 0);
    }
    guest.write_header(0, 4, OUT, 300);
    guest.frontend.set_owner().unwrap();
    guest.frontend.set_features(guest.features).unwrap();
    (0..2).for_each(|ring| guest.start_ring(ring).unwrap());
    assert_eq!(guest.run_request(0, IN, 0, &[(DATA_GPA + 4096, 512)]), OK);
    assert_eq!(guest.run_request(1, IN, 0, &[(DATA_GPA + 4096, 512)]), OK);
    assert_eq!((world.sim.taken() - before, guest.status(0, 4)), (2, UNTOUCHED));
}
