//! Proof: an invalidation waits until the ledger shows nothing over its range, and does everything that brings this about.
//!
//! [`Gate::advance`] sweeps the range ([`super::sweep`]) and does the next thing: unmap what is mapped, wait for what is in
//! progress, climb the ladder for what failed ([`super::ladder`]). Time only ever pushes.

use passgate_backends::Step;
use passgate_bindings::{Gpa, Iova, PageRange};

use super::Gate;
use super::effect::{Answer, Effect, Effects, FilePages, Notice};
use super::event::Performer;
use super::ids::{DomainId, InvalidationId};
use super::invalidations::{CloseCause, Phase, Purpose};
use super::ledger::{Run, RunState};
use super::rung::Rung;
use super::verdict::{Cause, Reason, Refusal, Verdict};

impl Gate {
    /// The first sweep. The timer is set before any call can hang, and taken back if the answer came at once.
    pub(super) fn start_clearing(&mut self, id: InvalidationId, effects: &mut Effects) {
        let at = effects.len();
        self.arm(id, Rung::Unmap, effects);
        self.detach_ats(id, effects);
        self.advance(id, effects);
        if self.invalidations.get(id).is_none_or(|inv| inv.is_granted()) && at < effects.len() {
            effects.remove(at);
        }
    }

    /// A fence or an attach is over: every invalidation that waits for proof sweeps again.
    pub(super) fn advance_all(&mut self, effects: &mut Effects) {
        for id in self.invalidations.waiting().iter().collect::<Vec<_>>() {
            self.advance(id, effects);
        }
    }

    /// Something over `iova` has changed: every invalidation that waits for something there sweeps again.
    pub(super) fn advance_over(&mut self, iova: PageRange<Iova>, effects: &mut Effects) {
        let last = self.invalidations.last();
        for id in self.invalidations.waiting().over(iova) {
            self.advance_if_waiting(id, iova, effects);
        }
        for id in self.invalidations.waiting().since(last) {
            self.advance_if_waiting(id, iova, effects);
        }
    }

    fn advance_if_waiting(&mut self, id: InvalidationId, iova: PageRange<Iova>, effects: &mut Effects) {
        if self.invalidations.takes_notice(id, iova) {
            self.advance(id, effects);
        }
    }

    /// Sweeps the range of an invalidation, and does the next thing about what is in the way.
    pub(super) fn advance(&mut self, id: InvalidationId, effects: &mut Effects) {
        loop {
            let Some(inv) = self.invalidations.get(id).filter(|inv| inv.progress().is_some()) else {
                return;
            };
            if self.waits_for_fences(inv) {
                return;
            }
            #[cfg(test)]
            super::invalidations::tests::SWEEPS.set(super::invalidations::tests::SWEEPS.get() + 1);
            // A conversion can be refused with nothing changed; a region being closed is at least unmapped.
            if inv.is_conversion() && self.is_ats_active_over(inv.targets()) {
                self.fail(id, effects);
                return;
            }
            if self.waits_for_pauses(id, effects) {
                return;
            }
            if let Some(progress) = self.invalidations.progress_mut(id) {
                progress.stopping = false;
            }
            let blockers = self.sweep(id, effects);
            if blockers.failed.is_empty() {
                if !blockers.pending {
                    self.grant(id, effects);
                }
                return;
            }
            // The rest of a region being closed does not wait for a part that failed: time is up only when nothing moves.
            if blockers.pending && self.invalidations.is_close(id) {
                return;
            }
            // While a device is being fenced or attached, a retry would prove nothing.
            if blockers.failed.iter().any(|(domain, _)| self.devices.is_busy(*domain)) {
                return;
            }
            if self.retry_failed(id, blockers.failed, effects) {
                return;
            }
            if !self.climb(id, effects) {
                self.fail(id, effects);
                return;
            }
        }
    }

