//! Restart: a gate resumes from the records that an earlier process wrote before each of its effects.
//!
//! Everything mapped stays mapped. Every run in progress is in doubt, and is settled by an unmap of its own: where the
//! kernel reports success, nothing is mapped there any more, whatever was. Conversions that were open end as if their
//! client had gone: nobody here knows the state of the pages.
//!
//! A quarantine that no run in the ledger justifies any more was disproved when the earlier gate ended, and is lifted.
//!
//! No page stays mapped that is excluded or not shared. The earlier gate may have excluded a page and left it mapped while
//! it waited for a device to pause or to be detached; this one unmaps it by an invalidation of its own, with the ladder
//! behind it.

use passgate_bindings::units::{Address, LIMIT, Offset};
use passgate_bindings::{Gpa, Iova, PAGE, PageRange};

use super::Gate;
use super::calls::Call;
use super::effect::{Effect, Effects};
use super::event::{Caller, RegionSpec, UnmapResult};
use super::ids::{CLOSED_BEFORE, DeviceId, DomainId, FileId, InvalidationId, JobId, ORPHANS, RegionId};
use super::invalidations::{New, Purpose};
use super::ledger::exclusions::gaps;
use super::ledger::{ExcludedBy, PageState, Store};
use super::mappings::Domain;
use super::ranges::Ranges;
use super::verdict::{Cause, Reason};

/// A region as it is recorded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegionRecord {
    /// Its number.
    pub region: RegionId,
    /// As it was described.
    pub spec: RegionSpec,
    /// Bytes per kernel mapping.
    pub piece: u64,
    /// True while it is being closed.
    pub closing: bool,
}

/// The records of an earlier gate. Its page states and mappings lie in the store ([`Gate::use_store`]).
#[derive(Debug, Default)]
pub struct RecordedState {
    /// Its regions; none overlaps another.
    pub regions: Vec<RegionRecord>,
    /// The ranges excluded from mapping.
    pub exclusions: Vec<(FileId, PageRange<Offset>, ExcludedBy)>,
    /// Conversions that were open at an earlier restart, which the owner of their memory may still settle.
    pub unended: Vec<InvalidationId>,
    /// True if the mappings are gone with the process that had them.
    pub unmapped: bool,
    /// Devices that were stopped, or about to be.
    pub stopped: Vec<DeviceId>,
    /// The highest number that a region had.
    pub last_region: u32,
    /// The highest number that an invalidation had.
    pub last_invalidation: u64,
}

impl Gate {
    /// Keeps page states and mappings in `store`, where they outlive this gate. Before its domains.
    pub fn use_store(&mut self, store: Store) {
        self.memory.use_store(store);
    }

    /// Resumes from the records of an earlier gate. On a gate with its domain and devices, without memory.
    pub fn resume(&mut self, past: RecordedState, effects: &mut Effects) {
        self.memory.count_regions_from(past.last_region);
        self.invalidations.count_from(past.last_invalidation);
        if past.unmapped {
            // Of what was in flight this ledger proves nothing.
            self.quarantine.earlier_until(InvalidationId(past.last_invalidation));
        }
        past.stopped.iter().for_each(|device| self.devices.make_uncertain(*device));
        let Some(domain) = self.mappings.iter().map(Domain::id).next() else { return };
        past.regions.iter().for_each(|region| self.restore_region(region));
        for (file, range, by) in past.exclusions {
            self.restore_exclusion(file, range, by, effects);
        }
        let unknown = self.unknown();
        let unsettled = past.unended.into_iter().filter(|id| unknown.contains_key(id));
        unsettled.for_each(|id| self.quarantine.add_unended(id));
        self.unmap_leftovers(domain, effects);
        self.unmap_forbidden(domain, effects);
        self.lift_disproved(effects);
        if past.regions.iter().any(|region| region.closing) {
            self.clients.leaves(CLOSED_BEFORE);
        }
        for RegionRecord { region, closing, .. } in past.regions {
            if closing {
                self.close_stopped(region, effects);
            } else if let Some(iova) = self.memory.region(region).map(|region| region.iova()) {
                self.map_wanted(domain, region, iova, effects);
            }
        }
        self.attach_stopped(effects);
    }

    fn restore_region(&mut self, written: &RegionRecord) {
        let RegionRecord { region, spec, piece, closing } = *written;
        let owner = if closing { CLOSED_BEFORE } else { ORPHANS };
        self.memory.restore_region(region, spec, owner, closing);
        self.mappings.add_region(region, &vec![piece; self.mappings.ids().len()]);
    }

    fn restore_exclusion(
        &mut self,
        file: FileId,
        range: PageRange<Offset>,
        by: ExcludedBy,
        effects: &mut Effects,
    ) {
        match by {
            ExcludedBy::Quarantine(since, reason) => {
                self.memory.restore_excluded(file, range, by);
                if self.quarantine.lasts(since, reason) {
                    self.memory.restore_state(file, range, PageState::Unknown);
                }
            }
            ExcludedBy::Open(id) => {
                self.memory.restore_state(file, range, PageState::Unknown);
                self.put_in_quarantine(id, file, range, Reason::of(Cause::ClientGone, 0), effects);
                self.quarantine.add_unended(id);
            }
        }
    }

