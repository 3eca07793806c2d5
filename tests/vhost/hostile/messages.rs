//! Invalid messages of a front-end, each on a connection of its own.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use passgate_bindings::memory::GuestFile;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use super::raw::*;
use super::{anonymous_kib, assert_serves, open_files};
use vhost::VhostBackend;

use crate::guest::{FLUSH, Guest, MEMORY_BYTES, QUEUE_SIZE, USER_ADDR};
use crate::world::World;

/// Sends a message on a negotiated connection, and asserts that it is refused: by its acknowledgement or by the end of the
/// connection.
#[track_caller]
fn assert_refused(world: &World, case: &str, request: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) {
    let raw = Raw::negotiated(&world.socket_path());
    let response = raw.send_with_ack(request, payload, fds);
    assert!(response.is_refusal(), "{case}: {response:?}");
    raw.close();
}

/// Like [`assert_refused`], on a connection with memory.
#[track_caller]
fn assert_refused_with_memory(
    world: &World,
    case: &str,
    request: u32,
    payload: &[u8],
    fds: &[BorrowedFd<'_>],
) {
    let memory = GuestFile::memfd("hostile", MEMORY_BYTES).unwrap();
    let raw = Raw::negotiated(&world.socket_path());
    let response =
        raw.send_with_ack(SET_MEM_TABLE, &mem_table(&[region_at(0, MEMORY_BYTES, 0)]), &[memory.as_fd()]);
    assert!(!response.is_refusal(), "{case}: {response:?}");
    let response = raw.send_with_ack(request, payload, fds);
    assert!(response.is_refusal(), "{case}: {response:?}");
    raw.close();
}

fn memfd(len: u64) -> OwnedFd {
    let fd = memfd_create("hostile", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&fd, len).unwrap();
    fd
}

/// Waits until no region, quarantine or file of the front-ends remains; those of the last one go when the back-end notices its
/// disconnect.
#[track_caller]
fn assert_no_leak(world: &World, files: usize) {
    let mut control = world.control();
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let (status, open) = (control.status().unwrap(), open_files());
        // Two files for the control connection, both ends; a third may be open until the back-end has closed the last front-end.
        if status.regions.is_empty() && status.quarantine.is_empty() && open <= files + 2 {
            return;
        }
        assert!(Instant::now() < deadline, "{open} files are open, {files} were; {status:?}");
        std::thread::yield_now();
    }
}

/// Runs `hostile` twice: files that the second run leaves open are a leak. The caller must have created its world first, which
/// serializes the tests of this process.
fn run_twice(world: &World, hostile: impl Fn(&World)) {
    hostile(world);
    assert_serves(world);
    // A few files may not be closed yet; a leak of one for each connection would exceed them.
    let files = open_files();
    hostile(world);
    assert_serves(world);
    assert_no_leak(world, files);
}

