//! Removal of memory, rings and front-ends while the drive has requests: no DMA reaches memory that was removed, and no
//! removal is answered before that is certain.

use std::time::{Duration, Instant};

use passgate_bindings::Iova;
use passgate_sim::nvme::{self as sim, CommandFilter, FaultAction};
use vhost::vhost_user::VhostUserFrontend;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};

use super::raw::{RESET_DEVICE, Raw, SET_MEM_TABLE, VERSION, mem_table, region_at};
use super::{assert_serves, assert_serves_guest};
use crate::guest::{Guest, IN, IOERR, MEMORY_BYTES, OK, OUT};
use crate::world::{Setup, World};

const TIMEOUT: Duration = Duration::from_secs(20);
/// The guest-physical address of the second half of memory, which can be removed without the rings.
const HALF: u64 = MEMORY_BYTES / 2;
/// The guest-physical address of the buffers in the second half.
const REMOVED_GPA: u64 = HALF + 0x1_0000;

fn world() -> World {
    World::with(Setup { deadline: Duration::from_secs(60), ..Setup::default() })
}

/// Returns a guest with two regions.
fn guest_with_two_regions(world: &World) -> Guest {
    let mut guest = Guest::connect(&world.socket_path(), 2);
    guest.negotiate().unwrap();
    guest.frontend.set_mem_table(&[guest.region_of(0, HALF), guest.region_of(HALF, HALF)]).unwrap();
    (0..2).for_each(|ring| guest.start_ring(ring).unwrap());
    guest
}

/// Returns the region that is removed.
fn second_region(guest: &Guest) -> VhostUserMemoryRegionInfo {
    guest.region_of(HALF, HALF)
}

/// Returns `len` bytes of guest memory.
fn bytes(guest: &Guest, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    guest.memory.read(at, &mut bytes).unwrap();
    bytes
}

/// Starts reads into the second region whose data transfer the drive holds.
fn start_held_reads(world: &World, guest: &mut Guest, count: u16) {
    world.sim.medium().write(0, &[0xdd; 64 * 512]);
    guest.memory.write(REMOVED_GPA, &[0x11; 64 * 512]).unwrap();
    world.sim.fault(CommandFilter::io(sim::opcode::READ).always(), FaultAction::StallData);
    for n in 0..count {
        guest.request(0, n * 3, IN, u64::from(n), &[(REMOVED_GPA + u64::from(n) * 512, 512)]);
    }
    guest.kick(0);
    assert!(world.sim.await_stalled(count.into(), TIMEOUT));
    // Later requests are not held.
    world.sim.behave();
}

#[test]
fn removed_memory_is_not_written() {
    let world = world();
    let mut guest = guest_with_two_regions(&world);
    start_held_reads(&world, &mut guest, 16);
    // The drive never answers these reads: the removal must fence it.
    let removed = second_region(&guest);
    guest.frontend.remove_mem_region(&removed).unwrap();
    let status = world.control().status().unwrap();
    assert_eq!((status.regions.len(), status.quarantine.len()), (1, 0), "{status:?}");
    let mapped = |at| world.iommu.mappings().iter().any(|mapping| mapping.iova.contains(Iova(at)));
    assert!(!mapped(HALF) && !mapped(REMOVED_GPA) && mapped(0));
    // From here on the memory belongs to others.
    guest.memory.write(REMOVED_GPA, &[0x22; 64 * 512]).unwrap();
    world.sim.release();
    let used = guest.await_used(0, 16);
    assert_eq!(used.len(), 16);
    for n in 0..16 {
        assert_eq!(guest.status(0, n * 3), IOERR, "request {n}");
    }
    assert_eq!(bytes(&guest, REMOVED_GPA, 64 * 512), [0x22; 64 * 512], "stale DMA");
    assert_serves_guest(&world, &mut guest);
    drop(guest);
    assert_serves(&world);
}

#[test]
fn removal_waits_for_dma_that_ends_soon() {
    let world = world();
    let mut guest = guest_with_two_regions(&world);
    start_held_reads(&world, &mut guest, 4);
    let enabled = world.sim.enabled();
    let removed = second_region(&guest);
    std::thread::scope(|scope| {
        let sim = &world.sim;
        let control = world.control();
        scope.spawn(move || {
            let mut control = control;
            let deadline = Instant::now() + TIMEOUT;
            // Once the region is being closed.
            while !control.status().unwrap().regions.iter().any(|region| region.closing) {
                assert!(Instant::now() < deadline);
            }
            sim.release();
        });
        guest.frontend.remove_mem_region(&removed).unwrap();
    });
    assert_eq!(world.sim.enabled(), enabled, "no fence was needed");
    assert_eq!(guest.await_used(0, 4).len(), 4);
    for n in 0..4 {
        assert_eq!(guest.status(0, n * 3), OK);
    }
    assert_eq!(bytes(&guest, REMOVED_GPA, 2048), [0xdd; 2048]);
    assert_serves_guest(&world, &mut guest);
}

