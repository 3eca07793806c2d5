//! Quarantine: pages that are never mapped nor handed out again until proof, or an operator, frees them.
//!
//! Pages come into quarantine when an unmap over them fails, when nobody knows how a conversion of them ended, and from an
//! earlier daemon. Where the cause is disproved (the operations ended, the call returned with its full length) the
//! quarantine is lifted; where only the owner knew what the pages are, it lasts until an operator says what they are
//! (*release*). What may be in quarantine lies with the pages, in [`super::memory`].

use std::collections::{BTreeMap, BTreeSet};

use passgate_bindings::units::{LIMIT, Offset};
use passgate_bindings::{Gpa, Iova, PageRange};

use super::Gate;
use super::effect::{Answer, Effect, Effects, FilePages, Notice};
use super::event::Caller;
use super::ids::{ClientId, DomainId, FileId, InvalidationId, ORPHANS};
use super::ledger::exclusions::gaps;
use super::ledger::{ExcludedBy, PageState};
use super::status::QuarantineStatus;
use super::verdict::{Cause, Reason, Refusal};

/// The records that decide how long a quarantine lasts, and who may end it.
#[derive(Debug, Default)]
pub(super) struct Quarantine {
    /// The highest invalidation from which an earlier daemon's quarantine dates.
    last_of_earlier: u64,
    /// Conversions that were open when an earlier daemon ended and are not settled, with the client that has adopted
    /// their memory; [`ORPHANS`] while nobody has.
    unended: BTreeMap<InvalidationId, ClientId>,
    /// Conversions of passgate's own that were given up and have not returned.
    still_converting: BTreeSet<InvalidationId>,
}

impl Quarantine {
    /// True if a quarantine outlasts every proof about mappings: only an operator knows what the pages are. Of what an
    /// earlier daemon mapped, this ledger proves nothing.
    pub(super) fn lasts(&self, since: InvalidationId, reason: Reason) -> bool {
        matches!(reason.cause, Cause::OwnerUnknown | Cause::ClientGone | Cause::Inconsistent)
            || since.0 <= self.last_of_earlier
    }

    /// Quarantine up to this invalidation dates from an earlier daemon.
    pub(super) fn earlier_until(&mut self, last: InvalidationId) {
        self.last_of_earlier = self.last_of_earlier.max(last.0);
    }

    /// passgate's own conversion was given up: it may yet take the pages away.
    pub(super) fn conversion_given_up(&mut self, id: InvalidationId) {
        self.still_converting.insert(id);
    }

    /// passgate's own conversion has returned.
    pub(super) fn conversion_returned(&mut self, id: InvalidationId) {
        self.still_converting.remove(&id);
    }

    /// A conversion was open when an earlier daemon ended.
    pub(super) fn add_unended(&mut self, id: InvalidationId) {
        self.unended.insert(id, ORPHANS);
    }

    /// Returns the conversions that were open when an earlier daemon ended and are not settled, with who may settle them.
    pub(super) fn unended(&self) -> impl ExactSizeIterator<Item = (InvalidationId, ClientId)> + '_ {
        self.unended.iter().map(|(id, owner)| (*id, *owner))
    }

    /// True for a conversion that was open when an earlier daemon ended and is not settled.
    pub(super) fn is_unended(&self, id: InvalidationId) -> bool {
        self.unended.contains_key(&id)
    }

    /// True if `client` has adopted the memory of a conversion that is not settled.
    pub(super) fn is_unended_of(&self, id: InvalidationId, client: ClientId) -> bool {
        self.unended.get(&id) == Some(&client)
    }

    /// `client` adopts the conversions without an owner that `whole` admits; the others nobody here can settle.
    pub(super) fn adopt_unended(&mut self, client: ClientId, whole: impl Fn(InvalidationId) -> bool) {
        self.unended.retain(|id, owner| {
            if *owner != ORPHANS {
                return true;
            }
            *owner = client;
            whole(*id)
        });
    }

    /// The client is gone: whoever comes after it did not begin what it might have settled.
    pub(super) fn disown(&mut self, client: ClientId) {
        self.unended.retain(|_, owner| *owner != client);
    }

    /// Returns its state as text ([`super::Gate::canonical`]).
    pub(super) fn canonical(&self) -> String {
        let Self { last_of_earlier, unended, still_converting } = self;
        format!("{:?} {unended:?} {still_converting:?}", InvalidationId(*last_of_earlier))
    }
}

