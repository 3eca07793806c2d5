//! Regions: how memory is added, and how it is removed.
//!
//! A region is removed as a conversion is granted: unmapped, proved, and only then forgotten. Where its owner is gone
//! without a word, every device of the VM is stopped first. A region whose removal is not proved is never forgotten.

use passgate_bindings::units::{Address, Offset};
use passgate_bindings::{Gpa, Iova, PageRange};

use super::Gate;
use super::effect::{Answer, Effect, Effects, Notice};
use super::event::{Caller, RegionSpec};
use super::ids::{ClientId, FileId, InvalidationId, RegionId};
use super::invalidations::{CloseCause, Invalidation, New, Phase, Purpose};
use super::ledger::{ExcludedBy, PageState};
use super::memory::Region;
use super::verdict::{Cause, Reason, Refusal};

/// The condition that a new region waits for ([`Gate::close_to_wait_for`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CloseWait {
    /// The end of closes that overlap it or show its pages. Each succeeds or is given up.
    Region,
    /// Room in a budget that a close in progress may free; another client may take it first.
    Room,
}

impl Gate {
    pub(super) fn add_region(&mut self, caller: Caller, spec: RegionSpec, effects: &mut Effects) {
        let pieces = match self.check_region(caller.client, &spec) {
            Ok(pieces) => pieces,
            Err(refusal) => {
                effects.push(Effect::Answer { caller, answer: Answer::Refused(refusal) });
                return;
            }
        };
        let quarantine = &self.quarantine;
        let id = self.memory.add_region(caller, spec, |since, reason| quarantine.lasts(since, reason));
        self.mappings.add_region(id, &pieces);
        let iova = spec.gpa.rebase(Gpa(0), Iova(0));
        self.invalidations.forget_targets(iova);
        self.promise_room(id, iova);
        self.devices.retry_lost();
        for domain in self.mappings.ids() {
            self.map_wanted(domain, id, iova, effects);
        }
        self.answer_added(id, effects);
    }

    /// Reserves room for a region that is being added, and for what of it must wait for the end of an invalidation.
    fn promise_room(&mut self, id: RegionId, iova: PageRange<Iova>) {
        self.mappings.promise(id, iova);
        let Some(region) = self.memory.region(id) else { return };
        let file = region.spec().backing.file;
        let later = |inv: &Invalidation| {
            let parts = inv.pages.iter().filter(|part| part.file == file);
            self.mappings.needed_for(id, parts.filter_map(|part| region.iova_of(part.range)))
        };
        let later: Vec<_> = self.invalidations.iter().map(|(id, inv)| (id, later(inv))).collect();
        for (id, count) in later {
            self.reserve(id, count);
        }
    }

    /// Checks a region that is to be added. Returns the bytes per kernel mapping in each domain.
    fn check_region(&self, client: ClientId, spec: &RegionSpec) -> Result<Vec<u64>, Refusal> {
        if self.clients.is_leaving(client) {
            return Err(Refusal::Closing);
        }
        self.memory.check_new(spec, &self.policy)?;
        let piece = |domain: &super::mappings::Domain| {
            domain.choose_piece(spec, self.gaps_allowed(domain.id()), self.policy.hitless)
        };
        self.mappings.iter().map(piece).collect()
    }

    /// Returns what a new region should wait for; none if it should be added, or refused, now. [`CloseWait::Region`]: every region that
    /// overlaps it is being closed, or one of another client is that shows the same pages, whose states the new region would take
    /// over. [`CloseWait::Room`]: it goes beyond a limit, and a close is in progress.
    pub fn close_to_wait_for(&self, client: ClientId, spec: &RegionSpec) -> Option<CloseWait> {
        let is_closing = |id: RegionId| self.invalidations.close_of(id).is_some();
        match self.check_region(client, spec) {
            Err(Refusal::Overlaps { .. }) => {
                let mut over = self.memory.regions().filter(|(_, other)| other.gpa().overlaps(spec.gpa));
                over.all(|(id, _)| is_closing(id)).then_some(CloseWait::Region)
            }
            Err(Refusal::Budget { .. }) => {
                self.memory.regions().any(|(id, _)| is_closing(id)).then_some(CloseWait::Room)
            }
            Err(_) => None,
            Ok(_) => {
                let pages = spec.gpa.rebase(spec.gpa.start(), spec.backing.offset);
                let shows = |id: RegionId| {
                    let other = self.memory.region(id).filter(|other| other.owner() != client);
                    other.is_some_and(|other| other.file_pages().range.overlaps(pages))
                };
                let mut regions = self.memory.regions_of(spec.backing.file).iter();
                regions.any(|id| shows(*id) && is_closing(*id)).then_some(CloseWait::Region)
            }
        }
    }

