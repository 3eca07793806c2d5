//! What came of the gate's own effects on mappings.
//!
//! A result is believed to the byte and no further: short is not gone, an error is not "nothing happened".

use passgate_bindings::units::Offset;
use passgate_bindings::{Iova, PageRange};

use super::effect::{Effect, Effects, FilePages, Notice};
use super::event::{DomainId, FileId, InvalidationId, JobId, MapResult, RegionId, UnmapResult};
use super::fence::Step;
use super::invalidation::After;
use super::ledger::holds::gaps;
use super::ledger::{HeldBy, Run, RunState};
use super::receipt::Evidence;
use super::region::Region;
use super::verdict::{Cause, Reason, Refusal};
use super::{Gate, Job};

/// Bytes of `range` that none of `gone` has.
fn left(range: PageRange<Iova>, gone: &[PageRange<Iova>]) -> u64 {
    gaps(range, gone.iter().copied().filter(|gone| gone.overlaps(range))).map(PageRange::len).sum()
}

/// `EPROTO`: a domain reported more bytes gone than were mapped.
const PROTOCOL_ERROR: i32 = 71;

impl Gate {
    pub(super) fn mapped(&mut self, job: JobId, result: MapResult, effects: &mut Effects) {
        let Some(Job::Map { domain, region, iova, rest }) = self.jobs.get(&job).copied() else { return };
        self.jobs.remove(&job);
        let Some(mapped) = self.mapped_in(domain) else { return };
        match result {
            MapResult::Mapped => {
                mapped.made(iova.start());
                self.fray(domain, iova);
            }
            MapResult::Refused { .. } => _ = mapped.remove(iova.start()),
            MapResult::Unknown { errno } => {
                mapped.mark(iova.start(), RunState::Suspect { gone: None, errno })
            }
        }
        if let MapResult::Unknown { errno } = result {
            let reason = Reason {
                cause: Cause::HalfMapped,
                device: self.suspect_device(domain),
                rung: Step::Unmap,
                errno,
            };
            // A number of its own, by which a person can release it.
            self.last_invalidation += 1;
            for part in self.files_at(iova) {
                self.quarantine(
                    InvalidationId(self.last_invalidation),
                    part.file,
                    part.range,
                    reason,
                    effects,
                );
            }
        }
        // Taken down now, where anything is to be settled: the region may be gone by then.
        let pages = if self.unsettled() { self.files_at(iova) } else { Vec::new() };
        self.advance_over(iova, effects);
        self.filled(domain, region, iova, result, rest, effects);
        self.settle(iova, pages, effects);
    }

    /// Counts a map towards the region that it is of.
    fn filled(
        &mut self,
        domain: DomainId,
        id: RegionId,
        iova: PageRange<Iova>,
        result: MapResult,
        rest: Option<PageRange<Iova>>,
        effects: &mut Effects,
    ) {
        let Some(region) = self.regions.get_mut(&id) else { return };
        region.filling -= 1;
        match result {
            MapResult::Mapped => region.mapped += iova.len(),
            MapResult::Refused { errno } | MapResult::Unknown { errno } if region.adding.is_some() => {
                let half = matches!(result, MapResult::Unknown { .. });
                region.failed =
                    Some(if half { Refusal::HalfMapped { errno } } else { Refusal::MapFailed { errno } });
            }
            MapResult::Refused { errno } | MapResult::Unknown { errno } => {
                effects.push(Effect::Notice(Notice::MapFailed { domain, iova, errno }));
            }
        }
        if region.failed.is_none()
            && let Some(rest) = rest
        {
            self.fill(domain, id, rest, effects);
        }
        self.answer_added(id, effects);
    }

