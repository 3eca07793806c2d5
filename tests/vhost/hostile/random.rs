//! Front-ends and guests of chance: thousands of messages and chains that nobody thought of.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use passgate_bindings::memory::GuestFile;

use super::raw::*;
use super::{open_files, resident, serves, serves_this, told_of_memory_only};
use crate::guest::{DATA, Desc, ENTRIES, NEXT, SIZE, USER, WRITE};
use crate::world::World;

/// splitmix64: the same numbers every time.
struct Chance(u64);

impl Chance {
    fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let word = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ word >> 31
    }

    fn below(&mut self, most: u64) -> u64 {
        self.word() % most
    }

    /// A number as they hurt: small, near a border, or anything.
    fn number(&mut self) -> u64 {
        let near = [0, 1, 64, 256, 4096, SIZE, USER, USER + SIZE, 1 << 32, 1 << 48, 1 << 62, u64::MAX];
        match self.below(4) {
            0 => self.below(4),
            1 => near[self.below(near.len() as u64) as usize],
            2 => near[self.below(near.len() as u64) as usize].wrapping_sub(self.below(9000)),
            _ => self.word(),
        }
    }
}

/// A message that might be one.
fn message(chance: &mut Chance) -> (u32, u32, Vec<u8>) {
    let request = chance.below(u64::from(LAST) + 3) as u32;
    let flags = match chance.below(8) {
        0 => chance.word() as u32,
        1 => VERSION,
        _ => VERSION | NEED_REPLY,
    };
    let payload = match (request, chance.below(3)) {
        (SET_MEM_TABLE, 0..2) => {
            let shape =
                |chance: &mut Chance| [chance.number(), chance.number(), chance.number(), chance.number()];
            let regions: Vec<_> = (0..chance.below(5)).map(|_| shape(chance)).collect();
            table(&regions)
        }
        (ADD_MEM_REG | REM_MEM_REG, 0..2) => {
            region([chance.number(), chance.number(), chance.number(), chance.number()])
        }
        (SET_VRING_ADDR, 0..2) => {
            let index = chance.below(3) as u32;
            [halves(&[index, 0]), words(&[chance.number(), chance.number(), chance.number(), 0])].concat()
        }
        (SET_VRING_NUM | SET_VRING_BASE | SET_VRING_ENABLE | GET_VRING_BASE, 0..2) => {
            halves(&[chance.below(3) as u32, chance.number() as u32])
        }
        (SET_VRING_KICK | SET_VRING_CALL | SET_VRING_ERR, 0..2) => words(&[chance.below(3)]),
        (GET_CONFIG | SET_CONFIG, 0..2) => {
            let size = chance.below(70);
            [halves(&[chance.below(300) as u32, size as u32, 0]), vec![1; size as usize]].concat()
        }
        (GET_INFLIGHT_FD | SET_INFLIGHT_FD, 0..2) => {
            words(&[chance.number(), chance.number(), chance.below(1 << 33)])
        }
        (_, 0) => vec![0; 8],
        _ => (0..chance.below(64)).map(|_| chance.word() as u8).collect(),
    };
    (request, flags, payload)
}

#[test]
fn thousands_of_messages_of_chance_harm_nobody() {
    let world = World::new();
    let memory = GuestFile::memfd("random", SIZE).unwrap();
    let kick = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
    let mut before = None;
    for connection in 0..600 {
        let mut chance = Chance(connection);
        let raw =
            if chance.below(4) == 0 { Raw::connect(&world.path()) } else { Raw::greeted(&world.path()) };
        if chance.below(2) == 0 {
            raw.send(SET_MEM_TABLE, VERSION, &table(&[at(0, SIZE, 0)]), &[memory.as_fd()]);
        }
        for _ in 0..chance.below(30) {
            let (request, flags, payload) = message(&mut chance);
            let fds = [memory.as_fd(), kick.as_fd(), memory.as_fd(), kick.as_fd()];
            let most = if chance.below(6) == 0 { 4 } else { 1 };
            let takes = matches!(
                request,
                SET_MEM_TABLE
                    | ADD_MEM_REG
                    | SET_VRING_KICK
                    | SET_VRING_CALL
                    | SET_VRING_ERR
                    | SET_INFLIGHT_FD
            );
            let fds = &fds[..if takes { chance.below(most + 1) as usize } else { 0 }];
            if !raw.send(request, flags, &payload, fds) {
                break;
            }
        }
        raw.leaves();
        if connection % 100 == 99 {
            serves(&world);
            let (had, kept) = *before.get_or_insert_with(|| (open_files(), resident()));
            // What the last ones had may be about to be closed.
            let until = Instant::now() + Duration::from_secs(20);
            while open_files() > had + 8 {
                assert!(Instant::now() < until, "{} files are open, {had} were", open_files());
                std::thread::yield_now();
            }
            let memory = resident();
            assert!(memory <= kept + 16_384, "{memory} KiB are used, {kept} were");
        }
    }
}

