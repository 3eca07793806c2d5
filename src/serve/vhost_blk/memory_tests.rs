//! The order in which a region is taken from workers and from devices, and given to them.

use std::os::fd::AsFd;

use passgate_backends::Domain;
use passgate_backends::iommu::sim::{Memory, Sim};
use passgate_bindings::memory::GuestFile;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::*;
use crate::serve::{Handle, Options, Server};

const LEN: u64 = 0x1_0000;

/// A gate without devices, and a table whose regions go into it.
struct Bench {
    table: Table,
    domain: Arc<Sim>,
    file: GuestFile,
    server: Option<Handle>,
}

impl Bench {
    fn new() -> Self {
        let domain = Arc::new(Sim::new(Sim::CAPABILITIES, Memory::new()).unwrap());
        let plain = Arc::clone(&domain) as Arc<dyn Domain>;
        let server = Server::bind(Options::nowhere(), plain, Vec::new()).unwrap();
        let inside = server.inside();
        let server = Some(server.spawn().unwrap());
        let table = Table::new(inside.connect().unwrap(), false);
        Self { table, domain, file: GuestFile::memfd("guest", 4 * LEN).unwrap(), server }
    }

    /// Part `nth` of the file, at its place in the guest and in the front-end.
    fn part(&self, nth: u64) -> (Shape, u64, File) {
        let file = self.file.as_fd().try_clone_to_owned().unwrap();
        (Shape { gpa: nth * LEN, len: LEN, offset: nth * LEN }, 0x7000_0000 + nth * LEN, file.into())
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        let _ = self.server.take().map(Handle::stop);
    }
}

/// Where devices reach memory.
fn mapped(domain: &Sim) -> Vec<u64> {
    let mut at: Vec<_> = domain.mappings().iter().map(|mapping| mapping.iova.start().0 / LEN * LEN).collect();
    at.sort_unstable();
    at.dedup();
    at
}

/// Where workers see memory.
fn seen(memory: &GuestMemoryMmap) -> Vec<u64> {
    memory.iter().map(|region| region.start_addr().0).collect()
}

#[test]
fn added_memory_is_mapped_before_workers_see_it() {
    let mut bench = Bench::new();
    let ((shape, user, file), domain) = (bench.part(0), Arc::clone(&bench.domain));
    let mut steps = Vec::new();
    bench.table.add(shape, user, file, |memory| steps.push((seen(&memory), mapped(&domain)))).unwrap();
    assert_eq!(steps, [(vec![0], vec![0])]);
}

#[test]
fn removed_memory_is_unmapped_after_workers_have_lost_it() {
    let mut bench = Bench::new();
    for nth in [0, 1] {
        let (shape, user, file) = bench.part(nth);
        bench.table.add(shape, user, file, drop).unwrap();
    }
    let ((shape, user, _), domain) = (bench.part(1), Arc::clone(&bench.domain));
    let mut steps = Vec::new();
    bench.table.remove(shape, user, |memory| steps.push((seen(&memory), mapped(&domain)))).unwrap();
    assert_eq!((steps, mapped(&domain)), (vec![(vec![0], vec![0, LEN])], vec![0]));
    assert_eq!((bench.table.has(0), bench.table.has(LEN), bench.table.gpa(user)), (true, false, None));
}

/// Two parts go, one stays, one comes.
#[test]
fn table_takes_old_memory_from_workers_first_and_shows_new_memory_last() {
    let mut bench = Bench::new();
    let first = [0, 1, 2].map(|nth| bench.part(nth)).into();
    bench.table.set(first, drop).unwrap();
    let (second, domain) = ([1, 3].map(|nth| bench.part(nth)).into(), Arc::clone(&bench.domain));
    let mut steps = Vec::new();
    bench.table.set(second, |memory| steps.push((seen(&memory), mapped(&domain)))).unwrap();
    let (stays, comes) = (LEN, 3 * LEN);
    assert_eq!(steps, [(vec![stays], vec![0, LEN, 2 * LEN]), (vec![stays, comes], vec![stays, comes])]);
}
