//! What to map: derived from the ledger, never queued.
//!
//! Wanted is what is shared, lies in a region that stays, and is neither held nor mapped. Whoever changes one of
//! these calls [`Gate::reconcile`] over the pages that he touched; nothing else ever maps.

use passgate_bindings::units::{Address, Offset};
use passgate_bindings::{Iova, PageRange};

use super::effect::{Effect, Effects, Notice};
use super::event::{DomainId, FileId, RegionId};
use super::ledger::holds::gaps;
use super::ledger::{PageState, Run, RunState};
use super::{Gate, Job};

/// Kernel mappings that one map effect makes at most, so that no begin waits long for one in flight.
const JOB_OBJECTS: u64 = 1024;
/// Bytes that one map effect maps at most (but for a single longer piece), for the same reason.
const JOB_BYTES: u64 = 64 << 20;

/// `ENOSPC`: the budget of mappings is used up.
pub(super) const NO_SPACE: i32 = 28;

impl Gate {
    /// Maps what of these pages is wanted and not mapped, at every alias, in every domain.
    pub(super) fn reconcile(&mut self, file: FileId, range: PageRange<Offset>, effects: &mut Effects) {
        let regions = self.files.get(&file).map_or(0, |entry| entry.regions.len());
        for index in 0..regions {
            let Some(region) = self.files.get(&file).and_then(|entry| entry.regions.get(index)).copied()
            else {
                return;
            };
            let Some(iova) = self.regions.get(&region).and_then(|r| r.iova_of(range)) else { continue };
            for index in 0..self.domains.len() {
                self.fill(self.domains[index].id, region, iova, effects);
            }
        }
    }

    /// Maps what of one region's `range` is wanted and not mapped in one domain: as much as one effect may, and
    /// the rest once that is done.
    pub(super) fn fill(
        &mut self,
        domain: DomainId,
        region: RegionId,
        range: PageRange<Iova>,
        effects: &mut Effects,
    ) {
        let Some(piece) = self.piece(domain, region) else { return };
        let (parts, rest) = self.wanted(domain, region, range, piece);
        let last = parts.len().saturating_sub(1);
        for (index, part) in parts.into_iter().enumerate() {
            let rest = if index == last { rest } else { None };
            self.map(domain, region, part, piece, rest, effects);
        }
    }

    /// Bytes per kernel mapping of a region in a domain, while the region stays.
    fn piece(&self, domain: DomainId, region: RegionId) -> Option<u64> {
        let region = self.regions.get(&region).filter(|region| !region.closing)?;
        let domain = self.domain(domain)?;
        let longest = 1 << domain.max_piece.checked_ilog2()?;
        Some(region.spec.piece.min(longest))
    }

    /// The parts of `range` that are to be mapped now, cut where pieces would not be aligned, and what must wait.
    fn wanted(
        &self,
        domain: DomainId,
        region: RegionId,
        range: PageRange<Iova>,
        piece: u64,
    ) -> (Vec<PageRange<Iova>>, Option<PageRange<Iova>>) {
        let mut parts = Vec::new();
        let (Some(region), Some(domain)) = (self.regions.get(&region), self.domain(domain)) else {
            return (parts, None);
        };
        let pages = region.pages_at(range);
        let Some(file) = self.files.get(&pages.file) else { return (parts, None) };
        let mut room = JOB_BYTES.min(JOB_OBJECTS.saturating_mul(piece)).max(piece);
        let shared = file.pages.runs(pages.range).filter(|(_, state)| *state == PageState::Shared);
        for free in shared.flat_map(|(run, _)| file.holds.gaps(run)) {
            let free = free.rebase(pages.range.start(), range.start());
            let clear = domain.runs.is_clear(free);
            let taken = (!clear).then(|| domain.runs.overlapping(free).map(|run| run.range));
            for gap in gaps(free, taken.into_iter().flatten()) {
                let border = Iova(gap.start().raw().next_multiple_of(piece).min(gap.end().raw()));
                let split = [PageRange::between(gap.start(), border), PageRange::between(border, gap.end())];
                for part in split.into_iter().flatten() {
                    if room == 0 {
                        return (parts, PageRange::between(part.start(), range.end()));
                    }
                    // Whole pieces only, so that what waits starts where a piece would.
                    let whole = (room / piece).max(1) * piece;
                    let take = if part.len() <= room { part.len() } else { whole.min(part.len()) };
                    room = room.saturating_sub(take);
                    let cut = Iova(part.start().raw() + take);
                    parts.extend(PageRange::between(part.start(), cut));
                    if let Some(left) = PageRange::between(cut, range.end()).filter(|_| cut < part.end()) {
                        return (parts, Some(left));
                    }
                }
            }
        }
        (parts, None)
    }

    fn map(
        &mut self,
        domain: DomainId,
        region: RegionId,
        iova: PageRange<Iova>,
        piece: u64,
        rest: Option<PageRange<Iova>>,
        effects: &mut Effects,
    ) {
        let run = Run::new(iova, piece, RunState::Live);
        let Some(entry) = self.domain(domain) else { return };
        if entry.runs.objects() + run.objects > entry.max_mappings {
            effects.push(Effect::Notice(Notice::MapFailed { domain, iova, errno: NO_SPACE }));
            return;
        }
        let job = self.next_job(Job::Map { domain, region, iova, rest });
        if let Some(runs) = self.runs(domain) {
            runs.insert(Run { state: RunState::Filling(job), ..run });
        }
        let Some(region) = self.regions.get_mut(&region) else { return };
        region.filling += 1;
        let pages = region.pages_at(iova);
        effects.push(Effect::Map {
            job,
            domain,
            iova,
            piece,
            file: pages.file,
            offset: pages.range.start(),
            writable: region.spec.writable,
        });
    }
}
