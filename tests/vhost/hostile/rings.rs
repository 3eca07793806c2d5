//! Guests that write nonsense into their rings. Both rings have one worker, which looks at the first before the second:
//! once a request of the second is answered, what lay in the first was looked at.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use passgate_backends::nvme::sim::{self, Does, When};
use vhost::{VhostBackend, VringConfigData};

use super::{serves, serves_this, told_of_memory_only};
use crate::guest::{
    DATA, Desc, ENTRIES, FLUSH, GET_ID, Guest, IN, INDIRECT, IOERR, NEXT, OK, SIZE, UNTOUCHED, USER, WRITE,
};
use crate::world::{Setup, World};

/// Where indirect tables are.
const TABLE: u64 = 0x18_0000;
/// Memory that nobody has.
const NOWHERE: u64 = 1 << 40;

fn one_worker() -> World {
    let drive = sim::Options { queues: 1, ..Setup::default().drive };
    World::with(Setup { drive, ..Setup::default() })
}

fn desc(addr: u64, len: u32, flags: u16, next: u16) -> Desc {
    Desc { addr, len, flags, next }
}

/// What is to come of a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Then {
    /// It has this status.
    Says(u8),
    /// It is told as used, but there is no status.
    Used,
    /// Its ring rests: nobody hears of it.
    Rests,
}
use Then::{Rests, Says, Used};

/// Offers a chain, which begins at descriptor 0 of ring 0, and sees what comes of it; then that all else goes on.
#[track_caller]
fn offered(world: &World, what: &str, then: Then, write: impl FnOnce(&mut Guest)) {
    let mut guest = world.guest();
    guest.write_header(0, 0, IN, 8);
    write(&mut guest);
    guest.kick(0);
    assert_eq!(guest.ask(1, IN, 0, &[(DATA + 0x10_0000, 512)]), OK, "{what}: the other ring");
    match then {
        Says(status) => {
            let used = guest.await_used(0, 1);
            assert_eq!((used[0].0, guest.status(0, 0)), (0, status), "{what}");
        }
        Used => assert_eq!(guest.await_used(0, 1)[0].0, 0, "{what}"),
        Rests => {
            assert_eq!(guest.used(0), [], "{what}");
            assert_eq!(guest.status(0, 0), UNTOUCHED, "{what}");
            // Set up anew, it works.
            let base = guest.frontend.get_vring_base(0).unwrap();
            assert!(base <= u32::from(u16::MAX), "{what}");
            let used = guest.rings[0].used;
            guest.set_avail(0, used);
            guest.start_ring(0).unwrap();
            serves_this(world, &mut guest);
        }
    }
}

/// A chain of these descriptors, each with the next one behind it.
fn chain(guest: &mut Guest, descs: &[(u64, u32, u16)]) {
    write_chain(guest, descs, |guest, index, desc| guest.describe(0, index, desc));
    guest.offer(0, 0);
}

fn write_chain(guest: &Guest, descs: &[(u64, u32, u16)], write: impl Fn(&Guest, u16, Desc)) {
    for (index, (addr, len, flags)) in descs.iter().enumerate() {
        let last = index + 1 == descs.len();
        let flags = if last { *flags } else { flags | NEXT };
        write(guest, index as u16, desc(*addr, *len, flags, index as u16 + 1));
    }
}

/// The same by an indirect table.
fn indirect(guest: &mut Guest, descs: &[(u64, u32, u16)]) {
    write_chain(guest, descs, |guest, index, desc| guest.describe_at(TABLE, index, desc));
    guest.describe(0, 0, desc(TABLE, descs.len() as u32 * 16, INDIRECT, 0));
    guest.offer(0, 0);
}