    /// Begins to unmap the pages that are live in the domain and must not be: those excluded, or not shared.
    fn unmap_forbidden(&mut self, domain: DomainId, effects: &mut Effects) {
        let targets = self.forbidden_in(domain);
        let Some(first) = targets.first() else { return };
        let gpa = first.rebase(Iova(0), Gpa(0));
        let ranges = targets.iter().map(|target| target.rebase(Iova(0), Gpa(0))).collect::<Vec<_>>();
        let id = self.invalidations.start(New {
            caller: Caller::internal(ORPHANS),
            ranges: Ranges::try_from(ranges).unwrap_or_else(|_| gpa.into()),
            to: PageState::Unknown,
            purpose: Purpose::Resume,
            pages: Vec::new(),
            targets,
            deadline_ns: self.policy.close_deadline_ns,
        });
        self.start_clearing(id, effects);
    }

    /// Returns the ranges that are live in the domain although their pages are excluded or not shared: ascending,
    /// apart. A region that is being closed is unmapped as a whole anyway.
    fn forbidden_in(&self, domain: DomainId) -> Vec<PageRange<Iova>> {
        let (Ok(everywhere), Some(entry)) = (PageRange::<Iova>::new(0, LIMIT), self.mappings.get(domain))
        else {
            return Vec::new();
        };
        let mut found: Vec<PageRange<Iova>> = Vec::new();
        for part in entry.mapped().live(everywhere).flat_map(|live| self.memory.pages_at(live)) {
            let Some(excluded) = self.memory.excluded(part.file) else { continue };
            let excluded = excluded.overlapping(part.range);
            let excluded = excluded.filter_map(|(range, _)| range.intersection(part.range));
            let states = self.memory.states(part.file, part.range);
            let states = states.filter(|(_, state)| *state != PageState::Shared);
            let pages = excluded.chain(states.map(|(run, _)| run));
            found.extend(pages.map(|pages| pages.rebase(part.range.start(), Iova(part.gpa.raw()))));
        }
        if self.ats_active(domain).is_some() {
            // A leftover of a call in progress is unmapped already, which proves nothing before the device is detached.
            found.extend(entry.mapped().runs(everywhere).map(|run| run.range));
        }
        found.retain(|iova| {
            self.memory.region_at(Gpa(iova.start().raw())).is_none_or(|region| !region.is_closing())
        });
        found.sort_unstable();
        let mut apart: Vec<PageRange<Iova>> = Vec::with_capacity(found.len());
        for next in found {
            match apart.last_mut().filter(|last| next.start() <= last.end()) {
                Some(last) => {
                    *last = PageRange::between(last.start(), last.end().max(next.end())).unwrap_or(*last);
                }
                None => apart.push(next),
            }
        }
        apart
    }

    /// Unmaps every run that was in progress, and every mapping outside all regions.
    fn unmap_leftovers(&mut self, domain: DomainId, effects: &mut Effects) {
        let Ok(everywhere) = PageRange::<Iova>::new(0, LIMIT) else { return };
        let between: Vec<_> = gaps(everywhere, self.memory.layout()).collect();
        let Some(entry) = self.mappings.get_mut(domain) else { return };
        between.into_iter().for_each(|between| entry.doubt(between));
        for run in entry.mapped().runs(everywhere).collect::<Vec<_>>() {
            self.unmap_leftover(domain, run.range, effects);
        }
    }

    /// Unmaps everything that an earlier process may have left at `iova`. Nothing is mapped there until then.
    fn unmap_leftover(&mut self, domain: DomainId, iova: PageRange<Iova>, effects: &mut Effects) {
        let job = self.calls.start(Call::Leftover { domain, iova });
        if let Some(domain) = self.mappings.get_mut(domain) {
            domain.start_leftover(job, iova);
        }
        effects.push(Effect::Unmap { job, domain, iova, bytes: None });
    }

    /// The unmap of a leftover has returned: it is gone, or was before; or it is in doubt for good.
    pub(super) fn leftover_ended(
        &mut self,
        job: JobId,
        domain: DomainId,
        iova: PageRange<Iova>,
        result: UnmapResult,
        effects: &mut Effects,
    ) {
        self.calls.end(job);
        let ats = self.ats_active(domain).is_some();
        let entry = self.mappings.get_mut(domain);
        match entry.filter(|domain| domain.removing(iova.start(), job).is_some()) {
            Some(domain) => domain.end_leftover(iova, result, ats),
            None => {
                self.inconsistent("an unmap returned whose run is not being unmapped", domain, iova, effects);
            }
        }
        let (id, pages) = (self.invalidations.number(), self.memory.pages_at(iova));
        self.closes_moved(iova);
        self.advance_over(iova, effects);
        self.after_change(iova, pages, id, effects);
    }

    /// Returns the regions as they are to be recorded.
    pub fn written(&self) -> impl Iterator<Item = RegionRecord> + '_ {
        self.memory.regions().map(|(region, entry)| RegionRecord {
            region,
            spec: *entry.spec(),
            piece: self.mappings.pieces(region).first().copied().unwrap_or(PAGE),
            closing: entry.is_closing(),
        })
    }
}

#[cfg(test)]
mod tests;
