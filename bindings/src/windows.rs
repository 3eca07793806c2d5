//! The windows that the kernel may yet pin through.
//!
//! A mapping by address is a statement about this process's address space, and iommufd may read that address
//! again: whenever a device is attached to an IOAS whose pages are not pinned at the time. So a [`GuestFile`]
//! that was mapped by address stays open until the kernel has confirmed the mapping gone. What is never
//! confirmed is leaked, not closed: something else could be mapped there, and a device could then reach it.

use std::collections::BTreeMap;
use std::mem::ManuallyDrop;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;

use crate::memory::GuestFile;
use crate::units::{LIMIT, Offset};
use crate::{Iova, PageRange};

/// Whether `len` bytes from `offset` on lie in `file`, and a device may write them if it is to: the kernel checks
/// neither where it maps by file.
pub(crate) fn check(file: &GuestFile, offset: Offset, len: u64, writable: bool) -> Result<(), Errno> {
    match offset.0.checked_add(len) {
        Some(end) if end <= file.size() => {}
        _ => return Err(Errno::INVAL),
    }
    if writable && !file.writable() { Err(Errno::ACCESS) } else { Ok(()) }
}

/// The files behind the by-address mappings of one kernel object, by address space and IOVA.
#[derive(Debug, Default)]
pub(crate) struct Windows(ManuallyDrop<Mutex<Held>>);

#[derive(Debug, Default)]
struct Held {
    records: BTreeMap<(u32, Iova), Record>,
    next: u64,
}

#[derive(Debug)]
struct Record {
    iova: PageRange<Iova>,
    born: u64,
    file: Arc<GuestFile>,
}

/// A point in time: an unmap that began here says nothing about mappings made later.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Mark(u64);

impl Windows {
    /// Now. Taken before an unmap is issued and given to [`Windows::release`] once it has succeeded.
    pub(crate) fn mark(&self) -> Mark {
        Mark(self.lock().next)
    }

    /// Keeps `file` open: the kernel has just mapped it by address at `iova` of address space `space`.
    pub(crate) fn hold(&self, space: u32, iova: PageRange<Iova>, file: Arc<GuestFile>) {
        self.lock().insert(space, iova, file);
    }

    /// Every mapping in `iova` made before `mark` is confirmed gone; what stuck out of it stays held.
    pub(crate) fn release(&self, space: u32, iova: PageRange<Iova>, mark: Mark) {
        let mut held = self.lock();
        for record in held.overlapping(space, iova) {
            if record.born >= mark.0 {
                held.records.insert((space, record.iova.start()), record);
                continue;
            }
            for rest in record.iova.without(iova).into_iter().flatten() {
                held.insert(space, rest, Arc::clone(&record.file));
            }
        }
    }

    /// The whole address space is confirmed gone.
    pub(crate) fn release_all(&self, space: u32, mark: Mark) {
        if let Some(all) = PageRange::between(Iova(0), Iova(LIMIT)) {
            self.release(space, all, mark);
        }
    }

    /// The pages that the kernel has just copied from `from` of one address space to `to` of another (or the
    /// same one): whatever was held for the originals is held for the copies.
    pub(crate) fn copy(&self, from: (u32, PageRange<Iova>), to: (u32, Iova)) {
        let mut held = self.lock();
        let found = held.overlapping(from.0, from.1);
        for record in &found {
            if let Some(part) = record.iova.intersection(from.1) {
                held.insert(to.0, part.rebase(from.1.start(), to.1), Arc::clone(&record.file));
            }
        }
        for record in found {
            held.records.insert((from.0, record.iova.start()), record);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Held {
    fn insert(&mut self, space: u32, iova: PageRange<Iova>, file: Arc<GuestFile>) {
        let born = self.next;
        self.next += 1;
        self.records.insert((space, iova.start()), Record { iova, born, file });
    }

    /// Takes out the records of `space` that share a page with `iova`.
    fn overlapping(&mut self, space: u32, iova: PageRange<Iova>) -> Vec<Record> {
        let first = self
            .records
            .range(..=(space, iova.start()))
            .next_back()
            .filter(|(key, record)| key.0 == space && record.iova.overlaps(iova))
            .map_or(iova.start(), |(key, _)| key.1);
        let keys: Vec<_> =
            self.records.range((space, first)..(space, iova.end())).map(|(key, _)| *key).collect();
        keys.iter().filter_map(|key| self.records.remove(key)).collect()
    }
}

impl Drop for Windows {
    fn drop(&mut self) {
        if self.lock().records.is_empty() {
            // SAFETY: dropped once, here, and not used after; nothing in it backs a mapping any more.
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
        Arc::new(GuestFile::memfd("window", 16 * PAGE).unwrap())
    }

    #[test]
    fn a_file_is_held_until_its_last_page_is_released() {
        let (windows, file) = (Windows::default(), file());
        windows.hold(1, range(0, 8), Arc::clone(&file));
        windows.release(1, range(2, 2), windows.mark());
        assert_eq!(Arc::strong_count(&file), 3, "a cut leaves two pieces, each held");
        windows.release(2, range(0, 16), windows.mark());
        assert_eq!(Arc::strong_count(&file), 3, "another address space is another thing");
        windows.release(1, range(0, 16), windows.mark());
        assert_eq!(Arc::strong_count(&file), 1);
    }

    #[test]
    fn an_unmap_releases_nothing_that_was_mapped_after_it_began() {
        let (windows, file) = (Windows::default(), file());
        let mark = windows.mark();
        windows.hold(1, range(0, 8), Arc::clone(&file));
        windows.release(1, range(0, 8), mark);
        assert_eq!(Arc::strong_count(&file), 2);
    }

    #[test]
    fn a_copy_is_held_like_its_original() {
        let (windows, file) = (Windows::default(), file());
        windows.hold(1, range(0, 8), Arc::clone(&file));
        windows.copy((1, range(4, 2)), (2, Iova(100 * PAGE)));
        windows.release(1, range(0, 8), windows.mark());
        assert_eq!(Arc::strong_count(&file), 2);
        windows.release(2, range(100, 2), windows.mark());
        assert_eq!(Arc::strong_count(&file), 1);
    }

    #[test]
    fn what_was_never_released_is_leaked() {
        let (windows, file) = (Windows::default(), file());
        windows.hold(1, range(0, 8), Arc::clone(&file));
        drop(windows);
        assert_eq!(Arc::strong_count(&file), 2);
    }
}
