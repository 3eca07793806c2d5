//! Adoption: after a restart a client takes over the memory that has no owner, or it is closed.

use std::collections::BTreeMap;

use passgate_bindings::units::{Address, Offset};
use passgate_bindings::{Gpa, PageRange};

use super::Gate;
use super::effect::{Answer, Effect, Effects, FilePages};
use super::event::Caller;
use super::ids::{ClientId, FileId, InvalidationId, ORPHANS};
use super::ledger::ExcludedBy;
use super::ledger::exclusions::gaps;
use super::memory::Region;
use super::verdict::{Cause, Reason, Refusal};

/// A conversion that was open when its daemon ended: only its owner knows what the pages are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unended {
    /// The invalidation, for a `Release`.
    pub invalidation: InvalidationId,
    /// The guest-physical addresses of the pages.
    pub range: PageRange<Gpa>,
}

/// Pages in quarantine, by the conversion without an end that left them there.
type Unknown = BTreeMap<InvalidationId, Vec<(FileId, PageRange<Offset>)>>;

/// The guest-physical addresses at which a client's memory shows the pages of one file.
#[derive(Debug, Default)]
struct Shown {
    /// Each region's pages and the guest-physical address of the first of them, in order.
    regions: Vec<(PageRange<Offset>, Gpa)>,
    /// The length in bytes of the largest region: one that begins that far before a page does not show it.
    longest: u64,
}

impl Shown {
    fn sort(&mut self) {
        self.regions.sort_unstable();
        self.longest = self.regions.iter().map(|(range, _)| range.len()).max().unwrap_or(0);
    }

    /// Returns the regions that show a page of `range`, in order.
    fn over(&self, range: PageRange<Offset>) -> impl Iterator<Item = (PageRange<Offset>, Gpa)> + '_ {
        let from = range.start().raw().saturating_sub(self.longest);
        let first = self.regions.partition_point(|(shown, _)| shown.start().raw() < from);
        let regions = self.regions.get(first..).unwrap_or_default().iter().copied();
        regions.take_while(move |(shown, _)| shown.start() < range.end()).filter(move |(shown, _)| {
            #[cfg(test)]
            tests::COMPARED.set(tests::COMPARED.get() + 1);
            shown.overlaps(range)
        })
    }

    /// Returns every address at which it shows a part of `range`.
    fn at(&self, range: PageRange<Offset>) -> impl Iterator<Item = PageRange<Gpa>> + '_ {
        let part = move |(shown, gpa): (PageRange<Offset>, Gpa)| {
            Some(shown.intersection(range)?.rebase(shown.start(), gpa))
        };
        self.over(range).filter_map(part)
    }
}

/// True if every one of these pages is shown.
fn show_all(shown: &BTreeMap<FileId, Shown>, pages: &[(FileId, PageRange<Offset>)]) -> bool {
    pages.iter().all(|(file, range)| {
        let shown = shown.get(file).into_iter().flat_map(|shown| shown.over(*range).map(|(part, _)| part));
        let hidden = gaps(*range, shown).next();
        hidden.is_none()
    })
}

impl Gate {
    /// Every orphan is this client's from now on.
    pub(super) fn adopt(&mut self, caller: Caller, effects: &mut Effects) {
        let answer = match self.check_adopt(caller.client) {
            Err(refusal) => Answer::Refused(refusal),
            Ok(()) => {
                self.memory.change_owner(ORPHANS, caller.client);
                let (unknown, shown) = (self.unknown(), self.shown_to(caller.client));
                // Of a conversion of which not all pages lie in this memory nobody here is the owner.
                self.quarantine.adopt_unended(caller.client, |id| {
                    unknown.get(&id).is_some_and(|pages| show_all(&shown, pages))
                });
                let regions = self.memory.regions();
                let regions =
                    regions.filter(|(_, region)| region.owner() == caller.client && !region.is_closing());
                let regions = regions.map(|(id, region)| self.region_status(id, region)).collect();
                Answer::Adopted { regions, unended: self.unended_of(caller.client, &unknown, &shown) }
            }
        };
        effects.push(Effect::Answer { caller, answer });
    }

    fn check_adopt(&self, client: ClientId) -> Result<(), Refusal> {
        if self.clients.is_leaving(client) {
            return Err(Refusal::Closing);
        }
        let left = |region: &Region| region.owner() == ORPHANS && !region.is_closing();
        if self.memory.regions().any(|(_, region)| left(region)) { Ok(()) } else { Err(Refusal::NoOrphans) }
    }

    /// True while memory is left to adopt.
    pub fn has_orphans(&self) -> bool {
        self.check_adopt(ORPHANS).is_ok()
    }

    /// Returns the pages that conversions without an end left in quarantine, by these.
    pub(super) fn unknown(&self) -> Unknown {
        let mut unknown = Unknown::new();
        for (file, excluded) in self.memory.exclusions() {
            for (range, by) in excluded.iter() {
                if let ExcludedBy::Quarantine(since, reason) = by
                    && reason.cause == Cause::ClientGone
                {
                    unknown.entry(since).or_default().push((file, range));
                }
            }
        }
        unknown
    }

