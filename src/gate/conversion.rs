//! A conversion: begin → proof → verdict → end. What happens in between is in [`super::proof`].
//!
//! Whatever is not certain at its end is quarantined; whatever is certain is restored at once.

use passgate_bindings::units::Address;
use passgate_bindings::{Gpa, Iova, PageRange};

use super::Gate;
use super::effect::{Answer, Effect, Effects, FilePages, Notice};
use super::event::{Caller, Outcome, Performer};
use super::ids::{ClientId, InvalidationId};
use super::invalidations::{New, Purpose};
use super::ledger::{ExcludedBy, PageState};
use super::policy::MAX_EXCLUDED_RANGES;
use super::ranges::Ranges;
use super::verdict::{Cause, Reason, Refusal, Verdict, within_budget};

/// A begin that was checked and may be granted.
struct Checked {
    /// The number of kernel mappings that its end may need, in each domain.
    room: u64,
    /// The pages that it converts.
    pages: Vec<FilePages>,
    /// Every IOVA range at which they show.
    targets: Vec<PageRange<Iova>>,
}

impl Gate {
    pub(super) fn begin(
        &mut self,
        caller: Caller,
        ranges: Ranges,
        to: PageState,
        performer: Performer,
        deadline_ns: u64,
        effects: &mut Effects,
    ) {
        let Checked { room, pages, targets } = match self.check_begin(caller.client, &ranges) {
            Ok(checked) => checked,
            Err(refusal) => {
                effects.push(Effect::Answer { caller, answer: Answer::Refused(refusal) });
                return;
            }
        };
        self.mappings.extend_promises(&targets, &self.memory);
        let (purpose, excluded) = (Purpose::Convert(performer), pages.clone());
        let id = self.invalidations.start(New { caller, ranges, to, purpose, pages, targets, deadline_ns });
        self.reserve(id, room);
        for part in excluded {
            self.memory.exclude(part.file, part.range, ExcludedBy::Open(id));
        }
        self.start_clearing(id, effects);
    }

    fn check_begin(&self, client: ClientId, ranges: &Ranges) -> Result<Checked, Refusal> {
        let pages = self.resolve(client, ranges)?;
        let mut targets = Vec::with_capacity(pages.len());
        for part in &pages {
            targets.extend(self.memory.aliases(part.file, part.range));
        }
        targets.sort_unstable();
        // A page that a batch names twice, by two of its addresses, is one target.
        targets.dedup_by(|next, last| {
            let overlap = next.start() < last.end();
            if overlap && let Some(both) = PageRange::between(last.start(), last.end().max(next.end())) {
                *last = both;
            }
            overlap
        });
        Ok(Checked { room: self.mappings.check_room(&targets, &self.memory)?, pages, targets })
    }

    /// Returns the pages behind guest-physical ranges, or why they cannot be converted.
    fn resolve(&self, client: ClientId, ranges: &Ranges) -> Result<Vec<FilePages>, Refusal> {
        let open = self.invalidations.conversions_of(client);
        if open >= self.policy.max_open {
            let (needed, limit) = (u64::from(open) + 1, self.policy.max_open.into());
            return Err(Refusal::Budget { what: "open invalidations", needed, limit });
        }
        let excluded: usize = self.memory.exclusions().map(|(_, excluded)| excluded.len()).sum();
        let asked = ranges.as_slice().len();
        within_budget("excluded ranges", (excluded + asked) as u64, MAX_EXCLUDED_RANGES)?;
        let mut pages = Vec::with_capacity(asked);
        for range in ranges.iter() {
            let mut at = range.start();
            while at < range.end() {
                let region = self.memory.region_at(at).filter(|region| !region.is_closing());
                let region = region.ok_or(Refusal::NoMemory { gpa: at })?;
                let end = region.gpa().end().min(range.end());
                let part = PageRange::between(Iova(at.raw()), Iova(end.raw()));
                let part = region.pages_at(part.ok_or(Refusal::NoMemory { gpa: at })?);
                self.check_free(part)?;
                pages.push(part);
                at = end;
            }
        }
        Ok(pages)
    }

    /// Checks that nothing excludes these pages.
    fn check_free(&self, part: FilePages) -> Result<(), Refusal> {
        let excluded = self.memory.excluded(part.file).filter(|excluded| !excluded.is_clear(part.range));
        let Some((range, by)) = excluded.and_then(|excluded| excluded.overlapping(part.range).next()) else {
            return Ok(());
        };
        let into = range.start().raw().saturating_sub(part.range.start().raw());
        let gpa = Gpa(part.gpa.raw() + into);
        Err(match by {
            ExcludedBy::Open(invalidation) => Refusal::Busy { invalidation, gpa },
            ExcludedBy::Quarantine(_, reason) => Refusal::Quarantined { gpa, cause: reason.cause },
        })
    }

    /// The client that began says how its conversion ended.
    pub(super) fn end(
        &mut self,
        caller: Caller,
        id: InvalidationId,
        outcome: Outcome,
        effects: &mut Effects,
    ) {
        let open = self.invalidations.get(id).is_some_and(|inv| {
            inv.is_granted() && inv.is_conversion() && inv.receipt.caller.client == caller.client
        });
        if !open {
            let answer = Answer::Refused(Refusal::NotBegun { invalidation: id });
            effects.push(Effect::Answer { caller, answer });
            return;
        }
        effects.push(Effect::Answer { caller, answer: Answer::Ended { invalidation: id } });
        self.conclude(id, outcome, effects);
    }

