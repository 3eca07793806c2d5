//! The page table of a simulated IOMMU: whole mappings, made and removed as the kernel does it.

use std::collections::BTreeMap;
use std::sync::Arc;

use passgate_bindings::memory::GuestFile;
use passgate_bindings::units::Offset;
use passgate_bindings::{Iova, PageRange};
use rustix::io::Errno;

use super::memory::Stamp;
use super::{FileKey, Seen};
use crate::iommu::pieces;

/// One mapping.
#[derive(Debug, Clone)]
pub struct Mapping {
    /// Where devices see it.
    pub iova: PageRange<Iova>,
    /// The file that it pins pages of.
    pub file: FileKey,
    /// From where on.
    pub offset: Offset,
    /// When it pinned them.
    pub since: Stamp,
    /// Whether devices may write.
    pub writable: bool,
    pub(super) memory: Arc<GuestFile>,
}

impl Mapping {
    /// The pages of the file that it shows.
    pub fn pages(&self) -> PageRange<Offset> {
        self.iova.rebase(self.iova.start(), self.offset)
    }

    /// Its part at `iova`, which lies inside: the same frames.
    fn part(&self, iova: PageRange<Iova>) -> Self {
        let offset = Offset(iova.start().0 - self.iova.start().0 + self.offset.0);
        Self { iova, offset, ..self.clone() }
    }

    /// What a device sees at `iova`, where this mapping has it.
    pub fn at(&self, iova: Iova) -> Option<Seen> {
        self.iova.contains(iova).then(|| Seen {
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

    /// The mappings that share a page with `iova`.
    pub(super) fn overlapping(&self, iova: PageRange<Iova>) -> impl Iterator<Item = &Mapping> {
        let before = self.mappings.range(..iova.start()).next_back().map(|(_, m)| m);
        before
            .filter(move |m| m.iova.overlaps(iova))
            .into_iter()
            .chain(self.mappings.range(iova.start()..iova.end()).map(|(_, m)| m))
    }

    /// Makes the first `count` mappings of the grid of `piece` bytes over `whole`; the caller has checked that
    /// nothing is there.
    pub(super) fn insert(&mut self, whole: &Mapping, piece: u64, count: usize) {
        for iova in pieces::grid(whole.iova, piece).take(count) {
            self.put(whole.part(iova));
        }
    }

    /// What of the mappings lies in `iova`; where the table does not cut, `ENOENT` if one of them sticks out.
    pub(super) fn inside(&self, iova: PageRange<Iova>, cuts: bool) -> Result<Vec<PageRange<Iova>>, Errno> {
        let parts = self.overlapping(iova).map(|mapping| match mapping.iova.intersection(iova) {
            Some(part) if cuts || part == mapping.iova => Ok(part),
            _ => Err(Errno::NOENT),
        });
        parts.collect()
    }

    /// Takes out `part`, all of a mapping or a part of one; what is left of it pins the frames that it did.
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