#[test]
fn unsuitable_memory_is_refused() {
    let world = World::new();
    let valid_file = GuestFile::memfd("hostile", MEMORY_BYTES).unwrap();
    let other = GuestFile::memfd("hostile", MEMORY_BYTES).unwrap();
    let unsealed = memfd(MEMORY_BYTES);
    let plain: OwnedFd = tempfile::tempfile().unwrap().into();
    ftruncate(&plain, MEMORY_BYTES).unwrap();
    let (pipe, _writer) = rustix::pipe::pipe().unwrap();
    let null: OwnedFd = File::open("/dev/null").unwrap().into();
    let directory: OwnedFd = File::open("/").unwrap().into();
    let whole = region_at(0, MEMORY_BYTES, 0);
    run_twice(&world, |world| {
        for (case, fd) in [
            ("a file that can shrink", unsealed.as_fd()),
            ("a plain file", plain.as_fd()),
            ("a pipe", pipe.as_fd()),
            ("a device", null.as_fd()),
            ("a directory", directory.as_fd()),
        ] {
            assert_refused(world, case, SET_MEM_TABLE, &mem_table(&[whole]), &[fd]);
            assert_refused(world, case, ADD_MEM_REG, &single_region(whole), &[fd]);
        }
        for (case, fields) in [
            ("nothing", region_at(0, 0, 0)),
            ("longer than its file", region_at(0, MEMORY_BYTES + 4096, 0)),
            ("beyond its file", region_at(0, MEMORY_BYTES, 4096)),
            ("an offset that overflows", region_at(0, MEMORY_BYTES, u64::MAX - 4095)),
            ("an address that overflows", region_at(u64::MAX - 4095, MEMORY_BYTES, 0)),
            ("an address beyond all", region_at(1 << 62, MEMORY_BYTES, 0)),
            ("half pages", region_at(0x800, MEMORY_BYTES - 0x800, 0)),
            ("half a page", region_at(0, 0x800, 0)),
            ("an offset in a page", region_at(0, 0x1000, 0x10)),
            ("endless", region_at(0, u64::MAX, 0)),
            ("endless, in pages", region_at(0, u64::MAX - 4095, 0)),
        ] {
            assert_refused(world, case, SET_MEM_TABLE, &mem_table(&[fields]), &[valid_file.as_fd()]);
            assert_refused(world, case, ADD_MEM_REG, &single_region(fields), &[valid_file.as_fd()]);
        }
        let half = MEMORY_BYTES / 2;
        for (case, regions) in [
            ("the same twice", [whole, whole]),
            ("two at one address", [region_at(0, half, 0), region_at(0, half, half)]),
            ("two that overlap", [region_at(0, half, 0), region_at(half - 4096, half, half)]),
        ] {
            assert_refused(
                world,
                case,
                SET_MEM_TABLE,
                &mem_table(&regions),
                &[valid_file.as_fd(), other.as_fd()],
            );
        }
        let (two, one) = ([region_at(0, half, 0), region_at(half, half, half)], [whole]);
        assert_refused(world, "a file too few", SET_MEM_TABLE, &mem_table(&two), &[valid_file.as_fd()]);
        assert_refused(
            world,
            "a file too many",
            SET_MEM_TABLE,
            &mem_table(&one),
            &[valid_file.as_fd(), other.as_fd()],
        );
        assert_refused(world, "no file", SET_MEM_TABLE, &mem_table(&one), &[]);
        assert_refused(world, "no file", ADD_MEM_REG, &single_region(whole), &[]);
        assert_refused(
            world,
            "two files",
            ADD_MEM_REG,
            &single_region(whole),
            &[valid_file.as_fd(), other.as_fd()],
        );
        assert_refused(world, "no region", SET_MEM_TABLE, &mem_table(&[]), &[]);
        let too_many: Vec<_> = (0..33).map(|n| region_at(n * 4096, 4096, n * 4096)).collect();
        let files = vec![valid_file.as_fd(); 33];
        assert_refused(world, "more regions than fit", SET_MEM_TABLE, &mem_table(&too_many), &files);
        let mut counts_more = mem_table(&one);
        counts_more[0] = 2;
        assert_refused(
            world,
            "a region that is not there",
            SET_MEM_TABLE,
            &counts_more,
            &[valid_file.as_fd(), valid_file.as_fd()],
        );
        counts_more[..4].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_refused(
            world,
            "regions that are not there",
            SET_MEM_TABLE,
            &counts_more,
            &[valid_file.as_fd()],
        );
        assert_refused_with_memory(
            world,
            "what is there",
            ADD_MEM_REG,
            &single_region(whole),
            &[valid_file.as_fd()],
        );
        assert_refused_with_memory(
            world,
            "over what is there",
            ADD_MEM_REG,
            &single_region(region_at(MEMORY_BYTES - 4096, 8192, 0)),
            &[valid_file.as_fd()],
        );
        for (case, fields) in [
            ("another length", region_at(0, MEMORY_BYTES / 2, 0)),
            ("another address", region_at(4096, MEMORY_BYTES, 0)),
            ("another user address", [0, MEMORY_BYTES, USER_ADDR + 1, 0]),
            ("nothing", region_at(0, 0, 0)),
        ] {
            assert_refused_with_memory(world, case, REM_MEM_REG, &single_region(fields), &[]);
        }
        assert_refused(world, "what was never added", REM_MEM_REG, &single_region(whole), &[]);
    });
}