    pub(super) fn unmapped(&mut self, job: JobId, result: UnmapResult, took_ns: u64, effects: &mut Effects) {
        match self.jobs.get(&job).copied() {
            Some(Job::Unmap { domain, iova, already, invalidation }) => {
                let run = self.domain(domain).and_then(|entry| entry.mapped.at(iova.start()));
                let Some(run) = run.filter(|run| run.state == RunState::Removing(job)) else { return };
                let in_flight = self.went(job, domain, run, already, result);
                if let UnmapResult::InFlight { bytes } = result {
                    let already = Some(match already {
                        Some(already) => already.saturating_add(bytes),
                        // As much as there was, unless it is more than there can be.
                        None => bytes.max(run.bytes),
                    });
                    self.jobs.insert(job, Job::Unmap { domain, iova, already, invalidation });
                } else {
                    self.jobs.remove(&job);
                }
                let asked = run.bytes.saturating_sub(already.unwrap_or(0));
                self.record(invalidation, domain, (Some(iova), asked), result, took_ns);
                self.came_back(invalidation, (!in_flight).then_some(job), run.objects);
                self.changed(iova, invalidation, effects);
            }
            Some(Job::Replace { domain, invalidation }) => {
                self.jobs.remove(&job);
                let gone = self.replacing.remove(&job).unwrap_or_default();
                let Some(entry) = self.domain(domain) else { return };
                let runs = entry.mapped.in_state(RunState::Removing(job));
                let (whole, objects) =
                    runs.iter().fold((0, 0), |sum, run| (sum.0 + run.bytes, sum.1 + run.objects));
                let left: u64 = runs.iter().map(|run| left(run.range, &gone)).sum();
                let asked = whole - left;
                if result == (UnmapResult::Gone { bytes: asked }) {
                    self.replaced(domain, &runs, &gone);
                } else {
                    self.perhaps_stranded(domain);
                    // All or nothing: which of them went is not told.
                    let each = match result {
                        UnmapResult::Failed { errno, .. } => UnmapResult::Failed { errno, bytes: 0 },
                        UnmapResult::Gone { .. } | UnmapResult::InFlight { .. } => {
                            UnmapResult::Gone { bytes: 0 }
                        }
                    };
                    runs.iter().for_each(|run| _ = self.went(job, domain, *run, Some(0), each));
                }
                self.record(invalidation, domain, (None, asked), result, took_ns);
                self.came_back(invalidation, Some(job), objects);
                runs.into_iter().for_each(|run| self.changed(run.range, invalidation, effects));
            }
            Some(Job::Settle { domain, iova }) => self.settled_left(job, domain, iova, result, effects),
            _ => {}
        }
    }

    /// Takes down what became of one run; whether operations over it are in flight.
    fn went(
        &mut self,
        job: JobId,
        domain: DomainId,
        run: Run,
        already: Option<u64>,
        result: UnmapResult,
    ) -> bool {
        let (UnmapResult::Gone { bytes }
        | UnmapResult::InFlight { bytes }
        | UnmapResult::Failed { bytes, .. }) = result;
        let (gone, start) = (already.unwrap_or(0).saturating_add(bytes), run.range.start());
        let whole = gone == run.bytes || already.is_none() && gone < run.bytes;
        let copies = self.keeps_copies(domain).is_some();
        let Some(mapped) = self.mapped_in(domain) else { return false };
        let errno = match result {
            UnmapResult::Failed { errno, .. } => errno,
            _ if gone > run.bytes => PROTOCOL_ERROR,
            _ => 0,
        };
        match result {
            UnmapResult::Gone { .. } if whole && copies => mapped.mark(start, RunState::Cached),
            UnmapResult::Gone { .. } if whole => _ = mapped.remove(start),
            // Also where it came up short: what is in flight must end before the rest is tried.
            UnmapResult::InFlight { .. } => mapped.mark(start, RunState::Leaking(job)),
            _ => {
                let gone = already.map(|_| gone.min(run.bytes));
                mapped.mark(start, RunState::Suspect { gone, errno });
            }
        }
        matches!(result, UnmapResult::InFlight { .. })
    }

