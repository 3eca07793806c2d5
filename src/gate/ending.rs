//! How an invalidation is over: failed, ended by its owner, converted by passgate, or abandoned.
//!
//! Whatever is not certain ends in quarantine; whatever is certain is restored at once.

use passgate_bindings::units::Offset;
use passgate_bindings::{Gpa, PageRange};

use super::Gate;
use super::effect::{Answer, Effect, Effects, FilePages, Notice};
use super::event::{Caller, DomainId, FileId, InvalidationId, Outcome};
use super::fence::Step;
use super::invalidation::{After, Phase};
use super::ledger::{HeldBy, PageState, Run, RunState};
use super::verdict::{Cause, Reason, Refusal, Verdict};

impl Gate {
    /// The proof did not come: what stands in the way goes to quarantine, the rest back to what it was.
    pub(super) fn fail(&mut self, id: InvalidationId, effects: &mut Effects) {
        let Some(inv) = self.invalidations.get_mut(&id) else { return };
        let (targets, rung) = (std::mem::take(&mut inv.targets), inv.rung);
        let (caller, range, after) = (inv.receipt.caller, inv.receipt.ranges.first(), inv.after);
        let is_conversion = inv.is_conversion();
        let swept: Vec<DomainId> =
            self.domains.iter().map(|domain| domain.id).filter(|domain| !inv.sweeps(*domain)).collect();
        let mut stuck: Vec<_> = self
            .runs_over(&targets)
            .into_iter()
            .map(|(domain, run)| (domain, run.range, Some(run.state)))
            .collect();
        // What is mapped again since it was swept is plainly mapped, and in nobody's way.
        let unswept = self.domains.iter().filter(|domain| !swept.contains(&domain.id));
        for (domain, target) in unswept.flat_map(|d| targets.iter().map(move |t| (d, *t))) {
            stuck.extend(domain.mapped.live(target).map(|live| (domain.id, live, None)));
        }
        let at = effects.len();
        let mut worst: Option<(bool, Reason, PageRange<Gpa>)> = None;
        let pages = self.invalidations.get(&id).map(|inv| inv.pages.clone()).unwrap_or_default();
        self.release(id, &pages);
        for (domain, iova, state) in stuck {
            // Of a conversion, only what waits for its devices to be detached is still plainly mapped.
            let untouched = state.is_none() && is_conversion;
            let state = if untouched { Some(RunState::Cached) } else { state };
            let (known, reason) = self.reason(domain, state, rung);
            let parts = self.files_at(iova);
            if !untouched {
                for part in &parts {
                    self.quarantine(id, part.file, part.range, reason, effects);
                }
            }
            // Looked for only where it is to be told: a batch has thousands of parts.
            if worst.is_none_or(|(was_known, ..)| was_known && !known) {
                let first = parts.into_iter().find_map(|part| self.asked(&pages, part));
                worst = Some((known, reason, first.unwrap_or(range)));
            }
        }
        let (known, reason, range) =
            worst.unwrap_or((false, Reason { cause: Cause::CallHangs, device: None, rung, errno: 0 }, range));
        let verdict =
            if known { Verdict::Refused { range, reason } } else { Verdict::Unknown { range, reason } };
        if let Some(inv) = self.invalidations.get_mut(&id) {
            inv.receipt.verdict = Some(verdict);
        }
        self.clearing.remove(id, &targets);
        let answer = match after {
            After::AddFailed(_, Refusal::MapFailed { errno }) => {
                Some(Answer::Refused(Refusal::HalfMapped { errno }))
            }
            After::AddFailed(_, refusal) => Some(Answer::Refused(refusal)),
            After::Gone | After::Merged(_) | After::Resumed => None,
            _ => Some(Answer::Verdict { invalidation: id, verdict }),
        };
        if let Some(answer) = answer {
            // It has a deadline, what everybody is told has none: thousands of ranges may be.
            effects.insert(at, Effect::Answer { caller, answer });
        }
        effects.push(Effect::Notice(Notice::Refused { invalidation: id, range, reason }));
        self.finish(id, effects);
        self.restore(pages, effects);
    }

    /// Where in what was asked for a part of a file lies.
    fn asked(&self, pages: &[FilePages], part: FilePages) -> Option<PageRange<Gpa>> {
        pages.iter().filter(|asked| asked.file == part.file).find_map(|asked| {
            let shared = asked.range.intersection(part.range)?;
            Some(shared.rebase(asked.range.start(), asked.gpa))
        })
    }

    pub(super) fn end(
        &mut self,
        caller: Caller,
        id: InvalidationId,
        outcome: Outcome,
        effects: &mut Effects,
    ) {
        let open = self.invalidations.get(&id).is_some_and(|inv| {
            inv.phase == Phase::Granted && inv.is_conversion() && inv.receipt.caller.client == caller.client
        });
        if !open {
            let answer = Answer::Refused(Refusal::NotBegun { invalidation: id });
            effects.push(Effect::Answer { caller, answer });
            return;
        }
        effects.push(Effect::Answer { caller, answer: Answer::Ended { invalidation: id } });
        self.conclude(id, outcome, effects);
    }

