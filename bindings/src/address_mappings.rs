//! Keeps files open while the kernel may still pin pages by their address in this process.
//!
//! An IOMMU mapping by address depends on this process's address space: iommufd reads that address again whenever a
//! device is attached to an IOAS whose pages are not pinned at the time. So a [`GuestFile`] that was mapped by address
//! stays open, and mapped here, until the kernel has confirmed the unmap. A file without that confirmation is leaked, not
//! closed: otherwise other memory could be mapped at the same address, and a device could then reach it.

use std::collections::BTreeMap;
use std::mem::ManuallyDrop;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;

use crate::memory::GuestFile;
use crate::units::{LIMIT, Offset};
use crate::{Iova, PageRange};

/// Checks that `len` bytes from `offset` on lie in `file` (`EINVAL`), and that the file is writable if `writable`
/// (`EACCES`). The kernel checks neither where it maps by file.
pub(crate) fn check(file: &GuestFile, offset: Offset, len: u64, writable: bool) -> Result<(), Errno> {
    match offset.0.checked_add(len) {
        Some(end) if end <= file.size() => {}
        _ => return Err(Errno::INVAL),
    }
    if writable && !file.writable() { Err(Errno::ACCESS) } else { Ok(()) }
}

/// The files behind the by-address mappings of one kernel object, by address space (IOAS id) and IOVA.
#[derive(Debug, Default)]
pub(crate) struct AddressMappings(ManuallyDrop<Mutex<Records>>);

#[derive(Debug, Default)]
struct Records {
    by_iova: BTreeMap<(u32, Iova), Record>,
    next_sequence: u64,
}

#[derive(Debug)]
struct Record {
    iova: PageRange<Iova>,
    sequence: u64,
    file: Arc<GuestFile>,
}

/// A position in the sequence of mappings. An unmap that began there does not cover mappings made later.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Mark(u64);

impl AddressMappings {
    /// Returns the current position. Taken before an unmap is issued, and passed to [`AddressMappings::remove`] once it has
    /// succeeded.
    pub(crate) fn mark(&self) -> Mark {
        Mark(self.lock().next_sequence)
    }

    /// Keeps `file` open: the kernel has mapped it by address at `iova` of address space `space`.
    pub(crate) fn add(&self, space: u32, iova: PageRange<Iova>, file: Arc<GuestFile>) {
        self.lock().insert(space, iova, file);
    }

    /// The kernel has confirmed the unmap of every mapping in `iova` that was made before `mark`. The parts of a mapping
    /// outside `iova` remain.
    pub(crate) fn remove(&self, space: u32, iova: PageRange<Iova>, mark: Mark) {
        let mut records = self.lock();
        for record in records.take_overlapping(space, iova) {
            if record.sequence >= mark.0 {
                records.by_iova.insert((space, record.iova.start()), record);
                continue;
            }
            for rest in record.iova.without(iova).into_iter().flatten() {
                records.insert(space, rest, Arc::clone(&record.file));
            }
        }
    }

    /// The kernel has confirmed the unmap of a whole address space.
    pub(crate) fn remove_all(&self, space: u32, mark: Mark) {
        if let Some(all) = PageRange::between(Iova(0), Iova(LIMIT)) {
            self.remove(space, all, mark);
        }
    }

    /// The kernel has copied the mappings in `from` of one address space to `to` of another, or of the same one: the copies
    /// keep the same files open.
    pub(crate) fn copy(&self, from: (u32, PageRange<Iova>), to: (u32, Iova)) {
        let mut records = self.lock();
        let found = records.take_overlapping(from.0, from.1);
        for record in &found {
            if let Some(part) = record.iova.intersection(from.1) {
                records.insert(to.0, part.rebase(from.1.start(), to.1), Arc::clone(&record.file));
            }
        }
        for record in found {
            records.by_iova.insert((from.0, record.iova.start()), record);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Records> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Records {
    fn insert(&mut self, space: u32, iova: PageRange<Iova>, file: Arc<GuestFile>) {
        let sequence = self.next_sequence;
        self.next_sequence += 1;
        self.by_iova.insert((space, iova.start()), Record { iova, sequence, file });
    }

    /// Removes and returns the records of `space` that overlap `iova`.
    fn take_overlapping(&mut self, space: u32, iova: PageRange<Iova>) -> Vec<Record> {
        let first = self
            .by_iova
            .range(..=(space, iova.start()))
            .next_back()
            .filter(|(key, record)| key.0 == space && record.iova.overlaps(iova))
            .map_or(iova.start(), |(key, _)| key.1);
        let keys: Vec<_> =
            self.by_iova.range((space, first)..(space, iova.end())).map(|(key, _)| *key).collect();
        keys.iter().filter_map(|key| self.by_iova.remove(key)).collect()
    }
}

impl Drop for AddressMappings {
    fn drop(&mut self) {
        if self.lock().by_iova.is_empty() {
            // SAFETY: dropped once, here, and not used after. There is no record, so no file in it backs a mapping.
            unsafe { ManuallyDrop::drop(&mut self.0) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::PAGE;

    fn range(page: u64, pages: u64) -> PageRange<Iova> {
        PageRange::new(page * PAGE, pages * PAGE).unwrap()
    }

    fn file() -> Arc<GuestFile> {
        Arc::new(GuestFile::memfd("mapped", 16 * PAGE).unwrap())
    }

    #[test]
    fn file_stays_open_until_its_last_page_is_unmapped() {
        let (mappings, file) = (AddressMappings::default(), file());
        mappings.add(1, range(0, 8), Arc::clone(&file));
        mappings.remove(1, range(2, 2), mappings.mark());
        assert_eq!(Arc::strong_count(&file), 3, "a cut leaves two records of the file");
        mappings.remove(2, range(0, 16), mappings.mark());
        assert_eq!(Arc::strong_count(&file), 3, "another address space has its own records");
        mappings.remove(1, range(0, 16), mappings.mark());
        assert_eq!(Arc::strong_count(&file), 1);
    }

    #[test]
    fn unmap_does_not_cover_a_mapping_made_after_it_began() {
        let (mappings, file) = (AddressMappings::default(), file());
        let mark = mappings.mark();
        mappings.add(1, range(0, 8), Arc::clone(&file));
        mappings.remove(1, range(0, 8), mark);
        assert_eq!(Arc::strong_count(&file), 2);
    }

    #[test]
    fn copied_mapping_keeps_the_file_open() {
        let (mappings, file) = (AddressMappings::default(), file());
        mappings.add(1, range(0, 8), Arc::clone(&file));
        mappings.copy((1, range(4, 2)), (2, Iova(100 * PAGE)));
        mappings.remove(1, range(0, 8), mappings.mark());
        assert_eq!(Arc::strong_count(&file), 2);
        mappings.remove(2, range(100, 2), mappings.mark());
        assert_eq!(Arc::strong_count(&file), 1);
    }

    #[test]
    fn file_without_confirmed_unmap_is_leaked() {
        let (mappings, file) = (AddressMappings::default(), file());
        mappings.add(1, range(0, 8), Arc::clone(&file));
        drop(mappings);
        assert_eq!(Arc::strong_count(&file), 2);
    }
}
