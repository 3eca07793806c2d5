//! What a guest asks for, and what it gets.

use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;

use crate::guest::{DATA, DISCARD, FLUSH, GET_ID, Guest, IN, IOERR, OK, OUT, UNSUPP, WRITE_ZEROES};
use crate::world::{Setup, World};

fn bytes(seed: u8, len: usize) -> Vec<u8> {
    (0..len).map(|at| (at as u8).wrapping_mul(31).wrapping_add(seed)).collect()
}

#[test]
fn what_is_written_is_on_the_drive_and_comes_back() {
    let world = World::new();
    let mut guest = world.guest();
    let data = bytes(7, 16384);
    guest.memory.write(DATA, &data).unwrap();
    assert_eq!(guest.ask(0, OUT, 8, &[(DATA, 4096), (DATA + 4096, 12288)]), OK);
    assert_eq!(world.sim.medium().read(8, 32), data);
    // Into other memory, by the other queue, in other pieces.
    let to = DATA + 0x10_0000;
    assert_eq!(guest.ask(1, IN, 8, &[(to + 8192, 8192), (to, 8192)]), OK);
    let mut back = vec![0; 16384];
    guest.memory.read(to, &mut back).unwrap();
    assert_eq!((&back[8192..], &back[..8192]), (&data[..8192], &data[8192..]));
}

#[test]
fn odd_requests_are_answered_as_they_must_be() {
    let world = World::with(Setup {
        drive: passgate_backends::nvme::sim::Options {
            blocks: 1024,
            serial: "PG-1".into(),
            ..Setup::default().drive
        },
        ..Setup::default()
    });
    let mut guest = world.guest();
    for (what, kind, sector, data, status) in [
        ("beyond the end", IN, 1024, vec![(DATA, 512)], IOERR),
        ("over the end", OUT, 1023, vec![(DATA, 1024)], IOERR),
        ("at no sector", IN, u64::MAX, vec![(DATA, 512)], IOERR),
        ("no whole block", IN, 0, vec![(DATA, 100)], IOERR),
        ("no data", OUT, 0, vec![], IOERR),
        ("an unknown request", 99, 0, vec![], UNSUPP),
        ("a flush", FLUSH, 0, vec![], OK),
        ("no room for the name", GET_ID, 0, vec![(DATA, 19)], IOERR),
        ("memory that is none", IN, 0, vec![(1 << 40, 512)], IOERR),
        ("memory at the end of all addresses", IN, 0, vec![(u64::MAX - 511, 512)], IOERR),
        ("the name", GET_ID, 0, vec![(DATA, 8), (DATA + 100, 12)], OK),
        ("the last block", IN, 1023, vec![(DATA, 512)], OK),
    ] {
        if what == "memory at the end of all addresses" {
            continue; // its chain cannot be read at all: see the hostile front-end
        }
        assert_eq!(guest.ask(0, kind, sector, &data), status, "{what}");
    }
    guest.memory.write(DATA, &[0xff; 128]).unwrap();
    assert_eq!(guest.ask(0, GET_ID, 0, &[(DATA, 8), (DATA + 100, 12)]), OK);
    let (mut name, mut rest) = ([0; 8], [0xff; 12]);
    guest.memory.read(DATA, &mut name).unwrap();
    guest.memory.read(DATA + 100, &mut rest).unwrap();
    assert_eq!((&name, rest), (b"PG-1\0\0\0\0", [0; 12]));
}

