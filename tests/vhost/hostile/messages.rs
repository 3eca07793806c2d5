//! Messages of a front-end that are not as they must be, each on a connection of its own.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use passgate_bindings::memory::GuestFile;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use super::raw::*;
use super::{open_files, resident, serves};
use vhost::VhostBackend;

use crate::guest::{ENTRIES, FLUSH, Guest, SIZE, USER};
use crate::world::World;

/// Says this on a connection that was greeted: it is refused in words or by the end.
#[track_caller]
fn refused(world: &World, what: &str, request: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) {
    let raw = Raw::greeted(&world.path());
    let came = raw.says(request, payload, fds);
    assert!(came.is_no(), "{what}: {came:?}");
    raw.leaves();
}

/// The same on one that has its memory.
#[track_caller]
fn refused_with_memory(world: &World, what: &str, request: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) {
    let memory = GuestFile::memfd("hostile", SIZE).unwrap();
    let raw = Raw::greeted(&world.path());
    let came = raw.says(SET_MEM_TABLE, &table(&[at(0, SIZE, 0)]), &[memory.as_fd()]);
    assert!(!came.is_no(), "{what}: {came:?}");
    let came = raw.says(request, payload, fds);
    assert!(came.is_no(), "{what}: {came:?}");
    raw.leaves();
}

fn memfd(len: u64) -> OwnedFd {
    let fd = memfd_create("hostile", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&fd, len).unwrap();
    fd
}

/// Nothing of what front-ends had is left: regions, quarantine, files. What the last one had goes as soon as the back-end
/// has heard that it has left.
#[track_caller]
fn is_clean(world: &World, files: usize) {
    let mut control = world.control();
    let until = Instant::now() + Duration::from_secs(20);
    loop {
        let (status, open) = (control.status().unwrap(), open_files());
        // The control connection is two, and one more until the door has let go of the last.
        if status.regions.is_empty() && status.quarantine.is_empty() && open <= files + 2 {
            return;
        }
        assert!(Instant::now() < until, "{open} files are open, {files} were; {status:?}");
        std::thread::yield_now();
    }
}

/// Runs `hostile` twice: what it leaves behind the second time is a leak. The world comes first in a test: whoever has
/// it is alone in this process.
fn twice(world: &World, hostile: impl Fn(&World)) {
    hostile(world);
    serves(world);
    // Some of it may be about to be closed: a leak is one for each connection, and that is more.
    let files = open_files();
    hostile(world);
    serves(world);
    is_clean(world, files);
}

