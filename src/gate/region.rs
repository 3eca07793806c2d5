//! Regions: how memory comes, and how it goes.
//!
//! A region goes the way a conversion does: unmapped, proved, and only then forgotten. Where its owner went away
//! without a word, its devices are stopped first. A region whose removal is not proved is never forgotten.

use passgate_bindings::units::{Address, Offset};
use passgate_bindings::{Gpa, Iova, PAGE, PageRange};

use super::effect::{Answer, Effect, Effects, FilePages, Notice};
use super::event::{Caller, ClientId, FileId, InvalidationId, RegionId, RegionSpec};
use super::invalidation::{After, Phase};
use super::ledger::holds::gaps;
use super::ledger::{HeldBy, PageState};
use super::verdict::{Cause, Reason, Refusal};
use super::{Gate, Step};

/// A guest memory region.
#[derive(Debug)]
pub(super) struct Region {
    pub(super) owner: ClientId,
    pub(super) spec: RegionSpec,
    /// Bytes per kernel mapping, in each domain.
    pub(super) pieces: Vec<u64>,
    /// Kernel mappings that are kept free for it in each domain, while it is being added.
    pub(super) promised: Vec<u64>,
    /// Whether it is on its way out: nothing of it is mapped any more.
    pub(super) closing: bool,
    /// Map effects under way.
    pub(super) filling: u32,
    /// Bytes mapped while it was being added.
    pub(super) mapped: u64,
    /// Who waits for it to be added.
    pub(super) adding: Option<Caller>,
    /// Why it could not be added.
    pub(super) failed: Option<Refusal>,
}

impl Region {
    /// What devices see of it: guest-physical addresses are IOVAs.
    pub(super) fn iova(&self) -> PageRange<Iova> {
        self.spec.gpa.rebase(Gpa(0), Iova(0))
    }

    /// Where devices see these pages of its file.
    pub(super) fn iova_of(&self, range: PageRange<Offset>) -> Option<PageRange<Iova>> {
        let whole = self.pages_at(self.iova()).range;
        Some(whole.intersection(range)?.rebase(whole.start(), self.iova().start()))
    }

    /// The pages of its file behind a part of it.
    pub(super) fn pages_at(&self, part: PageRange<Iova>) -> FilePages {
        let range = part.rebase(self.iova().start(), self.spec.backing.offset);
        FilePages { file: self.spec.backing.file, range, gpa: Gpa(part.start().raw()) }
    }
}

impl Gate {
    pub(super) fn add_region(&mut self, caller: Caller, spec: RegionSpec, effects: &mut Effects) {
        let pieces = match self.admit(caller.client, &spec) {
            Ok(pieces) => pieces,
            Err(refusal) => {
                effects.push(Effect::Answer { caller, answer: Answer::Refused(refusal) });
                return;
            }
        };
        self.last_region += 1;
        let id = RegionId(self.last_region);
        let region = Region {
            owner: caller.client,
            spec,
            promised: Vec::new(),
            pieces,
            closing: false,
            filling: 0,
            mapped: 0,
            adding: Some(caller),
            failed: None,
        };
        let (iova, pages) = (region.iova(), region.pages_at(region.iova()));
        self.learn(pages, spec.initial);
        // Who still waits for what was at these addresses before does not wait for this.
        for inv in self.invalidations.values_mut() {
            inv.targets.retain(|target| !target.overlaps(iova));
        }
        self.clearing.forget(iova);
        self.regions.insert(id, region);
        self.layout.insert(spec.gpa.start(), id);
        if let Some(file) = self.files.get_mut(&pages.file) {
            file.regions.push(id);
        }
        self.promise(id);
        self.hope();
        for index in 0..self.domains.len() {
            self.fill(self.domains[index].id, id, iova, effects);
        }
        self.answer_added(id, effects);
    }

    /// Whether the region may come, and in what mappings, in each domain.
    fn admit(&self, client: ClientId, spec: &RegionSpec) -> Result<Vec<u64>, Refusal> {
        if self.leaving.contains(&client) {
            return Err(Refusal::Closing);
        }
        let bad = |size: u64| !size.is_power_of_two() || size < PAGE;
        if let Some(piece) = [spec.piece, spec.page].into_iter().find(|size| *size != 0 && bad(*size)) {
            return Err(Refusal::BadPiece { piece });
        }
        let before = self.layout.range(..=spec.gpa.start()).next_back();
        let within = self.layout.range(spec.gpa.start()..spec.gpa.end()).next();
        for (_, id) in before.into_iter().chain(within) {
            let other = self.regions.get(id).and_then(|region| region.spec.gpa.intersection(spec.gpa));
            if let Some(shared) = other {
                return Err(Refusal::Overlaps { region: *id, gpa: shared.start() });
            }
        }
        within_budget("regions", self.regions.len() as u64 + 1, self.policy.max_regions.into())?;
        let memory: u64 = self.regions.values().map(|region| region.spec.gpa.len()).sum();
        within_budget("bytes of guest memory", memory + spec.gpa.len(), self.policy.max_memory)?;
        self.domains.iter().map(|domain| self.choose(domain, spec)).collect()
    }