impl Gate {
    /// Puts what of a range is not excluded into quarantine, and reports it.
    pub(super) fn put_in_quarantine(
        &mut self,
        invalidation: InvalidationId,
        file: FileId,
        range: PageRange<Offset>,
        reason: Reason,
        effects: &mut Effects,
    ) {
        for range in self.memory.quarantine(file, range, invalidation, reason) {
            let gpa = self.gpa_of(file, range);
            effects.push(Effect::Notice(Notice::Quarantined { invalidation, file, range, gpa, reason }));
        }
    }

    /// The gate's own records of pages contradict each other. Fails closed: it is counted and reported, `iova` may be mapped in the
    /// domain until an unmap has proved that it is not, and what no invalidation excludes there is quarantined until an
    /// operator says what it is.
    pub(super) fn inconsistent(
        &mut self,
        what: &'static str,
        domain: DomainId,
        iova: PageRange<Iova>,
        effects: &mut Effects,
    ) {
        self.inconsistencies += 1;
        effects.push(Effect::Notice(Notice::Inconsistent { what, iova: Some(iova) }));
        if let Some(domain) = self.mappings.get_mut(domain) {
            domain.doubt_unknown(iova);
        }
        let id = self.invalidations.number();
        for part in self.memory.pages_at(iova) {
            self.put_in_quarantine(id, part.file, part.range, Reason::of(Cause::Inconsistent, 0), effects);
        }
    }

    /// The gate's own records of a device contradict each other: it is counted and reported.
    pub(super) fn inconsistent_device(&mut self, what: &'static str, effects: &mut Effects) {
        self.inconsistencies += 1;
        effects.push(Effect::Notice(Notice::Inconsistent { what, iova: None }));
    }

    /// Pages that an earlier daemon had in quarantine stay there.
    pub(super) fn restore_quarantine(
        &mut self,
        file: FileId,
        range: PageRange<Offset>,
        invalidation: InvalidationId,
        reason: Reason,
    ) {
        // No gate counts so far; one that starts there would run out of numbers.
        let invalidation = InvalidationId(invalidation.0.min(u64::MAX / 2));
        self.invalidations.count_from(invalidation.0);
        self.quarantine.earlier_until(invalidation);
        // A later daemon that goes on with this one's ledger must not take it for one of this gate's own.
        let cause = if reason.cause == Cause::ClientGone { reason.cause } else { Cause::OwnerUnknown };
        let reason = Reason { cause, ..reason };
        self.memory.restore_state(file, range, PageState::Unknown);
        self.memory.restore_excluded(file, range, ExcludedBy::Quarantine(invalidation, reason));
    }

    /// Lifts the quarantines over these pages whose cause is disproved: nothing is mapped or in doubt at any alias.
    pub(super) fn lift_over(&mut self, part: FilePages, effects: &mut Effects) {
        let Some(excluded) = self.memory.excluded(part.file) else { return };
        for (range, by) in excluded.overlapping(part.range).collect::<Vec<_>>() {
            let ExcludedBy::Quarantine(since, reason) = by else { continue };
            let no_run = |alias: PageRange<Iova>| {
                self.mappings.iter().all(|domain| domain.mapped().runs(alias).next().is_none())
            };
            let clear = self.memory.aliases(part.file, range).all(no_run);
            if !clear || self.quarantine.lasts(since, reason) {
                continue;
            }
            self.lift(part.file, range, effects);
            self.reconcile(part.file, range, effects);
        }
        self.forget_unused(part.file, effects);
    }

    /// Lifts a quarantine whose cause is disproved.
    fn lift(&mut self, file: FileId, range: PageRange<Offset>, effects: &mut Effects) {
        self.memory.lift(file, range.start());
        let gpa = self.gpa_of(file, range);
        effects.push(Effect::Notice(Notice::Freed { file, range, gpa }));
    }