#[test]
fn chains_that_are_none_rest_their_ring_and_no_other() {
    let world = one_worker();
    let (header, status) = world.guest().places(0, 0);
    let (head, tail) = ((header, 16, 0), (status, 1, WRITE));
    let data = (DATA, 512, WRITE);
    offered(&world, "a loop of one", Rests, |guest| {
        guest.describe(0, 0, desc(header, 16, NEXT, 0));
        guest.offer(0, 0);
    });
    offered(&world, "a loop of three", Rests, |guest| {
        guest.describe(0, 0, desc(header, 16, NEXT, 1));
        guest.describe(0, 1, desc(DATA, 512, NEXT | WRITE, 2));
        guest.describe(0, 2, desc(DATA, 512, NEXT | WRITE, 1));
        guest.offer(0, 0);
    });
    for next in [ENTRIES, 1000, u16::MAX] {
        offered(&world, "a next one outside the table", Rests, |guest| {
            guest.describe(0, 0, desc(header, 16, NEXT, next));
            guest.offer(0, 0);
        });
    }
    for head in [ENTRIES, 1000, u16::MAX] {
        offered(&world, "a head outside the table", Rests, |guest| guest.offer(0, head));
    }
    for more in [ENTRIES + 1, 1000, u16::MAX] {
        offered(&world, "more on offer than there are", Rests, |guest| {
            chain(guest, &[head, data, tail]);
            guest.set_avail(0, guest.rings[0].used.wrapping_add(more));
        });
    }
    offered(&world, "an indirect table in one", Rests, |guest| {
        indirect(guest, &[head, (TABLE + 0x1000, 32, INDIRECT)]);
    });
    offered(&world, "an indirect table with a next one", Rests, |guest| {
        indirect(guest, &[head, data, tail]);
        guest.describe(0, 0, desc(TABLE, 48, INDIRECT | NEXT, 1));
    });
    for len in [0, 1, 15, 24, 47, u32::MAX] {
        offered(&world, &format!("an indirect table of {len} bytes"), Rests, |guest| {
            indirect(guest, &[head, data, tail]);
            guest.describe(0, 0, desc(TABLE, len, INDIRECT, 0));
        });
    }
    offered(&world, "an indirect loop", Rests, |guest| {
        indirect(guest, &[head, data, tail]);
        guest.describe_at(TABLE, 2, desc(DATA, 512, NEXT | WRITE, 1));
    });
    offered(&world, "a next one outside the indirect table", Rests, |guest| {
        indirect(guest, &[head, data, tail]);
        guest.describe(0, 0, desc(TABLE, 32, INDIRECT, 0));
    });
    for (what, table) in [
        ("a table nowhere", NOWHERE),
        ("a table at the end of all addresses", u64::MAX - 15),
        ("a table over the end of memory", SIZE - 16),
    ] {
        offered(&world, what, Rests, |guest| {
            if table < SIZE {
                guest.describe_at(table, 0, desc(header, 16, NEXT, 1));
            }
            guest.describe(0, 0, desc(table, 48, INDIRECT, 0));
            guest.offer(0, 0);
        });
    }
    offered(&world, "what is read behind what is written", Rests, |guest| {
        chain(guest, &[data, head, tail]);
    });
    offered(&world, "no status", Rests, |guest| chain(guest, &[head]));
    offered(&world, "no status but data to be read", Rests, |guest| chain(guest, &[head, (DATA, 512, 0)]));
    offered(&world, "a status of no byte", Rests, |guest| chain(guest, &[head, (status, 0, WRITE)]));
    offered(&world, "addresses that overflow", Rests, |guest| {
        chain(guest, &[head, (u64::MAX - 255, 512, WRITE), tail]);
    });
    offered(&world, "as many descriptors as a chain may have, and one", Rests, |guest| {
        let mut descs = vec![(header, 1, 0); 1024];
        descs.push(tail);
        indirect(guest, &descs);
    });
    serves(&world);
}

