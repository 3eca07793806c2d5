//! The order in which a region is taken from workers and from devices, and given to them.

use std::os::fd::AsFd;

use passgate_backends::Domain;
use passgate_bindings::memory::GuestFile;
use passgate_sim::iommu::{FileKey, Memory, Sim};
use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryRegion};

use super::*;
use crate::serve::{Handle, Options, Server};

const LEN: u64 = 0x1_0000;

/// A gate without devices, and a memory table on it.
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

    /// Returns part `index` of the file as a region: its shape, its address in the front-end, and the file.
    fn part(&self, index: u64) -> (Shape, u64, File) {
        let file = self.file.as_fd().try_clone_to_owned().unwrap();
        (Shape { gpa: index * LEN, len: LEN, offset: index * LEN }, 0x7000_0000 + index * LEN, file.into())
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        let _ = self.server.take().map(Handle::stop);
    }
}

/// Returns the guest-physical addresses of the parts that are mapped for devices.
fn mapped(domain: &Sim) -> Vec<u64> {
    let mut at: Vec<_> = domain.mappings().iter().map(|mapping| mapping.iova.start().0 / LEN * LEN).collect();
    at.sort_unstable();
    at.dedup();
    at
}

/// Returns the guest-physical addresses of the regions that workers see.
fn visible(memory: &GuestMemoryMmap) -> Vec<u64> {
    memory.iter().map(|region| region.start_addr().0).collect()
}

#[test]
fn added_memory_is_mapped_before_workers_see_it() {
    let mut bench = Bench::new();
    let ((shape, user, file), domain) = (bench.part(0), Arc::clone(&bench.domain));
    let mut steps = Vec::new();
    bench.table.add(shape, user, file, |memory| steps.push((visible(&memory), mapped(&domain)))).unwrap();
    assert_eq!(steps, [(vec![0], vec![0])]);
}

#[test]
fn removed_memory_is_taken_from_workers_before_it_is_unmapped() {
    let mut bench = Bench::new();
    for index in [0, 1] {
        let (shape, user, file) = bench.part(index);
        bench.table.add(shape, user, file, drop).unwrap();
    }
    let ((shape, user, _), domain) = (bench.part(1), Arc::clone(&bench.domain));
    let mut steps = Vec::new();
    bench.table.remove(shape, user, |memory| steps.push((visible(&memory), mapped(&domain)))).unwrap();
    assert_eq!((steps, mapped(&domain)), (vec![(vec![0], vec![0, LEN])], vec![0]));
    assert_eq!((bench.table.has(0), bench.table.has(LEN), bench.table.gpa(user)), (true, false, None));
}

/// Two parts are removed, one remains, one is added.
#[test]
fn new_table_takes_old_memory_from_workers_before_it_shows_new_memory() {
    let mut bench = Bench::new();
    let first = [0, 1, 2].map(|index| bench.part(index)).into();
    bench.table.set(first, drop).unwrap();
    let (second, domain) = ([1, 3].map(|index| bench.part(index)).into(), Arc::clone(&bench.domain));
    let mut steps = Vec::new();
    bench.table.set(second, |memory| steps.push((visible(&memory), mapped(&domain)))).unwrap();
    let (unchanged, added) = (LEN, 3 * LEN);
    assert_eq!(
        steps,
        [(vec![unchanged], vec![0, LEN, 2 * LEN]), (vec![unchanged, added], vec![unchanged, added])]
    );
}

/// Returns `st_dev` and `st_ino` of a file.
fn numbers(file: &GuestFile) -> (u64, u64) {
    let found = identity::identify(file).unwrap();
    (found.device, found.inode)
}

/// Returns true if nothing but the bench's file is mapped for devices.
fn only_its_file_is_mapped(bench: &Bench) -> bool {
    let mappings = bench.domain.mappings();
    !mappings.is_empty() && mappings.iter().all(|mapping| mapping.file == FileKey::of(&bench.file).unwrap())
}

/// A VMM that restarts has memory of the same shape in another file. That file may have the numbers of the one before, because
/// the kernel's inode numbers wrap at 32 bits.
#[test]
fn another_file_of_the_same_shape_replaces_the_region() {
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

/// Adds an adopted region that a restart has left mapped, with these numbers. Returns its number at the gate.
fn adopt(bench: &mut Bench, (device, inode): (u64, u64)) -> u32 {
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
fn another_file_of_the_same_shape_is_not_adopted_after_a_restart() {
    for same_numbers in [false, true] {
        let mut bench = Bench::new();
        let new = GuestFile::memfd("guest", 4 * LEN).unwrap();
        let of = numbers(if same_numbers { &new } else { &bench.file });
        adopt(&mut bench, of);
        let old = Arc::new(std::mem::replace(&mut bench.file, new));
        bench.table.inherited_files = vec![Arc::downgrade(&old)];
        let after = vec![bench.part(0)];
        bench.table.set(after, drop).unwrap();
        assert!(only_its_file_is_mapped(&bench), "the same numbers: {same_numbers}");
        assert!(bench.table.adopted.is_empty());
    }
}

#[test]
fn same_file_is_adopted_and_stays_mapped_after_a_restart() {
    let mut bench = Bench::new();
    let of = numbers(&bench.file);
    let region = adopt(&mut bench, of);
    let copy = bench.file.as_fd().try_clone_to_owned().unwrap();
    let inherited = Arc::new(GuestFile::new(copy, bench.file.kind(), bench.file.size(), true));
    bench.table.inherited_files = vec![Arc::downgrade(&inherited)];
    let after = vec![bench.part(0)];
    bench.table.set(after, drop).unwrap();
    assert_eq!(bench.table.regions[0].id, region);
    assert!(bench.table.adopted.is_empty());
}
