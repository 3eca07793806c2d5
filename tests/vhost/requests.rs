//! Requests of a guest, and their results.

use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;

use crate::guest::{DATA_GPA, DISCARD, FLUSH, GET_ID, Guest, IN, IOERR, OK, OUT, UNSUPP, WRITE_ZEROES};
use crate::world::{Setup, World};

/// Returns a test pattern.
fn bytes(seed: u8, len: usize) -> Vec<u8> {
    (0..len).map(|at| (at as u8).wrapping_mul(31).wrapping_add(seed)).collect()
}

#[test]
fn written_data_is_on_drive_and_reads_back() {
    let world = World::new();
    let mut guest = world.guest();
    let data = bytes(7, 16384);
    guest.memory.write(DATA_GPA, &data).unwrap();
    assert_eq!(guest.run_request(0, OUT, 8, &[(DATA_GPA, 4096), (DATA_GPA + 4096, 12288)]), OK);
    assert_eq!(world.sim.medium().read(8, 32), data);
    // Read back into other memory, by the other queue, with other descriptors.
    let to = DATA_GPA + 0x10_0000;
    assert_eq!(guest.run_request(1, IN, 8, &[(to + 8192, 8192), (to, 8192)]), OK);
    let mut back = vec![0; 16384];
    guest.memory.read(to, &mut back).unwrap();
    assert_eq!((&back[8192..], &back[..8192]), (&data[..8192], &data[8192..]));
}

#[test]
fn invalid_requests_get_specified_status() {
    let world = World::with(Setup {
        drive: passgate_sim::nvme::Options { blocks: 1024, serial: "PG-1".into(), ..Setup::default().drive },
        ..Setup::default()
    });
    let mut guest = world.guest();
    for (case, kind, sector, data, status) in [
        ("beyond the end", IN, 1024, vec![(DATA_GPA, 512)], IOERR),
        ("over the end", OUT, 1023, vec![(DATA_GPA, 1024)], IOERR),
        ("at no sector", IN, u64::MAX, vec![(DATA_GPA, 512)], IOERR),
        ("no whole block", IN, 0, vec![(DATA_GPA, 100)], IOERR),
        ("no data", OUT, 0, vec![], IOERR),
        ("an unknown request", 99, 0, vec![], UNSUPP),
        ("a flush", FLUSH, 0, vec![], OK),
        ("no room for the name", GET_ID, 0, vec![(DATA_GPA, 19)], IOERR),
        ("memory that is none", IN, 0, vec![(1 << 40, 512)], IOERR),
        ("memory at the end of all addresses", IN, 0, vec![(u64::MAX - 511, 512)], IOERR),
        ("the name", GET_ID, 0, vec![(DATA_GPA, 8), (DATA_GPA + 100, 12)], OK),
        ("the last block", IN, 1023, vec![(DATA_GPA, 512)], OK),
    ] {
        if case == "memory at the end of all addresses" {
            continue; // its chain cannot be read at all: tested in hostile/rings.rs
        }
        assert_eq!(guest.run_request(0, kind, sector, &data), status, "{case}");
    }
    guest.memory.write(DATA_GPA, &[0xff; 128]).unwrap();
    assert_eq!(guest.run_request(0, GET_ID, 0, &[(DATA_GPA, 8), (DATA_GPA + 100, 12)]), OK);
    let (mut name, mut rest) = ([0; 8], [0xff; 12]);
    guest.memory.read(DATA_GPA, &mut name).unwrap();
    guest.memory.read(DATA_GPA + 100, &mut rest).unwrap();
    assert_eq!((&name, rest), (b"PG-1\0\0\0\0", [0; 12]));
}

