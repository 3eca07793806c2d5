//! Quarantine that outlives a daemon, and the person who ends one.

use passgate_bindings::units::{Address, LIMIT, Offset};
use passgate_bindings::{Gpa, Iova, PageRange};

use super::Gate;
use super::effect::{Answer, Effect, Effects, Notice};
use super::event::{Caller, FileId, InvalidationId, RegionId};
use super::invalidation::After;
use super::ledger::holds::gaps;
use super::ledger::{HeldBy, PageState};
use super::verdict::{Cause, Reason, Refusal};

impl Gate {
    /// What an earlier daemon had in quarantine stays there.
    pub(super) fn keep_quarantine(
        &mut self,
        file: FileId,
        range: PageRange<Offset>,
        invalidation: InvalidationId,
        reason: Reason,
    ) {
        // No gate counts so far; one that starts there would run out of numbers.
        let invalidation = InvalidationId(invalidation.0.min(u64::MAX / 2));
        self.last_invalidation = self.last_invalidation.max(invalidation.0);
        self.last_of_earlier = self.last_of_earlier.max(invalidation.0);
        // A later daemon that goes on with this one's ledger must not take it for one of this gate's own.
        let cause = if reason.cause == Cause::ClientGone { reason.cause } else { Cause::OwnerUnknown };
        let reason = Reason { cause, ..reason };
        let entry = self.file(file);
        entry.pages.set(range, PageState::Unknown);
        entry.holds.hold(range, HeldBy::Quarantine(invalidation, reason));
    }

    /// Whether a quarantine outlasts every proof about mappings: only a person knows what the pages are. Of what an
    /// earlier daemon mapped, this ledger proves nothing.
    pub(super) fn lasts(&self, since: InvalidationId, reason: Reason) -> bool {
        matches!(reason.cause, Cause::OwnerUnknown | Cause::ClientGone) || since.0 <= self.last_of_earlier
    }

    /// A person knows what the pages are that an invalidation left in quarantine. A mapping over them that was
    /// never proved gone stays in the ledger all the same: the next invalidation tries it again. While there is one the
    /// pages are released as shared or not at all, because a device may reach them. While passgate's own conversion may
    /// still take the pages away, nobody can know.
    pub(super) fn let_go(
        &mut self,
        caller: Caller,
        invalidation: InvalidationId,
        to: PageState,
        effects: &mut Effects,
    ) {
        if self.hanging.contains(&invalidation) {
            let answer = Answer::Refused(Refusal::StillConverting { invalidation });
            effects.push(Effect::Answer { caller, answer });
            return;
        }
        if to != PageState::Shared
            && let Some(gpa) = self.reached_since(invalidation)
        {
            let answer = Answer::Refused(Refusal::StillMapped { invalidation, gpa });
            effects.push(Effect::Answer { caller, answer });
            return;
        }
        self.unended.remove(&invalidation);
        let mut freed = Vec::new();
        for (file, entry) in &mut self.files {
            for range in entry.holds.lift_all(invalidation) {
                entry.pages.set(range, to);
                freed.push((*file, range));
            }
        }
        let bytes = freed.iter().map(|(_, range)| range.len()).sum();
        let answer = match bytes {
            0 => Answer::Refused(Refusal::NotQuarantined { invalidation }),
            bytes => Answer::Released { bytes },
        };
        effects.push(Effect::Answer { caller, answer });
        for (file, range) in freed.iter().copied() {
            let (gpa, client) = (self.gpa_of(file, range), caller.client);
            effects.push(Effect::Notice(Notice::Released { client, invalidation, file, range, gpa, to }));
        }
        for (file, range) in freed {
            self.reconcile(file, range, effects);
            self.close_again(file, range, effects);
            self.forget_file(file, effects);
        }
    }

    /// Where a device may still reach pages that this invalidation left in quarantine: at any alias, in any domain, by
    /// a mapping in any state. A mapping that no region is of may show any page.
    pub(super) fn reached_since(&self, invalidation: InvalidationId) -> Option<Gpa> {
        let held = self.files.iter();
        let held =
            held.flat_map(|(file, entry)| entry.holds.since(invalidation).map(|(range, _)| (*file, range)));
        let mut held = held.peekable();
        held.peek()?;
        let gpa = |iova: PageRange<Iova>| Gpa(iova.start().raw());
        let aliases = held.flat_map(|(file, range)| self.aliases(file, range));
        let reached = |iova: &PageRange<Iova>| !self.is_clear(*iova);
        aliases.filter(reached).map(gpa).next().or_else(|| self.stray().map(gpa))
    }

    /// The first mapping that no region is of.
    pub(super) fn stray(&self) -> Option<PageRange<Iova>> {
        let everywhere = PageRange::<Iova>::new(0, LIMIT).ok()?;
        let regions: Vec<_> =
            self.layout.values().filter_map(|id| Some(self.regions.get(id)?.iova())).collect();
        let between: Vec<_> = gaps(everywhere, regions.into_iter()).collect();
        self.domains.iter().find_map(|domain| {
            between.iter().find_map(|between| domain.mapped.taken(*between).first().copied())
        })
    }

    /// A dead client's region that could not be closed, because of these pages, is worth another try.
    fn close_again(&mut self, file: FileId, range: PageRange<Offset>, effects: &mut Effects) {
        let given_up: Vec<RegionId> = self
            .regions
            .iter()
            .filter(|(id, region)| {
                region.closing
                    && region.spec.backing.file == file
                    && region.iova_of(range).is_some()
                    && self.leaving.contains(&region.owner)
                    && !self.closes(**id)
            })
            .map(|(id, _)| *id)
            .collect();
        for id in given_up {
            self.close(id, false, After::Gone, effects);
        }
    }
}