    /// Lifts the quarantines whose cause was disproved, where the earlier gate ended before it lifted them: nothing that comes
    /// back will. What no region shows stays, and so does everything while a mapping is left that no region is of,
    /// which may show any page.
    pub(super) fn lift_disproved(&mut self, effects: &mut Effects) {
        if !self.memory.is_quarantined_any() || self.mapped_outside_regions().is_some() {
            return;
        }
        let disproved = |status: &QuarantineStatus| {
            let mut aliases = self.memory.aliases(status.file, status.range).peekable();
            !self.quarantine.lasts(status.invalidation, status.reason)
                && aliases.peek().is_some()
                && aliases.all(|alias| self.mappings.is_clear(alias))
        };
        let disproved: Vec<_> = self.quarantined_ranges().filter(disproved).collect();
        for QuarantineStatus { file, range, .. } in disproved {
            self.lift(file, range, effects);
        }
    }

    /// An operator says what the pages are that an invalidation left in quarantine. A mapping over them that was never proved
    /// gone stays in the ledger all the same: the next invalidation tries it again. While there is one the pages are
    /// released as shared or not at all, because a device may reach them. While passgate's own conversion may still
    /// take the pages away, nobody can know.
    pub(super) fn operator_release(
        &mut self,
        caller: Caller,
        invalidation: InvalidationId,
        to: PageState,
        effects: &mut Effects,
    ) {
        if let Err(refusal) = self.check_release(invalidation, to) {
            effects.push(Effect::Answer { caller, answer: Answer::Refused(refusal) });
            return;
        }
        self.quarantine.unended.remove(&invalidation);
        let freed = self.memory.lift_all(invalidation, to);
        let answer = match freed.iter().map(|(_, range)| range.len()).sum() {
            0 => Answer::Refused(Refusal::NotQuarantined { invalidation }),
            bytes => Answer::Released { bytes },
        };
        effects.push(Effect::Answer { caller, answer });
        for (file, range) in freed.iter().copied() {
            let (client, gpa) = (caller.client, self.gpa_of(file, range));
            effects.push(Effect::Notice(Notice::Released { client, invalidation, file, range, gpa, to }));
        }
        for (file, range) in freed {
            self.reconcile(file, range, effects);
            self.close_again(file, range, effects);
            self.forget_unused(file, effects);
        }
    }

    fn check_release(&self, invalidation: InvalidationId, to: PageState) -> Result<(), Refusal> {
        if self.quarantine.still_converting.contains(&invalidation) {
            return Err(Refusal::StillConverting { invalidation });
        }
        if to == PageState::Shared {
            return Ok(());
        }
        self.reached_since(invalidation).map_or(Ok(()), |gpa| Err(Refusal::StillMapped { invalidation, gpa }))
    }

    /// Returns where a device may still reach pages that this invalidation left in quarantine: at any alias, in any domain, by
    /// a mapping in any state. A mapping that no region is of may show any page.
    pub(super) fn reached_since(&self, invalidation: InvalidationId) -> Option<Gpa> {
        let ranges = self
            .memory
            .exclusions()
            .flat_map(|(file, excluded)| excluded.since(invalidation).map(move |(range, _)| (file, range)));
        let mut ranges = ranges.peekable();
        ranges.peek()?;
        let gpa = |iova: PageRange<Iova>| Gpa(iova.start().0);
        let mut aliases = ranges.flat_map(|(file, range)| self.memory.aliases(file, range));
        let reached = aliases.find(|iova| !self.mappings.is_clear(*iova));
        reached.or_else(|| self.mapped_outside_regions()).map(gpa)
    }

    /// Returns the first mapping that no region is of.
    fn mapped_outside_regions(&self) -> Option<PageRange<Iova>> {
        let everywhere = PageRange::<Iova>::new(0, LIMIT).ok()?;
        let between: Vec<_> = gaps(everywhere, self.memory.layout()).collect();
        self.mappings.iter().find_map(|domain| {
            between.iter().find_map(|between| domain.mapped().taken(*between).first().copied())
        })
    }

    /// Returns all that is in quarantine.
    pub fn quarantined_ranges(&self) -> impl Iterator<Item = QuarantineStatus> + '_ {
        self.memory.exclusions().flat_map(|(file, excluded)| {
            excluded.iter().filter_map(move |(range, by)| match by {
                ExcludedBy::Open(_) => None,
                ExcludedBy::Quarantine(invalidation, reason) => {
                    Some(QuarantineStatus { file, range, reason, invalidation })
                }
            })
        })
    }
}
