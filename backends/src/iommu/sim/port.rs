//! One device, as a simulated domain sees it: what it reaches, and which old translations it goes on using.

use super::table::Mapping;
use crate::iommu::Ticket;

/// What it takes to end the use of an old translation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Ends {
    /// An operation in flight, over with the next flush.
    WithFlush,
    /// An operation in flight that only a detach or a reset ends.
    WhenUnstuck,
    /// A copy in the device's own cache, gone with a detach or a reset; used while the device issues requests.
    WithCache,
}

/// An old translation that one device has not flushed yet.
#[derive(Debug, Clone)]
pub(super) struct Stale {
    pub(super) mapping: Mapping,
    /// None for a copy of which nobody is told.
    pub(super) ticket: Option<Ticket>,
    pub(super) ends: Ends,
}

/// One device, as the domain sees it.
#[derive(Debug, Default)]
pub(super) struct Port {
    pub(super) attached: bool,
    /// Whether it issues no requests: stopped, or bus mastering off.
    pub(super) silent: bool,
    /// Whether it caches translations of its own.
    pub(super) ats: bool,
    pub(super) stale: Vec<Stale>,
}

impl Port {
    /// Whether it reaches what is mapped.
    pub(super) fn reaches(&self) -> bool {
        self.attached && !self.silent
    }

    /// It goes on using these, though they are gone.
    pub(super) fn keep(&mut self, gone: &[Mapping], ticket: Option<Ticket>, ends: Ends) {
        self.stale.extend(gone.iter().map(|mapping| Stale { mapping: mapping.clone(), ticket, ends }));
    }

    /// The old translations that it uses.
    pub(super) fn used(&self) -> impl Iterator<Item = &Stale> {
        self.stale.iter().filter(|stale| stale.ends != Ends::WithCache || self.reaches())
    }
}
