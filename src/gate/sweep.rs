//! The sweep of an invalidation: it finds the runs that stand in its way, and unmaps everything live.

use passgate_bindings::units::Address;
use passgate_bindings::{Gpa, Iova, PageRange};

use super::Gate;
use super::calls::Call;
use super::effect::{Effect, Effects};
use super::ids::{DomainId, InvalidationId};
use super::invalidations::Invalidation;
use super::ledger::exclusions::gaps;
use super::ledger::{Run, RunState};
use super::mappings::Domain;
use super::memory::Memory;
use super::policy::MIN_REPLACED_MAPPINGS;

/// The runs that stand in the way of an invalidation.
#[derive(Default)]
pub(super) struct Blockers {
    /// The runs whose unmap failed, or which a device may have cached.
    pub(super) failed: Vec<(DomainId, Run)>,
    /// True if a call is in progress.
    pub(super) pending: bool,
}

/// The ranges that are to be unmapped in one domain: ascending, apart.
#[derive(Default)]
struct UnmapPlan {
    spans: Vec<PageRange<Iova>>,
    /// The number of spans that begin or end inside a mapping.
    partial: usize,
}

impl Gate {
    /// Unmaps what is live over the targets of an invalidation. Returns what is left in its way.
    pub(super) fn sweep(&mut self, id: InvalidationId, effects: &mut Effects) -> Blockers {
        let mut blockers = Blockers::default();
        for domain in self.mappings.ids() {
            let Some(plan) = self.plan_unmaps(id, domain, &mut blockers) else { continue };
            blockers.pending |= !plan.spans.is_empty();
            self.unmap_planned(id, domain, plan, effects);
        }
        if let Some(progress) = self.invalidations.progress_mut(id) {
            progress.swept = true;
        }
        blockers
    }

    /// Returns what of an invalidation's targets is live in a domain; adds what else is in the way to `blockers`.
    fn plan_unmaps(
        &self,
        id: InvalidationId,
        domain: DomainId,
        blockers: &mut Blockers,
    ) -> Option<UnmapPlan> {
        let (inv, domain) = (self.invalidations.get(id)?, self.mappings.get(domain)?);
        let (mut plan, sweeps) = (UnmapPlan::default(), inv.sweeps(domain.id()));
        for target in inv.targets() {
            blockers.add_runs(domain, *target);
            if sweeps {
                plan.add_mapped(domain, *target, &self.memory);
            }
        }
        Some(plan)
    }

    fn unmap_planned(
        &mut self,
        id: InvalidationId,
        domain: DomainId,
        plan: UnmapPlan,
        effects: &mut Effects,
    ) {
        let Some(caps) = self.mappings.get(domain).map(Domain::caps) else { return };
        let is_close = self.invalidations.is_close(id);
        // If devices cache translations, every piece would stay behind until they are detached.
        if is_close && self.ats_active(domain).is_none() {
            self.unmap_pieces(id, domain, plan.spans, effects);
            return;
        }
        if caps.replace && !caps.cut && plan.partial >= MIN_REPLACED_MAPPINGS {
            self.replace(id, domain, plan.spans, effects);
            return;
        }
        self.unmap_spans(id, domain, plan.spans, effects);
    }

    /// Asks for one unmap of each span.
    pub(super) fn unmap_spans(
        &mut self,
        id: InvalidationId,
        domain: DomainId,
        spans: Vec<PageRange<Iova>>,
        effects: &mut Effects,
    ) {
        let Some(caps) = self.mappings.get(domain).map(Domain::caps) else { return };
        for span in spans {
            let Some(mapped) = self.mappings.get(domain).map(Domain::mapped) else { return };
            // An earlier span may have taken this one along.
            if let Some(extent) = mapped.extent(span) {
                let span = if caps.cut { extent } else { mapped.whole(extent) };
                self.unmap(id, domain, span, effects);
            }
        }
    }

    /// Returns what is live of a region whose close is given up, in each domain: it goes when the calls return that unmap
    /// it.
    pub(super) fn plan_rest(&self, id: InvalidationId) -> Vec<(DomainId, Vec<PageRange<Iova>>)> {
        let plan = |domain| Some((domain, self.plan_unmaps(id, domain, &mut Blockers::default())?.spans));
        self.mappings.ids().into_iter().filter_map(plan).collect()
    }

