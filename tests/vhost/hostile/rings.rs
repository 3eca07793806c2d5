//! Guests that write invalid data into their rings. One worker serves both rings, the first before the second: once a request of
//! the second ring is answered, the first ring was processed.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use passgate_sim::nvme::{self as sim, CommandFilter, FaultAction};
use vhost::{VhostBackend, VringConfigData};

use super::{assert_no_dma_faults, assert_serves, assert_serves_guest};
use crate::guest::{
    DATA_GPA, Desc, FLUSH, GET_ID, Guest, IN, INDIRECT, IOERR, MEMORY_BYTES, NEXT, OK, QUEUE_SIZE, UNTOUCHED,
    USER_ADDR, WRITE,
};
use crate::world::{Setup, World};

/// The guest-physical address of indirect descriptor tables.
const INDIRECT_TABLE_GPA: u64 = 0x18_0000;
/// A guest-physical address without memory.
const UNMAPPED_GPA: u64 = 1 << 40;

/// Starts a back-end whose drive has one queue, and so one worker.
fn world_with_one_worker() -> World {
    let drive = sim::Options { queues: 1, ..Setup::default().drive };
    World::with(Setup { drive, ..Setup::default() })
}

fn desc(addr: u64, len: u32, flags: u16, next: u16) -> Desc {
    Desc { addr, len, flags, next }
}

/// The expected result of a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Expected {
    /// It is used, with this status.
    Status(u8),
    /// It is used, and no status is written.
    UsedOnly,
    /// Its ring stops, and it is not used.
    RingStops,
}
use Expected::{RingStops, Status, UsedOnly};

/// Lets `write` make a chain available that begins at descriptor 0 of ring 0, and asserts its result and that the other ring is
/// served.
#[track_caller]
fn check_chain(world: &World, case: &str, expected: Expected, write: impl FnOnce(&mut Guest)) {
    let mut guest = world.guest();
    guest.write_header(0, 0, IN, 8);
    write(&mut guest);
    guest.kick(0);
    assert_eq!(guest.run_request(1, IN, 0, &[(DATA_GPA + 0x10_0000, 512)]), OK, "{case}: the other ring");
    match expected {
        Status(status) => {
            let used = guest.await_used(0, 1);
            assert_eq!((used[0].0, guest.status(0, 0)), (0, status), "{case}");
        }
        UsedOnly => assert_eq!(guest.await_used(0, 1)[0].0, 0, "{case}"),
        RingStops => {
            assert_eq!(guest.used(0), [], "{case}");
            assert_eq!(guest.status(0, 0), UNTOUCHED, "{case}");
            // The ring works when it is set up again.
            let base = guest.frontend.get_vring_base(0).unwrap();
            assert!(base <= u32::from(u16::MAX), "{case}");
            let used = guest.rings[0].used;
            guest.set_avail(0, used);
            guest.start_ring(0).unwrap();
            assert_serves_guest(world, &mut guest);
        }
    }
}

/// Makes a chain of these descriptors available.
fn add_chain(guest: &mut Guest, descs: &[(u64, u32, u16)]) {
    write_chain(guest, descs, |guest, index, desc| guest.write_descriptor(0, index, desc));
    guest.make_available(0, 0);
}

fn write_chain(guest: &Guest, descs: &[(u64, u32, u16)], write: impl Fn(&Guest, u16, Desc)) {
    for (index, (addr, len, flags)) in descs.iter().enumerate() {
        let last = index + 1 == descs.len();
        let flags = if last { *flags } else { flags | NEXT };
        write(guest, index as u16, desc(*addr, *len, flags, index as u16 + 1));
    }
}

/// Makes a chain of these descriptors in an indirect table available.
fn add_indirect_chain(guest: &mut Guest, descs: &[(u64, u32, u16)]) {
    write_chain(guest, descs, |guest, index, desc| {
        guest.write_descriptor_at(INDIRECT_TABLE_GPA, index, desc)
    });
    guest.write_descriptor(0, 0, desc(INDIRECT_TABLE_GPA, descs.len() as u32 * 16, INDIRECT, 0));
    guest.make_available(0, 0);
}

