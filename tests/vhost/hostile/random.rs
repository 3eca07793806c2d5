//! Random front-ends and guests: thousands of random messages and descriptor chains.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use passgate_bindings::memory::GuestFile;

use super::raw::*;
use super::{anonymous_kib, assert_no_dma_faults, assert_serves, assert_serves_guest, open_files};
use crate::guest::{DATA_GPA, Desc, MEMORY_BYTES, NEXT, QUEUE_SIZE, USER_ADDR, WRITE};
use crate::world::World;

/// A pseudo-random number generator (splitmix64), with the same sequence in every run.
struct Random(u64);

impl Random {
    fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let word = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ word >> 31
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.word() % limit
    }

    /// Returns a small number, one near an edge, or any.
    fn edge_value(&mut self) -> u64 {
        let edges = [
            0,
            1,
            64,
            256,
            4096,
            MEMORY_BYTES,
            USER_ADDR,
            USER_ADDR + MEMORY_BYTES,
            1 << 32,
            1 << 48,
            1 << 62,
            u64::MAX,
        ];
        match self.below(4) {
            0 => self.below(4),
            1 => edges[self.below(edges.len() as u64) as usize],
            2 => edges[self.below(edges.len() as u64) as usize].wrapping_sub(self.below(9000)),
            _ => self.word(),
        }
    }
}

/// Returns a random message (request, flags, payload), which may be valid.
fn message(random: &mut Random) -> (u32, u32, Vec<u8>) {
    let request = random.below(u64::from(MAX_KNOWN_REQUEST) + 3) as u32;
    let flags = match random.below(8) {
        0 => random.word() as u32,
        1 => VERSION,
        _ => VERSION | NEED_REPLY,
    };
    let payload = match (request, random.below(3)) {
        (SET_MEM_TABLE, 0..2) => {
            let shape = |random: &mut Random| {
                [random.edge_value(), random.edge_value(), random.edge_value(), random.edge_value()]
            };
            let regions: Vec<_> = (0..random.below(5)).map(|_| shape(random)).collect();
            mem_table(&regions)
        }
        (ADD_MEM_REG | REM_MEM_REG, 0..2) => single_region([
            random.edge_value(),
            random.edge_value(),
            random.edge_value(),
            random.edge_value(),
        ]),
        (SET_VRING_ADDR, 0..2) => {
            let index = random.below(3) as u32;
            [u32s(&[index, 0]), u64s(&[random.edge_value(), random.edge_value(), random.edge_value(), 0])]
                .concat()
        }
        (SET_VRING_NUM | SET_VRING_BASE | SET_VRING_ENABLE | GET_VRING_BASE, 0..2) => {
            u32s(&[random.below(3) as u32, random.edge_value() as u32])
        }
        (SET_VRING_KICK | SET_VRING_CALL | SET_VRING_ERR, 0..2) => u64s(&[random.below(3)]),
        (GET_CONFIG | SET_CONFIG, 0..2) => {
            let size = random.below(70);
            [u32s(&[random.below(300) as u32, size as u32, 0]), vec![1; size as usize]].concat()
        }
        (GET_INFLIGHT_FD | SET_INFLIGHT_FD, 0..2) => {
            u64s(&[random.edge_value(), random.edge_value(), random.below(1 << 33)])
        }
        (_, 0) => vec![0; 8],
        _ => (0..random.below(64)).map(|_| random.word() as u8).collect(),
    };
    (request, flags, payload)
}

#[test]
fn random_messages_are_harmless() {
    let world = World::new();
    let memory = GuestFile::memfd("random", MEMORY_BYTES).unwrap();
    let kick = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
    let mut before = None;
    for connection in 0..600 {
        let mut random = Random(connection);
        let raw = if random.below(4) == 0 {
            Raw::connect(&world.socket_path())
        } else {
            Raw::negotiated(&world.socket_path())
        };
        if random.below(2) == 0 {
            raw.send(SET_MEM_TABLE, VERSION, &mem_table(&[region_at(0, MEMORY_BYTES, 0)]), &[memory.as_fd()]);
        }
        for _ in 0..random.below(30) {
            let (request, flags, payload) = message(&mut random);
            let fds = [memory.as_fd(), kick.as_fd(), memory.as_fd(), kick.as_fd()];
            let max_fds = if random.below(6) == 0 { 4 } else { 1 };
            let carries_fds = matches!(
                request,
                SET_MEM_TABLE
                    | ADD_MEM_REG
                    | SET_VRING_KICK
                    | SET_VRING_CALL
                    | SET_VRING_ERR
                    | SET_INFLIGHT_FD
            );
            let fds = &fds[..if carries_fds { random.below(max_fds + 1) as usize } else { 0 }];
            if !raw.send(request, flags, &payload, fds) {
                break;
            }
        }
        raw.close();
        if connection % 100 == 99 {
            assert_serves(&world);
            let (files_before, memory_before) =
                *before.get_or_insert_with(|| (open_files(), anonymous_kib()));
            // A few files of the last connections may not be closed yet.
            let deadline = Instant::now() + Duration::from_secs(20);
            while open_files() > files_before + 8 {
                assert!(Instant::now() < deadline, "{} files are open, {files_before} were", open_files());
                std::thread::yield_now();
            }
            let memory = anonymous_kib();
            assert!(memory <= memory_before + 16_384, "{memory} KiB are used, {memory_before} were");
        }
    }
}