#[test]
fn mem_table_without_region_in_use_removes_it() {
    let world = world();
    let mut guest = guest_with_two_regions(&world);
    start_held_reads(&world, &mut guest, 4);
    guest.frontend.set_mem_table(&[guest.region_of(0, HALF)]).unwrap();
    guest.memory.write(REMOVED_GPA, &[0x22; 64 * 512]).unwrap();
    world.sim.release();
    assert_eq!(guest.await_used(0, 4).len(), 4);
    assert_eq!(bytes(&guest, REMOVED_GPA, 64 * 512), [0x22; 64 * 512], "stale DMA");
    // The region can be added again.
    guest.frontend.add_mem_region(&second_region(&guest)).unwrap();
    guest.request(1, 0, IN, 0, &[(REMOVED_GPA, 512)]);
    guest.kick(1);
    guest.await_used(1, 1);
    assert_eq!((guest.status(1, 0), bytes(&guest, REMOVED_GPA, 512)), (OK, vec![0xdd; 512]));
    assert_serves_guest(&world, &mut guest);
}

#[test]
fn disconnect_removes_memory_in_use() {
    for disconnects in [false, true] {
        let world = world();
        let mut guest = guest_with_two_regions(&world);
        start_held_reads(&world, &mut guest, 8);
        if disconnects {
            // The front-end disconnects.
            let Guest { memory, frontend, socket, rings, .. } = guest;
            drop((frontend, socket, rings));
            assert_serves(&world);
            memory.write(REMOVED_GPA, &[0x22; 64 * 512]).unwrap();
            world.sim.release();
            assert_serves(&world);
            let mut read = vec![0; 64 * 512];
            memory.read(REMOVED_GPA, &mut read).unwrap();
            assert_eq!(read, [0x22; 64 * 512], "stale DMA");
        } else {
            // The front-end is silent, and the back-end stops.
            drop(world);
            guest.memory.write(REMOVED_GPA, &[0x22; 64 * 512]).unwrap();
            assert_eq!(bytes(&guest, REMOVED_GPA, 64 * 512), [0x22; 64 * 512]);
        }
    }
}

#[test]
fn get_vring_base_waits_for_requests_in_flight() {
    let world = world();
    let mut guest = guest_with_two_regions(&world);
    world.sim.medium().write(0, &[0xdd; 64 * 512]);
    let slow = FaultAction::DelayData(Duration::from_millis(20));
    world.sim.fault(CommandFilter::io(sim::opcode::READ).always(), slow);
    for n in 0..20 {
        guest.request(0, n * 3, IN, u64::from(n), &[(REMOVED_GPA + u64::from(n) * 512, 512)]);
    }
    guest.kick(0);
    assert!(world.sim.await_stalled(1, TIMEOUT));
    let base = guest.frontend.get_vring_base(0).unwrap();
    // Every request that was taken has ended, and no further one is processed.
    let used = guest.used(0);
    assert_eq!((used.len(), world.sim.stalled_commands()), (base as usize, 0));
    let data_at_stop = bytes(&guest, REMOVED_GPA, 64 * 512);
    world.sim.behave();
    for (head, _) in &used {
        assert_eq!(guest.status(0, *head as u16), OK);
    }
    guest.start_ring(0).unwrap();
    guest.kick(0);
    guest.await_used(0, 20 - used.len());
    assert!(data_at_stop[..base as usize * 512].iter().all(|byte| *byte == 0xdd));
    assert_eq!(
        bytes(&guest, REMOVED_GPA, 20 * 512),
        [0xdd; 20 * 512],
        "the requests that were not taken before must be processed now"
    );
    assert_serves_guest(&world, &mut guest);
}

#[test]
fn reset_device_under_load_ends_all_requests() {
    let world = world();
    for round in 0..10 {
        let mut guest = guest_with_two_regions(&world);
        world
            .sim
            .fault(CommandFilter::any().times(5), FaultAction::DelayCompletion(Duration::from_millis(5)));
        for n in 0..20 {
            let kind = if n % 2 == 0 { IN } else { OUT };
            guest.request(round % 2, n * 3, kind, u64::from(n), &[(REMOVED_GPA + u64::from(n) * 512, 512)]);
        }
        guest.kick(round % 2);
        let raw = Raw::over_socket(&guest.socket);
        let response = raw.send_with_ack(RESET_DEVICE, &[], &[]);
        assert!(!response.is_refusal(), "{response:?}");
        assert_eq!(world.sim.stalled_commands(), 0);
        guest.frontend.set_features(guest.features).unwrap();
        for ring in 0..2 {
            let used = guest.rings[ring].avail;
            guest.used(ring);
            // After a reset nothing is outstanding: the used index equals the available index.
            guest.rings[ring].used = used;
            guest.memory.write(guest.ring_base(ring) + 8192 + 2, &used.to_le_bytes()).unwrap();
            guest.start_ring(ring).unwrap();
        }
        assert_serves_guest(&world, &mut guest);
    }
}

#[test]
fn refused_mem_table_leaves_no_dma() {
    let world = world();
    let mut guest = guest_with_two_regions(&world);
    start_held_reads(&world, &mut guest, 4);
    // The second region overlaps the first: the message is refused, and the front-end is disconnected.
    let memory = std::os::fd::AsFd::as_fd(&guest.memory);
    let raw = Raw::over_socket(&guest.socket);
    raw.send(
        SET_MEM_TABLE,
        VERSION,
        &mem_table(&[region_at(0, HALF, 0), region_at(4096, HALF, 0)]),
        &[memory, memory],
    );
    raw.close();
    drop(guest.frontend);
    assert_serves(&world);
    guest.memory.write(REMOVED_GPA, &[0x22; 64 * 512]).unwrap();
    world.sim.release();
    assert_serves(&world);
    let mut read = vec![0; 64 * 512];
    guest.memory.read(REMOVED_GPA, &mut read).unwrap();
    assert_eq!(read, [0x22; 64 * 512], "stale DMA");
}
