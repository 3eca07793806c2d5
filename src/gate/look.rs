//! What stands in the way of an invalidation, and the unmaps that are plainly due.

use passgate_bindings::units::Address;
use passgate_bindings::{Gpa, Iova, PageRange};

use super::effect::{Effect, Effects};
use super::event::{DomainId, InvalidationId, JobId};
use super::ledger::holds::gaps;
use super::ledger::{Run, RunState};
use super::{DomainEntry, Gate, Job};

/// So many mappings that give up pages at once are worth a second page table, where there is one.
const REPLACE_FROM: usize = 8;

/// What stands in the way of an invalidation.
#[derive(Default)]
pub(super) struct Sight {
    /// What failed.
    pub(super) suspects: Vec<(DomainId, Run)>,
    /// Whether something is under way.
    pub(super) waiting: bool,
}

/// What is to be unmapped in one domain: ascending, apart.
#[derive(Default)]
struct Due {
    spans: Vec<PageRange<Iova>>,
    /// How many of them begin or end inside a mapping.
    partial: usize,
}

impl Gate {
    /// Unmaps what is plainly mapped over the targets; tells what is left to wait for, and what failed.
    pub(super) fn look(
        &mut self,
        id: InvalidationId,
        targets: &[PageRange<Iova>],
        effects: &mut Effects,
    ) -> Sight {
        let mut sight = Sight::default();
        for index in 0..self.domains.len() {
            let mut due = Due::default();
            let domain = &self.domains[index];
            let sweeps = self.invalidations.get(&id).is_some_and(|inv| inv.sweeps(domain.id));
            for target in targets {
                self.look_at(domain, *target, sweeps, &mut sight, &mut due);
            }
            let (domain, able) = (self.domains[index].id, self.domains[index].able);
            sight.waiting |= !due.spans.is_empty();
            if able.replace && !able.cut && due.partial >= REPLACE_FROM {
                self.replace(id, domain, due.spans, effects);
                continue;
            }
            for span in due.spans {
                let mapped = &self.domains[index].mapped;
                // What an earlier span took along needs no call of its own.
                if let Some(extent) = mapped.extent(span) {
                    let span = if able.cut { extent } else { mapped.whole(extent) };
                    self.unmap(id, domain, span, effects);
                }
            }
        }
        if let Some(inv) = self.invalidations.get_mut(&id) {
            inv.swept = true;
        }
        sight
    }

    /// What of one target is live, failed or under way in a domain.
    fn look_at(
        &self,
        domain: &DomainEntry,
        target: PageRange<Iova>,
        sweeps: bool,
        sight: &mut Sight,
        due: &mut Due,
    ) {
        let mapped = &domain.mapped;
        for run in mapped.runs(target) {
            match run.state {
                RunState::Suspect { .. } | RunState::Cached => {
                    // A run may lie over several targets, which ascend as runs do: each run is tried once.
                    if sight.suspects.last() != Some(&(domain.id, run)) {
                        sight.suspects.push((domain.id, run));
                    }
                }
                _ => sight.waiting = true,
            }
        }
        let taken = mapped.runs(target).map(|run| run.range);
        for free in gaps(target, taken).filter(|_| sweeps) {
            let Some(span) = mapped.extent(free) else { continue };
            due.partial += usize::from(mapped.whole(span) != span);
            match due.spans.last_mut() {
                Some(last) if last.end() > span.start() => {
                    *last = PageRange::between(last.start(), last.end().max(span.end())).unwrap_or(*last);
                }
                Some(last) if self.joins(domain, *last, span) => {
                    *last = PageRange::between(last.start(), span.end()).unwrap_or(*last);
                }
                _ => due.spans.push(span),
            }
        }
    }