#[test]
fn invalid_rings_are_refused() {
    let world = World::new();
    let kick: OwnedFd = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
    let address = |index: u32, addresses: [u64; 3]| {
        let [descriptor, used, available] = addresses;
        [u32s(&[index, 0]), u64s(&[descriptor, used, available, 0])].concat()
    };
    let valid = [USER_ADDR, USER_ADDR + 8192, USER_ADDR + 4096];
    run_twice(&world, |world| {
        for index in [2, 3, 255, 256, 65_536, u32::MAX] {
            for (request, payload) in [
                (SET_VRING_NUM, u32s(&[index, 64])),
                (SET_VRING_BASE, u32s(&[index, 0])),
                (SET_VRING_ENABLE, u32s(&[index, 1])),
                (GET_VRING_BASE, u32s(&[index, 0])),
                (SET_VRING_ADDR, address(index, valid)),
            ] {
                assert_refused_with_memory(
                    world,
                    &format!("ring {index}, request {request}"),
                    request,
                    &payload,
                    &[],
                );
            }
            for request in [SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR] {
                let payload = u64s(&[u64::from(index)]);
                if index != 256 && index != 65_536 {
                    assert_refused_with_memory(
                        world,
                        &format!("ring {index}"),
                        request,
                        &payload,
                        &[kick.as_fd()],
                    );
                }
            }
        }
        for num in [0, 3, 1000, 2048, 32_768, 65_535, 65_536, u32::MAX] {
            let case = format!("{num} descriptors");
            assert_refused_with_memory(world, &case, SET_VRING_NUM, &u32s(&[0, num]), &[]);
        }
        assert_refused_with_memory(world, "a base of 17 bits", SET_VRING_BASE, &u32s(&[0, 65_536]), &[]);
        assert_refused_with_memory(world, "enabled twice over", SET_VRING_ENABLE, &u32s(&[0, 2]), &[]);
        assert_refused(world, "rings before memory", SET_VRING_ADDR, &address(0, valid), &[]);
        for (case, addresses) in [
            ("descriptors nowhere", [USER_ADDR + MEMORY_BYTES, valid[1], valid[2]]),
            ("used nowhere", [valid[0], 0, valid[2]]),
            ("available nowhere", [valid[0], valid[1], u64::MAX - 1]),
            ("below", [USER_ADDR - 16, valid[1], valid[2]]),
            ("descriptors askew", [USER_ADDR + 8, valid[1], valid[2]]),
            ("used askew", [valid[0], valid[1] + 2, valid[2]]),
            ("available askew", [valid[0], valid[1], valid[2] + 1]),
        ] {
            assert_refused_with_memory(world, case, SET_VRING_ADDR, &address(0, addresses), &[]);
        }
        assert_refused_with_memory(world, "a kick without a file", SET_VRING_KICK, &u64s(&[0]), &[]);
        assert_refused_with_memory(world, "a kick that is none", SET_VRING_KICK, &u64s(&[0x100]), &[]);
        assert_refused_with_memory(
            world,
            "two kicks",
            SET_VRING_KICK,
            &u64s(&[0]),
            &[kick.as_fd(), kick.as_fd()],
        );
        assert_refused_with_memory(world, "a log", SET_LOG_BASE, &u64s(&[MEMORY_BYTES, 0]), &[kick.as_fd()]);
    });
}

