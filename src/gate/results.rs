//! Results of the calls on mappings.
//!
//! A result is believed to the byte and no further: short is not gone, an error is not "nothing happened". A result of a call
//! that is not in progress is late or invented, and changes nothing.

use passgate_bindings::{Iova, PageRange};

use super::Gate;
use super::calls::Call;
use super::effect::{Effect, Effects, FilePages, Notice};
use super::event::{MapResult, UnmapResult};
use super::ids::{DomainId, InvalidationId, JobId, RegionId};
use super::ledger::Run;
use super::ledger::exclusions::gaps;
use super::mappings::EPROTO;
use super::receipt::Evidence;
use super::rung::Rung;
use super::verdict::{Cause, Reason};

/// Bytes of `range` that none of `gone` covers.
fn bytes_beside(range: PageRange<Iova>, gone: &[PageRange<Iova>]) -> u64 {
    gaps(range, gone.iter().copied().filter(|gone| gone.overlaps(range))).map(PageRange::len).sum()
}

impl Gate {
    /// A map has returned.
    pub(super) fn mapped(&mut self, job: JobId, result: MapResult, effects: &mut Effects) {
        let Some(&Call::Map { domain, region, iova, rest }) = self.calls.get(job) else { return };
        self.calls.end(job);
        let result = if self.mappings.end_map(domain, job, iova, result) {
            result
        } else {
            self.inconsistent("a map returned whose run is not being mapped", domain, iova, effects);
            MapResult::Unknown { errno: 0 }
        };
        match result {
            MapResult::Mapped => self.record_split(domain, iova),
            MapResult::Refused { .. } => {}
            MapResult::Unknown { errno } => self.quarantine_half_mapped(domain, iova, errno, effects),
        }
        // Taken down now, where anything is to be settled: the region may be gone by then.
        let pages = if self.is_unsettled() { self.memory.pages_at(iova) } else { Vec::new() };
        self.advance_over(iova, effects);
        self.map_ended(domain, region, iova, result, rest, effects);
        self.settle(iova, pages, effects);
    }

    fn quarantine_half_mapped(
        &mut self,
        domain: DomainId,
        iova: PageRange<Iova>,
        errno: i32,
        effects: &mut Effects,
    ) {
        let device = self.devices.first_of(domain);
        let reason = Reason { cause: Cause::HalfMapped, device, rung: Rung::Unmap, errno };
        // A number of its own, by which an operator can release it.
        let id = self.invalidations.number();
        for part in self.memory.pages_at(iova) {
            self.put_in_quarantine(id, part.file, part.range, reason, effects);
        }
    }

    /// Counts a map towards its region, and maps the rest of what is wanted.
    fn map_ended(
        &mut self,
        domain: DomainId,
        id: RegionId,
        iova: PageRange<Iova>,
        result: MapResult,
        rest: Option<PageRange<Iova>>,
        effects: &mut Effects,
    ) {
        let reports = self.memory.map_ended(id, iova.len(), result);
        if let (true, MapResult::Refused { errno } | MapResult::Unknown { errno }) = (reports, result) {
            effects.push(Effect::Notice(Notice::MapFailed { domain, iova, errno }));
        }
        if let Some(rest) = rest
            && self.memory.region(id).is_some_and(|region| !region.has_failed())
        {
            self.map_wanted(domain, id, rest, effects);
        }
        self.answer_added(id, effects);
    }

    /// An unmap or a replace has returned.
    pub(super) fn unmapped(&mut self, job: JobId, result: UnmapResult, took_ns: u64, effects: &mut Effects) {
        match self.calls.get(job).cloned() {
            Some(Call::Unmap { domain, iova, already, invalidation }) => {
                let entry = self.mappings.get(domain);
                let Some(run) = entry.and_then(|domain| domain.removing(iova.start(), job)) else {
                    // A second result, of a call whose operations are in flight, is invented.
                    if entry.and_then(|domain| domain.in_flight(iova.start(), job)).is_none() {
                        self.unmap_inconsistent(job, domain, iova, invalidation, effects);
                    }
                    return;
                };
                self.end_unmap(job, domain, run, already, result);
                let in_flight = matches!(result, UnmapResult::InFlight { .. });
                if let UnmapResult::InFlight { bytes } = result {
                    let already = Some(match already {
                        Some(already) => already.saturating_add(bytes),
                        // As much as there was, unless it is more than there can be.
                        None => bytes.max(run.bytes),
                    });
                    self.calls.record(job, Call::Unmap { domain, iova, already, invalidation });
                } else {
                    self.calls.end(job);
                }
                let asked = run.bytes.saturating_sub(already.unwrap_or(0));
                self.record_evidence(invalidation, domain, (Some(iova), asked), result, took_ns);
                self.call_ended(invalidation, (!in_flight).then_some(job), run.mapping_count);
                self.changed(iova, invalidation, effects);
            }
            Some(Call::Replace { domain, gone, invalidation }) => {
                self.calls.end(job);
                let runs =
                    self.mappings.get(domain).map(|domain| domain.replaced_by(job)).unwrap_or_default();
                if runs.is_empty() {
                    gone.into_iter().for_each(|iova| {
                        self.unmap_inconsistent(job, domain, iova, invalidation, effects);
                    });
                    return;
                }
                let beside: u64 = runs.iter().map(|run| bytes_beside(run.range, &gone)).sum();
                let asked = runs.iter().map(|run| run.bytes).sum::<u64>() - beside;
                self.end_replace(job, domain, &runs, &gone, asked, result);
                self.record_evidence(invalidation, domain, (None, asked), result, took_ns);
                self.call_ended(invalidation, Some(job), runs.iter().map(|run| run.mapping_count).sum());
                runs.into_iter().for_each(|run| self.changed(run.range, invalidation, effects));
            }
            Some(Call::Leftover { domain, iova }) => self.leftover_ended(job, domain, iova, result, effects),
            Some(Call::Map { .. } | Call::Fence { .. } | Call::Attach { .. }) | None => {}
        }
    }