    /// Takes down what an unmap answered, in the receipt.
    fn record(
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
            _ if gone > asked => PROTOCOL_ERROR,
            _ => 0,
        };
        let in_flight = matches!(result, UnmapResult::InFlight { .. });
        if let Some(inv) = self.invalidations.get_mut(&invalidation) {
            inv.receipt.record(Evidence {
                step: Step::Unmap,
                domain,
                device: None,
                iova,
                asked,
                gone,
                in_flight,
                errno,
                took_ns,
            });
        }
    }

    /// One call of an invalidation has returned, and with `over` nothing of it is in flight. The mappings that it took away
    /// may have to come back at its end: their room is kept.
    fn came_back(&mut self, invalidation: InvalidationId, over: Option<JobId>, objects: u64) {
        let Some(inv) = self.invalidations.get_mut(&invalidation) else { return };
        if let Some(job) = over {
            inv.came_back(job);
        }
        if inv.is_conversion() {
            self.reserve(invalidation, objects);
        }
    }

    pub(super) fn released(&mut self, job: JobId, effects: &mut Effects) {
        let Some(Job::Unmap { domain, iova, already, invalidation }) = self.jobs.get(&job).copied() else {
            return;
        };
        let copies = self.keeps_copies(domain).is_some();
        let Some(mapped) = self.mapped_in(domain) else { return };
        let Some(run) = mapped.at(iova.start()).filter(|run| run.state == RunState::Leaking(job)) else {
            return;
        };
        match already == Some(run.bytes) {
            true if copies => mapped.mark(iova.start(), RunState::Cached),
            true => _ = mapped.remove(iova.start()),
            false => {
                let gone = already.map(|already| already.min(run.bytes));
                mapped.mark(iova.start(), RunState::Suspect { gone, errno: 0 });
            }
        }
        self.jobs.remove(&job);
        self.came_back(invalidation, Some(job), 0);
        self.changed(iova, invalidation, effects);
    }

    /// Something over `iova` left the ledger, or failed to: whoever waits looks again, neighbours that had to go
    /// with it come back, and what was in doubt may be so no more.
    fn changed(&mut self, iova: PageRange<Iova>, invalidation: InvalidationId, effects: &mut Effects) {
        // The common case: nothing came along with the range, and nothing else is in doubt.
        let enclosed = self.invalidations.get(&invalidation).is_some_and(|inv| inv.encloses(iova));
        let plain = enclosed && self.is_alone(invalidation);
        // Taken down now: the region may be gone when it is settled.
        let pages = if plain { Vec::new() } else { self.files_at(iova) };
        self.advance_over(iova, effects);
        if plain && self.is_alone(invalidation) {
            return;
        }
        self.look_again(iova, pages, invalidation, effects);
    }

    /// What was at `iova`, showing `pages`, is gone or failed to go, and whoever waited has looked.
    pub(super) fn look_again(
        &mut self,
        iova: PageRange<Iova>,
        pages: Vec<FilePages>,
        invalidation: InvalidationId,
        effects: &mut Effects,
    ) {
        if !self.awaited(iova) {
            for (domain, run) in self.runs_over(&[iova]) {
                self.doubt(invalidation, domain, run, effects);
            }
        }
        for part in &pages {
            self.reconcile(part.file, part.range, effects);
        }
        self.settle(iova, pages, effects);
    }

    /// Whether nothing is in quarantine, on its way out, or in doubt but what this invalidation itself waits for.
    fn is_alone(&self, invalidation: InvalidationId) -> bool {
        let own = self.invalidations.get(&invalidation).map_or(0, |inv| inv.not_back());
        let unsettled: usize = self.domains.iter().map(|domain| domain.mapped.unsettled()).sum();
        unsettled <= own
            && !self.files.values().any(|file| file.holds.quarantined())
            && !self.regions.values().any(|region| region.closing)
    }

    /// Whether anything is in quarantine, on its way out, or neither plainly mapped nor about to be.
    fn unsettled(&self) -> bool {
        self.files.values().any(|file| file.holds.quarantined())
            || self.regions.values().any(|region| region.closing)
            || self.domains.iter().any(|domain| domain.mapped.unsettled() > 0)
    }

    /// Lifts quarantines over `iova` whose cause is disproved, and forgets closing regions that are clear.
    fn settle(&mut self, iova: PageRange<Iova>, pages: Vec<FilePages>, effects: &mut Effects) {
        let quarantined = self.files.values().any(|file| file.holds.quarantined());
        let closing = self.regions.values().any(|region| region.closing);
        if !quarantined && !closing {
            return;
        }
        for part in pages {
            let Some(file) = self.files.get(&part.file) else { continue };
            let held: Vec<_> = file.holds.overlapping(part.range).collect();
            for (range, by) in held {
                let HeldBy::Quarantine(since, reason) = by else { continue };
                let clear = self
                    .aliases(part.file, range)
                    .all(|alias| self.domains.iter().all(|d| d.mapped.runs(alias).next().is_none()));
                if !clear || self.lasts(since, reason) {
                    continue;
                }
                self.lift(part.file, range, effects);
                self.reconcile(part.file, range, effects);
            }
            self.forget_file(part.file, effects);
        }
        if closing {
            self.settle_closing(iova, effects);
        }
    }

    /// Lifts a quarantine whose cause is disproved.
    pub(super) fn lift(&mut self, file: FileId, range: PageRange<Offset>, effects: &mut Effects) {
        if let Some(entry) = self.files.get_mut(&file) {
            entry.holds.lift(range.start());
        }
        let gpa = self.gpa_of(file, range);
        effects.push(Effect::Notice(Notice::Freed { file, range, gpa }));
    }

    /// Forgets closing regions over `iova` that are clear, and goes on with those of a dead client that are not.
    fn settle_closing(&mut self, iova: PageRange<Iova>, effects: &mut Effects) {
        let closing = |region: &Region| region.closing && region.iova().overlaps(iova);
        let closing: Vec<_> = self.regions.iter().filter(|(_, r)| closing(r)).map(|(id, _)| *id).collect();
        for id in closing {
            let Some(region) = self.regions.get(&id).filter(|_| !self.closes(id)) else { continue };
            let (iova, dead) = (region.iova(), self.leaving.contains(&region.owner));
            if self.unmapped_everywhere(id) {
                self.forget_region(id, effects);
            } else if dead && self.domains.iter().any(|domain| domain.mapped.extent(iova).is_some()) {
                // What came back after its closing had been given up: it goes on.
                self.close(id, false, After::Gone, effects);
            }
        }
    }
}