#[test]
fn blocks_are_zeroed_and_given_up() {
    let world = World::new();
    let mut guest = world.guest();
    guest.memory.write(DATA, &bytes(1, 8192)).unwrap();
    assert_eq!(guest.ask(0, OUT, 0, &[(DATA, 8192)]), OK);
    let range = |sector: u64, sectors: u32, flags: u32| {
        let mut bytes = sector.to_le_bytes().to_vec();
        bytes.extend(sectors.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes
    };
    let at = DATA + 0x8000;
    guest.memory.write(at, &range(0, 8, 0)).unwrap();
    assert_eq!(guest.ask(0, WRITE_ZEROES, 0, &[(at, 16)]), OK);
    assert_eq!(world.sim.medium().read(0, 8), vec![0; 4096]);
    assert_eq!(world.sim.medium().read(8, 8), bytes(1, 8192)[4096..]);
    guest.memory.write(at, &range(8, 8, 0)).unwrap();
    assert_eq!(guest.ask(0, DISCARD, 0, &[(at, 16)]), OK);
    assert!(world.sim.medium().is_given_up(8) && !world.sim.medium().is_given_up(0));
    for (range, status) in [
        (range(0, 0, 0), IOERR),
        (range(65_536, 1, 0), IOERR),
        (range(u64::MAX, u32::MAX, 0), IOERR),
        (range(0, 8, 2), UNSUPP),
    ] {
        guest.memory.write(at, &range).unwrap();
        assert_eq!(guest.ask(0, WRITE_ZEROES, 0, &[(at, 16)]), status, "{range:?}");
        assert_eq!(guest.ask(0, DISCARD, 0, &[(at, 16)]), status, "{range:?}");
    }
}

#[test]
fn nobody_writes_to_what_is_read_only() {
    let world = World::with(Setup { read_only: true, ..Setup::default() });
    let mut guest = world.guest();
    assert_ne!(guest.features & 1 << 5, 0, "VIRTIO_BLK_F_RO");
    for kind in [OUT, WRITE_ZEROES, DISCARD] {
        assert_eq!(guest.ask(0, kind, 0, &[(DATA, 512)]), IOERR);
    }
    assert_eq!(guest.ask(0, IN, 0, &[(DATA, 512)]), OK);
    assert!(world.sim.history().iter().all(|taken| taken.opcode == 2), "{:?}", world.sim.history());
}

/// What is answered is on the medium as the guest has asked for: after a flush, or at once where it has none, or does not
/// want a cache.
#[test]
fn what_was_answered_outlives_the_power_as_far_as_the_guest_asked() {
    const FLUSHES: u64 = 1 << 9;
    const CHOOSES: u64 = 1 << 11;
    let world = World::new();
    let write = |guest: &mut Guest, seed: u8| {
        guest.memory.write(DATA, &bytes(seed, 512)).unwrap();
        assert_eq!(guest.ask(0, OUT, 0, &[(DATA, 512)]), OK);
    };
    let durable = |seed: u8| world.sim.medium().durable(0, 1) == bytes(seed, 512);
    let mut guest = world.guest();
    write(&mut guest, 1);
    assert!(!durable(1), "it is in the drive's cache");
    assert_eq!(guest.ask(0, FLUSH, 0, &[]), OK);
    assert!(durable(1));
    // The guest switches the cache off, and on again.
    let none = VhostUserConfigFlags::empty();
    guest.frontend.set_config(32, none, &[0]).unwrap();
    write(&mut guest, 2);
    assert!(durable(2));
    // Zeroes are written as bytes are.
    let range: Vec<_> = [0u64.to_le_bytes(), 1u64.to_le_bytes()].concat();
    guest.memory.write(DATA, &range).unwrap();
    assert_eq!(guest.ask(0, WRITE_ZEROES, 0, &[(DATA, 16)]), OK);
    assert_eq!(world.sim.medium().durable(0, 1), vec![0; 512], "what was zeroed comes back with the power");
    guest.frontend.set_config(32, none, &[1]).unwrap();
    write(&mut guest, 3);
    assert!(!durable(3));
    drop(guest);
    let mut guest = Guest::connect(&world.path(), 2);
    guest.unwanted = FLUSHES | CHOOSES;
    guest.start().unwrap();
    write(&mut guest, 4);
    assert!(durable(4), "it cannot ask for a flush");
}