#[test]
fn write_zeroes_and_discard_take_effect() {
    let world = World::new();
    let mut guest = world.guest();
    guest.memory.write(DATA_GPA, &bytes(1, 8192)).unwrap();
    assert_eq!(guest.run_request(0, OUT, 0, &[(DATA_GPA, 8192)]), OK);
    let range = |sector: u64, sectors: u32, flags: u32| {
        let mut bytes = sector.to_le_bytes().to_vec();
        bytes.extend(sectors.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes
    };
    let at = DATA_GPA + 0x8000;
    guest.memory.write(at, &range(0, 8, 0)).unwrap();
    assert_eq!(guest.run_request(0, WRITE_ZEROES, 0, &[(at, 16)]), OK);
    assert_eq!(world.sim.medium().read(0, 8), vec![0; 4096]);
    assert_eq!(world.sim.medium().read(8, 8), bytes(1, 8192)[4096..]);
    guest.memory.write(at, &range(8, 8, 0)).unwrap();
    assert_eq!(guest.run_request(0, DISCARD, 0, &[(at, 16)]), OK);
    assert!(world.sim.medium().is_given_up(8) && !world.sim.medium().is_given_up(0));
    for (range, status) in [
        (range(0, 0, 0), IOERR),
        (range(65_536, 1, 0), IOERR),
        (range(u64::MAX, u32::MAX, 0), IOERR),
        (range(0, 8, 2), UNSUPP),
    ] {
        guest.memory.write(at, &range).unwrap();
        assert_eq!(guest.run_request(0, WRITE_ZEROES, 0, &[(at, 16)]), status, "{range:?}");
        assert_eq!(guest.run_request(0, DISCARD, 0, &[(at, 16)]), status, "{range:?}");
    }
}

#[test]
fn writes_to_read_only_disk_fail() {
    let world = World::with(Setup { read_only: true, ..Setup::default() });
    let mut guest = world.guest();
    assert_ne!(guest.features & 1 << 5, 0, "VIRTIO_BLK_F_RO");
    for kind in [OUT, WRITE_ZEROES, DISCARD] {
        assert_eq!(guest.run_request(0, kind, 0, &[(DATA_GPA, 512)]), IOERR);
    }
    assert_eq!(guest.run_request(0, IN, 0, &[(DATA_GPA, 512)]), OK);
    assert!(world.sim.history().iter().all(|taken| taken.opcode == 2), "{:?}", world.sim.history());
}

/// An answered write is durable as the guest requires: after a flush, or at once if it has no flush or has disabled the cache.
#[test]
fn answered_writes_are_durable_as_requested() {
    const FEATURE_FLUSH: u64 = 1 << 9;
    const FEATURE_CONFIG_WCE: u64 = 1 << 11;
    let world = World::new();
    let write = |guest: &mut Guest, seed: u8| {
        guest.memory.write(DATA_GPA, &bytes(seed, 512)).unwrap();
        assert_eq!(guest.run_request(0, OUT, 0, &[(DATA_GPA, 512)]), OK);
    };
    let durable = |seed: u8| world.sim.medium().durable(0, 1) == bytes(seed, 512);
    let mut guest = world.guest();
    write(&mut guest, 1);
    assert!(!durable(1), "the data must be in the drive's cache");
    assert_eq!(guest.run_request(0, FLUSH, 0, &[]), OK);
    assert!(durable(1));
    // The guest disables the cache, and enables it again.
    let none = VhostUserConfigFlags::empty();
    guest.frontend.set_config(32, none, &[0]).unwrap();
    write(&mut guest, 2);
    assert!(durable(2));
    // Write zeroes must be as durable as writes.
    let range: Vec<_> = [0u64.to_le_bytes(), 1u64.to_le_bytes()].concat();
    guest.memory.write(DATA_GPA, &range).unwrap();
    assert_eq!(guest.run_request(0, WRITE_ZEROES, 0, &[(DATA_GPA, 16)]), OK);
    assert_eq!(world.sim.medium().durable(0, 1), vec![0; 512], "the zeroed data is lost with the power");
    guest.frontend.set_config(32, none, &[1]).unwrap();
    write(&mut guest, 3);
    assert!(!durable(3));
    drop(guest);
    let mut guest = Guest::connect(&world.socket_path(), 2);
    guest.declined_features = FEATURE_FLUSH | FEATURE_CONFIG_WCE;
    guest.start().unwrap();
    write(&mut guest, 4);
    assert!(durable(4), "without flushes a write must be durable at once");
}