#[test]
fn memory_that_will_not_do_is_refused() {
    let world = World::new();
    let good = GuestFile::memfd("hostile", SIZE).unwrap();
    let other = GuestFile::memfd("hostile", SIZE).unwrap();
    let unsealed = memfd(SIZE);
    let plain: OwnedFd = tempfile::tempfile().unwrap().into();
    ftruncate(&plain, SIZE).unwrap();
    let (pipe, _keep) = rustix::pipe::pipe().unwrap();
    let null: OwnedFd = File::open("/dev/null").unwrap().into();
    let directory: OwnedFd = File::open("/").unwrap().into();
    let all = at(0, SIZE, 0);
    twice(&world, |world| {
        for (what, fd) in [
            ("a file that can shrink", unsealed.as_fd()),
            ("a plain file", plain.as_fd()),
            ("a pipe", pipe.as_fd()),
            ("a device", null.as_fd()),
            ("a directory", directory.as_fd()),
        ] {
            refused(world, what, SET_MEM_TABLE, &table(&[all]), &[fd]);
            refused(world, what, ADD_MEM_REG, &region(all), &[fd]);
        }
        for (what, shape) in [
            ("nothing", at(0, 0, 0)),
            ("longer than its file", at(0, SIZE + 4096, 0)),
            ("beyond its file", at(0, SIZE, 4096)),
            ("an offset that overflows", at(0, SIZE, u64::MAX - 4095)),
            ("an address that overflows", at(u64::MAX - 4095, SIZE, 0)),
            ("an address beyond all", at(1 << 62, SIZE, 0)),
            ("half pages", at(0x800, SIZE - 0x800, 0)),
            ("half a page", at(0, 0x800, 0)),
            ("an offset in a page", at(0, 0x1000, 0x10)),
            ("endless", at(0, u64::MAX, 0)),
            ("endless, in pages", at(0, u64::MAX - 4095, 0)),
        ] {
            refused(world, what, SET_MEM_TABLE, &table(&[shape]), &[good.as_fd()]);
            refused(world, what, ADD_MEM_REG, &region(shape), &[good.as_fd()]);
        }
        let half = SIZE / 2;
        for (what, regions) in [
            ("the same twice", [all, all]),
            ("two at one address", [at(0, half, 0), at(0, half, half)]),
            ("two that overlap", [at(0, half, 0), at(half - 4096, half, half)]),
        ] {
            refused(world, what, SET_MEM_TABLE, &table(&regions), &[good.as_fd(), other.as_fd()]);
        }
        let (two, one) = ([at(0, half, 0), at(half, half, half)], [all]);
        refused(world, "a file too few", SET_MEM_TABLE, &table(&two), &[good.as_fd()]);
        refused(world, "a file too many", SET_MEM_TABLE, &table(&one), &[good.as_fd(), other.as_fd()]);
        refused(world, "no file", SET_MEM_TABLE, &table(&one), &[]);
        refused(world, "no file", ADD_MEM_REG, &region(all), &[]);
        refused(world, "two files", ADD_MEM_REG, &region(all), &[good.as_fd(), other.as_fd()]);
        refused(world, "no region", SET_MEM_TABLE, &table(&[]), &[]);
        let many: Vec<_> = (0..33).map(|n| at(n * 4096, 4096, n * 4096)).collect();
        let files = vec![good.as_fd(); 33];
        refused(world, "more regions than fit", SET_MEM_TABLE, &table(&many), &files);
        let mut counts_more = table(&one);
        counts_more[0] = 2;
        refused(
            world,
            "a region that is not there",
            SET_MEM_TABLE,
            &counts_more,
            &[good.as_fd(), good.as_fd()],
        );
        counts_more[..4].copy_from_slice(&u32::MAX.to_le_bytes());
        refused(world, "regions that are not there", SET_MEM_TABLE, &counts_more, &[good.as_fd()]);
        refused_with_memory(world, "what is there", ADD_MEM_REG, &region(all), &[good.as_fd()]);
        refused_with_memory(
            world,
            "over what is there",
            ADD_MEM_REG,
            &region(at(SIZE - 4096, 8192, 0)),
            &[good.as_fd()],
        );
        for (what, shape) in [
            ("another length", at(0, SIZE / 2, 0)),
            ("another address", at(4096, SIZE, 0)),
            ("another user address", [0, SIZE, USER + 1, 0]),
            ("nothing", at(0, 0, 0)),
        ] {
            refused_with_memory(world, what, REM_MEM_REG, &region(shape), &[]);
        }
        refused(world, "what was never added", REM_MEM_REG, &region(all), &[]);
    });
}