#[test]
fn bytes_of_chance_harm_nobody() {
    let world = World::new();
    for connection in 0..400 {
        let mut chance = Chance(connection << 32);
        let raw = Raw::connect(&world.path());
        for _ in 0..chance.below(8) {
            let bytes: Vec<u8> = (0..chance.below(600)).map(|_| chance.word() as u8).collect();
            if bytes.is_empty() || !raw.bytes(&bytes, &[]) {
                break;
            }
        }
        raw.leaves();
    }
    serves(&world);
}

/// A descriptor that might be one.
fn descriptor(chance: &mut Chance, index: u16) -> Desc {
    let addr = match chance.below(8) {
        0 => chance.number(),
        1 => SIZE - chance.below(600),
        2..5 => 0x10_0000 + chance.below(128) * 16,
        _ => DATA + chance.below(64) * 512,
    };
    let len =
        [1, 15, 16, 17, 32, 48, 512, 513, 4096, 0, u32::MAX, chance.word() as u32][chance.below(12) as usize];
    let flags = [0, 1, 1, 1, 2, 3, 3, 4, 5, 7, chance.word() as u16][chance.below(11) as usize];
    let next = if chance.below(4) == 0 { chance.word() as u16 } else { (index + 1) % ENTRIES };
    Desc { addr, len, flags, next }
}

#[test]
fn thousands_of_chains_of_chance_harm_nobody() {
    let world = World::new();
    world.sim.medium().write(0, &[0x33; 65_536]);
    for round in 0..300u64 {
        let mut chance = Chance(round << 40 | 7);
        let mut guest = world.guest();
        // Headers: mostly reads and what touches nothing, of the first blocks.
        for slot in 0..128 {
            let kind = [0u32, 0, 0, 4, 8, 13, 99][chance.below(7) as usize];
            let mut bytes = kind.to_le_bytes().to_vec();
            bytes.extend([0; 4]);
            bytes.extend(chance.below(100).to_le_bytes());
            guest.memory.write(0x10_0000 + slot * 16, &bytes).unwrap();
        }
        for ring in 0..2 {
            // Requests of three descriptors each, of which now and then one is something else.
            for index in 0..ENTRIES {
                let (addr, len, flags) = match index % 3 {
                    0 => (0x10_0000 + chance.below(128) * 16, 16, NEXT),
                    1 => (DATA + chance.below(64) * 512, 512 * (1 + chance.below(8) as u32), NEXT | WRITE),
                    _ => (0x10_1000 + u64::from(index), 1, WRITE),
                };
                let good = Desc { addr, len, flags, next: index + 1 };
                let desc = if chance.below(12) == 0 { descriptor(&mut chance, index) } else { good };
                guest.describe(ring, index, desc);
            }
            for nth in 0..1 + chance.below(8) {
                let wild = chance.below(20) == 0;
                let head = if wild { chance.below(70) } else { (nth * 5 % 21) * 3 };
                guest.offer(ring, head as u16);
            }
            guest.kick(ring);
        }
        // What there is of answers; a ring that rests has none.
        guest.used_within(round as usize % 2, 1, Duration::from_millis(5));
        if round % 3 == 0 {
            // It waits for what the drive has.
            let raw = Raw::over(&guest.socket);
            raw.says(GET_VRING_BASE, &halves(&[0, 0]), &[]);
        }
        drop(guest);
        if round % 50 == 49 {
            serves(&world);
        }
    }
    told_of_memory_only(&world);
    assert!(world.sim.taken() > 100, "hardly a chain was a request");
    serves_this(&world, &mut world.guest());
}
