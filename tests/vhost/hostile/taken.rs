//! Memory, rings and front-ends that go while the drive is at it: nothing moves into memory that is no more the guest's,
//! and nothing is answered before it is so.

use std::time::{Duration, Instant};

use passgate_backends::nvme::sim::{self, Does, When};
use passgate_bindings::Iova;
use vhost::vhost_user::VhostUserFrontend;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};

use super::raw::{RESET_DEVICE, Raw, SET_MEM_TABLE, VERSION, at, table};
use super::{serves, serves_this};
use crate::guest::{Guest, IN, IOERR, OK, OUT, SIZE};
use crate::world::{Setup, World};

const SOON: Duration = Duration::from_secs(20);
/// Where the second half of memory is: what a guest can lose and still have its rings.
const HALF: u64 = SIZE / 2;
const LOST: u64 = HALF + 0x1_0000;

fn world() -> World {
    World::with(Setup { deadline: Duration::from_secs(60), ..Setup::default() })
}

/// A guest with two regions.
fn of_two_halves(world: &World) -> Guest {
    let mut guest = Guest::connect(&world.path(), 2);
    guest.greet().unwrap();
    guest.frontend.set_mem_table(&[guest.part(0, HALF), guest.part(HALF, HALF)]).unwrap();
    (0..2).for_each(|ring| guest.start_ring(ring).unwrap());
    guest
}

fn lost(guest: &Guest) -> VhostUserMemoryRegionInfo {
    guest.part(HALF, HALF)
}

fn bytes(guest: &Guest, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    guest.memory.read(at, &mut bytes).unwrap();
    bytes
}

/// Reads into memory that goes, which the drive does not end by itself.
fn held_reads(world: &World, guest: &mut Guest, count: u16) {
    world.sim.medium().write(0, &[0xdd; 64 * 512]);
    guest.memory.write(LOST, &[0x11; 64 * 512]).unwrap();
    world.sim.fault(When::io(sim::opcode::READ).always(), Does::HoldData);
    for n in 0..count {
        guest.request(0, n * 3, IN, u64::from(n), &[(LOST + u64::from(n) * 512, 512)]);
    }
    guest.kick(0);
    assert!(world.sim.await_held(count.into(), SOON));
    // What comes after these goes well.
    world.sim.behave();
}

#[test]
fn memory_that_is_removed_is_not_written_to_any_more() {
    let world = world();
    let mut guest = of_two_halves(&world);
    held_reads(&world, &mut guest, 16);
    // By whatever it takes: the drive never answers these.
    let gone = lost(&guest);
    guest.frontend.remove_mem_region(&gone).unwrap();
    let seen = world.control().status().unwrap();
    assert_eq!((seen.regions.len(), seen.quarantine.len()), (1, 0), "{seen:?}");
    let mapped = |at| world.iommu.mappings().iter().any(|mapping| mapping.iova.contains(Iova(at)));
    assert!(!mapped(HALF) && !mapped(LOST) && mapped(0));
    // What is its from here on is another's.
    guest.memory.write(LOST, &[0x22; 64 * 512]).unwrap();
    world.sim.release();
    let used = guest.await_used(0, 16);
    assert_eq!(used.len(), 16);
    for n in 0..16 {
        assert_eq!(guest.status(0, n * 3), IOERR, "request {n}");
    }
    assert_eq!(bytes(&guest, LOST, 64 * 512), [0x22; 64 * 512], "stale DMA");
    serves_this(&world, &mut guest);
    drop(guest);
    serves(&world);
}

#[test]
fn memory_in_use_that_ends_soon_is_waited_for() {
    let world = world();
    let mut guest = of_two_halves(&world);
    held_reads(&world, &mut guest, 4);
    let enabled = world.sim.enabled();
    let gone = lost(&guest);
    std::thread::scope(|scope| {
        let sim = &world.sim;
        let control = world.control();
        scope.spawn(move || {
            let mut control = control;
            let until = Instant::now() + SOON;
            // Once the gate is at it.
            while !control.status().unwrap().regions.iter().any(|region| region.closing) {
                assert!(Instant::now() < until);
            }
            sim.release();
        });
        guest.frontend.remove_mem_region(&gone).unwrap();
    });
    assert_eq!(world.sim.enabled(), enabled, "no fence was needed");
    assert_eq!(guest.await_used(0, 4).len(), 4);
    for n in 0..4 {
        assert_eq!(guest.status(0, n * 3), OK);
    }
    assert_eq!(bytes(&guest, LOST, 2048), [0xdd; 2048]);
    serves_this(&world, &mut guest);
}