    /// True where a region that is not being closed lies in `gpa`.
    pub fn is_taken(&self, gpa: PageRange<Gpa>) -> bool {
        self.memory.regions().any(|(_, region)| !region.is_closing() && region.gpa().overlaps(gpa))
    }

    /// Answers the client that adds a region, once no map of it is in progress.
    pub(super) fn answer_added(&mut self, id: RegionId, effects: &mut Effects) {
        let Some((caller, result)) = self.memory.added(id) else { return };
        self.mappings.end_promise(id);
        match result {
            Err(refusal) => self.close(id, CloseCause::AddFailed(caller, refusal), effects),
            Ok(mapped) => {
                let answer = Answer::RegionAdded { region: id, mapped };
                effects.push(Effect::Answer { caller, answer });
            }
        }
    }

    pub(super) fn remove_region(&mut self, caller: Caller, id: RegionId, effects: &mut Effects) {
        match self.check_removal(caller.client, id) {
            Err(refusal) => effects.push(Effect::Answer { caller, answer: Answer::Refused(refusal) }),
            Ok(()) => self.close(id, CloseCause::Removed(caller), effects),
        }
    }

    fn check_removal(&self, client: ClientId, id: RegionId) -> Result<(), Refusal> {
        let own = |region: &&Region| region.owner() == client;
        let region = self.memory.region(id).filter(own).ok_or(Refusal::NotOwner { region: id })?;
        if region.is_being_added() || self.invalidations.close_of(id).is_some() {
            return Err(Refusal::RegionBusy { region: id });
        }
        let pages = region.file_pages();
        let open = self.memory.excluded(pages.file).and_then(|excluded| {
            excluded.overlapping(pages.range).find_map(|(range, by)| match by {
                ExcludedBy::Open(invalidation) => Some((range, invalidation)),
                ExcludedBy::Quarantine(..) => None,
            })
        });
        match open {
            None => Ok(()),
            Some((range, invalidation)) => {
                // Not none: they overlap.
                let iova = region.iova_of(range).unwrap_or(region.iova());
                Err(Refusal::Busy { invalidation, gpa: Gpa(iova.start().raw()) })
            }
        }
    }

    /// Begins to take a region out of every domain.
    pub(super) fn close(&mut self, id: RegionId, cause: CloseCause, effects: &mut Effects) {
        self.close_region(id, cause, false, effects);
    }

    /// As [`Gate::close`], with every device of the VM stopped first.
    pub(super) fn close_stopped(&mut self, id: RegionId, effects: &mut Effects) {
        self.close_region(id, CloseCause::OwnerGone, true, effects);
    }

    fn close_region(&mut self, id: RegionId, cause: CloseCause, stop: bool, effects: &mut Effects) {
        self.memory.start_closing(id);
        let Some(region) = self.memory.region(id) else { return };
        let caller = match cause {
            CloseCause::Removed(caller) | CloseCause::AddFailed(caller, _) => caller,
            CloseCause::OwnerGone => Caller::internal(region.owner()),
        };
        let (ranges, targets) = (region.gpa().into(), vec![region.iova()]);
        let (purpose, deadline_ns) = (Purpose::Close(id, cause), self.policy.close_deadline_ns);
        let (to, pages) = (PageState::Hole, Vec::new());
        let id = self.invalidations.start(New { caller, ranges, to, purpose, pages, targets, deadline_ns });
        if stop {
            self.stop_first(id, effects);
        }
        self.start_clearing(id, effects);
    }

    /// Forgets a region of which nothing is mapped any more.
    pub(super) fn forget_region(&mut self, id: RegionId, effects: &mut Effects) {
        let Some(region) = self.memory.remove_region(id) else { return };
        self.mappings.remove_region(id);
        self.forget_unused(region.spec().backing.file, effects);
        effects.push(Effect::Notice(Notice::RegionClosed { region: id }));
        let client = region.owner();
        if self.clients.is_leaving(client) && !self.memory.regions().any(|(_, r)| r.owner() == client) {
            self.clients.client_closed(client);
            effects.push(Effect::Notice(Notice::SessionClosed { client }));
        }
    }