#[test]
fn requests_that_cannot_be_are_answered_so() {
    let world = one_worker();
    let (header, status) = world.guest().places(0, 0);
    let (head, tail) = ((header, 16, 0), (status, 1, WRITE));
    for (what, then, descs) in [
        ("half a header", Says(IOERR), vec![(header, 8, 0), tail]),
        ("no header", Says(IOERR), vec![tail]),
        ("a header nowhere", Says(IOERR), vec![(NOWHERE, 16, 0), (DATA, 512, WRITE), tail]),
        (
            "half of a header nowhere",
            Says(IOERR),
            vec![(header, 8, 0), (NOWHERE, 8, 0), (DATA, 512, WRITE), tail],
        ),
        ("data nowhere", Says(IOERR), vec![head, (NOWHERE, 512, WRITE), tail]),
        ("data over the end", Says(IOERR), vec![head, (SIZE - 512, 1024, WRITE), tail]),
        ("some data nowhere", Says(IOERR), vec![head, (DATA, 512, WRITE), (NOWHERE, 512, WRITE), tail]),
        ("a read into what may not be written", Says(IOERR), vec![head, (DATA, 512, 0), tail]),
        ("data of 4 GiB", Says(IOERR), vec![head, (DATA, u32::MAX, WRITE), tail]),
        (
            "data of 16 GiB",
            Says(IOERR),
            vec![
                head,
                (DATA, u32::MAX - 511, WRITE),
                (0, u32::MAX - 511, WRITE),
                (0, u32::MAX - 511, WRITE),
                (0, u32::MAX - 511, WRITE),
                tail,
            ],
        ),
        ("a status nowhere", Used, vec![head, (DATA, 512, WRITE), (NOWHERE, 1, WRITE)]),
        ("a status over the end", Used, vec![head, (DATA, 512, WRITE), (SIZE - 1, 2, WRITE)]),
    ] {
        offered(&world, what, then, |guest| chain(guest, &descs));
    }
    told_of_memory_only(&world);
    serves(&world);
}

#[test]
fn requests_may_be_cut_as_the_guest_likes() {
    let world = one_worker();
    let (header, status) = world.guest().places(0, 0);
    let tail = (status, 1, WRITE);
    let pattern: Vec<u8> = (0..126 * 512).map(|n| (n / 512 + n) as u8).collect();
    world.sim.medium().write(8, &pattern);
    let bytes: Vec<_> = (0..16).map(|n| (header + n, 1, 0)).collect();
    offered(&world, "a header byte by byte", Says(OK), |guest| {
        chain(guest, &[&bytes[..], &[(DATA, 512, WRITE), tail]].concat());
    });
    offered(&world, "pieces of no byte", Says(OK), |guest| {
        let none = |flags| (NOWHERE, 0, flags);
        chain(
            guest,
            &[
                none(0),
                (header, 16, 0),
                none(0),
                none(WRITE),
                (DATA, 512, WRITE),
                none(WRITE),
                tail,
                none(WRITE),
            ],
        );
    });
    let mut guest = world.guest();
    let pieces =
        |count: u64, apart: u64| (0..count).map(move |n| (DATA + n * apart, 512, WRITE)).collect::<Vec<_>>();
    for (count, apart) in [(125, 512), (126, 512), (126, 1024), (126, 4096)] {
        guest.write_header(0, 0, IN, 8);
        guest.memory.write(DATA, &vec![0; 126 * 4096]).unwrap();
        indirect(&mut guest, &[&[(header, 16, 0)][..], &pieces(count, apart), &[tail]].concat());
        guest.kick(0);
        assert_eq!(guest.await_used(0, 1), [(0, count as u32 * 512 + 1)], "{count} pieces, {apart} apart");
        assert_eq!(guest.status(0, 0), OK, "{count} pieces, {apart} apart");
        for n in 0..count {
            let mut read = [0; 512];
            guest.memory.read(DATA + n * apart, &mut read).unwrap();
            assert_eq!(read[..], pattern[n as usize * 512..][..512], "piece {n} of {count}, {apart} apart");
        }
    }
    for count in [127, 128, 129, 500, 1000, 1021] {
        guest.write_header(0, 0, IN, 8);
        indirect(&mut guest, &[&[(header, 16, 0)][..], &pieces(count, 512), &[tail]].concat());
        guest.kick(0);
        assert_eq!(guest.await_used(0, 1).len(), 1);
        assert_eq!(guest.status(0, 0), IOERR, "{count} pieces");
    }
    // Data and status in one piece.
    guest.write_header(0, 0, IN, 8);
    guest.memory.write(DATA, &[UNTOUCHED; 514]).unwrap();
    chain(&mut guest, &[(header, 16, 0), (DATA, 513, WRITE)]);
    guest.kick(0);
    assert_eq!(guest.await_used(0, 1), [(0, 513)]);
    let mut read = [0; 514];
    guest.memory.read(DATA, &mut read).unwrap();
    assert_eq!((&read[..512], &read[512..]), (&pattern[..512], &[OK, UNTOUCHED][..]));
    serves_this(&world, &mut guest);
}