#[test]
fn a_table_without_memory_that_is_in_use_takes_it_away_too() {
    let world = world();
    let mut guest = of_two_halves(&world);
    held_reads(&world, &mut guest, 4);
    guest.frontend.set_mem_table(&[guest.part(0, HALF)]).unwrap();
    guest.memory.write(LOST, &[0x22; 64 * 512]).unwrap();
    world.sim.release();
    assert_eq!(guest.await_used(0, 4).len(), 4);
    assert_eq!(bytes(&guest, LOST, 64 * 512), [0x22; 64 * 512], "stale DMA");
    // And comes back.
    guest.frontend.add_mem_region(&lost(&guest)).unwrap();
    guest.request(1, 0, IN, 0, &[(LOST, 512)]);
    guest.kick(1);
    guest.await_used(1, 1);
    assert_eq!((guest.status(1, 0), bytes(&guest, LOST, 512)), (OK, vec![0xdd; 512]));
    serves_this(&world, &mut guest);
}

#[test]
fn a_front_end_that_leaves_takes_its_memory_with_it() {
    for whole in [false, true] {
        let world = world();
        let mut guest = of_two_halves(&world);
        held_reads(&world, &mut guest, 8);
        if whole {
            // With the socket goes everything.
            let Guest { memory, frontend, socket, rings, .. } = guest;
            drop((frontend, socket, rings));
            serves(&world);
            memory.write(LOST, &[0x22; 64 * 512]).unwrap();
            world.sim.release();
            serves(&world);
            let mut read = vec![0; 64 * 512];
            memory.read(LOST, &mut read).unwrap();
            assert_eq!(read, [0x22; 64 * 512], "stale DMA");
        } else {
            // It only says nothing more: the door is shut under it.
            drop(world);
            guest.memory.write(LOST, &[0x22; 64 * 512]).unwrap();
            assert_eq!(bytes(&guest, LOST, 64 * 512), [0x22; 64 * 512]);
        }
    }
}

#[test]
fn the_base_of_a_ring_is_told_once_the_drive_has_nothing_of_it() {
    let world = world();
    let mut guest = of_two_halves(&world);
    world.sim.medium().write(0, &[0xdd; 64 * 512]);
    let slow = Does::DelayData(Duration::from_millis(20));
    world.sim.fault(When::io(sim::opcode::READ).always(), slow);
    for n in 0..20 {
        guest.request(0, n * 3, IN, u64::from(n), &[(LOST + u64::from(n) * 512, 512)]);
    }
    guest.kick(0);
    assert!(world.sim.await_held(1, SOON));
    let base = guest.frontend.get_vring_base(0).unwrap();
    // Whatever was taken has ended, and nothing comes after that.
    let used = guest.used(0);
    assert_eq!((used.len(), world.sim.held()), (base as usize, 0));
    let now = bytes(&guest, LOST, 64 * 512);
    world.sim.behave();
    for (head, _) in &used {
        assert_eq!(guest.status(0, *head as u16), OK);
    }
    guest.start_ring(0).unwrap();
    guest.kick(0);
    guest.await_used(0, 20 - used.len());
    assert!(now[..base as usize * 512].iter().all(|byte| *byte == 0xdd));
    assert_eq!(bytes(&guest, LOST, 20 * 512), [0xdd; 20 * 512], "what was not taken before is done now");
    serves_this(&world, &mut guest);
}

#[test]
fn a_reset_under_load_ends_everything() {
    let world = world();
    for round in 0..10 {
        let mut guest = of_two_halves(&world);
        world.sim.fault(When::any().times(5), Does::DelayCompletion(Duration::from_millis(5)));
        for n in 0..20 {
            let kind = if n % 2 == 0 { IN } else { OUT };
            guest.request(round % 2, n * 3, kind, u64::from(n), &[(LOST + u64::from(n) * 512, 512)]);
        }
        guest.kick(round % 2);
        let raw = Raw::over(&guest.socket);
        let came = raw.says(RESET_DEVICE, &[], &[]);
        assert!(!came.is_no(), "{came:?}");
        assert_eq!(world.sim.held(), 0);
        guest.frontend.set_features(guest.features).unwrap();
        for ring in 0..2 {
            let used = guest.rings[ring].avail;
            guest.used(ring);
            // As a driver does after a reset: from the beginning.
            guest.rings[ring].used = used;
            guest.memory.write(guest.ring_base(ring) + 8192 + 2, &used.to_le_bytes()).unwrap();
            guest.start_ring(ring).unwrap();
        }
        serves_this(&world, &mut guest);
    }
}

#[test]
fn a_table_that_cannot_be_had_leaves_nothing_at_the_drive() {
    let world = world();
    let mut guest = of_two_halves(&world);
    held_reads(&world, &mut guest, 4);
    // The second region lies over the first: this is refused, and the front-end with it.
    let memory = std::os::fd::AsFd::as_fd(&guest.memory);
    let raw = Raw::over(&guest.socket);
    raw.send(SET_MEM_TABLE, VERSION, &table(&[at(0, HALF, 0), at(4096, HALF, 0)]), &[memory, memory]);
    raw.leaves();
    drop(guest.frontend);
    serves(&world);
    guest.memory.write(LOST, &[0x22; 64 * 512]).unwrap();
    world.sim.release();
    serves(&world);
    let mut read = vec![0; 64 * 512];
    guest.memory.read(LOST, &mut read).unwrap();
    assert_eq!(read, [0x22; 64 * 512], "stale DMA");
}
