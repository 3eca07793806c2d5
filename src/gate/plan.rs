//! What to map: derived from the ledger, never queued.
//!
//! Wanted is what is shared, lies in a region that stays, and is neither held nor mapped. Whoever changes one of
//! these calls [`Gate::reconcile`] over the pages that he touched; nothing else ever maps. Mappings are as large as the
//! region's grid allows, but page by page where pages keep leaving ([`super::merge`]).

use passgate_bindings::units::{Address, Offset};
use passgate_bindings::{Iova, PAGE, PageRange};

use super::effect::{Effect, Effects, Notice};
use super::event::{DomainId, FileId, RegionId};
use super::ledger::holds::gaps;
use super::ledger::{PageState, Run};
use super::{Gate, Job};

/// Kernel mappings that one map effect makes at most, so that no begin waits long for one in flight.
pub(crate) const JOB_OBJECTS: u64 = 1024;
/// Bytes that one map effect maps at most (but for a single longer piece), for the same reason.
pub(crate) const JOB_BYTES: u64 = 64 << 20;

/// `ENOSPC`: the budget of mappings is used up.
pub(super) const NO_SPACE: i32 = 28;

/// What is to be mapped by one effect.
struct Part {
    iova: PageRange<Iova>,
    piece: u64,
}

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
            self.map(domain, region, part, rest, effects);
        }
    }

    /// Bytes per kernel mapping of a region in a domain, while the region stays.
    fn piece(&self, domain: DomainId, region: RegionId) -> Option<u64> {
        let region = self.regions.get(&region).filter(|region| !region.closing)?;
        let index = self.domains.iter().position(|entry| entry.id == domain)?;
        region.pieces.get(index).copied()
    }

    /// The parts of `range` that are to be mapped now, and what must wait.
    fn wanted(
        &self,
        domain: DomainId,
        region: RegionId,
        range: PageRange<Iova>,
        piece: u64,
    ) -> (Vec<Part>, Option<PageRange<Iova>>) {
        let mut parts = Vec::new();
        let (Some(region), Some(entry)) = (self.regions.get(&region), self.domain(domain)) else {
            return (parts, None);
        };
        let pages = region.pages_at(range);
        let Some(file) = self.files.get(&pages.file) else { return (parts, None) };
        let mut room = JOB_BYTES.min(JOB_OBJECTS.saturating_mul(piece)).max(piece);
        let shared = file.pages.runs(pages.range).filter(|(_, state)| *state == PageState::Shared);
        for free in shared.flat_map(|(run, _)| file.holds.gaps(run)) {
            let free = free.rebase(pages.range.start(), range.start());
            let taken: Vec<_> = match entry.mapped.is_clear(free) {
                true => Vec::new(),
                false => entry.mapped.taken(free),
            };
            for gap in gaps(free, taken.into_iter()) {
                let mut at = gap.start();
                while let Some(left) = PageRange::between(at, gap.end()) {
                    if room == 0 {
                        return (parts, PageRange::between(at, range.end()));
                    }
                    let (piece, stop) = match self.churns(domain, at, piece) {
                        Some(stop) => (PAGE, stop.min(gap.end())),
                        None => (piece, self.calm(domain, left, piece)),
                    };
                    // Up to a border of the grid, so that what waits starts where a mapping would.
                    let most = at.raw() + room;
                    let border = Iova((most / piece * piece).max((at.raw() / piece + 1) * piece));
                    let stop = if stop.raw() <= most { stop } else { border.min(stop) };
                    let Some(iova) = PageRange::between(at, stop) else { break };
                    room = room.saturating_sub(iova.len());
                    parts.push(Part { iova, piece });
                    at = stop;
                }
            }
        }
        (parts, None)
    }

    /// Where in `range` the first place begins that is mapped page by page; its end where none does.
    fn calm(&self, domain: DomainId, range: PageRange<Iova>, piece: u64) -> Iova {
        let hot = self.domain(domain).and_then(|entry| entry.frayed.first_hot(range));
        hot.filter(|at| self.churns(domain, *at, piece).is_some()).unwrap_or(range.end())
    }

    fn map(
        &mut self,
        domain: DomainId,
        region: RegionId,
        Part { iova, piece }: Part,
        rest: Option<PageRange<Iova>>,
        effects: &mut Effects,
    ) {
        let job = self.next_job(Job::Map { domain, region, iova, rest });
        let run = Run::filling(iova, piece, job);
        let Some(entry) = self.entry(domain) else { return };
        if entry.mapped.objects().saturating_add(run.objects) > entry.able.max_mappings {
            self.jobs.remove(&job);
            effects.push(Effect::Notice(Notice::MapFailed { domain, iova, errno: NO_SPACE }));
            return;
        }
        entry.mapped.insert(run);
        self.kept(domain, region, run.objects);
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