#[test]
fn invalid_chain_stops_only_its_ring() {
    let world = world_with_one_worker();
    let (header, status) = world.guest().header_and_status(0, 0);
    let (head, tail) = ((header, 16, 0), (status, 1, WRITE));
    let data = (DATA_GPA, 512, WRITE);
    check_chain(&world, "a loop of one", RingStops, |guest| {
        guest.write_descriptor(0, 0, desc(header, 16, NEXT, 0));
        guest.make_available(0, 0);
    });
    check_chain(&world, "a loop of three", RingStops, |guest| {
        guest.write_descriptor(0, 0, desc(header, 16, NEXT, 1));
        guest.write_descriptor(0, 1, desc(DATA_GPA, 512, NEXT | WRITE, 2));
        guest.write_descriptor(0, 2, desc(DATA_GPA, 512, NEXT | WRITE, 1));
        guest.make_available(0, 0);
    });
    for next in [QUEUE_SIZE, 1000, u16::MAX] {
        check_chain(&world, "a next one outside the table", RingStops, |guest| {
            guest.write_descriptor(0, 0, desc(header, 16, NEXT, next));
            guest.make_available(0, 0);
        });
    }
    for head in [QUEUE_SIZE, 1000, u16::MAX] {
        check_chain(&world, "a head outside the table", RingStops, |guest| guest.make_available(0, head));
    }
    for more in [QUEUE_SIZE + 1, 1000, u16::MAX] {
        check_chain(&world, "more on offer than there are", RingStops, |guest| {
            add_chain(guest, &[head, data, tail]);
            guest.set_avail(0, guest.rings[0].used.wrapping_add(more));
        });
    }
    check_chain(&world, "an indirect table in one", RingStops, |guest| {
        add_indirect_chain(guest, &[head, (INDIRECT_TABLE_GPA + 0x1000, 32, INDIRECT)]);
    });
    check_chain(&world, "an indirect table with a next one", RingStops, |guest| {
        add_indirect_chain(guest, &[head, data, tail]);
        guest.write_descriptor(0, 0, desc(INDIRECT_TABLE_GPA, 48, INDIRECT | NEXT, 1));
    });
    for len in [0, 1, 15, 24, 47, u32::MAX] {
        check_chain(&world, &format!("an indirect table of {len} bytes"), RingStops, |guest| {
            add_indirect_chain(guest, &[head, data, tail]);
            guest.write_descriptor(0, 0, desc(INDIRECT_TABLE_GPA, len, INDIRECT, 0));
        });
    }
    check_chain(&world, "an indirect loop", RingStops, |guest| {
        add_indirect_chain(guest, &[head, data, tail]);
        guest.write_descriptor_at(INDIRECT_TABLE_GPA, 2, desc(DATA_GPA, 512, NEXT | WRITE, 1));
    });
    check_chain(&world, "a next one outside the indirect table", RingStops, |guest| {
        add_indirect_chain(guest, &[head, data, tail]);
        guest.write_descriptor(0, 0, desc(INDIRECT_TABLE_GPA, 32, INDIRECT, 0));
    });
    for (case, table) in [
        ("a table nowhere", UNMAPPED_GPA),
        ("a table at the end of all addresses", u64::MAX - 15),
        ("a table over the end of memory", MEMORY_BYTES - 16),
    ] {
        check_chain(&world, case, RingStops, |guest| {
            if table < MEMORY_BYTES {
                guest.write_descriptor_at(table, 0, desc(header, 16, NEXT, 1));
            }
            guest.write_descriptor(0, 0, desc(table, 48, INDIRECT, 0));
            guest.make_available(0, 0);
        });
    }
    check_chain(&world, "what is read behind what is written", RingStops, |guest| {
        add_chain(guest, &[data, head, tail]);
    });
    check_chain(&world, "no status", RingStops, |guest| add_chain(guest, &[head]));
    check_chain(&world, "no status but data to be read", RingStops, |guest| {
        add_chain(guest, &[head, (DATA_GPA, 512, 0)])
    });
    check_chain(&world, "a status of no byte", RingStops, |guest| {
        add_chain(guest, &[head, (status, 0, WRITE)])
    });
    check_chain(&world, "addresses that overflow", RingStops, |guest| {
        add_chain(guest, &[head, (u64::MAX - 255, 512, WRITE), tail]);
    });
    check_chain(&world, "as many descriptors as a chain may have, and one", RingStops, |guest| {
        let mut descs = vec![(header, 1, 0); 1024];
        descs.push(tail);
        add_indirect_chain(guest, &descs);
    });
    assert_serves(&world);
}