    /// Unmaps once more what failed, where it has not been tried at this rung. Returns true if any call was asked for.
    fn retry_failed(
        &mut self,
        id: InvalidationId,
        failed: Vec<(DomainId, Run)>,
        effects: &mut Effects,
    ) -> bool {
        let Some(progress) = self.invalidations.progress_mut(id) else { return false };
        if !std::mem::take(&mut progress.retry) {
            return false;
        }
        let before = effects.len();
        // A cached run is unmapped already: its devices have to be detached.
        for (domain, run) in failed.into_iter().filter(|(_, run)| run.state != RunState::Cached) {
            self.unmap(id, domain, run.range, effects);
        }
        effects.len() > before
    }

    /// Nothing is in the way any more.
    fn grant(&mut self, id: InvalidationId, effects: &mut Effects) {
        let Some(inv) = self.invalidations.proved(id) else { return };
        inv.receipt.verdict = Some(Verdict::Done);
        let caller = inv.receipt.caller;
        match inv.purpose() {
            Purpose::Convert(Performer::Client) => {
                inv.phase = Phase::Granted;
                let answer = Answer::Verdict { invalidation: id, verdict: Verdict::Done };
                effects.push(Effect::Answer { caller, answer });
            }
            Purpose::Convert(Performer::Passgate) => {
                inv.phase = Phase::Converting;
                let (pages, to) = (inv.pages.clone(), inv.receipt.to);
                effects.push(Effect::Convert { invalidation: id, pages, to });
            }
            Purpose::Merge(_) | Purpose::Resume => self.finish(id, effects),
            Purpose::Close(region, cause) => {
                self.finish(id, effects);
                self.forget_region(region, effects);
                let answer = match cause {
                    CloseCause::Removed(_) => Some(Answer::RegionRemoved { region }),
                    CloseCause::AddFailed(_, refusal) => Some(Answer::Refused(refusal)),
                    CloseCause::OwnerGone => None,
                };
                effects.extend(answer.map(|answer| Effect::Answer { caller, answer }));
            }
        }
    }

    /// Proof did not come: everything in the way is quarantined, the rest is restored.
    pub(super) fn fail(&mut self, id: InvalidationId, effects: &mut Effects) {
        let Some(inv) = self.invalidations.get_mut(id) else { return };
        let rung = inv.progress().map_or(Rung::Unmap, |progress| progress.rung);
        let (caller, range, purpose) = (inv.receipt.caller, inv.receipt.ranges.first(), inv.purpose());
        let (is_conversion, pages) = (inv.is_conversion(), inv.pages.clone());
        let rest = if inv.is_close() { self.plan_rest(id) } else { Vec::new() };
        let stuck = self.stuck(id, &rest);
        // A mapping whose unmap was not asked for says nothing about the cause, unless nothing else is there.
        let decisive = stuck.iter().any(|(.., state)| state.is_some());
        self.invalidations.stop_waiting(id);
        self.memory.end_exclusion(&pages, id);
        let at = effects.len();
        let mut worst: Option<(bool, Reason, PageRange<Gpa>)> = None;
        for (domain, iova, state) in stuck {
            // Of a conversion, only what waits for its devices to be detached is still live.
            let untouched = state.is_none() && is_conversion;
            let decides = state.is_some() || is_conversion || !decisive;
            let state = if untouched { Some(RunState::Cached) } else { state };
            let (known, reason) = self.blame(domain, state, rung);
            let parts = self.memory.pages_at(iova);
            if !untouched {
                for part in &parts {
                    self.put_in_quarantine(id, part.file, part.range, reason, effects);
                }
            }
            // Looked for only where it is to be said: a batch has thousands of parts.
            if decides && worst.is_none_or(|(was_known, ..)| was_known && !known) {
                let first = parts.into_iter().find_map(|part| shown_in(&pages, part));
                worst = Some((known, reason, first.unwrap_or(range)));
            }
        }
        let (known, reason, range) =
            worst.unwrap_or((false, Reason { cause: Cause::CallHangs, device: None, rung, errno: 0 }, range));
        let verdict =
            if known { Verdict::Refused { range, reason } } else { Verdict::Unknown { range, reason } };
        if let Some(inv) = self.invalidations.get_mut(id) {
            inv.receipt.verdict = Some(verdict);
        }
        let verdict = Answer::Verdict { invalidation: id, verdict };
        let answer = match purpose {
            Purpose::Close(_, CloseCause::AddFailed(_, Refusal::MapFailed { errno })) => {
                Some(Answer::Refused(Refusal::HalfMapped { errno }))
            }
            Purpose::Close(_, CloseCause::AddFailed(_, refusal)) => Some(Answer::Refused(refusal)),
            Purpose::Close(_, CloseCause::OwnerGone) | Purpose::Merge(_) | Purpose::Resume => None,
            Purpose::Close(_, CloseCause::Removed(_)) | Purpose::Convert(_) => Some(verdict),
        };
        if let Some(answer) = answer {
            // It has a deadline, what everybody is told has none: there may be thousands of ranges.
            effects.insert(at, Effect::Answer { caller, answer });
        }
        effects.push(Effect::Notice(Notice::Refused { invalidation: id, range, reason }));
        for (domain, plan) in rest {
            self.unmap_spans(id, domain, plan, effects);
        }
        self.finish(id, effects);
        self.restore(pages, effects);
    }

