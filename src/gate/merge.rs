//! Merging large mappings that have lost pages ([`super::mappings`] tracks them).
//!
//! Once a fragmented place has been quiet for a while and all of it is shared again, it is unmapped as a whole and mapped as
//! one. That is a gap in the DMA of its pages, so it is done only where gaps are allowed ([`Hitless`]), and never while
//! anything is in progress.

use passgate_bindings::units::Address;
use passgate_bindings::{Gpa, Iova, PageRange};

use super::Gate;
use super::effect::Effects;
use super::event::Caller;
use super::ids::{ClientId, DomainId, RegionId};
use super::invalidations::{New, Purpose};
use super::ledger::PageState;
use super::ledger::mapped::mapping_count;
use super::policy::Hitless;

impl Gate {
    /// True while something waits for a tick ([`super::Event::Quiet`]).
    pub fn is_fragmented(&self) -> bool {
        self.mappings.is_fragmented()
    }

    /// Pages of `range` come or go: records where that fragments a mapping that will be merged.
    pub(super) fn record_split(&mut self, domain: DomainId, range: PageRange<Iova>) {
        let region = self.memory.region_id_at(Gpa(range.start().raw()));
        let merges = self.may_merge(domain);
        let Some(domain) = self.mappings.get_mut(domain) else { return };
        if let Some(piece) = region.and_then(|id| domain.piece(id)).filter(|_| merges) {
            domain.record_split(range, piece);
        }
    }

    /// True if fragmented places of a domain are merged. Where pages are cut it costs a gap to gain little (IOMMU pages are
    /// small either way, and mappings not counted), so only where gaps do not matter.
    fn may_merge(&self, domain: DomainId) -> bool {
        let cuts = self.mappings.get(domain).is_some_and(|domain| domain.caps().cut);
        self.gaps_allowed(domain) && (!cuts || self.policy.hitless == Hitless::Off)
    }

    /// A tick has passed: what has been quiet is mapped in large pieces again.
    pub(super) fn merge_quiet(&mut self, effects: &mut Effects) {
        for id in self.mappings.ids() {
            let (busy, waited) = (self.devices.is_busy(id), !self.invalidations.waiting().is_empty());
            let may = self.may_merge(id) && self.ats_active(id).is_none();
            let Some(domain) = self.mappings.get_mut(id) else { continue };
            if busy || waited || domain.mapped().unsettled() + domain.mapped().filling() > 0 {
                continue;
            }
            for start in domain.take_quiet().into_iter().filter(|_| may) {
                self.merge(id, start, effects);
            }
        }
    }

    /// Maps the place at `start` as one, where all of it is shared and mapped in parts.
    fn merge(&mut self, domain_id: DomainId, start: Iova, effects: &mut Effects) {
        let Some(region_id) = self.region_of_piece(start) else { return };
        let (Some(region), Some(domain)) = (self.memory.region(region_id), self.mappings.get(domain_id))
        else {
            return;
        };
        let Some(piece) = domain.piece(region_id).filter(|_| !region.is_closing()) else { return };
        let Some(whole) = PageRange::between(start, Iova(start.raw() + piece)) else { return };
        let Some(range) = region.iova().intersection(whole) else { return };
        let pages = region.pages_at(range);
        let free = self.memory.excluded(pages.file).is_some_and(|excluded| excluded.is_clear(pages.range));
        let is_shared = |(_, state): (_, PageState)| state == PageState::Shared;
        let shared = free && self.memory.states(pages.file, pages.range).all(is_shared);
        let mapped = domain.mapped();
        let in_parts = mapped.live(range).eq([range]) && mapped.starts(range) > mapping_count(range, piece);
        if !shared || !in_parts {
            return;
        }
        let id = self.invalidations.start(New {
            caller: Caller::internal(ClientId(0)),
            ranges: range.rebase(Iova(0), Gpa(0)).into(),
            to: PageState::Shared,
            purpose: Purpose::Merge(domain_id),
            pages: Vec::new(),
            targets: vec![range],
            deadline_ns: self.policy.close_deadline_ns,
        });
        self.start_clearing(id, effects);
    }

    /// Returns the region of a place, which may begin before its region does.
    fn region_of_piece(&self, start: Iova) -> Option<RegionId> {
        let gpa = Gpa(start.raw());
        self.memory.region_id_at(gpa).or_else(|| self.memory.first_region_from(gpa))
    }
}