#[test]
fn a_head_that_is_offered_twice_rests_its_ring() {
    let world = one_worker();
    let mut guest = world.guest();
    world.sim.fault(When::io(sim::opcode::READ), Does::HoldData);
    guest.request(0, 0, IN, 0, &[(DATA, 512)]);
    guest.kick(0);
    assert!(world.sim.await_held(1, std::time::Duration::from_secs(20)));
    guest.offer(0, 0);
    guest.request(0, 8, IN, 8, &[(DATA + 4096, 512)]);
    guest.kick(0);
    assert_eq!(guest.ask(1, FLUSH, 0, &[]), OK);
    assert_eq!((guest.status(0, 8), guest.used(0)), (UNTOUCHED, vec![]));
    world.sim.release();
    assert_eq!(guest.await_used(0, 1), [(0, 513)]);
    assert_eq!(guest.status(0, 0), OK, "what was at the drive is answered");
    drop(guest);
    serves(&world);
}

#[test]
fn what_is_rewritten_after_the_kick_is_not_looked_at_again() {
    let world = one_worker();
    let mut guest = world.guest();
    let (header, status) = guest.places(0, 0);
    let pattern = vec![0x5a; 4096];
    world.sim.medium().write(8, &pattern);
    guest.memory.write(DATA, &[0; 0x2_0000]).unwrap();
    world.sim.fault(When::io(sim::opcode::READ), Does::HoldData);
    guest.request(0, 0, IN, 8, &[(DATA, 4096)]);
    guest.kick(0);
    assert!(world.sim.await_held(1, std::time::Duration::from_secs(20)));
    // Another place, another status, another kind, another length, and no chain at all.
    guest.describe(0, 0, desc(NOWHERE, 16, NEXT, 0));
    guest.describe(0, 1, desc(DATA + 0x1_0000, 512, NEXT | WRITE, 1));
    guest.describe(0, 2, desc(DATA + 0x1_8000, 1, WRITE, 0));
    guest.memory.write(header, &[0xff; 16]).unwrap();
    world.sim.release();
    assert_eq!(guest.await_used(0, 1), [(0, 4097)]);
    let mut read = vec![0; 0x2_0000];
    guest.memory.read(DATA, &mut read).unwrap();
    assert_eq!((&read[..4096], &read[4096..]), (&pattern[..], &vec![0; 0x2_0000 - 4096][..]));
    let mut byte = [0];
    guest.memory.read(status, &mut byte).unwrap();
    assert_eq!(byte, [OK]);
    drop(guest);
    serves(&world);
}

