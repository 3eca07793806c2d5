//! Front-ends whose guest requires `VIRTIO_F_ACCESS_PLATFORM`, as SEV and TDX guests do.

use std::io::{ErrorKind, Read};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use passgate_bindings::memory::GuestFile;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserProtocolFeatures;

use crate::guest::{ACCESS_PLATFORM, Guest, MEMORY_BYTES, USER_ADDR};
use crate::hostile::raw::{Raw, Response, SET_MEM_TABLE, VERSION, mem_table, region_at};
use crate::hostile::{assert_serves, assert_serves_guest};
use crate::world::World;

/// The request `VHOST_USER_IOTLB_MSG`, sent by front-ends with a virtual IOMMU.
const IOTLB_MSG: u32 = 22;

/// Returns its payload: an update that maps all guest memory one to one.
fn translation() -> Vec<u8> {
    let mut bytes: Vec<u8> = [0, MEMORY_BYTES, USER_ADDR].into_iter().flat_map(u64::to_le_bytes).collect();
    bytes.extend([3, 2, 0, 0, 0, 0, 0, 0]); // permission: read and write; type: update
    bytes
}

/// QEMU exits if a back-end offers the feature without both of these protocol features.
#[test]
fn platform_feature_is_offered_with_features_that_qemu_requires() {
    let world = World::new();
    let mut guest = Guest::connect(&world.socket_path(), 1);
    guest.frontend.set_owner().unwrap();
    assert_eq!(guest.frontend.get_features().unwrap() & ACCESS_PLATFORM, ACCESS_PLATFORM);
    let demanded = VhostUserProtocolFeatures::BACKEND_REQ | VhostUserProtocolFeatures::REPLY_ACK;
    assert!(guest.frontend.get_protocol_features().unwrap().contains(demanded));
}

/// With the feature, ring addresses are guest-physical by the protocol, but some front-ends still use their own addresses.
#[test]
fn rings_are_found_at_gpa_or_front_end_address() {
    let world = World::new();
    for ring_address_base in [0, USER_ADDR] {
        let mut guest = Guest::connect(&world.socket_path(), 2);
        (guest.declined_features, guest.ring_address_base) = (0, ring_address_base);
        guest.start().unwrap();
        assert_eq!(guest.features & ACCESS_PLATFORM, ACCESS_PLATFORM);
        assert_serves_guest(&world, &mut guest);
    }
    // Without the feature a guest-physical address is no valid front-end address.
    let mut guest = Guest::connect(&world.socket_path(), 2);
    guest.ring_address_base = 0;
    assert!(guest.start().is_err());
    assert_serves(&world);
}

#[test]
fn back_end_request_channel_stays_open_while_served() {
    let world = World::new();
    let mut guest = world.guest();
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    guest.frontend.set_backend_request_fd(&theirs).unwrap();
    drop(theirs);
    assert_serves_guest(&world, &mut guest);
    ours.set_nonblocking(true).unwrap();
    let found = ours.read(&mut [0; 16]).map_err(|error| error.kind());
    assert_eq!(found, Err(ErrorKind::WouldBlock), "the channel must be open and empty");
    drop(guest);
    ours.set_nonblocking(false).unwrap();
    ours.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    assert_eq!(ours.read(&mut [0; 16]).unwrap(), 0);
}

/// With a virtual IOMMU the addresses in the rings are not guest-physical: the drive would access other memory.
#[test]
fn iotlb_front_end_is_refused_with_reply() {
    let world = World::new();
    let memory = GuestFile::memfd("translated", MEMORY_BYTES).unwrap();
    let connect = || {
        let raw = Raw::negotiated(&world.socket_path());
        let response =
            raw.send_with_ack(SET_MEM_TABLE, &mem_table(&[region_at(0, MEMORY_BYTES, 0)]), &[memory.as_fd()]);
        assert!(!response.is_refusal(), "{response:?}");
        raw
    };
    let raw = connect();
    assert_eq!(
        raw.send_with_ack(IOTLB_MSG, &translation(), &[]),
        Response::Reply(vec![1, 0, 0, 0, 0, 0, 0, 0])
    );
    assert_eq!(raw.receive(), Response::Disconnected);
    assert_serves(&world);
    // Without `need_reply`, and with an incomplete payload.
    for payload in [&translation()[..], &[]] {
        let raw = connect();
        assert!(raw.send(IOTLB_MSG, VERSION, payload, &[]));
        assert_eq!(raw.receive(), Response::Disconnected);
    }
    let raw = connect();
    assert!(raw.send_bytes(&IOTLB_MSG.to_le_bytes(), &[]));
    raw.close();
    assert_serves(&world);
}
