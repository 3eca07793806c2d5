//! Hostile front-ends and guests: the back-end survives and serves the next one, leaks nothing, and its drive does no DMA to
//! memory that it was not given.

mod messages;
mod random;
pub mod raw;
mod removal;
mod rings;

use crate::guest::{DATA_GPA, Guest, IN, OK, OUT};
use crate::world::World;

/// Asserts that a new, correct guest is served on every queue.
#[track_caller]
pub fn assert_serves(world: &World) {
    assert_serves_guest(world, &mut world.guest());
}

/// Asserts that this guest is served on every queue.
#[track_caller]
pub fn assert_serves_guest(world: &World, guest: &mut Guest) {
    for ring in 0..guest.rings.len() {
        let sector = 1000 + 8 * ring as u64;
        let pattern: Vec<u8> = (0..4096).map(|n| (n * 7 + ring) as u8).collect();
        guest.memory.write(DATA_GPA, &pattern).unwrap();
        assert_eq!(guest.run_request(ring, OUT, sector, &[(DATA_GPA, 4096)]), OK);
        assert_eq!(world.sim.medium().read(sector, 8), pattern);
        assert_eq!(guest.run_request(ring, IN, sector, &[(DATA_GPA + 8192, 4096)]), OK);
        let mut read = vec![0; 4096];
        guest.memory.read(DATA_GPA + 8192, &mut read).unwrap();
        assert_eq!(read, pattern);
    }
}

/// Returns the number of files that this process has open.
fn open_files() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Returns the anonymous resident memory of this process (`RssAnon`), in KiB.
fn anonymous_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// Asserts that no command of the drive has caused a DMA fault.
#[track_caller]
fn assert_no_dma_faults(world: &World) {
    // On a slow machine the drive may have been fenced by a reset, which faults its commands in flight.
    let fenced = world.sim.enabled() > 1;
    assert!(world.sim.dma_faults() == 0 || fenced, "{} DMA faults", world.sim.dma_faults());
}