    /// Returns everything that stands in the way of an invalidation: by domain, with the run's state, or none if it is live.
    /// The live part of a region being closed is `rest`, the spans by which it will be unmapped: a large region may have a million
    /// mappings, each with a gap behind it.
    fn stuck(
        &self,
        id: InvalidationId,
        rest: &[(DomainId, Vec<PageRange<Iova>>)],
    ) -> Vec<(DomainId, PageRange<Iova>, Option<RunState>)> {
        let Some(inv) = self.invalidations.get(id) else { return Vec::new() };
        let runs = self.mappings.runs_over(inv.targets()).into_iter();
        let mut stuck: Vec<_> = runs.map(|(domain, run)| (domain, run.range, Some(run.state))).collect();
        if inv.is_close() {
            let spans =
                rest.iter().flat_map(|(domain, spans)| spans.iter().map(|span| (*domain, *span, None)));
            stuck.extend(spans);
            return stuck;
        }
        // A mapping made again since the sweep is live, and in nobody's way.
        for domain in self.mappings.iter().filter(|domain| inv.sweeps(domain.id())) {
            for target in inv.targets() {
                stuck.extend(domain.mapped().live(*target).map(|live| (domain.id(), live, None)));
            }
        }
        stuck
    }

    /// Returns the reason for a failure that a run in this state (none: live) stands for, and true if it is known to have
    /// failed.
    pub(super) fn blame(&self, domain: DomainId, state: Option<RunState>, rung: Rung) -> (bool, Reason) {
        let (known, cause, errno) = match state {
            Some(RunState::Suspect { errno, .. }) => (true, Cause::UnmapFailed, errno),
            Some(RunState::Leaking(_)) => (true, Cause::DmaInFlight, 0),
            Some(RunState::Cached) => (true, Cause::AtsNotFenced, 0),
            Some(RunState::Filling { .. }) => (false, Cause::MapInFlight, 0),
            // A live mapping is here only if its unmap was never asked for: its devices did not stop in time.
            None | Some(RunState::Removing(_)) => (false, Cause::CallHangs, 0),
        };
        let (device, rung) = match cause {
            Cause::AtsNotFenced => (self.ats_active(domain), Rung::Fence(Step::Detach)),
            _ => (None, rung),
        };
        let device = device.or_else(|| self.devices.first_of(domain));
        (known, Reason { cause, device, rung, errno })
    }
}

/// Returns the part of the requested ranges that a part of a file lies in.
fn shown_in(pages: &[FilePages], part: FilePages) -> Option<PageRange<Gpa>> {
    pages.iter().filter(|asked| asked.file == part.file).find_map(|asked| {
        let shared = asked.range.intersection(part.range)?;
        Some(shared.rebase(asked.range.start(), asked.gpa))
    })
}
