//! Front-ends and guests that do what they must not: the back-end lives and serves the next one, holds on to nothing of
//! theirs, and its drive never touches memory that it was not given.

mod messages;
mod random;
pub mod raw;
mod rings;
mod taken;

use crate::guest::{DATA, Guest, IN, OK, OUT};
use crate::world::World;

/// A guest that behaves is served, by every queue.
#[track_caller]
pub fn serves(world: &World) {
    serves_this(world, &mut world.guest());
}

#[track_caller]
pub fn serves_this(world: &World, guest: &mut Guest) {
    for ring in 0..guest.rings.len() {
        let sector = 1000 + 8 * ring as u64;
        let pattern: Vec<u8> = (0..4096).map(|n| (n * 7 + ring) as u8).collect();
        guest.memory.write(DATA, &pattern).unwrap();
        assert_eq!(guest.ask(ring, OUT, sector, &[(DATA, 4096)]), OK);
        assert_eq!(world.sim.medium().read(sector, 8), pattern);
        assert_eq!(guest.ask(ring, IN, sector, &[(DATA + 8192, 4096)]), OK);
        let mut read = vec![0; 4096];
        guest.memory.read(DATA + 8192, &mut read).unwrap();
        assert_eq!(read, pattern);
    }
}

/// Files that this process has open.
fn open_files() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Memory that this process has of its own, in KiB.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// The drive was never told of memory that is none.
#[track_caller]
fn told_of_memory_only(world: &World) {
    // Where this machine was so slow that the drive was fenced, that was its DMA.
    let fenced = world.sim.enabled() > 1;
    assert!(world.sim.dma_faults() == 0 || fenced, "{} DMA faults", world.sim.dma_faults());
}