    /// True where a region had better come once others are closed: they lie in its way, use up a budget, or are of another
    /// client's and tell the states of its pages.
    pub fn waits_for_close(&self, client: ClientId, spec: &RegionSpec) -> bool {
        match self.admit(client, spec) {
            Err(Refusal::Overlaps { .. }) => {
                let mut over = self.regions.iter().filter(|(_, other)| other.spec.gpa.overlaps(spec.gpa));
                over.all(|(id, _)| self.closes(*id))
            }
            Err(Refusal::Budget { .. }) => self.regions.keys().any(|id| self.closes(*id)),
            Err(_) => false,
            Ok(_) => self.files.get(&spec.backing.file).is_some_and(|file| {
                let pages = spec.gpa.rebase(spec.gpa.start(), spec.backing.offset);
                file.regions.iter().any(|id| {
                    let other = self.regions.get(id).filter(|other| other.owner != client);
                    let shows = |other: &Region| other.pages_at(other.iova()).range.overlaps(pages);
                    other.is_some_and(shows) && self.closes(*id)
                })
            }),
        }
    }

    /// True where a region that is not on its way out lies in `gpa`.
    pub fn is_taken(&self, gpa: PageRange<Gpa>) -> bool {
        self.regions.values().any(|region| !region.closing && region.spec.gpa.overlaps(gpa))
    }

    /// Takes down the state of pages that no other region of the file has told before.
    fn learn(&mut self, pages: FilePages, initial: PageState) {
        let known = self.files.get(&pages.file).map_or(&[][..], |entry| &entry.regions);
        let mut told: Vec<_> = known
            .iter()
            .filter_map(|id| self.regions.get(id))
            .map(|region| region.pages_at(region.iova()).range)
            .filter(|range| range.overlaps(pages.range))
            .collect();
        told.sort_unstable();
        let entry = self.file(pages.file);
        for new in gaps(pages.range, told.into_iter()) {
            // Also what is held: once it may be mapped, its state must be what its owner says now.
            entry.pages.set(new, initial);
        }
        self.keep_unknown(pages);
    }

    /// What its last owner could not say, the next cannot either.
    fn keep_unknown(&mut self, pages: FilePages) {
        let Some(entry) = self.files.get(&pages.file) else { return };
        let unknown: Vec<_> = entry
            .holds
            .overlapping(pages.range)
            .filter(|(_, by)| matches!(by, HeldBy::Quarantine(since, why) if self.lasts(*since, *why)))
            .filter_map(|(held, _)| held.intersection(pages.range))
            .collect();
        if let Some(entry) = self.files.get_mut(&pages.file) {
            unknown.into_iter().for_each(|part| entry.pages.set(part, PageState::Unknown));
        }
    }

    /// Answers whoever added the region, once no map of it is under way.
    pub(super) fn answer_added(&mut self, id: RegionId, effects: &mut Effects) {
        let Some(region) = self.regions.get_mut(&id) else { return };
        if region.filling > 0 {
            return;
        }
        let Some(caller) = region.adding.take() else { return };
        let (failed, promised, mapped) = (region.failed, std::mem::take(&mut region.promised), region.mapped);
        for (domain, kept) in self.domains.iter_mut().zip(promised) {
            domain.reserved -= kept;
        }
        match failed {
            Some(refusal) => self.close(id, false, After::AddFailed(caller, refusal), effects),
            None => {
                let answer = Answer::RegionAdded { region: id, mapped };
                effects.push(Effect::Answer { caller, answer });
            }
        }
    }

    pub(super) fn remove_region(&mut self, caller: Caller, id: RegionId, effects: &mut Effects) {
        match self.removable(caller.client, id) {
            Err(refusal) => effects.push(Effect::Answer { caller, answer: Answer::Refused(refusal) }),
            Ok(()) => self.close(id, false, After::Removed(caller), effects),
        }
    }