    pub(super) fn converted(&mut self, id: InvalidationId, outcome: Outcome, effects: &mut Effects) {
        self.hanging.remove(&id);
        let Some(inv) = self.invalidations.get_mut(&id).filter(|inv| inv.phase == Phase::Converting) else {
            return;
        };
        let (caller, range) = (inv.receipt.caller, inv.receipt.ranges.first());
        let reason = |cause, errno| Reason { cause, device: None, rung: Step::Unmap, errno };
        let verdict = match outcome {
            Outcome::Committed => Verdict::Done,
            Outcome::NotCommitted => Verdict::Refused { range, reason: reason(Cause::ConvertFailed, 0) },
            Outcome::Unknown { errno, .. } => {
                Verdict::Unknown { range, reason: reason(Cause::OwnerUnknown, errno) }
            }
        };
        inv.receipt.verdict = Some(verdict);
        effects.push(Effect::Answer { caller, answer: Answer::Verdict { invalidation: id, verdict } });
        if let Verdict::Refused { range, reason } = verdict {
            effects.push(Effect::Notice(Notice::Refused { invalidation: id, range, reason }));
        }
        self.conclude(id, outcome, effects);
    }

    /// passgate's own conversion did not return in time: nobody knows what became of the pages.
    pub(super) fn convert_hangs(&mut self, id: InvalidationId, effects: &mut Effects) {
        let outcome = Outcome::Unknown { errno: 0, offset: 0 };
        self.converted(id, outcome, effects);
        self.hanging.insert(id);
    }

    /// Takes down how the owner's side went.
    fn conclude(&mut self, id: InvalidationId, outcome: Outcome, effects: &mut Effects) {
        // A VM that adds no memory any more would have its lost devices so for ever.
        self.hope();
        if let Outcome::Unknown { errno, .. } = outcome {
            let reason = Reason { cause: Cause::OwnerUnknown, device: None, rung: Step::Unmap, errno };
            self.settle_unknown(id, reason, Some(outcome), effects);
            return;
        }
        let Some(inv) = self.invalidations.get_mut(&id) else { return };
        inv.receipt.outcome = Some(outcome);
        let (pages, to) = (std::mem::take(&mut inv.pages), inv.receipt.to);
        if outcome == Outcome::Committed {
            for part in &pages {
                if let Some(file) = self.files.get_mut(&part.file) {
                    file.pages.set(part.range, to);
                }
            }
        }
        self.release(id, &pages);
        self.finish(id, effects);
        self.restore(pages, effects);
    }

    /// The owner cannot say, or is gone: the whole range is unknown, and quarantined.
    pub(super) fn settle_unknown(
        &mut self,
        id: InvalidationId,
        reason: Reason,
        outcome: Option<Outcome>,
        effects: &mut Effects,
    ) {
        let Some(inv) = self.invalidations.get_mut(&id) else { return };
        inv.receipt.outcome = outcome;
        let pages = std::mem::take(&mut inv.pages);
        self.release(id, &pages);
        for part in &pages {
            if let Some(file) = self.files.get_mut(&part.file) {
                file.pages.set(part.range, PageState::Unknown);
            }
            self.quarantine(id, part.file, part.range, reason, effects);
        }
        self.finish(id, effects);
    }

    /// The client went away before any answer: nothing was granted, all is as it was.
    pub(super) fn abandon(&mut self, id: InvalidationId, effects: &mut Effects) {
        let Some(inv) = self.invalidations.get_mut(&id) else { return };
        let (pages, targets) = (std::mem::take(&mut inv.pages), std::mem::take(&mut inv.targets));
        self.clearing.remove(id, &targets);
        self.release(id, &pages);
        for (domain, run) in self.runs_over(&targets) {
            self.doubt(id, domain, run, effects);
        }
        self.finish(id, effects);
        self.restore(pages, effects);
    }

    /// Nobody waits for this run any more: what is in doubt goes to quarantine, so that it is told.
    pub(super) fn doubt(&mut self, id: InvalidationId, domain: DomainId, run: Run, effects: &mut Effects) {
        let (known, reason) = self.reason(domain, Some(run.state), Step::Unmap);
        if !known {
            return;
        }
        for part in self.files_at(run.range) {
            self.quarantine(id, part.file, part.range, reason, effects);
        }
    }

    /// What a run that stands in the way says: whether it is known that it failed, and why.
    fn reason(&self, domain: DomainId, state: Option<RunState>, rung: Step) -> (bool, Reason) {
        let (known, cause, errno) = blame(state);
        let (device, rung) = match cause {
            Cause::AtsNotFenced => (self.keeps_copies(domain), Step::Detach),
            _ => (None, rung),
        };
        let device = device.or_else(|| self.suspect_device(domain));
        (known, Reason { cause, device, rung, errno })
    }

    fn release(&mut self, id: InvalidationId, pages: &[FilePages]) {
        for part in pages {
            if let Some(file) = self.files.get_mut(&part.file) {
                file.holds.release(part.range, id);
            }
        }
    }

