//! The page table of a simulated IOMMU: whole mappings, made and removed as the kernel does.

use std::collections::BTreeMap;
use std::sync::Arc;

use passgate_backends::iommu::pieces;
use passgate_bindings::memory::GuestFile;
use passgate_bindings::units::Offset;
use passgate_bindings::{Iova, PageRange};
use rustix::io::Errno;

use super::memory::Generation;
use super::{DmaTarget, FileKey};

/// One mapping.
#[derive(Debug, Clone)]
pub struct Mapping {
    /// Its range in the I/O address space.
    pub iova: PageRange<Iova>,
    /// The file whose pages it pins.
    pub file: FileKey,
    /// The offset of its first page in the file.
    pub offset: Offset,
    /// The generation in which it pinned the pages.
    pub since: Generation,
    /// True if devices may write.
    pub writable: bool,
    pub(super) memory: Arc<GuestFile>,
}

impl Mapping {
    /// Returns the pages of the file that it maps.
    pub fn pages(&self) -> PageRange<Offset> {
        self.iova.rebase(self.iova.start(), self.offset)
    }

    /// Returns its part at `iova`, which lies inside, with the same frames.
    fn part(&self, iova: PageRange<Iova>) -> Self {
        let offset = Offset(iova.start().0 - self.iova.start().0 + self.offset.0);
        Self { iova, offset, ..self.clone() }
    }

    /// Returns the memory that a device accesses at `iova`; none if this mapping does not include it.
    pub fn at(&self, iova: Iova) -> Option<DmaTarget> {
        self.iova.contains(iova).then(|| DmaTarget {
            file: self.file,
            offset: Offset(iova.0 - self.iova.start().0 + self.offset.0),
            since: self.since,
            writable: self.writable,
        })
    }
}

/// The mappings of one domain; no two overlap.
#[derive(Debug, Default)]
pub(super) struct Table {
    mappings: BTreeMap<Iova, Mapping>,
}

impl Table {
    pub(super) fn len(&self) -> u64 {
        self.mappings.len() as u64
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Mapping> {
        self.mappings.values()
    }

    pub(super) fn find(&self, iova: Iova) -> Option<&Mapping> {
        self.mappings.range(..=iova).next_back().map(|(_, m)| m).filter(|m| m.iova.contains(iova))
    }

    /// Returns the mappings that share a page with `iova`, ascending.
    pub(super) fn overlapping(&self, iova: PageRange<Iova>) -> impl Iterator<Item = &Mapping> {
        let before = self.mappings.range(..iova.start()).next_back().map(|(_, m)| m);
        before
            .filter(move |m| m.iova.overlaps(iova))
            .into_iter()
            .chain(self.mappings.range(iova.start()..iova.end()).map(|(_, m)| m))
    }

    /// Makes the first `count` mappings of the grid of `piece` bytes over `whole`. The caller has checked that nothing
    /// is mapped there.
    pub(super) fn insert(&mut self, whole: &Mapping, piece: u64, count: usize) {
        for iova in pieces::grid(whole.iova, piece).take(count) {
            self.put(whole.part(iova));
        }
    }

    /// Returns the parts of mappings that lie in `iova`; `ENOENT` if one of them extends beyond it and `cuts` is not
    /// set.
    pub(super) fn inside(&self, iova: PageRange<Iova>, cuts: bool) -> Result<Vec<PageRange<Iova>>, Errno> {
        let parts = self.overlapping(iova).map(|mapping| match mapping.iova.intersection(iova) {
            Some(part) if cuts || part == mapping.iova => Ok(part),
            _ => Err(Errno::NOENT),
        });
        parts.collect()
    }

    /// Removes `part`, which is a mapping or a part of one. The rest of the mapping stays, with the same frames.
    pub(super) fn remove(&mut self, part: PageRange<Iova>) -> Option<Mapping> {
        let start = self.find(part.start())?.iova.start();
        let whole = self.mappings.remove(&start)?;
        for rest in whole.iova.without(part).into_iter().flatten() {
            self.put(whole.part(rest));
        }
        Some(whole.part(part))
    }

    fn put(&mut self, mapping: Mapping) {
        self.mappings.insert(mapping.iova.start(), mapping);
    }
}
