//! The page table of a simulated IOMMU: whole mappings, made and removed as the kernel does it.

use std::collections::BTreeMap;
use std::sync::Arc;

use passgate_bindings::memory::GuestFile;
use passgate_bindings::units::Offset;
use passgate_bindings::{Iova, PageRange};
use rustix::io::Errno;

use super::memory::Stamp;
use super::{FileKey, Seen};

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

    /// Makes mappings of `piece` bytes until `whole` is covered; the caller has checked that nothing is there.
    pub(super) fn insert(&mut self, whole: &Mapping, piece: u64, pieces: u64) {
        let mut from = whole.iova.start();
        for _ in 0..pieces {
            let to = Iova(whole.iova.end().0.min(from.0.saturating_add(piece)));
            let Some(iova) = PageRange::between(from, to) else { return };
            let offset = Offset(from.0 - whole.iova.start().0 + whole.offset.0);
            self.mappings.insert(from, Mapping { iova, offset, ..whole.clone() });
            from = to;
        }
    }

    /// The mappings in `iova`, or `ENOENT` where one of them would be cut in two.
    pub(super) fn inside(&self, iova: PageRange<Iova>) -> Result<Vec<Iova>, Errno> {
        let mut starts = Vec::new();
        for mapping in self.overlapping(iova) {
            if !iova.covers(mapping.iova) {
                return Err(Errno::NOENT);
            }
            starts.push(mapping.iova.start());
        }
        Ok(starts)
    }

    pub(super) fn remove(&mut self, start: Iova) -> Option<Mapping> {
        self.mappings.remove(&start)
    }
}