    /// An unmap has returned, or what was in flight over it has ended, and the ledger has no such unmap there.
    fn unmap_inconsistent(
        &mut self,
        job: JobId,
        domain: DomainId,
        iova: PageRange<Iova>,
        invalidation: InvalidationId,
        effects: &mut Effects,
    ) {
        self.calls.end(job);
        self.inconsistent("an unmap returned whose run is not being unmapped", domain, iova, effects);
        self.call_ended(invalidation, Some(job), 0);
        self.changed(iova, invalidation, effects);
    }

    fn end_unmap(
        &mut self,
        job: JobId,
        domain: DomainId,
        run: Run,
        already: Option<u64>,
        result: UnmapResult,
    ) {
        let ats = self.ats_active(domain).is_some();
        if let Some(domain) = self.mappings.get_mut(domain) {
            domain.end_unmap(job, run, already, result, ats);
        }
    }

    fn end_replace(
        &mut self,
        job: JobId,
        domain: DomainId,
        runs: &[Run],
        gone: &[PageRange<Iova>],
        asked: u64,
        result: UnmapResult,
    ) {
        if result == (UnmapResult::Gone { bytes: asked }) {
            let ats = self.ats_active(domain).is_some();
            if let Some(domain) = self.mappings.get_mut(domain) {
                domain.end_replace(runs, gone, ats);
            }
            return;
        }
        self.devices.perhaps_detached(domain);
        // All or nothing: which of them went is not said.
        let each = match result {
            UnmapResult::Failed { errno, .. } => UnmapResult::Failed { errno, bytes: 0 },
            UnmapResult::Gone { .. } | UnmapResult::InFlight { .. } => UnmapResult::Gone { bytes: 0 },
        };
        runs.iter().for_each(|run| self.end_unmap(job, domain, *run, Some(0), each));
    }

    /// Records what an unmap answered, in the receipt.
    fn record_evidence(
        &mut self,
        invalidation: InvalidationId,
        domain: DomainId,
        (iova, asked): (Option<PageRange<Iova>>, u64),
        result: UnmapResult,
        took_ns: u64,
    ) {
        let (UnmapResult::Gone { bytes: gone }
        | UnmapResult::InFlight { bytes: gone }
        | UnmapResult::Failed { bytes: gone, .. }) = result;
        let errno = match result {
            UnmapResult::Failed { errno, .. } => errno,
            _ if gone > asked => EPROTO,
            _ => 0,
        };
        let in_flight = matches!(result, UnmapResult::InFlight { .. });
        let step = Rung::Unmap;
        let device = None;
        let evidence = Evidence { step, domain, device, iova, asked, gone, in_flight, errno, took_ns };
        self.invalidations.record(invalidation, evidence);
    }

    /// A call of an invalidation has returned; with `ended`, nothing of it is in flight. The mappings that it took away may have to
    /// be made again at the end of a conversion: room for them is kept.
    fn call_ended(&mut self, invalidation: InvalidationId, ended: Option<JobId>, mappings: u64) {
        let Some(inv) = self.invalidations.get_mut(invalidation) else { return };
        if let (Some(job), Some(progress)) = (ended, inv.progress_mut()) {
            progress.call_ended(job);
        }
        if inv.is_conversion() {
            self.reserve(invalidation, mappings);
        }
    }

