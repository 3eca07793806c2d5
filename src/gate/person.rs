//! Quarantine that outlives a daemon, and the person who ends one.

use passgate_bindings::PageRange;
use passgate_bindings::units::Offset;

use super::Gate;
use super::effect::{Answer, Effect, Effects, Notice};
use super::event::{Caller, FileId, InvalidationId, RegionId};
use super::invalidation::After;
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
    /// never proved gone stays in the ledger all the same: the next invalidation tries it again. While passgate's own
    /// conversion may still take the pages away, nobody can know.
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