/// Another thread rewrites descriptors, headers and ring all the time, while requests run.
#[test]
fn memory_that_never_holds_still_harms_nobody() {
    let world = World::new();
    world.sim.medium().write(0, &[0x77; 4096]);
    for seed in 1..6u64 {
        let mut guest = world.guest();
        let over = std::sync::atomic::AtomicBool::new(false);
        let memory = &guest.memory;
        let copy = passgate_bindings::memory::GuestFile::new(
            std::os::fd::AsFd::as_fd(memory).try_clone_to_owned().unwrap(),
            memory.kind(),
            SIZE,
            true,
        );
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut word = seed;
                while !over.load(std::sync::atomic::Ordering::Relaxed) {
                    word = word.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    // Descriptors, available rings, headers; now and then what would be right.
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
                guest.request(ring, round % 60, kind, 0, &[(DATA, 512)]);
                guest.kick(ring);
            }
            over.store(true, std::sync::atomic::Ordering::Relaxed);
        });
        drop(guest);
        serves(&world);
    }
    told_of_memory_only(&world);
}

/// A guest that offers as fast as it is answered: its other ring is served, and its front-end has its way.
#[test]
fn a_guest_that_offers_without_an_end_keeps_nobody() {
    let world = one_worker();
    let mut guest = world.guest();
    // The longest of rings, for long chains: it takes its time to read them all.
    let (table, available, used, length) = (0x40_0000, 0x41_0000, 0x42_0000, 1024u16);
    guest.frontend.get_vring_base(0).unwrap();
    guest.frontend.set_vring_num(0, length).unwrap();
    guest.frontend.set_vring_base(0, 0).unwrap();
    let config = VringConfigData {
        queue_max_size: length,
        queue_size: length,
        flags: 0,
        desc_table_addr: USER + table,
        avail_ring_addr: USER + available,
        used_ring_addr: USER + used,
        log_addr: None,
    };
    guest.frontend.set_vring_addr(0, &config).unwrap();
    guest.write_header(0, 0, 99, 0);
    let (header, status) = guest.places(0, 0);
    for index in 0..1000 {
        guest.describe_at(table, index, desc(header, 16, NEXT, index + 1));
    }
    guest.describe_at(table, 1000, desc(status, 1, WRITE, 0));
    let fd = guest.memory.as_fd().try_clone_to_owned().unwrap();
    let kind = passgate_bindings::identity::identify(&fd).unwrap().kind;
    let memory = passgate_bindings::memory::GuestFile::new(fd, kind, SIZE, true);
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // Every entry of the available ring is 0. What was used may be offered again at once.
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                let mut index = [0; 2];
                memory.read(used + 2, &mut index).unwrap();
                let offered = u16::from_le_bytes(index).wrapping_add(length);
                memory.write(available + 2, &offered.to_le_bytes()).unwrap();
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
                assert_eq!(guest.ask(1, IN, 0, &[(DATA, 512)]), OK);
            }
            guest.frontend.get_vring_base(0).unwrap();
            ended.send(()).unwrap();
        });
        let in_time = wait.recv_timeout(Duration::from_secs(20));
        over.store(true, Ordering::Relaxed);
        in_time.expect("a ring that is never empty keeps its worker");
    });
}

/// More than the drive has room for, all the time: the other ring has its turn.
#[test]
fn a_ring_that_fills_the_drive_leaves_room_for_the_other() {
    let drive = sim::Options { queues: 1, entries: 8, ..Setup::default().drive };
    let world = World::with(Setup { drive, ..Setup::default() });
    let mut guest = world.guest();
    world.sim.fault(When::any().always(), Does::DelayCompletion(Duration::from_millis(1)));
    let heads = || (0..ENTRIES - 3).step_by(3);
    for head in heads() {
        guest.request(0, head, IN, 0, &[(DATA, 512)]);
    }
    guest.kick(0);
    let mut used = guest.await_used(0, 7);
    let mut ended = used.len();
    guest.request(1, 0, IN, 0, &[(DATA, 512)]);
    guest.kick(1);
    while guest.used(1).is_empty() {
        assert!(ended < 1000, "{ended} requests of the one ring, and none of the other");
        for (head, _) in used {
            guest.request(0, head as u16, IN, 0, &[(DATA, 512)]);
        }
        guest.kick(0);
        used = guest.await_used(0, 1);
        ended += used.len();
    }
}
