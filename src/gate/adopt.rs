//! Memory without an owner, after a restart: whoever comes back for it takes it over, or it is closed.

use passgate_bindings::units::Offset;
use passgate_bindings::{Gpa, Iova, PageRange};

use super::Gate;
use super::effect::{Answer, Effect, Effects};
use super::event::{Caller, ClientId, FileId, InvalidationId};
use super::ledger::HeldBy;
use super::ledger::holds::gaps;
use super::region::Region;
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
                self.claim_unended(caller.client);
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

    /// Has this client settle the conversions of which all pages lie in memory that it has just adopted. Of the others
    /// nobody here is the owner.
    fn claim_unended(&mut self, client: ClientId) {
        let mut unended = std::mem::take(&mut self.unended);
        unended.retain(|id, owner| {
            if *owner == ORPHANS {
                *owner = client;
                return self.owns_unknown(client, *id);
            }
            true
        });
        self.unended = unended;
    }

    /// The pages that a conversion without an end left in quarantine.
    pub(super) fn unknown_since(
        &self,
        invalidation: InvalidationId,
    ) -> impl Iterator<Item = (FileId, PageRange<Offset>)> + '_ {
        self.files.iter().flat_map(move |(file, entry)| {
            entry.holds.iter().filter_map(move |(range, by)| match by {
                HeldBy::Quarantine(since, reason)
                    if since == invalidation && reason.cause == Cause::ClientGone =>
                {
                    Some((*file, range))
                }
                _ => None,
            })
        })
    }

    /// This client's regions of a file.
    fn owned_by(&self, client: ClientId, file: FileId) -> impl Iterator<Item = &Region> + '_ {
        let regions = self.files.get(&file).map_or(&[][..], |entry| &entry.regions);
        let owned = regions.iter().filter_map(|id| self.regions.get(id));
        owned.filter(move |region| region.owner == client && !region.closing)
    }

    /// True while every page that the conversion left in quarantine shows in this client's memory.
    fn owns_unknown(&self, client: ClientId, invalidation: InvalidationId) -> bool {
        let mut any = false;
        self.unknown_since(invalidation).all(|(file, range)| {
            any = true;
            let mut shown: Vec<_> = self
                .owned_by(client, file)
                .map(|region| region.pages_at(region.iova()).range)
                .filter(|shown| shown.overlaps(range))
                .collect();
            shown.sort_unstable();
            gaps(range, shown.into_iter()).next().is_none()
        }) && any
    }

    /// The conversions that this client may settle, at every address where its memory shows them.
    fn unended_of(&self, client: ClientId) -> Vec<Unended> {
        let mut unended = Vec::new();
        for invalidation in self.unended.iter().filter(|(_, owner)| **owner == client).map(|(id, _)| *id) {
            for (file, range) in self.unknown_since(invalidation) {
                let iova = self.owned_by(client, file).filter_map(|region| region.iova_of(range));
                let gpa = iova.map(|iova| iova.rebase(Iova(0), Gpa(0)));
                unended.extend(gpa.map(|range| Unended { invalidation, range }));
            }
        }
        unended
    }

    /// Conversions that were open when an earlier daemon ended and are not settled.
    pub fn unended(&self) -> impl Iterator<Item = InvalidationId> + '_ {
        self.unended.keys().copied()
    }

    /// True where this client, which speaks for a VM, may say all the same what pages are that this invalidation left
    /// in quarantine: it was open when an earlier daemon ended, all of its pages lay in the memory that this client has
    /// adopted, and they still do.
    pub fn may_settle(&self, client: ClientId, invalidation: InvalidationId) -> bool {
        self.unended.get(&invalidation) == Some(&client) && self.owns_unknown(client, invalidation)
    }
}