#[test]
fn ring_beyond_end_of_memory_stops() {
    let world = World::new();
    run_twice(&world, |world| {
        for parts in [
            [USER_ADDR + MEMORY_BYTES - 16, USER_ADDR + 8192, USER_ADDR + 4096],
            [USER_ADDR, USER_ADDR + MEMORY_BYTES - 4, USER_ADDR + 4096],
            [USER_ADDR, USER_ADDR + 8192, USER_ADDR + MEMORY_BYTES - 2],
        ] {
            let (raw, _memory) = set_up(world, parts);
            // The back-end may end the connection or never process the ring; it must not access the ring in either case.
            raw.close();
        }
    });
}

/// Sets a ring up at these addresses, and kicks it.
fn set_up(world: &World, [descriptor, used, available]: [u64; 3]) -> (Raw, GuestFile) {
    let memory = GuestFile::memfd("hostile", MEMORY_BYTES).unwrap();
    let kick = rustix::event::eventfd(1, rustix::event::EventfdFlags::CLOEXEC).unwrap();
    let raw = Raw::negotiated(&world.socket_path());
    raw.send_with_ack(SET_MEM_TABLE, &mem_table(&[region_at(0, MEMORY_BYTES, 0)]), &[memory.as_fd()]);
    raw.send_with_ack(SET_VRING_NUM, &u32s(&[0, QUEUE_SIZE.into()]), &[]);
    raw.send_with_ack(SET_VRING_BASE, &u32s(&[0, 0]), &[]);
    let address = [u32s(&[0, 0]), u64s(&[descriptor, used, available, 0])].concat();
    raw.send_with_ack(SET_VRING_ADDR, &address, &[]);
    raw.send_with_ack(SET_VRING_KICK, &u64s(&[0]), &[kick.as_fd()]);
    raw.send_with_ack(SET_VRING_ENABLE, &u32s(&[0, 1]), &[]);
    (raw, memory)
}

#[test]
fn non_eventfd_kick_and_call_are_harmless() {
    let world = World::new();
    let plain: OwnedFd = tempfile::tempfile().unwrap().into();
    let null: OwnedFd = File::open("/dev/null").unwrap().into();
    let directory: OwnedFd = File::open("/").unwrap().into();
    let (pipe, _writer) = rustix::pipe::pipe().unwrap();
    let (_other, full) = rustix::pipe::pipe().unwrap();
    rustix::fs::fcntl_setfl(&full, rustix::fs::OFlags::NONBLOCK).unwrap();
    while rustix::io::write(&full, &[0; 4096]).is_ok() {}
    rustix::fs::fcntl_setfl(&full, rustix::fs::OFlags::empty()).unwrap();
    let full_counter = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
    rustix::io::write(&full_counter, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    let epoll: OwnedFd = rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC).unwrap();
    let fds = [&plain, &null, &directory, &pipe, &full, &full_counter, &epoll];
    run_twice(&world, |world| {
        for kick in fds {
            for call in fds {
                let mut guest = world.guest();
                guest.request(0, 0, FLUSH, 0, &[]);
                let raw = Raw::over_socket(&guest.socket);
                raw.send(SET_VRING_CALL, VERSION, &u64s(&[0]), &[call.as_fd()]);
                raw.send(SET_VRING_ERR, VERSION, &u64s(&[0]), &[call.as_fd()]);
                // The ring runs already, so this may be refused by the end of the connection.
                raw.send(SET_VRING_KICK, VERSION, &u64s(&[0]), &[kick.as_fd()]);
                drop(guest);
            }
        }
    });
}