    /// passgate's own conversion has returned.
    pub(super) fn converted(&mut self, id: InvalidationId, outcome: Outcome, effects: &mut Effects) {
        self.quarantine.conversion_returned(id);
        let Some(inv) = self.invalidations.get_mut(id).filter(|inv| inv.is_converting()) else {
            // It was given up and its pages are quarantined, or nobody asked for it.
            return;
        };
        let (caller, range) = (inv.receipt.caller, inv.receipt.ranges.first());
        let verdict = match outcome {
            Outcome::Committed => Verdict::Done,
            Outcome::NotCommitted => Verdict::Refused { range, reason: Reason::of(Cause::ConvertFailed, 0) },
            Outcome::Unknown { errno, .. } => {
                Verdict::Unknown { range, reason: Reason::of(Cause::OwnerUnknown, errno) }
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
    pub(super) fn give_up_conversion(&mut self, id: InvalidationId, effects: &mut Effects) {
        let outcome = Outcome::Unknown { errno: 0, offset: 0 };
        self.converted(id, outcome, effects);
        self.quarantine.conversion_given_up(id);
    }

    /// The conversion has ended in this way.
    fn conclude(&mut self, id: InvalidationId, outcome: Outcome, effects: &mut Effects) {
        // Also here, not only when memory is added: a VM that adds none any more would have its lost devices so for ever.
        self.devices.retry_lost();
        if let Outcome::Unknown { errno, .. } = outcome {
            let reason = Reason::of(Cause::OwnerUnknown, errno);
            self.end_unknown(id, reason, Some(outcome), effects);
            return;
        }
        let Some(inv) = self.invalidations.get_mut(id) else { return };
        inv.receipt.outcome = Some(outcome);
        let (pages, to) = (std::mem::take(&mut inv.pages), inv.receipt.to);
        if outcome == Outcome::Committed {
            pages.iter().for_each(|part| self.memory.set_state(part.file, part.range, to));
        }
        self.memory.end_exclusion(&pages, id);
        self.finish(id, effects);
        self.restore(pages, effects);
    }

    /// Nobody knows how the conversion ended: all of its pages are unknown, and quarantined.
    pub(super) fn end_unknown(
        &mut self,
        id: InvalidationId,
        reason: Reason,
        outcome: Option<Outcome>,
        effects: &mut Effects,
    ) {
        let Some(inv) = self.invalidations.get_mut(id) else { return };
        inv.receipt.outcome = outcome;
        let pages = std::mem::take(&mut inv.pages);
        self.memory.end_exclusion(&pages, id);
        for part in &pages {
            self.memory.set_state(part.file, part.range, PageState::Unknown);
            self.put_in_quarantine(id, part.file, part.range, reason, effects);
        }
        self.finish(id, effects);
    }

    /// The client went away before any answer: nothing was granted, all is as it was.
    pub(super) fn abandon(&mut self, id: InvalidationId, effects: &mut Effects) {
        let Some(inv) = self.invalidations.get_mut(id) else { return };
        let pages = std::mem::take(&mut inv.pages);
        let targets = self.invalidations.stop_waiting(id);
        self.memory.end_exclusion(&pages, id);
        for (domain, run) in self.mappings.runs_over(&targets) {
            self.quarantine_failed(id, domain, run, effects);
        }
        self.finish(id, effects);
        self.restore(pages, effects);
    }

    /// Maps again what may be mapped, and forgets files that nothing needs any more.
    pub(super) fn restore(&mut self, pages: Vec<FilePages>, effects: &mut Effects) {
        for part in pages {
            self.reconcile(part.file, part.range, effects);
            self.forget_unused(part.file, effects);
        }
    }

    /// Keeps room for `count` more mappings, in each domain, until the invalidation is over.
    pub(super) fn reserve(&mut self, id: InvalidationId, count: u64) {
        if self.invalidations.reserve(id, count) {
            self.mappings.reserve(count);
        }
    }

    /// The invalidation is over: its receipt goes out.
    pub(super) fn finish(&mut self, id: InvalidationId, effects: &mut Effects) {
        let Some(inv) = self.invalidations.end(id) else { return };
        self.mappings.end_reservation(inv.reserved());
        effects.push(Effect::Receipt(inv.receipt));
    }
}
#[cfg(test)]
mod tests {
    use passgate_bindings::units::Offset;
    use passgate_bindings::words;
    use passgate_bindings::{PAGE, PageRange};

    use super::super::*;

    const CALLER: Caller = Caller { client: ClientId(1), door: Door::Channel, cookie: 1 };

    /// The verdict on a page in two domains: in the first its unmap fails, in the second it does not return.
    fn verdict(first: DomainId, second: DomainId) -> Verdict {
        let (mut gate, mut effects) = (Gate::new(Policy::default(), words::private), Effects::new());
        let caps = DomainCaps::new(1000, 1 << 30);
        for domain in [DomainId(0), DomainId(1)] {
            gate.handle(Event::DomainAdded { domain, caps }, &mut effects);
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
        let mut rungs = Rung::LADDER.into_iter();
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
    fn unmap_error_in_one_domain_and_hang_in_another_is_unknown() {
        for (first, second) in [(DomainId(0), DomainId(1)), (DomainId(1), DomainId(0))] {
            let verdict = verdict(first, second);
            let Verdict::Unknown { reason, .. } = verdict else { panic!("{verdict:?}") };
            assert_eq!(reason.cause, Cause::CallHangs);
        }
    }
}
