//! Quarantine that outlives a daemon, and the person who ends one.

use passgate_bindings::PageRange;
use passgate_bindings::units::Offset;

use super::Gate;
use super::effect::{Answer, Effect, Effects, Notice};
use super::event::{Caller, FileId, InvalidationId};
use super::ledger::{HeldBy, PageState};
use super::verdict::{Reason, Refusal};

impl Gate {
    /// What an earlier daemon had in quarantine stays there.
    pub(super) fn keep_quarantine(
        &mut self,
        file: FileId,
        range: PageRange<Offset>,
        invalidation: InvalidationId,
        reason: Reason,
    ) {
        self.last_invalidation = self.last_invalidation.max(invalidation.0);
        let entry = self.files.entry(file).or_default();
        entry.pages.set(range, PageState::Unknown);
        entry.holds.hold(range, HeldBy::Quarantine(invalidation, reason));
    }

    /// A person knows what the pages are that an invalidation left in quarantine. A mapping over them that was
    /// never proved gone stays in the ledger all the same: the next invalidation tries it again.
    pub(super) fn let_go(
        &mut self,
        caller: Caller,
        invalidation: InvalidationId,
        to: PageState,
        effects: &mut Effects,
    ) {
        let mut freed = Vec::new();
        for (file, entry) in &mut self.files {
            for range in entry.holds.lift_all(invalidation) {
                entry.pages.set(range, to);
                freed.push((*file, range));
            }
        }
        let bytes = freed.iter().map(|(_, range)| range.len()).sum();
        for (file, range) in freed {
            let (gpa, client) = (self.gpa_of(file, range), caller.client);
            effects.push(Effect::Notice(Notice::Released { client, invalidation, file, range, gpa, to }));
            self.reconcile(file, range, effects);
            self.forget_file(file, effects);
        }
        let answer = match bytes {
            0 => Answer::Refused(Refusal::NotQuarantined { invalidation }),
            bytes => Answer::Released { bytes },
        };
        effects.push(Effect::Answer { caller, answer });
    }
}
