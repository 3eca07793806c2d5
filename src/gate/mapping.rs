//! Mapping: derived from the state, never queued.
//!
//! A page is wanted if it is shared, lies in a region that is not being closed, and is neither excluded nor mapped. Every rule
//! that changes one of these calls [`Gate::reconcile`] over the pages; nothing else ever maps. Mappings are as large as the
//! region's grid allows, but page by page where pages keep leaving ([`super::merge`]).

use passgate_bindings::units::{Address, Offset};
use passgate_bindings::{Iova, PAGE, PageRange};

use super::Gate;
use super::calls::Call;
use super::effect::{Effect, Effects, Notice};
use super::ids::{DomainId, FileId, RegionId};
use super::ledger::exclusions::gaps;
use super::ledger::mapped::mapping_count;
use super::policy::MAX_CALL_MAPPINGS;

/// `ENOSPC`: the budget of mappings is used up.
const ENOSPC: i32 = 28;

/// The part of a region that one effect maps.
struct Part {
    iova: PageRange<Iova>,
    /// Bytes per kernel mapping.
    piece: u64,
}

impl Gate {
    /// Maps the wanted parts of these pages, at every alias, in every domain.
    pub(super) fn reconcile(&mut self, file: FileId, range: PageRange<Offset>, effects: &mut Effects) {
        for index in 0..self.memory.regions_of(file).len() {
            let Some(region) = self.memory.regions_of(file).get(index).copied() else { return };
            let Some(iova) = self.memory.region(region).and_then(|r| r.iova_of(range)) else { continue };
            for domain in self.mappings.ids() {
                self.map_wanted(domain, region, iova, effects);
            }
        }
    }

    /// Maps the wanted parts of one region's `range` in one domain: as much as one effect may, and the rest once that is
    /// done.
    pub(super) fn map_wanted(
        &mut self,
        domain: DomainId,
        region: RegionId,
        range: PageRange<Iova>,
        effects: &mut Effects,
    ) {
        let Some((parts, rest)) = self.wanted(domain, region, range) else { return };
        let last = parts.len().saturating_sub(1);
        for (index, part) in parts.into_iter().enumerate() {
            let rest = if index == last { rest } else { None };
            self.map(domain, region, part, rest, effects);
        }
    }

    /// Returns the parts of `range` that are to be mapped now, and the rest that must wait.
    fn wanted(
        &self,
        domain: DomainId,
        region_id: RegionId,
        range: PageRange<Iova>,
    ) -> Option<(Vec<Part>, Option<PageRange<Iova>>)> {
        let region = self.memory.region(region_id).filter(|region| !region.is_closing())?;
        let domain = self.mappings.get(domain)?;
        let piece = domain.piece(region_id)?;
        let (pages, mapped) = (region.pages_at(range), domain.mapped());
        let mut parts = Vec::new();
        let mut room = self.limits.call_bytes.min(MAX_CALL_MAPPINGS.saturating_mul(piece)).max(piece);
        for free in self.memory.mappable(pages) {
            let free = free.rebase(pages.range.start(), range.start());
            for gap in gaps(free, mapped.taken(free).into_iter()) {
                let mut at = gap.start();
                while let Some(left) = PageRange::between(at, gap.end()) {
                    if room == 0 {
                        return Some((parts, PageRange::between(at, range.end())));
                    }
                    let (piece, end) = match domain.paged_until(at, piece) {
                        Some(end) => (PAGE, end.min(gap.end())),
                        None => (piece, domain.paged_from(left, piece)),
                    };
                    // Up to a border of the grid, so that what waits starts where a mapping would.
                    let most = at.raw() + room;
                    let border = Iova((most / piece * piece).max((at.raw() / piece + 1) * piece));
                    let end = if end.raw() <= most { end } else { border.min(end) };
                    let Some(iova) = PageRange::between(at, end) else { break };
                    room = room.saturating_sub(iova.len());
                    parts.push(Part { iova, piece });
                    at = end;
                }
            }
        }
        Some((parts, None))
    }

    fn map(
        &mut self,
        domain: DomainId,
        region: RegionId,
        Part { iova, piece }: Part,
        rest: Option<PageRange<Iova>>,
        effects: &mut Effects,
    ) {
        let job = self.calls.number();
        let has_room = |domain: &super::mappings::Domain| domain.has_room(mapping_count(iova, piece));
        match self.mappings.get(domain).map(has_room) {
            Some(true) => {}
            Some(false) => {
                effects.push(Effect::Notice(Notice::MapFailed { domain, iova, errno: ENOSPC }));
                return;
            }
            None => return,
        }
        self.calls.record(job, Call::Map { domain, region, iova, rest });
        self.mappings.start_map(domain, job, region, iova, piece);
        self.memory.map_started(region);
        let Some(region) = self.memory.region(region) else { return };
        let pages = region.pages_at(iova);
        let (file, offset, writable) = (pages.file, pages.range.start(), region.spec().writable);
        effects.push(Effect::Map { job, domain, iova, piece, file, offset, writable });
    }
}