    /// Asks for unmaps of the first pieces of `spans`, as many as may be in progress. Their results bring the next sweep.
    fn unmap_pieces(
        &mut self,
        id: InvalidationId,
        domain: DomainId,
        spans: Vec<PageRange<Iova>>,
        effects: &mut Effects,
    ) {
        let progress = self.invalidations.get(id).and_then(Invalidation::progress);
        let (all, in_time) = progress.map_or((0, 0), |progress| (progress.calls(), progress.calls_in_time()));
        // All closes share the calls, so that those of others find a free thread; each has one at least. While all of its calls are
        // late it has one more: the rest does not wait for a call that never returns.
        let share = (self.limits.close_calls / self.invalidations.closes().max(1)).max(1);
        let mut room = (share + usize::from(in_time == 0 && all > 0)).saturating_sub(all);
        for span in spans {
            let mut rest = Some(span);
            while room > 0
                && let Some(mapped) = self.mappings.get(domain).map(Domain::mapped)
                && let Some(extent) = rest.and_then(|rest| mapped.extent(rest))
            {
                let piece = first_piece(extent, self.limits.call_bytes);
                let piece = mapped.extent(piece).unwrap_or(extent);
                let piece = mapped.whole(piece);
                room -= 1;
                rest = PageRange::between(piece.end(), span.end());
                self.unmap(id, domain, piece, effects);
            }
        }
    }

    /// Asks for one unmap of what is mapped over `iova`, or of the run there that failed.
    pub(super) fn unmap(
        &mut self,
        invalidation: InvalidationId,
        domain: DomainId,
        iova: PageRange<Iova>,
        effects: &mut Effects,
    ) {
        let job = self.calls.number();
        self.record_split(domain, iova);
        let Some(unmap) = self.mappings.start_unmap(domain, job, iova) else {
            self.inconsistent("an unmap is due of a run that has not failed", domain, iova, effects);
            return;
        };
        let already = unmap.already;
        self.calls.record(job, Call::Unmap { domain, iova, already, invalidation });
        self.call_started(invalidation);
        let bytes = already.map(|already| unmap.bytes.saturating_sub(already));
        effects.push(Effect::Unmap { job, domain, iova, bytes });
    }

    /// Asks for all of `spans` to be unmapped at once, and nothing else.
    fn replace(
        &mut self,
        invalidation: InvalidationId,
        domain: DomainId,
        spans: Vec<PageRange<Iova>>,
        effects: &mut Effects,
    ) {
        let job = self.calls.number();
        spans.iter().for_each(|span| self.record_split(domain, *span));
        let Some(bytes) = self.mappings.start_replace(domain, job, &spans) else { return };
        self.calls.record(job, Call::Replace { domain, gone: spans.clone(), invalidation });
        self.call_started(invalidation);
        effects.push(Effect::Replace { job, domain, gone: spans, bytes });
    }

    /// One more call is in progress whose result an invalidation waits for.
    fn call_started(&mut self, invalidation: InvalidationId) {
        if let Some(progress) = self.invalidations.progress_mut(invalidation) {
            progress.call_started();
        }
    }
}

impl Blockers {
    /// Adds what of a target has failed in a domain, or is in progress.
    fn add_runs(&mut self, domain: &Domain, target: PageRange<Iova>) {
        for run in domain.mapped().runs(target) {
            match run.state {
                RunState::Suspect { .. } | RunState::Cached => {
                    // A run may lie over several targets, which ascend as runs do: each run is tried once.
                    if self.failed.last() != Some(&(domain.id(), run)) {
                        self.failed.push((domain.id(), run));
                    }
                }
                RunState::Filling { .. } | RunState::Removing(_) | RunState::Leaking(_) => {
                    self.pending = true;
                }
            }
        }
    }
}

impl UnmapPlan {
    /// Adds what of a target is live in a domain.
    fn add_mapped(&mut self, domain: &Domain, target: PageRange<Iova>, memory: &Memory) {
        let mapped = domain.mapped();
        for free in gaps(target, mapped.runs(target).map(|run| run.range)) {
            let Some(span) = mapped.extent(free) else { continue };
            self.partial += usize::from(mapped.whole(span) != span);
            match self.spans.last_mut() {
                Some(last) if last.end() > span.start() => {
                    *last = PageRange::between(last.start(), last.end().max(span.end())).unwrap_or(*last);
                }
                Some(last) if may_join(domain, *last, span, memory) => {
                    *last = PageRange::between(last.start(), span.end()).unwrap_or(*last);
                }
                _ => self.spans.push(span),
            }
        }
    }
}

/// Returns the part of `span` up to the next multiple of `bytes`.
fn first_piece(span: PageRange<Iova>, bytes: u64) -> PageRange<Iova> {
    let end = (span.start().raw() / bytes + 1) * bytes;
    PageRange::between(span.start(), span.end().min(Iova(end))).unwrap_or(span)
}

/// True if one call may unmap both: they are of one region, with nothing mapped between them.
fn may_join(domain: &Domain, left: PageRange<Iova>, right: PageRange<Iova>, memory: &Memory) -> bool {
    let clear = match PageRange::between(left.end(), right.start()) {
        Some(between) => domain.mapped().is_clear(between),
        None => left.end() == right.start(),
    };
    clear
        && memory
            .region_at(Gpa(left.start().raw()))
            .is_some_and(|region| region.iova().covers(left) && region.iova().covers(right))
}