    /// Whether one call may take both away: of one region, with nothing between them.
    fn joins(&self, domain: &DomainEntry, left: PageRange<Iova>, right: PageRange<Iova>) -> bool {
        let clear = match PageRange::between(left.end(), right.start()) {
            Some(between) => domain.mapped.is_clear(between),
            None => left.end() == right.start(),
        };
        clear
            && self
                .region_at(Gpa(left.start().raw()))
                .is_some_and(|region| region.iova().covers(left) && region.iova().covers(right))
    }

    /// Asks for one unmap of what is live over `iova`, or of the run there that failed.
    pub(super) fn unmap(
        &mut self,
        invalidation: InvalidationId,
        domain: DomainId,
        iova: PageRange<Iova>,
        effects: &mut Effects,
    ) {
        let job = self.next_job(Job::Unmap { domain, iova, already: Some(0), invalidation });
        self.fray(domain, iova);
        let Some(mapped) = self.mapped_in(domain) else { return };
        let (already, bytes) = match mapped.at(iova.start()) {
            Some(run) => {
                mapped.mark(iova.start(), RunState::Removing(job));
                let RunState::Suspect { gone, .. } = run.state else { return };
                (gone, run.bytes)
            }
            None => (Some(0), mapped.take(iova, RunState::Removing(job)).bytes),
        };
        if already != Some(0) {
            self.jobs.insert(job, Job::Unmap { domain, iova, already, invalidation });
        }
        self.waits(invalidation);
        effects.push(Effect::Unmap {
            job,
            domain,
            iova,
            bytes: already.map(|already| bytes.saturating_sub(already)),
        });
    }

    /// Asks for all of `spans` to go at once, and nothing else.
    fn replace(
        &mut self,
        invalidation: InvalidationId,
        domain: DomainId,
        spans: Vec<PageRange<Iova>>,
        effects: &mut Effects,
    ) {
        let job = self.next_job(Job::Replace { domain, invalidation });
        spans.iter().for_each(|span| self.fray(domain, *span));
        let Some(mapped) = self.mapped_in(domain) else { return };
        let bytes = spans.iter().flat_map(|span| mapped.live(*span)).map(PageRange::len).sum();
        // If it fails, nobody knows of the whole mappings how they are.
        let mut last: Option<PageRange<Iova>> = None;
        for span in &spans {
            let Some(rest) =
                last.map_or(Some(*span), |last| PageRange::between(last.end().max(span.start()), span.end()))
            else {
                continue;
            };
            // With the gaps in it: nothing may be mapped there while the call is under way.
            let whole = mapped.extent(rest).map_or(rest, |extent| mapped.whole(extent));
            let start = rest.start().min(whole.start());
            let Some(range) = PageRange::between(start, rest.end().max(whole.end())) else { continue };
            last = Some(mapped.take(range, RunState::Removing(job)).range);
        }
        self.replacing.insert(job, spans.clone());
        self.waits(invalidation);
        effects.push(Effect::Replace { job, domain, gone: spans, bytes });
    }

    /// A replace has done what it was to: what it left of the mappings is live again.
    pub(super) fn replaced(&mut self, domain: DomainId, runs: &[Run], gone: &[PageRange<Iova>]) {
        let copies = self.keeps_copies(domain).is_some();
        let Some(mapped) = self.mapped_in(domain) else { return };
        for run in runs {
            mapped.remove(run.range.start());
            for range in gone.iter().filter(|_| copies).filter_map(|range| range.intersection(run.range)) {
                mapped.insert(Run { range, bytes: range.len(), objects: 1, state: RunState::Cached });
            }
            for left in gaps(run.range, gone.iter().copied().filter(|range| range.overlaps(run.range))) {
                mapped.insert(Run::filling(left, 1 << 63, JobId(0)));
                mapped.made(left.start());
            }
        }
    }

    /// One more call whose result an invalidation waits for.
    fn waits(&mut self, invalidation: InvalidationId) {
        if let Some(inv) = self.invalidations.get_mut(&invalidation) {
            inv.under_way += 1;
        }
    }
}