    fn removable(&self, client: ClientId, id: RegionId) -> Result<(), Refusal> {
        let region = self.regions.get(&id).filter(|region| region.owner == client && region.adding.is_none());
        let region = region.ok_or(Refusal::NotOwner { region: id })?;
        if self.closes(id) {
            return Err(Refusal::NotOwner { region: id });
        }
        let pages = region.pages_at(region.iova());
        let held = self.files.get(&pages.file).and_then(|file| {
            file.holds.overlapping(pages.range).find_map(|(held, by)| match by {
                HeldBy::Open(invalidation) => Some((held, invalidation)),
                HeldBy::Quarantine(..) => None,
            })
        });
        match held {
            None => Ok(()),
            Some((held, invalidation)) => {
                let iova = region.iova_of(held).unwrap_or(region.iova());
                Err(Refusal::Busy { invalidation, gpa: Gpa(iova.start().raw()) })
            }
        }
    }

    /// Forgets a region of which nothing is mapped any more.
    pub(super) fn forget_region(&mut self, id: RegionId, effects: &mut Effects) {
        let Some(region) = self.regions.remove(&id) else { return };
        self.layout.remove(&region.spec.gpa.start());
        let file = region.spec.backing.file;
        if let Some(entry) = self.files.get_mut(&file) {
            entry.regions.retain(|other| *other != id);
        }
        self.forget_file(file, effects);
        effects.push(Effect::Notice(Notice::RegionClosed { region: id }));
        if self.leaving.contains(&region.owner) && !self.regions.values().any(|r| r.owner == region.owner) {
            self.leaving.retain(|client| *client != region.owner);
            self.insist_no_more(region.owner);
            effects.push(Effect::Notice(Notice::SessionClosed { client: region.owner }));
        }
    }

    /// Whether anything is known of a file.
    pub fn knows(&self, file: FileId) -> bool {
        self.files.contains_key(&file)
    }

    /// Forgets a file that no region and no hold needs. A quarantined file stays: its identity must not come
    /// back as another file's.
    pub(super) fn forget_file(&mut self, file: FileId, effects: &mut Effects) {
        let idle = |entry: &super::FileEntry| entry.regions.is_empty() && entry.holds.is_empty();
        if self.files.get(&file).is_some_and(idle) {
            if let Some(entry) = self.files.remove(&file) {
                entry.pages.discard();
            }
            effects.push(Effect::ForgetFile { file });
        }
    }

    /// A connection is gone: what it began is not known to be over, what it owned goes, its devices first.
    pub(super) fn client_gone(&mut self, client: ClientId, effects: &mut Effects) {
        // Whoever comes after it did not begin them.
        self.unended.retain(|_, owner| *owner != client);
        let mut owned = Vec::new();
        for (id, region) in self.regions.iter_mut().filter(|(_, region)| region.owner == client) {
            owned.push(*id);
            region.closing = true;
            if region.adding.take().is_some() {
                for (domain, kept) in self.domains.iter_mut().zip(std::mem::take(&mut region.promised)) {
                    domain.reserved -= kept;
                }
            }
        }
        let begun: Vec<InvalidationId> = self
            .invalidations
            .iter()
            .filter(|(_, inv)| inv.is_conversion() && inv.receipt.caller.client == client)
            .map(|(id, _)| *id)
            .collect();
        for id in begun {
            match self.invalidations.get(&id).map(|inv| inv.phase) {
                Some(Phase::Clearing) => self.abandon(id, effects),
                Some(Phase::Granted) => {
                    let reason =
                        Reason { cause: Cause::ClientGone, device: None, rung: Step::Unmap, errno: 0 };
                    self.settle_unknown(id, reason, None, effects);
                }
                // passgate itself is at it and will know how it went.
                Some(Phase::Converting) | None => {}
            }
        }
        if owned.is_empty() {
            self.insist_no_more(client);
        } else {
            self.leaving.push(client);
        }
        for id in owned {
            // Also what its owner tried to remove before, in vain.
            if !self.closes(id) {
                self.close(id, true, After::Gone, effects);
            }
        }
    }

    /// Whether the region lies in no domain any more.
    pub(super) fn unmapped_everywhere(&self, id: RegionId) -> bool {
        self.regions.get(&id).map(Region::iova).is_none_or(|iova| self.is_clear(iova))
    }

    /// True where nothing is mapped at `iova`, or in doubt, in any domain.
    pub(super) fn is_clear(&self, iova: PageRange<Iova>) -> bool {
        self.domains.iter().all(|domain| domain.mapped.is_clear(iova))
    }
}

pub(super) fn within_budget(what: &'static str, needed: u64, limit: u64) -> Result<(), Refusal> {
    if needed <= limit { Ok(()) } else { Err(Refusal::Budget { what, needed, limit }) }
}