    /// Returns the pages that this client's memory shows, by their file.
    fn shown_to(&self, client: ClientId) -> BTreeMap<FileId, Shown> {
        let mut shown: BTreeMap<FileId, Shown> = BTreeMap::new();
        let own = |region: &Region| region.owner() == client && !region.is_closing();
        for (_, region) in self.memory.regions().filter(|(_, region)| own(region)) {
            let FilePages { file, range, gpa } = region.file_pages();
            shown.entry(file).or_default().regions.push((range, gpa));
        }
        shown.values_mut().for_each(Shown::sort);
        shown
    }

    /// Returns the conversions that this client may settle, at every address where its memory shows them.
    fn unended_of(
        &self,
        client: ClientId,
        unknown: &Unknown,
        shown: &BTreeMap<FileId, Shown>,
    ) -> Vec<Unended> {
        let mut unended = Vec::new();
        let own = self.quarantine.unended().filter(|(_, owner)| *owner == client);
        for (invalidation, _) in own {
            for (file, range) in unknown.get(&invalidation).into_iter().flatten() {
                let at = shown.get(file).into_iter().flat_map(|shown| shown.at(*range));
                unended.extend(at.map(|range| Unended { invalidation, range }));
            }
        }
        unended
    }

    /// Returns the conversions that were open when an earlier daemon ended and are not settled.
    pub fn unended(&self) -> impl ExactSizeIterator<Item = InvalidationId> + '_ {
        self.quarantine.unended().map(|(id, _)| id)
    }

    /// True for a conversion that was open when an earlier daemon ended and is not settled.
    pub fn is_unended(&self, id: InvalidationId) -> bool {
        self.quarantine.is_unended(id)
    }

    /// True where this client, which speaks for a VM, may say all the same what pages are that this invalidation left
    /// in quarantine: it was open when an earlier daemon ended, all of its pages lay in the memory that this client has
    /// adopted, and they still do.
    pub fn may_settle(&self, client: ClientId, invalidation: InvalidationId) -> bool {
        let gone = |(_, reason): &(PageRange<Offset>, Reason)| reason.cause == Cause::ClientGone;
        let pages = self.memory.exclusions().flat_map(|(file, excluded)| {
            excluded.since(invalidation).filter(gone).map(move |(range, _)| (file, range))
        });
        let pages: Vec<_> = pages.collect();
        self.quarantine.is_unended_of(invalidation, client)
            && !pages.is_empty()
            && show_all(&self.shown_to(client), &pages)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::cell::Cell;

    use passgate_bindings::PAGE;
    use passgate_bindings::words;

    use super::super::*;
    use super::*;

    thread_local! {
        /// The number of times that quarantined pages were compared with a region or another conversion.
        pub(super) static COMPARED: Cell<u64> = const { Cell::new(0) };
    }

    /// A client adopts `count` conversions that were open, in eight regions of a file. Returns the comparisons it takes.
    fn compared(count: u64) -> u64 {
        let (mut gate, mut effects) = (Gate::new(Policy::default(), words::private), Effects::new());
        let caps = DomainCaps::new(1000, 1 << 30);
        gate.handle(Event::DomainAdded { domain: DomainId(0), caps }, &mut effects);
        let file = FileId { device: 1, inode: 1 };
        let pages = count / 4;
        let region = |nth: u64| {
            let backing = Backing { file, offset: Offset(nth * pages * PAGE) };
            let (gpa, initial) =
                (PageRange::new(2 * nth * pages * PAGE, pages * PAGE).unwrap(), PageState::Shared);
            let spec = RegionSpec { gpa, backing, writable: true, piece: PAGE, page: PAGE, initial };
            RegionRecord { region: RegionId(nth as u32 + 1), spec, piece: PAGE, closing: false }
        };
        let open = |nth: u64| {
            let range = PageRange::new(2 * nth * PAGE, PAGE).unwrap();
            (file, range, ExcludedBy::Open(InvalidationId(nth + 1)))
        };
        let past = RecordedState {
            regions: (0..8).map(region).collect(),
            exclusions: (0..count).map(open).collect(),
            last_region: 8,
            last_invalidation: count,
            ..RecordedState::default()
        };
        gate.resume(past, &mut effects);
        effects.clear();
        let before = COMPARED.get();
        let caller = Caller { client: ClientId(1), door: Door::Control, cookie: 1 };
        gate.handle(Event::Adopt { caller }, &mut effects);
        let unended = effects.iter().find_map(|effect| match effect {
            Effect::Answer { answer: Answer::Adopted { unended, .. }, .. } => Some(unended.len()),
            _ => None,
        });
        assert_eq!(unended, Some(count as usize));
        COMPARED.get() - before
    }

    #[test]
    fn adoption_takes_steps_in_proportion_to_the_open_conversions() {
        let [few, many] = [64, 512].map(compared);
        assert!(many < 16 * few, "{few} comparisons for 64 conversions, {many} for 512");
    }
}
