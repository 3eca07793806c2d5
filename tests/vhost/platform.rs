//! A front-end whose guest takes no device without `VIRTIO_F_ACCESS_PLATFORM`, as those of SEV and TDX do.

use std::io::{ErrorKind, Read};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use passgate_bindings::memory::GuestFile;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserProtocolFeatures;

use crate::guest::{Guest, PLATFORM, SIZE, USER};
use crate::hostile::raw::{Came, Raw, SET_MEM_TABLE, VERSION, at, table};
use crate::hostile::{serves, serves_this};
use crate::world::World;

/// The message of a front-end that translates, by its number, and a translation: all of the guest's memory, as it is.
const IOTLB_MSG: u32 = 22;

fn translation() -> Vec<u8> {
    let mut bytes: Vec<u8> = [0, SIZE, USER].into_iter().flat_map(u64::to_le_bytes).collect();
    bytes.extend([3, 2, 0, 0, 0, 0, 0, 0]); // readable and writable; an update
    bytes
}

/// QEMU ends where a back-end offers the feature without both of the protocol's.
#[test]
fn platform_feature_is_offered_with_the_protocol_features_that_qemu_demands() {
    let world = World::new();
    let mut guest = Guest::connect(&world.path(), 1);
    guest.frontend.set_owner().unwrap();
    assert_eq!(guest.frontend.get_features().unwrap() & PLATFORM, PLATFORM);
    let demanded = VhostUserProtocolFeatures::BACKEND_REQ | VhostUserProtocolFeatures::REPLY_ACK;
    assert!(guest.frontend.get_protocol_features().unwrap().contains(demanded));
}

/// By the protocol ring addresses are guest-physical ones then; some front-ends go on with their own.
#[test]
fn rings_are_found_at_guest_physical_addresses_and_at_the_front_ends_own() {
    let world = World::new();
    for rings_at in [0, USER] {
        let mut guest = Guest::connect(&world.path(), 2);
        (guest.unwanted, guest.rings_at) = (0, rings_at);
        guest.start().unwrap();
        assert_eq!(guest.features & PLATFORM, PLATFORM);
        serves_this(&world, &mut guest);
    }
    // Where it was not negotiated a guest-physical address is none of the front-end's.
    let mut guest = Guest::connect(&world.path(), 2);
    guest.rings_at = 0;
    assert!(guest.start().is_err());
    serves(&world);
}

#[test]
fn channel_for_back_end_requests_stays_open_as_long_as_the_front_end_is_served() {
    let world = World::new();
    let mut guest = world.guest();
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    guest.frontend.set_backend_request_fd(&theirs).unwrap();
    drop(theirs);
    serves_this(&world, &mut guest);
    ours.set_nonblocking(true).unwrap();
    let found = ours.read(&mut [0; 16]).map_err(|error| error.kind());
    assert_eq!(found, Err(ErrorKind::WouldBlock), "neither a request nor its end");
    drop(guest);
    ours.set_nonblocking(false).unwrap();
    ours.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    assert_eq!(ours.read(&mut [0; 16]).unwrap(), 0);
}

/// What such a guest has in its rings are no guest-physical addresses: the drive would read and write other memory.
#[test]
fn front_end_that_translates_is_refused_in_words_and_not_served() {
    let world = World::new();
    let memory = GuestFile::memfd("translated", SIZE).unwrap();
    let connect = || {
        let raw = Raw::greeted(&world.path());
        let came = raw.says(SET_MEM_TABLE, &table(&[at(0, SIZE, 0)]), &[memory.as_fd()]);
        assert!(!came.is_no(), "{came:?}");
        raw
    };
    let raw = connect();
    assert_eq!(raw.says(IOTLB_MSG, &translation(), &[]), Came::Reply(vec![1, 0, 0, 0, 0, 0, 0, 0]));
    assert_eq!(raw.hears(), Came::End);
    serves(&world);
    // Without an answer wanted, and one that is not whole.
    for payload in [&translation()[..], &[]] {
        let raw = connect();
        assert!(raw.send(IOTLB_MSG, VERSION, payload, &[]));
        assert_eq!(raw.hears(), Came::End);
    }
    let raw = connect();
    assert!(raw.bytes(&IOTLB_MSG.to_le_bytes(), &[]));
    raw.leaves();
    serves(&world);
}