#[test]
fn random_bytes_are_harmless() {
    let world = World::new();
    for connection in 0..400 {
        let mut random = Random(connection << 32);
        let raw = Raw::connect(&world.socket_path());
        for _ in 0..random.below(8) {
            let bytes: Vec<u8> = (0..random.below(600)).map(|_| random.word() as u8).collect();
            if bytes.is_empty() || !raw.send_bytes(&bytes, &[]) {
                break;
            }
        }
        raw.close();
    }
    assert_serves(&world);
}

/// Returns a random descriptor, which may be valid.
fn descriptor(random: &mut Random, index: u16) -> Desc {
    let addr = match random.below(8) {
        0 => random.edge_value(),
        1 => MEMORY_BYTES - random.below(600),
        2..5 => 0x10_0000 + random.below(128) * 16,
        _ => DATA_GPA + random.below(64) * 512,
    };
    let len =
        [1, 15, 16, 17, 32, 48, 512, 513, 4096, 0, u32::MAX, random.word() as u32][random.below(12) as usize];
    let flags = [0, 1, 1, 1, 2, 3, 3, 4, 5, 7, random.word() as u16][random.below(11) as usize];
    let next = if random.below(4) == 0 { random.word() as u16 } else { (index + 1) % QUEUE_SIZE };
    Desc { addr, len, flags, next }
}

#[test]
fn random_chains_are_harmless() {
    let world = World::new();
    world.sim.medium().write(0, &[0x33; 65_536]);
    for round in 0..300u64 {
        let mut random = Random(round << 40 | 7);
        let mut guest = world.guest();
        // Request headers: mostly reads of the first blocks, and requests that touch no data.
        for slot in 0..128 {
            let kind = [0u32, 0, 0, 4, 8, 13, 99][random.below(7) as usize];
            let mut bytes = kind.to_le_bytes().to_vec();
            bytes.extend([0; 4]);
            bytes.extend(random.below(100).to_le_bytes());
            guest.memory.write(0x10_0000 + slot * 16, &bytes).unwrap();
        }
        for ring in 0..2 {
            // Requests of three descriptors each; one descriptor in twelve is random.
            for index in 0..QUEUE_SIZE {
                let (addr, len, flags) = match index % 3 {
                    0 => (0x10_0000 + random.below(128) * 16, 16, NEXT),
                    1 => {
                        (DATA_GPA + random.below(64) * 512, 512 * (1 + random.below(8) as u32), NEXT | WRITE)
                    }
                    _ => (0x10_1000 + u64::from(index), 1, WRITE),
                };
                let good = Desc { addr, len, flags, next: index + 1 };
                let desc = if random.below(12) == 0 { descriptor(&mut random, index) } else { good };
                guest.write_descriptor(ring, index, desc);
            }
            for nth in 0..1 + random.below(8) {
                let any_head = random.below(20) == 0;
                let head = if any_head { random.below(70) } else { (nth * 5 % 21) * 3 };
                guest.make_available(ring, head as u16);
            }
            guest.kick(ring);
        }
        // Take the answers that there are; a stopped ring has none.
        guest.used_within(round as usize % 2, 1, Duration::from_millis(5));
        if round % 3 == 0 {
            // GET_VRING_BASE waits for the requests at the drive.
            let raw = Raw::over_socket(&guest.socket);
            raw.send_with_ack(GET_VRING_BASE, &u32s(&[0, 0]), &[]);
        }
        drop(guest);
        if round % 50 == 49 {
            assert_serves(&world);
        }
    }
    assert_no_dma_faults(&world);
    assert!(world.sim.taken() > 100, "too few chains were valid requests");
    assert_serves_guest(&world, &mut world.guest());
}
