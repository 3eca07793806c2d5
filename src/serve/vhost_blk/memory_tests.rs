//! The order in which a region is taken from workers and from devices, and given to them.

use std::os::fd::AsFd;

use passgate_backends::Domain;
use passgate_backends::iommu::sim::{FileKey, Memory, Sim};
use passgate_bindings::memory::GuestFile;
use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryRegion};

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
        let table = Table::new(inside.connect().unwrap(), Vec::new());
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

/// `st_dev` and `st_ino`.
fn numbers(file: &GuestFile) -> (u64, u64) {
    let found = identity::identify(file).unwrap();
    (found.device, found.inode)
}

/// True where devices reach nothing but the bench's file.
fn only_its_file_is_mapped(bench: &Bench) -> bool {
    let mappings = bench.domain.mappings();
    !mappings.is_empty() && mappings.iter().all(|mapping| mapping.file == FileKey::of(&bench.file).unwrap())
}

/// A VMM that has begun anew has memory of the same shape in another file. That one may have the numbers of the file before:
/// the kernel counts inodes in 32 bits.
#[test]
fn file_of_the_same_shape_is_not_taken_for_the_one_before() {
    for same_numbers in [false, true] {
        let mut bench = Bench::new();
        let before = vec![bench.part(0)];
        bench.table.set(before, drop).unwrap();
        bench.file = GuestFile::memfd("guest", 4 * LEN).unwrap();
        bench.file.write(0, &[7]).unwrap();
        if same_numbers {
            bench.table.regions[0].file = numbers(&bench.file);
        }
        let (after, mut steps) = (vec![bench.part(0)], Vec::new());
        let first = |memory: &GuestMemoryMmap| memory.read_obj::<u8>(GuestAddress(0)).ok();
        bench.table.set(after, |memory| steps.push(first(&memory))).unwrap();
        assert_eq!(steps, [None, Some(7)], "the same numbers: {same_numbers}");
        assert!(only_its_file_is_mapped(&bench));
    }
}

/// A region that a restart has kept mapped, with these numbers.
fn keep(bench: &mut Bench, (device, inode): (u64, u64)) -> u32 {
    let (shape, _, file) = bench.part(0);
    let memory = AddMemory { offset: shape.offset, ..AddMemory::shared(shape.gpa, shape.len) };
    let region = bench.table.client.add_memory(&memory, &[&file.as_fd()]).unwrap().region;
    let Shape { gpa, len: length, offset } = shape;
    let (piece, writable, shared) = (length, true, length);
    bench.table.adopted = vec![AdoptedRegion {
        region,
        gpa,
        length,
        device,
        inode,
        offset,
        piece,
        writable,
        shared,
        private: 0,
        hole: 0,
        unknown: 0,
    }];
    region
}

#[test]
fn file_of_the_same_shape_is_not_taken_for_one_that_a_restart_has_kept() {
    for same_numbers in [false, true] {
        let mut bench = Bench::new();
        let new = GuestFile::memfd("guest", 4 * LEN).unwrap();
        let of = numbers(if same_numbers { &new } else { &bench.file });
        keep(&mut bench, of);
        let old = Arc::new(std::mem::replace(&mut bench.file, new));
        bench.table.kept = vec![Arc::downgrade(&old)];
        let after = vec![bench.part(0)];
        bench.table.set(after, drop).unwrap();
        assert!(only_its_file_is_mapped(&bench), "the same numbers: {same_numbers}");
        assert!(bench.table.adopted.is_empty());
    }
}

#[test]
fn file_that_a_restart_has_kept_stays_mapped() {
    let mut bench = Bench::new();
    let of = numbers(&bench.file);
    let region = keep(&mut bench, of);
    let copy = bench.file.as_fd().try_clone_to_owned().unwrap();
    let held = Arc::new(GuestFile::new(copy, bench.file.kind(), bench.file.size(), true));
    bench.table.kept = vec![Arc::downgrade(&held)];
    let after = vec![bench.part(0)];
    bench.table.set(after, drop).unwrap();
    assert_eq!(bench.table.regions[0].id, region);
    assert!(bench.table.adopted.is_empty());
}