#[test]
fn rings_that_will_not_do_are_refused() {
    let world = World::new();
    let kick: OwnedFd = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
    let address = |index: u32, parts: [u64; 3]| {
        let [descriptor, used, available] = parts;
        [halves(&[index, 0]), words(&[descriptor, used, available, 0])].concat()
    };
    let good = [USER, USER + 8192, USER + 4096];
    twice(&world, |world| {
        for index in [2, 3, 255, 256, 65_536, u32::MAX] {
            for (request, payload) in [
                (SET_VRING_NUM, halves(&[index, 64])),
                (SET_VRING_BASE, halves(&[index, 0])),
                (SET_VRING_ENABLE, halves(&[index, 1])),
                (GET_VRING_BASE, halves(&[index, 0])),
                (SET_VRING_ADDR, address(index, good)),
            ] {
                refused_with_memory(
                    world,
                    &format!("ring {index}, request {request}"),
                    request,
                    &payload,
                    &[],
                );
            }
            for request in [SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR] {
                let payload = words(&[u64::from(index)]);
                if index != 256 && index != 65_536 {
                    refused_with_memory(world, &format!("ring {index}"), request, &payload, &[kick.as_fd()]);
                }
            }
        }
        for num in [0, 3, 1000, 2048, 32_768, 65_535, 65_536, u32::MAX] {
            let what = format!("{num} descriptors");
            refused_with_memory(world, &what, SET_VRING_NUM, &halves(&[0, num]), &[]);
        }
        refused_with_memory(world, "a base of 17 bits", SET_VRING_BASE, &halves(&[0, 65_536]), &[]);
        refused_with_memory(world, "enabled twice over", SET_VRING_ENABLE, &halves(&[0, 2]), &[]);
        refused(world, "rings before memory", SET_VRING_ADDR, &address(0, good), &[]);
        for (what, parts) in [
            ("descriptors nowhere", [USER + SIZE, good[1], good[2]]),
            ("used nowhere", [good[0], 0, good[2]]),
            ("available nowhere", [good[0], good[1], u64::MAX - 1]),
            ("below", [USER - 16, good[1], good[2]]),
            ("descriptors askew", [USER + 8, good[1], good[2]]),
            ("used askew", [good[0], good[1] + 2, good[2]]),
            ("available askew", [good[0], good[1], good[2] + 1]),
        ] {
            refused_with_memory(world, what, SET_VRING_ADDR, &address(0, parts), &[]);
        }
        refused_with_memory(world, "a kick without a file", SET_VRING_KICK, &words(&[0]), &[]);
        refused_with_memory(world, "a kick that is none", SET_VRING_KICK, &words(&[0x100]), &[]);
        refused_with_memory(world, "two kicks", SET_VRING_KICK, &words(&[0]), &[kick.as_fd(), kick.as_fd()]);
        refused_with_memory(world, "a log", SET_LOG_BASE, &words(&[SIZE, 0]), &[kick.as_fd()]);
    });
}

#[test]
fn a_ring_over_the_end_of_memory_rests() {
    let world = World::new();
    twice(&world, |world| {
        for parts in [
            [USER + SIZE - 16, USER + 8192, USER + 4096],
            [USER, USER + SIZE - 4, USER + 4096],
            [USER, USER + 8192, USER + SIZE - 2],
        ] {
            let (raw, _memory) = set_up(world, parts);
            // It may be refused by the end, or it never works; either way nothing of it is touched.
            raw.leaves();
        }
    });
}

/// A ring that was set up with these parts and kicked.
fn set_up(world: &World, [descriptor, used, available]: [u64; 3]) -> (Raw, GuestFile) {
    let memory = GuestFile::memfd("hostile", SIZE).unwrap();
    let kick = rustix::event::eventfd(1, rustix::event::EventfdFlags::CLOEXEC).unwrap();
    let raw = Raw::greeted(&world.path());
    raw.says(SET_MEM_TABLE, &table(&[at(0, SIZE, 0)]), &[memory.as_fd()]);
    raw.says(SET_VRING_NUM, &halves(&[0, ENTRIES.into()]), &[]);
    raw.says(SET_VRING_BASE, &halves(&[0, 0]), &[]);
    let address = [halves(&[0, 0]), words(&[descriptor, used, available, 0])].concat();
    raw.says(SET_VRING_ADDR, &address, &[]);
    raw.says(SET_VRING_KICK, &words(&[0]), &[kick.as_fd()]);
    raw.says(SET_VRING_ENABLE, &halves(&[0, 1]), &[]);
    (raw, memory)
}

