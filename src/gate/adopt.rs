//! Memory without an owner, after a restart: whoever comes back for it takes it over, or it is closed.

use passgate_bindings::{Gpa, PageRange};

use super::Gate;
use super::effect::{Answer, Effect, Effects};
use super::event::{Caller, ClientId, InvalidationId};
use super::ledger::HeldBy;
use super::snapshot::RegionStatus;
use super::verdict::{Cause, Refusal};

/// Whose the regions are that an earlier daemon's clients had. No connection has this number.
pub const ORPHANS: ClientId = ClientId(0);

/// A conversion that was open when its daemon ended: only its owner knows what the pages are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unended {
    /// The invalidation, for a `Release`.
    pub invalidation: InvalidationId,
    /// Where the guest sees the pages.
    pub range: PageRange<Gpa>,
}

impl Gate {
    /// Every orphan is this client's from now on.
    pub(super) fn adopt(&mut self, caller: Caller, effects: &mut Effects) {
        let answer = match self.adoptable(caller.client) {
            Err(refusal) => Answer::Refused(refusal),
            Ok(()) => {
                let orphans =
                    self.regions.values_mut().filter(|region| region.owner == ORPHANS && !region.closing);
                orphans.for_each(|region| region.owner = caller.client);
                let regions = self.snapshot().regions.into_iter();
                let regions: Vec<RegionStatus> =
                    regions.filter(|region| region.owner == caller.client && !region.closing).collect();
                Answer::Adopted { regions, unended: self.unended_of(caller.client) }
            }
        };
        effects.push(Effect::Answer { caller, answer });
    }

    fn adoptable(&self, client: ClientId) -> Result<(), Refusal> {
        if self.leaving.contains(&client) {
            return Err(Refusal::Closing);
        }
        let left = self.regions.values().any(|region| region.owner == ORPHANS && !region.closing);
        if left { Ok(()) } else { Err(Refusal::NoOrphans) }
    }

    /// Whether anything is left to adopt.
    pub fn has_orphans(&self) -> bool {
        self.adoptable(ORPHANS).is_ok()
    }

    /// Conversions over this client's memory that an earlier daemon did not see the end of.
    fn unended_of(&self, client: ClientId) -> Vec<Unended> {
        let mut unended = Vec::new();
        for (file, entry) in &self.files {
            for (range, by) in entry.holds.iter() {
                let HeldBy::Quarantine(invalidation, reason) = by else { continue };
                if reason.cause != Cause::ClientGone || invalidation.0 > self.last_unended {
                    continue;
                }
                let owned = entry.regions.iter().filter_map(|id| self.regions.get(id));
                for region in
                    owned.filter(|region| region.owner == client && region.spec.backing.file == *file)
                {
                    let range =
                        region.iova_of(range).map(|iova| iova.rebase(passgate_bindings::Iova(0), Gpa(0)));
                    unended.extend(range.map(|range| Unended { invalidation, range }));
                }
            }
        }
        unended
    }

    /// Whether this client, who speaks for a VM, may say all the same what pages are that this invalidation left in
    /// quarantine: it was open when an earlier daemon ended, and all of it lies in memory that is the client's now.
    pub fn may_settle(&self, client: ClientId, invalidation: InvalidationId) -> bool {
        let theirs = self.unended_of(client).into_iter().filter(|one| one.invalidation == invalidation);
        let (theirs, mut all): (u64, u64) = (theirs.map(|one| one.range.len()).sum(), 0);
        for entry in self.files.values() {
            let held = entry
                .holds
                .iter()
                .filter(|(_, by)| matches!(by, HeldBy::Quarantine(since, _) if *since == invalidation));
            all += held.map(|(range, _)| range.len()).sum::<u64>();
        }
        all > 0 && theirs >= all
    }
}