    /// The operations in flight over the pages of an unmap have ended.
    pub(super) fn flight_ended(&mut self, job: JobId, effects: &mut Effects) {
        let Some(&Call::Unmap { domain, iova, already, invalidation }) = self.calls.get(job) else { return };
        let entry = self.mappings.get(domain);
        let Some(run) = entry.and_then(|domain| domain.in_flight(iova.start(), job)) else {
            // Before the unmap itself has returned, such an event is invented.
            if entry.and_then(|domain| domain.removing(iova.start(), job)).is_none() {
                self.unmap_inconsistent(job, domain, iova, invalidation, effects);
            }
            return;
        };
        let ats = self.ats_active(domain).is_some();
        if let Some(domain) = self.mappings.get_mut(domain) {
            domain.end_flight(run, already, ats);
        }
        self.calls.end(job);
        self.call_ended(invalidation, Some(job), 0);
        self.changed(iova, invalidation, effects);
    }

    /// A mapping over `iova` is gone, or failed to go: invalidations that wait there sweep again, neighbours that had to go with
    /// it are mapped again, and quarantines that it justified are lifted.
    fn changed(&mut self, iova: PageRange<Iova>, invalidation: InvalidationId, effects: &mut Effects) {
        self.closes_moved(iova);
        // The common case: nothing came along with the range, and nothing else is in doubt.
        let enclosed = self.invalidations.get(invalidation).is_some_and(|inv| inv.encloses(iova));
        let plain = enclosed && self.is_alone(invalidation);
        // Taken down now: the region may be gone when it is settled.
        let pages = if plain { Vec::new() } else { self.memory.pages_at(iova) };
        self.advance_over(iova, effects);
        if plain && self.is_alone(invalidation) {
            return;
        }
        self.after_change(iova, pages, invalidation, effects);
    }

    /// Closes that wait at `iova` have progressed, if nothing there is in doubt or in progress.
    pub(super) fn closes_moved(&mut self, iova: PageRange<Iova>) {
        if self.memory.is_closing_any() && self.mappings.runs_over(&[iova]).is_empty() {
            self.invalidations.closes_moved(iova);
        }
    }

    /// As [`Gate::changed`], once every invalidation that waited at `iova`, which shows `pages`, has swept.
    pub(super) fn after_change(
        &mut self,
        iova: PageRange<Iova>,
        pages: Vec<FilePages>,
        invalidation: InvalidationId,
        effects: &mut Effects,
    ) {
        if !self.invalidations.is_awaited(iova) {
            for (domain, run) in self.mappings.runs_over(&[iova]) {
                self.quarantine_failed(invalidation, domain, run, effects);
            }
        }
        for part in &pages {
            self.reconcile(part.file, part.range, effects);
        }
        self.settle(iova, pages, effects);
    }

    /// True if nothing is in quarantine, being closed, or in doubt but what this invalidation itself waits for.
    fn is_alone(&self, invalidation: InvalidationId) -> bool {
        let progress = self.invalidations.get(invalidation).and_then(|inv| inv.progress());
        let own = progress.map_or(0, |progress| progress.calls());
        self.mappings.unsettled() <= own && !self.memory.is_quarantined_any() && !self.memory.is_closing_any()
    }

    /// True if anything is in quarantine, being closed, or neither live nor about to be.
    fn is_unsettled(&self) -> bool {
        self.memory.is_quarantined_any() || self.memory.is_closing_any() || self.mappings.unsettled() > 0
    }

    /// Lifts quarantines over `pages` whose cause is disproved, and forgets regions being closed over `iova` that are clear.
    fn settle(&mut self, iova: PageRange<Iova>, pages: Vec<FilePages>, effects: &mut Effects) {
        let (quarantined, closing) = (self.memory.is_quarantined_any(), self.memory.is_closing_any());
        if !quarantined && !closing {
            return;
        }
        for part in pages {
            self.lift_over(part, effects);
        }
        if closing {
            self.settle_closing(iova, effects);
        }
    }

    /// The last device of a domain that may have kept translations is detached: what was unmapped before is gone now.
    pub(super) fn cached_gone(&mut self, domain: DomainId, id: InvalidationId, effects: &mut Effects) {
        if self.policy.platform == super::Platform::Contained || self.ats_active(domain).is_some() {
            return;
        }
        let Some(domain) = self.mappings.get_mut(domain) else { return };
        // All of them before any invalidation sweeps, for the detach proves them together; and what they show is taken down
        // before any of it is forgotten.
        let gone = domain.take_cached().into_iter();
        let gone: Vec<_> = gone.map(|run| (run.range, self.memory.pages_at(run.range))).collect();
        for (iova, _) in &gone {
            self.advance_over(*iova, effects);
        }
        for (iova, pages) in gone {
            self.after_change(iova, pages, id, effects);
        }
    }

    /// Nobody waits for this run any more: if it is known to have failed, its pages are quarantined.
    pub(super) fn quarantine_failed(
        &mut self,
        id: InvalidationId,
        domain: DomainId,
        run: Run,
        effects: &mut Effects,
    ) {
        let (known, reason) = self.blame(domain, Some(run.state), Rung::Unmap);
        if !known {
            return;
        }
        for part in self.memory.pages_at(run.range) {
            self.put_in_quarantine(id, part.file, part.range, reason, effects);
        }
    }
}