#[test]
fn kicks_and_calls_that_are_no_eventfds_harm_nobody() {
    let world = World::new();
    let plain: OwnedFd = tempfile::tempfile().unwrap().into();
    let null: OwnedFd = File::open("/dev/null").unwrap().into();
    let directory: OwnedFd = File::open("/").unwrap().into();
    let (pipe, _keep) = rustix::pipe::pipe().unwrap();
    let (_other, full) = rustix::pipe::pipe().unwrap();
    rustix::fs::fcntl_setfl(&full, rustix::fs::OFlags::NONBLOCK).unwrap();
    while rustix::io::write(&full, &[0; 4096]).is_ok() {}
    rustix::fs::fcntl_setfl(&full, rustix::fs::OFlags::empty()).unwrap();
    let most = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
    rustix::io::write(&most, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    let epoll: OwnedFd = rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC).unwrap();
    let fds = [&plain, &null, &directory, &pipe, &full, &most, &epoll];
    twice(&world, |world| {
        for kick in fds {
            for call in fds {
                let mut guest = world.guest();
                guest.request(0, 0, FLUSH, 0, &[]);
                let raw = Raw::over(&guest.socket);
                raw.send(SET_VRING_CALL, VERSION, &words(&[0]), &[call.as_fd()]);
                raw.send(SET_VRING_ERR, VERSION, &words(&[0]), &[call.as_fd()]);
                // Its ring runs: this may be refused, by the end.
                raw.send(SET_VRING_KICK, VERSION, &words(&[0]), &[kick.as_fd()]);
                drop(guest);
            }
        }
    });
}

#[test]
fn what_was_not_offered_is_not_taken() {
    let world = World::new();
    twice(&world, |world| {
        for bit in 0..64 {
            let raw = Raw::connect(&world.path());
            let offered = raw.asks(GET_FEATURES, &[]);
            let offered = u64::from_le_bytes(offered.try_into().unwrap());
            let protocol = raw.asks(GET_PROTOCOL_FEATURES, &[]);
            raw.send(SET_FEATURES, VERSION, &words(&[offered]), &[]);
            raw.send(SET_PROTOCOL_FEATURES, VERSION, &protocol, &[]);
            let protocol = u64::from_le_bytes(protocol.try_into().unwrap());
            let came = raw.says(SET_FEATURES, &words(&[offered | 1 << bit]), &[]);
            assert_eq!(came.is_no(), offered & 1 << bit == 0, "feature {bit}: {came:?}");
            raw.leaves();
            if protocol & 1 << bit == 0 {
                refused(
                    world,
                    "a protocol feature",
                    SET_PROTOCOL_FEATURES,
                    &words(&[protocol | 1 << bit]),
                    &[],
                );
            }
        }
    });
}

#[test]
fn a_configuration_that_is_not_there_is_refused() {
    let world = World::new();
    twice(&world, |world| {
        let asked =
            |offset: u32, size: u32| [halves(&[offset, size, 0]), vec![0; size.min(300) as usize]].concat();
        for (offset, size) in [(0, 0), (256, 1), (0, 257), (u32::MAX, 1), (1, u32::MAX), (255, 2), (0, 4096)]
        {
            let raw = Raw::greeted(&world.path());
            assert!(raw.send(GET_CONFIG, VERSION, &asked(offset, size), &[]));
            match raw.hears() {
                Came::End => {}
                // The protocol's own way to say no: an empty one.
                Came::Reply(bytes) => assert!(bytes.len() <= 12, "{offset}+{size}: {bytes:?}"),
            }
            raw.leaves();
        }
        for (offset, bytes) in
            [(0, &[1][..]), (32, &[2]), (32, &[]), (32, &[1, 1]), (u32::MAX, &[1]), (33, &[0])]
        {
            let payload = [halves(&[offset, bytes.len() as u32, 0]), bytes.to_vec()].concat();
            refused(world, &format!("{offset}: {bytes:?}"), SET_CONFIG, &payload, &[]);
        }
    });
}