#[test]
fn features_not_offered_are_refused() {
    let world = World::new();
    run_twice(&world, |world| {
        for bit in 0..64 {
            let raw = Raw::connect(&world.socket_path());
            let offered = raw.call(GET_FEATURES, &[]);
            let offered = u64::from_le_bytes(offered.try_into().unwrap());
            let protocol = raw.call(GET_PROTOCOL_FEATURES, &[]);
            raw.send(SET_FEATURES, VERSION, &u64s(&[offered]), &[]);
            raw.send(SET_PROTOCOL_FEATURES, VERSION, &protocol, &[]);
            let protocol = u64::from_le_bytes(protocol.try_into().unwrap());
            let response = raw.send_with_ack(SET_FEATURES, &u64s(&[offered | 1 << bit]), &[]);
            assert_eq!(response.is_refusal(), offered & 1 << bit == 0, "feature {bit}: {response:?}");
            raw.close();
            if protocol & 1 << bit == 0 {
                assert_refused(
                    world,
                    "a protocol feature",
                    SET_PROTOCOL_FEATURES,
                    &u64s(&[protocol | 1 << bit]),
                    &[],
                );
            }
        }
    });
}

#[test]
fn out_of_range_config_access_is_refused() {
    let world = World::new();
    run_twice(&world, |world| {
        let config_payload =
            |offset: u32, size: u32| [u32s(&[offset, size, 0]), vec![0; size.min(300) as usize]].concat();
        for (offset, size) in [(0, 0), (256, 1), (0, 257), (u32::MAX, 1), (1, u32::MAX), (255, 2), (0, 4096)]
        {
            let raw = Raw::negotiated(&world.socket_path());
            assert!(raw.send(GET_CONFIG, VERSION, &config_payload(offset, size), &[]));
            match raw.receive() {
                Response::Disconnected => {}
                // An empty reply is the protocol's refusal of GET_CONFIG.
                Response::Reply(bytes) => assert!(bytes.len() <= 12, "{offset}+{size}: {bytes:?}"),
            }
            raw.close();
        }
        for (offset, bytes) in
            [(0, &[1][..]), (32, &[2]), (32, &[]), (32, &[1, 1]), (u32::MAX, &[1]), (33, &[0])]
        {
            let payload = [u32s(&[offset, bytes.len() as u32, 0]), bytes.to_vec()].concat();
            assert_refused(world, &format!("{offset}: {bytes:?}"), SET_CONFIG, &payload, &[]);
        }
    });
}

#[test]
fn unsuitable_inflight_memory_is_refused() {
    let world = World::new();
    let sealed = memfd(1 << 20);
    rustix::fs::fcntl_add_seals(&sealed, rustix::fs::SealFlags::SHRINK).unwrap();
    let unsealed = memfd(1 << 20);
    let (pipe, _writer) = rustix::pipe::pipe().unwrap();
    let inflight_payload = |size: u64, offset: u64, queues: u16, len: u16| {
        let mut bytes = u64s(&[size, offset]);
        bytes.extend(queues.to_le_bytes());
        bytes.extend(len.to_le_bytes());
        bytes.resize(24, 0);
        bytes
    };
    run_twice(&world, |world| {
        for (size, offset, queues, len) in [
            (0, 0, 2, 64),
            (1 << 20, 1 << 20, 2, 64),
            (1 << 20, u64::MAX, 2, 64),
            (1 << 20, 3, 2, 64),
            (u64::MAX, 0, u16::MAX, u16::MAX),
            (1 << 20, 0, 0, 64),
            (100, 0, 2, 64),
        ] {
            let payload = inflight_payload(size, offset, queues, len);
            let case = format!("{size} {offset} {queues} {len}");
            assert_refused(world, &case, SET_INFLIGHT_FD, &payload, &[sealed.as_fd()]);
        }
        assert_refused(
            world,
            "it can shrink",
            SET_INFLIGHT_FD,
            &inflight_payload(1 << 20, 0, 2, 64),
            &[unsealed.as_fd()],
        );
        assert_refused(
            world,
            "a pipe",
            SET_INFLIGHT_FD,
            &inflight_payload(1 << 20, 0, 2, 64),
            &[pipe.as_fd()],
        );
        assert_refused(world, "no file", SET_INFLIGHT_FD, &inflight_payload(1 << 20, 0, 2, 64), &[]);
        for (queues, len) in [(0, 64), (3, 64), (2, 1025), (u16::MAX, u16::MAX)] {
            let raw = Raw::negotiated(&world.socket_path());
            assert!(raw.send(GET_INFLIGHT_FD, VERSION, &inflight_payload(0, 0, queues, len), &[]));
            assert_eq!(raw.receive(), Response::Disconnected, "{queues} {len}");
            raw.close();
        }
    });
}