    /// Forgets a file that nothing needs any more.
    pub(super) fn forget_unused(&mut self, file: FileId, effects: &mut Effects) {
        if self.memory.forget_unused(file) {
            effects.push(Effect::ForgetFile { file });
        }
    }

    /// A connection is gone. Conversions that wait for proof are abandoned: nothing was granted. Of one that was granted nobody
    /// knows whether it took place: its pages are quarantined. Its regions are closed, every device of the VM stopped first.
    pub(super) fn client_gone(&mut self, client: ClientId, effects: &mut Effects) {
        self.quarantine.disown(client);
        let owned = self.memory.regions().filter(|(_, region)| region.owner() == client);
        let owned: Vec<_> = owned.map(|(id, _)| id).collect();
        for id in &owned {
            if self.memory.start_closing(*id).is_some() {
                self.mappings.end_promise(*id);
            }
        }
        for id in self.invalidations.begun_by(client) {
            self.client_of_conversion_gone(id, effects);
        }
        if owned.is_empty() {
            self.clients.client_closed(client);
        } else {
            self.clients.leaves(client);
        }
        for id in owned {
            match self.invalidations.close_of(id) {
                Some(close) => self.owner_of_close_gone(close, effects),
                // This includes a region whose removal its owner requested and that was given up.
                None => self.close_stopped(id, effects),
            }
        }
    }

    /// The client that waits for a close is gone: every device of the VM is stopped now, and nobody is answered.
    fn owner_of_close_gone(&mut self, close: InvalidationId, effects: &mut Effects) {
        self.invalidations.owner_gone(close);
        self.stop_first(close, effects);
        if let Some(progress) = self.invalidations.progress_mut(close) {
            // Its deadline begins anew at the next alarm: the devices need time to stop.
            progress.moved();
        }
        self.advance(close, effects);
    }

    /// Stops every device of the VM before anything more of a close is unmapped.
    fn stop_first(&mut self, close: InvalidationId, effects: &mut Effects) {
        self.stop_all(close, effects);
        if let Some(progress) = self.invalidations.progress_mut(close) {
            progress.stopping = true;
            progress.retry = true;
        }
    }

    fn client_of_conversion_gone(&mut self, id: InvalidationId, effects: &mut Effects) {
        match self.invalidations.get(id).map(|inv| &inv.phase) {
            Some(Phase::Clearing(_)) => self.abandon(id, effects),
            Some(Phase::Granted) => self.end_unknown(id, Reason::of(Cause::ClientGone, 0), None, effects),
            // passgate itself converts, and will know how it went.
            Some(Phase::Converting) | None => {}
        }
    }

    /// Forgets the closing regions over `iova` that have no mapping left. Closes again those that have a live mapping and whose client
    /// is gone.
    pub(super) fn settle_closing(&mut self, iova: PageRange<Iova>, effects: &mut Effects) {
        let closing = |region: &Region| region.is_closing() && region.iova().overlaps(iova);
        let closing = self.memory.regions().filter(|(_, region)| closing(region));
        for id in closing.map(|(id, _)| id).collect::<Vec<_>>() {
            let Some(region) = self.memory.region(id).filter(|_| self.invalidations.close_of(id).is_none())
            else {
                continue;
            };
            let (iova, owner) = (region.iova(), region.owner());
            if self.mappings.is_clear(iova) {
                self.forget_region(id, effects);
            } else if self.clients.is_leaving(owner)
                && self.mappings.iter().any(|domain| domain.mapped().extent(iova).is_some())
            {
                // A map that returned after the close was given up has left a live mapping: the close goes on.
                self.close(id, CloseCause::OwnerGone, effects);
            }
        }
    }

    /// Closes the regions again that show these pages and whose client is gone: an operator has released what stood in the way.
    pub(super) fn close_again(&mut self, file: FileId, range: PageRange<Offset>, effects: &mut Effects) {
        let given_up = |id: RegionId, region: &Region| {
            region.is_closing()
                && region.spec().backing.file == file
                && region.iova_of(range).is_some()
                && self.clients.is_leaving(region.owner())
                && self.invalidations.close_of(id).is_none()
        };
        let given_up: Vec<_> =
            self.memory.regions().filter(|(id, region)| given_up(*id, region)).map(|(id, _)| id).collect();
        for id in given_up {
            self.close(id, CloseCause::OwnerGone, effects);
        }
    }
}