#[test]
fn memory_for_what_is_in_flight_that_will_not_do_is_refused() {
    let world = World::new();
    let good = memfd(1 << 20);
    rustix::fs::fcntl_add_seals(&good, rustix::fs::SealFlags::SHRINK).unwrap();
    let unsealed = memfd(1 << 20);
    let (pipe, _keep) = rustix::pipe::pipe().unwrap();
    let asked = |size: u64, offset: u64, queues: u16, len: u16| {
        let mut bytes = words(&[size, offset]);
        bytes.extend(queues.to_le_bytes());
        bytes.extend(len.to_le_bytes());
        bytes.resize(24, 0);
        bytes
    };
    twice(&world, |world| {
        for (size, offset, queues, len) in [
            (0, 0, 2, 64),
            (1 << 20, 1 << 20, 2, 64),
            (1 << 20, u64::MAX, 2, 64),
            (1 << 20, 3, 2, 64),
            (u64::MAX, 0, u16::MAX, u16::MAX),
            (1 << 20, 0, 0, 64),
            (100, 0, 2, 64),
        ] {
            let payload = asked(size, offset, queues, len);
            let what = format!("{size} {offset} {queues} {len}");
            refused(world, &what, SET_INFLIGHT_FD, &payload, &[good.as_fd()]);
        }
        refused(world, "it can shrink", SET_INFLIGHT_FD, &asked(1 << 20, 0, 2, 64), &[unsealed.as_fd()]);
        refused(world, "a pipe", SET_INFLIGHT_FD, &asked(1 << 20, 0, 2, 64), &[pipe.as_fd()]);
        refused(world, "no file", SET_INFLIGHT_FD, &asked(1 << 20, 0, 2, 64), &[]);
        for (queues, len) in [(0, 64), (3, 64), (2, 1025), (u16::MAX, u16::MAX)] {
            let raw = Raw::greeted(&world.path());
            assert!(raw.send(GET_INFLIGHT_FD, VERSION, &asked(0, 0, queues, len), &[]));
            assert_eq!(raw.hears(), Came::End, "{queues} {len}");
            raw.leaves();
        }
    });
}

/// Memory for what is in flight that is full of nonsense: heads that are none, counters at their ends.
#[test]
fn nonsense_in_flight_harms_nobody() {
    let world = World::new();
    for (nth, word) in [u64::MAX, 1, 0x0101_0101_0101_0101, 1 << 63, 0x1_0001].into_iter().enumerate() {
        let mut guest = Guest::connect(&world.path(), 2);
        guest.greet().unwrap();
        guest.frontend.set_mem_table(&[guest.region()]).unwrap();
        let fd = memfd(1 << 20);
        rustix::fs::fcntl_add_seals(&fd, rustix::fs::SealFlags::SHRINK).unwrap();
        let mut bytes = word.to_le_bytes().repeat(1 << 14);
        if nth % 2 == 0 {
            // As if an earlier back-end had written it, in each queue's part (64 bytes and 16 for each descriptor).
            for part in 0..2 {
                bytes[part * 1088 + 8..][..2].copy_from_slice(&1u16.to_le_bytes());
            }
        }
        rustix::io::write(&fd, &bytes).unwrap();
        let file = File::from(fd);
        let inflight = vhost::vhost_user::message::VhostUserInflight::new(1 << 20, 0, 2, ENTRIES);
        guest.inflight = Some((inflight, file));
        guest.track();
        let _ = (0..2).try_for_each(|ring| guest.start_ring(ring));
        guest.kick(0);
        drop(guest);
        serves(&world);
    }
}

#[test]
fn messages_of_wrong_sizes_and_unknown_ones_are_refused() {
    let world = World::new();
    twice(&world, |world| {
        for request in 0..=LAST + 3 {
            for payload in [0, 1, 7, 8, 9, 16, 24, 40, 41, 300, 4096] {
                let raw = Raw::greeted(&world.path());
                raw.send(request, VERSION, &vec![0xa5; payload], &[]);
                raw.leaves();
            }
        }
        for request in [u32::MAX, 1 << 31, 1000] {
            refused(world, "an unknown request", request, &[], &[]);
        }
        for flags in [0, 2, 3, VERSION | 4, u32::MAX] {
            let raw = Raw::greeted(&world.path());
            raw.send(GET_FEATURES, flags, &[], &[]);
            raw.leaves();
        }
        // A size that is not what comes.
        for size in [1, 4097, 0x7fff_ffff, u32::MAX] {
            let raw = Raw::greeted(&world.path());
            raw.bytes(&halves(&[SET_FEATURES, VERSION, size]), &[]);
            raw.leaves();
        }
    });
}

#[test]
fn files_that_nobody_asked_for_are_closed() {
    let world = World::new();
    let file = memfd(4096);
    twice(&world, |world| {
        for request in [GET_FEATURES, SET_OWNER, SET_FEATURES, SET_VRING_NUM, GET_CONFIG, REM_MEM_REG, 999] {
            for count in [1, 8, 32, 33, 253] {
                let raw = Raw::greeted(&world.path());
                raw.send(request, VERSION, &[0; 8], &vec![file.as_fd(); count]);
                raw.leaves();
            }
        }
    });
}