/// An inflight buffer with invalid contents: invalid heads, counters at their limits.
#[test]
fn corrupt_inflight_memory_is_harmless() {
    let world = World::new();
    for (nth, word) in [u64::MAX, 1, 0x0101_0101_0101_0101, 1 << 63, 0x1_0001].into_iter().enumerate() {
        let mut guest = Guest::connect(&world.socket_path(), 2);
        guest.negotiate().unwrap();
        guest.frontend.set_mem_table(&[guest.whole_region()]).unwrap();
        let fd = memfd(1 << 20);
        rustix::fs::fcntl_add_seals(&fd, rustix::fs::SealFlags::SHRINK).unwrap();
        let mut bytes = word.to_le_bytes().repeat(1 << 14);
        if nth % 2 == 0 {
            // A valid version in the header of each queue's part (64 bytes, and 16 for each descriptor), as an earlier
            // back-end writes it.
            for part in 0..2 {
                bytes[part * 1088 + 8..][..2].copy_from_slice(&1u16.to_le_bytes());
            }
        }
        rustix::io::write(&fd, &bytes).unwrap();
        let file = File::from(fd);
        let inflight = vhost::vhost_user::message::VhostUserInflight::new(1 << 20, 0, 2, QUEUE_SIZE);
        guest.inflight = Some((inflight, file));
        guest.set_up_inflight();
        let _ = (0..2).try_for_each(|ring| guest.start_ring(ring));
        guest.kick(0);
        drop(guest);
        assert_serves(&world);
    }
}

#[test]
fn wrong_size_and_unknown_messages_are_refused() {
    let world = World::new();
    run_twice(&world, |world| {
        for request in 0..=MAX_KNOWN_REQUEST + 3 {
            for payload in [0, 1, 7, 8, 9, 16, 24, 40, 41, 300, 4096] {
                let raw = Raw::negotiated(&world.socket_path());
                raw.send(request, VERSION, &vec![0xa5; payload], &[]);
                raw.close();
            }
        }
        for request in [u32::MAX, 1 << 31, 1000] {
            assert_refused(world, "an unknown request", request, &[], &[]);
        }
        for flags in [0, 2, 3, VERSION | 4, u32::MAX] {
            let raw = Raw::negotiated(&world.socket_path());
            raw.send(GET_FEATURES, flags, &[], &[]);
            raw.close();
        }
        // A size that does not match the payload.
        for size in [1, 4097, 0x7fff_ffff, u32::MAX] {
            let raw = Raw::negotiated(&world.socket_path());
            raw.send_bytes(&u32s(&[SET_FEATURES, VERSION, size]), &[]);
            raw.close();
        }
    });
}

#[test]
fn unexpected_descriptors_are_closed() {
    let world = World::new();
    let file = memfd(4096);
    run_twice(&world, |world| {
        for request in [GET_FEATURES, SET_OWNER, SET_FEATURES, SET_VRING_NUM, GET_CONFIG, REM_MEM_REG, 999] {
            for count in [1, 8, 32, 33, 253] {
                let raw = Raw::negotiated(&world.socket_path());
                raw.send(request, VERSION, &[0; 8], &vec![file.as_fd(); count]);
                raw.close();
            }
        }
    });
}

