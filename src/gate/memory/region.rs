//! One guest memory region.

use passgate_bindings::units::{Address, Offset};
use passgate_bindings::{Gpa, Iova, PageRange};

use crate::gate::effect::FilePages;
use crate::gate::event::{Caller, RegionSpec};
use crate::gate::ids::ClientId;
use crate::gate::verdict::Refusal;

/// The stage of a region's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    /// Its first maps are in progress; this caller waits for them.
    Adding(Caller),
    /// It may be mapped.
    Present,
    /// It is being closed: nothing of it is mapped any more.
    Closing,
}

/// A guest memory region.
#[derive(Debug)]
pub(in crate::gate) struct Region {
    pub(super) owner: ClientId,
    pub(super) spec: RegionSpec,
    pub(super) stage: Stage,
    /// The number of map effects in progress.
    pub(super) maps_pending: u32,
    /// Bytes mapped while it was being added, summed over the domains.
    pub(super) mapped_bytes: u64,
    /// Set once a map failed while it was being added.
    pub(super) failed: Option<Refusal>,
}

impl Region {
    pub(in crate::gate) fn owner(&self) -> ClientId {
        self.owner
    }

    pub(in crate::gate) fn spec(&self) -> &RegionSpec {
        &self.spec
    }

    pub(in crate::gate) fn gpa(&self) -> PageRange<Gpa> {
        self.spec.gpa
    }

    pub(in crate::gate) fn is_closing(&self) -> bool {
        self.stage == Stage::Closing
    }

    pub(in crate::gate) fn is_being_added(&self) -> bool {
        matches!(self.stage, Stage::Adding(_))
    }

    /// True while map effects of it are in progress.
    pub(in crate::gate) fn is_being_mapped(&self) -> bool {
        self.maps_pending > 0
    }

    pub(in crate::gate) fn has_failed(&self) -> bool {
        self.failed.is_some()
    }

    /// Returns its IOVAs: they are the guest-physical addresses.
    pub(in crate::gate) fn iova(&self) -> PageRange<Iova> {
        self.spec.gpa.rebase(Gpa(0), Iova(0))
    }

    /// Returns the IOVAs at which it shows these pages of its file; none where it shows none of them.
    pub(in crate::gate) fn iova_of(&self, range: PageRange<Offset>) -> Option<PageRange<Iova>> {
        let whole = self.file_pages().range;
        Some(whole.intersection(range)?.rebase(whole.start(), self.iova().start()))
    }

    /// Returns the pages of its file at a part of it.
    pub(in crate::gate) fn pages_at(&self, part: PageRange<Iova>) -> FilePages {
        let range = part.rebase(self.iova().start(), self.spec.backing.offset);
        FilePages { file: self.spec.backing.file, range, gpa: Gpa(part.start().raw()) }
    }

    /// Returns all pages of its file that it shows.
    pub(in crate::gate) fn file_pages(&self) -> FilePages {
        self.pages_at(self.iova())
    }
}