    /// Maps again what may be mapped, and lets go of files that nothing needs any more.
    fn restore(&mut self, pages: Vec<FilePages>, effects: &mut Effects) {
        for part in pages {
            self.reconcile(part.file, part.range, effects);
            self.forget_file(part.file, effects);
        }
    }

    /// Puts what of a range is not held into quarantine, and says so.
    pub(super) fn quarantine(
        &mut self,
        invalidation: InvalidationId,
        file: FileId,
        range: PageRange<Offset>,
        reason: Reason,
        effects: &mut Effects,
    ) {
        let Some(entry) = self.files.get_mut(&file) else { return };
        let fresh: Vec<_> = entry.holds.gaps(range).collect();
        for range in fresh {
            if let Some(entry) = self.files.get_mut(&file) {
                entry.holds.hold(range, HeldBy::Quarantine(invalidation, reason));
            }
            let gpa = self.gpa_of(file, range);
            effects.push(Effect::Notice(Notice::Quarantined { invalidation, file, range, gpa, reason }));
        }
    }

    /// The invalidation is over: its receipt goes out.
    pub(super) fn finish(&mut self, id: InvalidationId, effects: &mut Effects) {
        let Some(inv) = self.invalidations.remove(&id) else { return };
        self.domains.iter_mut().for_each(|domain| domain.reserved -= inv.reserved);
        if inv.is_conversion()
            && let Some(open) = self.open_by_client.get_mut(&inv.receipt.caller.client)
        {
            *open -= 1;
            if *open == 0 {
                self.open_by_client.remove(&inv.receipt.caller.client);
            }
        }
        effects.push(Effect::Receipt(inv.receipt));
    }
}

/// What the state of a run (none: it is plainly mapped) says: whether it is known that it failed, why, and the kernel's answer.
fn blame(state: Option<RunState>) -> (bool, Cause, i32) {
    match state {
        Some(RunState::Suspect { errno, .. }) => (true, Cause::UnmapFailed, errno),
        Some(RunState::Leaking(_)) => (true, Cause::DmaInFlight, 0),
        Some(RunState::Cached) => (true, Cause::AtsNotFenced, 0),
        Some(RunState::Filling { .. }) => (false, Cause::MapInFlight, 0),
        // What is live is here only if it was never asked to go: its devices did not stop in time.
        None | Some(RunState::Removing(_)) => (false, Cause::CallHangs, 0),
    }
}

#[cfg(test)]
mod tests {
    use passgate_bindings::PAGE;

    use super::super::*;

    const CALLER: Caller = Caller { client: ClientId(1), door: Door::Channel, cookie: 1 };

    /// The verdict on a page in two domains: in the first its unmap fails, in the second it does not return.
    fn verdict(first: DomainId, second: DomainId) -> Verdict {
        let (mut gate, mut effects) = (Gate::new(Policy::default()), Effects::new());
        let able = Able { max_mappings: 1000, max_piece: 1 << 30, cut: false, replace: false };
        for domain in [DomainId(0), DomainId(1)] {
            gate.handle(Event::DomainAdded { domain, able }, &mut effects);
        }
        let backing = Backing { file: FileId { device: 1, inode: 1 }, offset: Offset(0) };
        let (gpa, initial) = (PageRange::new(0, 4 * PAGE).unwrap(), PageState::Shared);
        let spec = RegionSpec { gpa, backing, writable: true, piece: PAGE, page: PAGE, initial };
        gate.handle(Event::AddRegion { caller: CALLER, spec }, &mut effects);
        let ranges = PageRange::new(PAGE, PAGE).unwrap().into();
        let (to, performer) = (PageState::Private, Performer::Client);
        gate.handle(
            Event::Begin { caller: CALLER, ranges, to, performer, deadline_ns: 1 << 40 },
            &mut effects,
        );
        let mut rungs = Step::LADDER.into_iter();
        loop {
            if effects.is_empty() {
                let rung = rungs.next().expect("an answer in time");
                let invalidation = InvalidationId(gate.last().1);
                gate.handle(Event::Expired { invalidation, rung }, &mut effects);
                continue;
            }
            match effects.remove(0) {
                Effect::Map { job, .. } => {
                    gate.handle(Event::Mapped { job, result: MapResult::Mapped }, &mut effects);
                }
                Effect::Unmap { job, domain, .. } if domain == first => {
                    let result = UnmapResult::Failed { errno: 16, bytes: 0 };
                    gate.handle(Event::Unmapped { job, result, took_ns: 1 }, &mut effects);
                }
                Effect::Unmap { domain, .. } => assert_eq!(domain, second),
                Effect::Answer { answer: Answer::Verdict { verdict, .. }, .. } => return verdict,
                _ => {}
            }
        }
    }

    #[test]
    fn a_page_that_failed_in_one_domain_and_hangs_in_another_is_unknown() {
        for (first, second) in [(DomainId(0), DomainId(1)), (DomainId(1), DomainId(0))] {
            let verdict = verdict(first, second);
            let Verdict::Unknown { reason, .. } = verdict else { panic!("{verdict:?}") };
            assert_eq!(reason.cause, Cause::CallHangs);
        }
    }
}