#[test]
fn impossible_requests_are_answered_with_error() {
    let world = world_with_one_worker();
    let (header, status) = world.guest().header_and_status(0, 0);
    let (head, tail) = ((header, 16, 0), (status, 1, WRITE));
    for (case, expected, descs) in [
        ("half a header", Status(IOERR), vec![(header, 8, 0), tail]),
        ("no header", Status(IOERR), vec![tail]),
        ("a header nowhere", Status(IOERR), vec![(UNMAPPED_GPA, 16, 0), (DATA_GPA, 512, WRITE), tail]),
        (
            "half of a header nowhere",
            Status(IOERR),
            vec![(header, 8, 0), (UNMAPPED_GPA, 8, 0), (DATA_GPA, 512, WRITE), tail],
        ),
        ("data nowhere", Status(IOERR), vec![head, (UNMAPPED_GPA, 512, WRITE), tail]),
        ("data over the end", Status(IOERR), vec![head, (MEMORY_BYTES - 512, 1024, WRITE), tail]),
        (
            "some data nowhere",
            Status(IOERR),
            vec![head, (DATA_GPA, 512, WRITE), (UNMAPPED_GPA, 512, WRITE), tail],
        ),
        ("a read into what may not be written", Status(IOERR), vec![head, (DATA_GPA, 512, 0), tail]),
        ("data of 4 GiB", Status(IOERR), vec![head, (DATA_GPA, u32::MAX, WRITE), tail]),
        (
            "data of 16 GiB",
            Status(IOERR),
            vec![
                head,
                (DATA_GPA, u32::MAX - 511, WRITE),
                (0, u32::MAX - 511, WRITE),
                (0, u32::MAX - 511, WRITE),
                (0, u32::MAX - 511, WRITE),
                tail,
            ],
        ),
        ("a status nowhere", UsedOnly, vec![head, (DATA_GPA, 512, WRITE), (UNMAPPED_GPA, 1, WRITE)]),
        ("a status over the end", UsedOnly, vec![head, (DATA_GPA, 512, WRITE), (MEMORY_BYTES - 1, 2, WRITE)]),
    ] {
        check_chain(&world, case, expected, |guest| add_chain(guest, &descs));
    }
    assert_no_dma_faults(&world);
    assert_serves(&world);
}

#[test]
fn requests_may_be_split_into_any_descriptors() {
    let world = world_with_one_worker();
    let (header, status) = world.guest().header_and_status(0, 0);
    let tail = (status, 1, WRITE);
    let pattern: Vec<u8> = (0..126 * 512).map(|n| (n / 512 + n) as u8).collect();
    world.sim.medium().write(8, &pattern);
    let bytes: Vec<_> = (0..16).map(|n| (header + n, 1, 0)).collect();
    check_chain(&world, "a header byte by byte", Status(OK), |guest| {
        add_chain(guest, &[&bytes[..], &[(DATA_GPA, 512, WRITE), tail]].concat());
    });
    check_chain(&world, "pieces of no byte", Status(OK), |guest| {
        let none = |flags| (UNMAPPED_GPA, 0, flags);
        add_chain(
            guest,
            &[
                none(0),
                (header, 16, 0),
                none(0),
                none(WRITE),
                (DATA_GPA, 512, WRITE),
                none(WRITE),
                tail,
                none(WRITE),
            ],
        );
    });
    let mut guest = world.guest();
    let pieces = |count: u64, stride: u64| {
        (0..count).map(move |n| (DATA_GPA + n * stride, 512, WRITE)).collect::<Vec<_>>()
    };
    for (count, stride) in [(125, 512), (126, 512), (126, 1024), (126, 4096)] {
        guest.write_header(0, 0, IN, 8);
        guest.memory.write(DATA_GPA, &vec![0; 126 * 4096]).unwrap();
        add_indirect_chain(&mut guest, &[&[(header, 16, 0)][..], &pieces(count, stride), &[tail]].concat());
        guest.kick(0);
        assert_eq!(guest.await_used(0, 1), [(0, count as u32 * 512 + 1)], "{count} pieces, {stride} apart");
        assert_eq!(guest.status(0, 0), OK, "{count} pieces, {stride} apart");
        for n in 0..count {
            let mut read = [0; 512];
            guest.memory.read(DATA_GPA + n * stride, &mut read).unwrap();
            assert_eq!(read[..], pattern[n as usize * 512..][..512], "piece {n} of {count}, {stride} apart");
        }
    }
    for count in [127, 128, 129, 500, 1000, 1021] {
        guest.write_header(0, 0, IN, 8);
        add_indirect_chain(&mut guest, &[&[(header, 16, 0)][..], &pieces(count, 512), &[tail]].concat());
        guest.kick(0);
        assert_eq!(guest.await_used(0, 1).len(), 1);
        assert_eq!(guest.status(0, 0), IOERR, "{count} pieces");
    }
    // Data and status in one descriptor.
    guest.write_header(0, 0, IN, 8);
    guest.memory.write(DATA_GPA, &[UNTOUCHED; 514]).unwrap();
    add_chain(&mut guest, &[(header, 16, 0), (DATA_GPA, 513, WRITE)]);
    guest.kick(0);
    assert_eq!(guest.await_used(0, 1), [(0, 513)]);
    let mut read = [0; 514];
    guest.memory.read(DATA_GPA, &mut read).unwrap();
    assert_eq!((&read[..512], &read[512..]), (&pattern[..512], &[OK, UNTOUCHED][..]));
    assert_serves_guest(&world, &mut guest);
}