#[test]
fn half_a_message_and_silence_keep_nobody() {
    let world = World::new();
    for cut in 0..12 {
        let raw = Raw::greeted(&world.path());
        raw.bytes(&halves(&[SET_MEM_TABLE, VERSION, 40])[..cut], &[]);
        raw.leaves();
    }
    let raw = Raw::greeted(&world.path());
    raw.bytes(&halves(&[SET_MEM_TABLE, VERSION, 40, 1]), &[]);
    raw.leaves();
    serves(&world);
    // And one that stays: the door shuts all the same.
    let silent = Raw::greeted(&world.path());
    silent.bytes(&halves(&[SET_MEM_TABLE, VERSION, 40, 1]), &[]);
    let begun = Instant::now();
    drop(world);
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    silent.leaves();
}

#[test]
fn what_is_said_while_rings_run_changes_nothing_under_them() {
    let world = World::new();
    twice(&world, |world| {
        let moved =
            [halves(&[0, 0]), words(&[USER + 0x8_0000, USER + 0x8_2000, USER + 0x8_1000, 0])].concat();
        for (what, request, payload) in [
            ("their size", SET_VRING_NUM, halves(&[0, 32])),
            ("their base", SET_VRING_BASE, halves(&[0, 7])),
            ("their place", SET_VRING_ADDR, moved),
        ] {
            let guest = world.guest();
            let came = Raw::over(&guest.socket).says(request, &payload, &[]);
            assert!(came.is_no(), "{what}: {came:?}");
        }
        for (request, payload) in [(RESET_DEVICE, vec![]), (RESET_OWNER, vec![]), (SET_OWNER, vec![])] {
            let guest = world.guest();
            Raw::over(&guest.socket).says(request, &payload, &[]);
        }
    });
}

#[test]
fn many_connections_leave_nothing_behind() {
    let world = World::new();
    let come_and_go = |rounds: u32| {
        for round in 0..rounds {
            let raw = Raw::greeted(&world.path());
            let memory = GuestFile::memfd("hostile", SIZE).unwrap();
            raw.says(SET_MEM_TABLE, &table(&[at(0, SIZE, 0)]), &[memory.as_fd()]);
            if round % 3 == 0 {
                raw.says(ADD_MEM_REG, &region(at(0, SIZE, 0)), &[memory.as_fd()]);
            }
            raw.leaves();
        }
    };
    come_and_go(50);
    serves(&world);
    world.control().status().unwrap();
    let (files, memory) = (open_files(), resident());
    come_and_go(500);
    serves(&world);
    is_clean(&world, files);
    let more = resident().saturating_sub(memory);
    assert!(more < 8192, "500 connections have taken {more} KiB");
}

/// The door is shut in spite of a front-end that leaves it waiting.
#[test]
fn a_front_end_that_says_or_reads_nothing_more_keeps_no_door_open() {
    let stops_inside_a_header = |world: &World| {
        let raw = Raw::greeted(&world.path());
        assert!(raw.bytes(&halves(&[GET_FEATURES])[..3], &[]));
        raw
    };
    let reads_no_answers = |world: &World| {
        let raw = Raw::greeted(&world.path());
        raw.says_until_nobody_reads(GET_FEATURES);
        raw
    };
    type Front = fn(&World) -> Raw;
    for (what, front) in [
        ("stops inside a header", stops_inside_a_header as Front),
        ("reads no answers", reads_no_answers as Front),
    ] {
        let mut world = World::new();
        let raw = front(&world);
        let (door, (shut, is_shut)) = (world.door.take(), std::sync::mpsc::channel());
        let shutting = std::thread::spawn(move || {
            drop(door);
            let _ = shut.send(());
        });
        let ended = is_shut.recv_timeout(Duration::from_secs(60));
        // Lets a door that still waits go.
        drop(raw);
        shutting.join().unwrap();
        assert!(ended.is_ok(), "a front-end that {what} keeps it open");
    }
}