#[test]
fn partial_message_blocks_nobody() {
    let world = World::new();
    for cut in 0..12 {
        let raw = Raw::negotiated(&world.socket_path());
        raw.send_bytes(&u32s(&[SET_MEM_TABLE, VERSION, 40])[..cut], &[]);
        raw.close();
    }
    let raw = Raw::negotiated(&world.socket_path());
    raw.send_bytes(&u32s(&[SET_MEM_TABLE, VERSION, 40, 1]), &[]);
    raw.close();
    assert_serves(&world);
    // The same with a connection that stays: the back-end must be able to stop.
    let silent = Raw::negotiated(&world.socket_path());
    silent.send_bytes(&u32s(&[SET_MEM_TABLE, VERSION, 40, 1]), &[]);
    let begun = Instant::now();
    drop(world);
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    silent.close();
}

#[test]
fn running_rings_cannot_be_reconfigured() {
    let world = World::new();
    run_twice(&world, |world| {
        let other_addresses =
            [u32s(&[0, 0]), u64s(&[USER_ADDR + 0x8_0000, USER_ADDR + 0x8_2000, USER_ADDR + 0x8_1000, 0])]
                .concat();
        for (case, request, payload) in [
            ("their size", SET_VRING_NUM, u32s(&[0, 32])),
            ("their base", SET_VRING_BASE, u32s(&[0, 7])),
            ("their place", SET_VRING_ADDR, other_addresses),
        ] {
            let guest = world.guest();
            let response = Raw::over_socket(&guest.socket).send_with_ack(request, &payload, &[]);
            assert!(response.is_refusal(), "{case}: {response:?}");
        }
        for (request, payload) in [(RESET_DEVICE, vec![]), (RESET_OWNER, vec![]), (SET_OWNER, vec![])] {
            let guest = world.guest();
            Raw::over_socket(&guest.socket).send_with_ack(request, &payload, &[]);
        }
    });
}

#[test]
fn many_connections_leak_nothing() {
    let world = World::new();
    let connect_repeatedly = |rounds: u32| {
        for round in 0..rounds {
            let raw = Raw::negotiated(&world.socket_path());
            let memory = GuestFile::memfd("hostile", MEMORY_BYTES).unwrap();
            raw.send_with_ack(SET_MEM_TABLE, &mem_table(&[region_at(0, MEMORY_BYTES, 0)]), &[memory.as_fd()]);
            if round % 3 == 0 {
                raw.send_with_ack(
                    ADD_MEM_REG,
                    &single_region(region_at(0, MEMORY_BYTES, 0)),
                    &[memory.as_fd()],
                );
            }
            raw.close();
        }
    };
    connect_repeatedly(50);
    assert_serves(&world);
    world.control().status().unwrap();
    let (files, memory) = (open_files(), anonymous_kib());
    connect_repeatedly(500);
    assert_serves(&world);
    assert_no_leak(&world, files);
    let more = anonymous_kib().saturating_sub(memory);
    assert!(more < 8192, "500 connections have taken {more} KiB");
}

/// The back-end can be stopped while a front-end neither completes a message nor reads its replies.
#[test]
fn stalled_front_end_does_not_block_shutdown() {
    let stops_inside_a_header = |world: &World| {
        let raw = Raw::negotiated(&world.socket_path());
        assert!(raw.send_bytes(&u32s(&[GET_FEATURES])[..3], &[]));
        raw
    };
    let reads_no_answers = |world: &World| {
        let raw = Raw::negotiated(&world.socket_path());
        raw.send_until_full(GET_FEATURES);
        raw
    };
    type Stall = fn(&World) -> Raw;
    for (case, stall) in [
        ("stops inside a header", stops_inside_a_header as Stall),
        ("reads no answers", reads_no_answers as Stall),
    ] {
        let mut world = World::new();
        let raw = stall(&world);
        let (back_end, (stopped, is_stopped)) = (world.back_end.take(), std::sync::mpsc::channel());
        let stopping = std::thread::spawn(move || {
            drop(back_end);
            let _ = stopped.send(());
        });
        let result = is_stopped.recv_timeout(Duration::from_secs(60));
        // Closes the connection, so that a back-end that still waits can stop.
        drop(raw);
        stopping.join().unwrap();
        assert!(result.is_ok(), "a front-end that {case} prevents the stop");
    }
}