#[test]
fn duplicate_head_stops_its_ring() {
    let world = world_with_one_worker();
    let mut guest = world.guest();
    world.sim.fault(CommandFilter::io(sim::opcode::READ), FaultAction::StallData);
    guest.request(0, 0, IN, 0, &[(DATA_GPA, 512)]);
    guest.kick(0);
    assert!(world.sim.await_stalled(1, std::time::Duration::from_secs(20)));
    guest.make_available(0, 0);
    guest.request(0, 8, IN, 8, &[(DATA_GPA + 4096, 512)]);
    guest.kick(0);
    assert_eq!(guest.run_request(1, FLUSH, 0, &[]), OK);
    assert_eq!((guest.status(0, 8), guest.used(0)), (UNTOUCHED, vec![]));
    world.sim.release();
    assert_eq!(guest.await_used(0, 1), [(0, 513)]);
    assert_eq!(guest.status(0, 0), OK, "the request at the drive must be answered");
    drop(guest);
    assert_serves(&world);
}

#[test]
fn descriptors_are_read_once() {
    let world = world_with_one_worker();
    let mut guest = world.guest();
    let (header, status) = guest.header_and_status(0, 0);
    let pattern = vec![0x5a; 4096];
    world.sim.medium().write(8, &pattern);
    guest.memory.write(DATA_GPA, &[0; 0x2_0000]).unwrap();
    world.sim.fault(CommandFilter::io(sim::opcode::READ), FaultAction::StallData);
    guest.request(0, 0, IN, 8, &[(DATA_GPA, 4096)]);
    guest.kick(0);
    assert!(world.sim.await_stalled(1, std::time::Duration::from_secs(20)));
    // Other addresses, another status, another type, another length, and an invalid chain.
    guest.write_descriptor(0, 0, desc(UNMAPPED_GPA, 16, NEXT, 0));
    guest.write_descriptor(0, 1, desc(DATA_GPA + 0x1_0000, 512, NEXT | WRITE, 1));
    guest.write_descriptor(0, 2, desc(DATA_GPA + 0x1_8000, 1, WRITE, 0));
    guest.memory.write(header, &[0xff; 16]).unwrap();
    world.sim.release();
    assert_eq!(guest.await_used(0, 1), [(0, 4097)]);
    let mut read = vec![0; 0x2_0000];
    guest.memory.read(DATA_GPA, &mut read).unwrap();
    assert_eq!((&read[..4096], &read[4096..]), (&pattern[..], &vec![0; 0x2_0000 - 4096][..]));
    let mut byte = [0];
    guest.memory.read(status, &mut byte).unwrap();
    assert_eq!(byte, [OK]);
    drop(guest);
    assert_serves(&world);
}

/// Another thread rewrites descriptors, headers and rings continuously while requests run.
#[test]
fn concurrent_ring_rewrites_are_harmless() {
    let world = World::new();
    world.sim.medium().write(0, &[0x77; 4096]);
    for seed in 1..6u64 {
        let mut guest = world.guest();
        let stop = std::sync::atomic::AtomicBool::new(false);
        let memory = &guest.memory;
        let copy = passgate_bindings::memory::GuestFile::new(
            std::os::fd::AsFd::as_fd(memory).try_clone_to_owned().unwrap(),
            memory.kind(),
            MEMORY_BYTES,
            true,
        );
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut word = seed;
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    word = word.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    // Offsets in descriptors, available ring, used ring and headers; half of the values are plausible.
                    let at = match word >> 61 {
                        0..3 => (word >> 20) % 1024,
                        3..5 => 4096 + (word >> 20) % 132,
                        5 => 8192 + (word >> 20) % 16,
                        _ => 0x10_0000 + (word >> 20) % 2048,
                    };
                    let bytes =
                        if word & 4 == 0 { word.to_le_bytes() } else { (word & 0xf_f003).to_le_bytes() };
                    let _ = copy.write(at, &bytes[..1 + (word >> 40) as usize % 8]);
                }
            });
            for round in 0..2000u16 {
                let ring = usize::from(round % 2);
                let kind = [IN, FLUSH, GET_ID][usize::from(round % 3)];
                guest.request(ring, round % 60, kind, 0, &[(DATA_GPA, 512)]);
                guest.kick(ring);
            }
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
        });
        drop(guest);
        assert_serves(&world);
    }
    assert_no_dma_faults(&world);
}

