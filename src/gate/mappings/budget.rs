//! The budget of kernel mappings of one domain: those in use, those that open invalidations may yet need, and those promised
//! to regions that are being added.
//!
//! Every number here counts kernel mappings. A conversion that has been granted must be able to map its pages again, so room
//! for that is reserved when it begins, before anything is changed.

use passgate_bindings::units::Address;
use passgate_bindings::{Gpa, Iova, PAGE, PageRange};

use super::{Domain, Mappings};
use crate::gate::ids::{DomainId, RegionId};
use crate::gate::ledger::mapped::mapping_count;
use crate::gate::memory::{Memory, Region};
use crate::gate::status::MappingStatus;
use crate::gate::verdict::{Refusal, within_budget};

impl Domain {
    /// True where `more` kernel mappings beside those in use are within the domain's limit.
    pub(in crate::gate) fn has_room(&self, more: u64) -> bool {
        self.mapped.mapping_count().saturating_add(more) <= self.caps.max_mappings
    }

    /// Returns the number of kernel mappings that are neither in use nor reserved.
    pub(super) fn free_mappings(&self) -> u64 {
        self.caps.max_mappings.saturating_sub(self.mapped.mapping_count() + self.reserved)
    }

    /// Returns the maximum of additional mappings once all of `target` is mapped by itself and its neighbours are cut off; where it
    /// is cut out, also in the meantime.
    fn growth(&self, target: PageRange<Iova>, memory: &Memory) -> u64 {
        let region = memory.region_id_at(Gpa(target.start().raw()));
        let all = mapping_count(target, region.and_then(|id| self.piece(id)).unwrap_or(PAGE));
        let splits = self.mapped.whole(target) != target || self.mapped.fills_around(target);
        let ends = 2 * u64::from(splits);
        let after = (all + ends).saturating_sub(self.mapped.starts(target));
        if self.caps.cut { after.max(ends) } else { after }
    }

    /// Returns the number of mappings that `target` adds to what was promised to its region: while the region is being added, a
    /// conversion of pages that are not mapped yet cuts a mapping that is yet to be made, and leaves a part on either side.
    fn promise_growth(&self, target: PageRange<Iova>, memory: &Memory) -> Option<(RegionId, u64)> {
        let id = memory.region_id_at(Gpa(target.start().raw()))?;
        let being_added = self.shapes.get(&id).is_some_and(|shape| shape.promised > 0);
        (being_added && self.mapped.extent(target) != Some(target)).then_some((id, 2))
    }

    /// Returns the number of mappings at the worst that conversions can make of a region: every other page gone, or each page
    /// by itself where pages are mapped so.
    fn worst(&self, id: RegionId, region: &Region, gaps_allowed: bool) -> u64 {
        let pages = region.gpa().pages();
        let piece = self.piece(id).unwrap_or(PAGE);
        // If pages are never mapped by themselves, neighbours share a mapping until every other one is gone.
        let singly = piece == PAGE || (!self.caps.cut && gaps_allowed);
        if singly { pages } else { pages.div_ceil(2).max(region.gpa().len().div_ceil(piece) + 1) }
    }

    /// Returns the use of its kernel mappings; `gaps_allowed` as [`crate::gate::Gate::gaps_allowed`].
    pub(in crate::gate) fn status(&self, memory: &Memory, gaps_allowed: bool) -> MappingStatus {
        MappingStatus {
            domain: self.id,
            used: self.mapped.mapping_count(),
            reserved: self.reserved,
            worst: memory.regions().map(|(id, region)| self.worst(id, region, gaps_allowed)).sum(),
            limit: self.caps.max_mappings,
        }
    }
}

impl Mappings {
    /// Returns the number of mappings that an invalidation of `targets` may leave more than there are, in the domain where it
    /// leaves most; refused where there is no room.
    pub(in crate::gate) fn check_room(
        &self,
        targets: &[PageRange<Iova>],
        memory: &Memory,
    ) -> Result<u64, Refusal> {
        let mut most = 0;
        for domain in &self.domains {
            // A domain that counts memory and not mappings has room for all.
            if domain.caps.max_mappings == u64::MAX {
                continue;
            }
            let more: u64 = targets.iter().map(|target| domain.growth(*target, memory)).sum();
            let promised = targets.iter().filter_map(|target| domain.promise_growth(*target, memory));
            let promised: u64 = promised.map(|(_, count)| count).sum();
            let in_use = domain.mapped.mapping_count().saturating_add(domain.reserved);
            let needed = in_use.saturating_add(more).saturating_add(promised);
            within_budget("mappings", needed, domain.caps.max_mappings)?;
            most = most.max(more);
        }
        Ok(most)
    }

    /// Reserves `count` mappings in every domain.
    pub(in crate::gate) fn reserve(&mut self, count: u64) {
        self.domains.iter_mut().for_each(|domain| domain.reserved += count);
    }

    /// Ends a reservation of `count` mappings in every domain.
    pub(in crate::gate) fn end_reservation(&mut self, count: u64) {
        self.domains.iter_mut().for_each(|domain| domain.reserved -= count);
    }

    /// Reserves room in every domain for the first maps of a region.
    pub(in crate::gate) fn promise(&mut self, id: RegionId, iova: PageRange<Iova>) {
        for domain in &mut self.domains {
            if let Some(shape) = domain.shapes.get_mut(&id) {
                shape.promised = mapping_count(iova, shape.piece);
                domain.reserved += shape.promised;
            }
        }
    }

    /// Adds to the promises to regions being added what an invalidation of `targets` that was checked needs beside them.
    pub(in crate::gate) fn extend_promises(&mut self, targets: &[PageRange<Iova>], memory: &Memory) {
        for domain in &mut self.domains {
            for target in targets {
                if let Some((id, count)) = domain.promise_growth(*target, memory)
                    && let Some(shape) = domain.shapes.get_mut(&id)
                {
                    shape.promised += count;
                    domain.reserved += count;
                }
            }
        }
    }

    /// Ends what is left of the promise to a region, in every domain.
    pub(in crate::gate) fn end_promise(&mut self, id: RegionId) {
        for domain in &mut self.domains {
            if let Some(shape) = domain.shapes.get_mut(&id) {
                domain.reserved -= std::mem::take(&mut shape.promised);
            }
        }
    }

    /// Uses the promise to a region for `count` mappings that are being made.
    pub(super) fn use_promise(&mut self, domain: DomainId, id: RegionId, count: u64) {
        let Some(domain) = self.get_mut(domain) else { return };
        if let Some(shape) = domain.shapes.get_mut(&id) {
            let used = count.min(shape.promised);
            shape.promised -= used;
            domain.reserved -= used;
        }
    }

    /// Returns the number of mappings that `ranges` of a region take in the domain where they take most.
    pub(in crate::gate) fn needed_for(
        &self,
        id: RegionId,
        ranges: impl Iterator<Item = PageRange<Iova>>,
    ) -> u64 {
        let least = self.domains.iter().filter_map(|domain| domain.piece(id)).min().unwrap_or(PAGE);
        ranges.map(|range| mapping_count(range, least)).sum()
    }
}