/// A guest makes chains available as fast as they are used: its other ring is served, and its front-end can stop the ring.
#[test]
fn endless_offers_do_not_starve_other_ring() {
    let world = world_with_one_worker();
    let mut guest = world.guest();
    // The longest ring with long chains, which take long to read.
    let (table, available, used, length) = (0x40_0000, 0x41_0000, 0x42_0000, 1024u16);
    guest.frontend.get_vring_base(0).unwrap();
    guest.frontend.set_vring_num(0, length).unwrap();
    guest.frontend.set_vring_base(0, 0).unwrap();
    let config = VringConfigData {
        queue_max_size: length,
        queue_size: length,
        flags: 0,
        desc_table_addr: USER_ADDR + table,
        avail_ring_addr: USER_ADDR + available,
        used_ring_addr: USER_ADDR + used,
        log_addr: None,
    };
    guest.frontend.set_vring_addr(0, &config).unwrap();
    guest.write_header(0, 0, 99, 0);
    let (header, status) = guest.header_and_status(0, 0);
    for index in 0..1000 {
        guest.write_descriptor_at(table, index, desc(header, 16, NEXT, index + 1));
    }
    guest.write_descriptor_at(table, 1000, desc(status, 1, WRITE, 0));
    let fd = guest.memory.as_fd().try_clone_to_owned().unwrap();
    let kind = passgate_bindings::identity::identify(&fd).unwrap().kind;
    let memory = passgate_bindings::memory::GuestFile::new(fd, kind, MEMORY_BYTES, true);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // Every entry of the available ring is head 0; a used chain is made available again at once.
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let mut index = [0; 2];
                memory.read(used + 2, &mut index).unwrap();
                let avail_index = u16::from_le_bytes(index).wrapping_add(length);
                memory.write(available + 2, &avail_index.to_le_bytes()).unwrap();
            }
        });
        guest.frontend.set_vring_kick(0, &guest.rings[0].kick).unwrap();
        guest.kick(0);
        let (ended, wait) = std::sync::mpsc::channel();
        let guest = &mut guest;
        scope.spawn(move || {
            let mut index = [0; 2];
            while index == [0; 2] {
                guest.memory.read(used + 2, &mut index).unwrap();
            }
            for _ in 0..5 {
                assert_eq!(guest.run_request(1, IN, 0, &[(DATA_GPA, 512)]), OK);
            }
            guest.frontend.get_vring_base(0).unwrap();
            ended.send(()).unwrap();
        });
        let in_time = wait.recv_timeout(Duration::from_secs(20));
        stop.store(true, Ordering::Relaxed);
        in_time.expect("a ring that is never empty starves the other");
    });
}

/// One ring always has more requests than the drive has entries: the other ring is served, too.
#[test]
fn full_drive_is_shared_between_rings() {
    let drive = sim::Options { queues: 1, entries: 8, ..Setup::default().drive };
    let world = World::with(Setup { drive, ..Setup::default() });
    let mut guest = world.guest();
    world.sim.fault(CommandFilter::any().always(), FaultAction::DelayCompletion(Duration::from_millis(1)));
    let heads = || (0..QUEUE_SIZE - 3).step_by(3);
    for head in heads() {
        guest.request(0, head, IN, 0, &[(DATA_GPA, 512)]);
    }
    guest.kick(0);
    let mut used = guest.await_used(0, 7);
    let mut ended = used.len();
    guest.request(1, 0, IN, 0, &[(DATA_GPA, 512)]);
    guest.kick(1);
    while guest.used(1).is_empty() {
        assert!(ended < 1000, "{ended} requests of the one ring, and none of the other");
        for (head, _) in used {
            guest.request(0, head as u16, IN, 0, &[(DATA_GPA, 512)]);
        }
        guest.kick(0);
        used = guest.await_used(0, 1);
        ended += used.len();
    }
}
