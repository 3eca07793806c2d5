//! A gate that goes on where another process's ended, from what that one wrote down before each of its effects.
//!
//! What was mapped is mapped; what was under way is in doubt, and is settled by an unmap of its own: where the kernel
//! says that it succeeded, nothing is left there, whatever was. Conversions that were open end as their client's
//! going does: nobody here knows what the pages are.
//!
//! A quarantine that nothing in the ledger bears out any more was disproved when the earlier gate ended, and is lifted.
//!
//! Of what was mapped, no page stays so that is held or not shared. The earlier gate may have held a page and left it
//! mapped while it waited for a device to pause or to be detached; this one takes it out by an invalidation of its own,
//! with the ladder behind it.

use std::ops::Bound;

use passgate_bindings::units::{Address, LIMIT, Offset};
use passgate_bindings::{Gpa, Iova, PageRange};

use super::adopt::ORPHANS;
use super::effect::{Effect, Effects, FilePages};
use super::event::{
    Caller, ClientId, DeviceId, DomainId, Door, FileId, InvalidationId, JobId, RegionId, RegionSpec,
    UnmapResult,
};
use super::fence::{Nature, Step};
use super::invalidation::After;
use super::ledger::holds::gaps;
use super::ledger::{HeldBy, PageState, RunState, Store};
use super::ranges::Ranges;
use super::region::Region;
use super::snapshot::QuarantineStatus;
use super::verdict::{Cause, Reason};
use super::{Gate, Job};

/// Whose regions are that were on their way out already.
const LEFT: ClientId = ClientId(u32::MAX);

/// A region as it is written down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Written {
    /// Its name.
    pub region: RegionId,
    /// As it was described.
    pub spec: RegionSpec,
    /// Bytes per kernel mapping.
    pub piece: u64,
    /// Whether it is on its way out.
    pub closing: bool,
}

/// What an earlier gate knew. Its page states and mappings lie in the store ([`Gate::keep_in`]).
#[derive(Debug, Default)]
pub struct Past {
    /// Its regions; none overlaps another.
    pub regions: Vec<Written>,
    /// What was held, and by what.
    pub holds: Vec<(FileId, PageRange<Offset>, HeldBy)>,
    /// Conversions that were open at an earlier restart, and that the owner of their memory may still settle.
    pub unended: Vec<InvalidationId>,
    /// Whether the mappings are gone with the process that had them.
    pub unmapped: bool,
    /// Devices that were stopped, or about to be.
    pub stopped: Vec<DeviceId>,
    /// The highest number that a region had.
    pub last_region: u32,
    /// The highest number that an invalidation had.
    pub last_invalidation: u64,
}

impl Gate {
    /// Keeps page states and mappings in `store`, where they outlive this gate. Before its domains.
    pub fn keep_in(&mut self, store: Store) {
        self.store = Some(store);
    }

    /// Goes on from where another gate ended. On a gate with its domain and devices, without memory.
    pub fn resume(&mut self, past: Past, effects: &mut Effects) {
        self.last_region = past.last_region;
        self.last_invalidation = past.last_invalidation;
        if past.unmapped {
            // Of what was in flight this ledger proves nothing.
            self.last_of_earlier = past.last_invalidation;
        }
        for device in &past.stopped {
            self.shake(*device);
        }
        let Some(domain) = self.domains.first().map(|entry| entry.id) else { return };
        past.regions.iter().for_each(|region| self.again(region));
        for (file, range, by) in past.holds {
            self.hold_again(file, range, by, effects);
        }
        let unknown = self.unknown();
        let unsettled = past.unended.into_iter().filter(|id| unknown.contains_key(id));
        self.unended.extend(unsettled.map(|id| (id, ORPHANS)));
        self.settle_all(domain, effects);
        self.clear_forbidden(domain, effects);
        self.lift_disproved(effects);
        if past.regions.iter().any(|region| region.closing) {
            self.leaving.push(LEFT);
        }
        for Written { region, closing, .. } in past.regions {
            if closing {
                self.close(region, true, After::Gone, effects);
            } else if let Some(iova) = self.regions.get(&region).map(Region::iova) {
                self.fill(domain, region, iova, effects);
            }
        }
        self.bring_back(effects);
    }

    fn again(&mut self, written: &Written) {
        let Written { region: id, spec, piece, closing } = *written;
        let owner = if closing { LEFT } else { ORPHANS };
        let region = Region {
            owner,
            spec,
            pieces: vec![piece; self.domains.len()],
            closing,
            filling: 0,
            mapped: 0,
            adding: None,
            failed: None,
            promised: Vec::new(),
        };
        self.file(spec.backing.file).regions.push(id);
        self.layout.insert(spec.gpa.start(), id);
        self.regions.insert(id, region);
    }

    fn hold_again(&mut self, file: FileId, range: PageRange<Offset>, by: HeldBy, effects: &mut Effects) {
        match by {
            HeldBy::Quarantine(since, reason) => {
                let lasts = self.lasts(since, reason);
                let entry = self.file(file);
                entry.holds.hold(range, by);
                if lasts {
                    entry.pages.set(range, PageState::Unknown);
                }
            }
            HeldBy::Open(id) => {
                self.file(file).pages.set(range, PageState::Unknown);
                let reason = Reason { cause: Cause::ClientGone, device: None, rung: Step::Unmap, errno: 0 };
                self.quarantine(id, file, range, reason, effects);
                self.unended.insert(id, ORPHANS);
            }
        }
    }

    /// Lifts the quarantines whose cause was disproved, where the earlier gate has ended before it lifted them: nothing
    /// that comes back will. What no region shows stays, and so does everything while a mapping is left that no region is
    /// of, which may show any page.
    fn lift_disproved(&mut self, effects: &mut Effects) {
        let quarantined = self.files.values().any(|file| file.holds.quarantined());
        if !quarantined || self.stray().is_some() {
            return;
        }
        let disproved = |held: &QuarantineStatus| {
            let mut aliases = self.aliases(held.file, held.range).peekable();
            !self.lasts(held.invalidation, held.reason)
                && aliases.peek().is_some()
                && aliases.all(|alias| self.is_clear(alias))
        };
        let lifted: Vec<_> = self.quarantined_ranges().filter(disproved).collect();
        for QuarantineStatus { file, range, .. } in lifted {
            self.lift(file, range, effects);
        }
    }

    /// Begins to take out of the domain what is plainly mapped there and must not be: pages that are held, or not shared.
    fn clear_forbidden(&mut self, domain: DomainId, effects: &mut Effects) {
        let targets = self.forbidden_in(domain);
        let Some(first) = targets.first() else { return };
        let gpa = first.rebase(Iova(0), Gpa(0));
        let (caller, deadline) =
            (Caller { client: ORPHANS, door: Door::Control, cookie: 0 }, self.policy.close_deadline_ns);
        let ranges = targets.iter().map(|target| target.rebase(Iova(0), Gpa(0))).collect::<Vec<_>>();
        let ranges = Ranges::try_from(ranges).unwrap_or_else(|_| gpa.into());
        let id = self.start(caller, ranges, PageState::Unknown, After::Resumed, targets, deadline);
        self.clear(id, effects);
    }

    /// What is plainly mapped in the domain although its pages are held or not shared: ascending, apart. A region on
    /// its way out is unmapped as a whole anyway.
    fn forbidden_in(&self, domain: DomainId) -> Vec<PageRange<Iova>> {
        let (Ok(everywhere), Some(entry)) = (PageRange::<Iova>::new(0, LIMIT), self.domain(domain)) else {
            return Vec::new();
        };
        let mut found: Vec<PageRange<Iova>> = Vec::new();
        for part in entry.mapped.live(everywhere).flat_map(|live| self.files_at(live)) {
            let Some(file) = self.files.get(&part.file) else { continue };
            let held =
                file.holds.overlapping(part.range).filter_map(|(held, _)| held.intersection(part.range));
            let states = file.pages.runs(part.range).filter(|(_, state)| *state != PageState::Shared);
            let pages = held.chain(states.map(|(run, _)| run));
            found.extend(pages.map(|pages| pages.rebase(part.range.start(), Iova(part.gpa.raw()))));
        }
        if self.keeps_copies(domain).is_some() {
            // What was under way is unmapped already, which proves nothing before the device is detached.
            found.extend(entry.mapped.runs(everywhere).map(|run| run.range));
        }
        found.retain(|iova| self.region_at(Gpa(iova.start().raw())).is_none_or(|region| !region.closing));
        found.sort_unstable();
        let mut apart: Vec<PageRange<Iova>> = Vec::with_capacity(found.len());
        for next in found {
            match apart.last_mut().filter(|last| next.start() <= last.end()) {
                Some(last) => {
                    *last = PageRange::between(last.start(), last.end().max(next.end())).unwrap_or(*last);
                }
                None => apart.push(next),
            }
        }
        apart
    }

    /// Takes away what was under way, and what no region is of.
    fn settle_all(&mut self, domain: DomainId, effects: &mut Effects) {
        let Ok(everywhere) = PageRange::<Iova>::new(0, LIMIT) else { return };
        let regions: Vec<_> =
            self.layout.values().filter_map(|id| Some(self.regions.get(id)?.iova())).collect();
        let Some(mapped) = self.mapped_in(domain) else { return };
        for between in gaps(everywhere, regions.into_iter()) {
            for live in mapped.live(between).collect::<Vec<_>>() {
                mapped.take(live, RunState::Suspect { gone: None, errno: 0 });
            }
        }
        for run in mapped.runs(everywhere).collect::<Vec<_>>() {
            self.settle_left(domain, run.range, effects);
        }
    }

    /// Takes away whatever an earlier process may have left at `iova`. Nothing is mapped there until it is gone.
    fn settle_left(&mut self, domain: DomainId, iova: PageRange<Iova>, effects: &mut Effects) {
        let job = self.next_job(Job::Settle { domain, iova });
        if let Some(mapped) = self.mapped_in(domain) {
            mapped.mark(iova.start(), RunState::Removing(job));
        }
        effects.push(Effect::Unmap { job, domain, iova, bytes: None });
    }

    /// It is gone, or was before; or it is in doubt for good.
    pub(super) fn settled_left(
        &mut self,
        job: JobId,
        domain: DomainId,
        iova: PageRange<Iova>,
        result: UnmapResult,
        effects: &mut Effects,
    ) {
        self.jobs.remove(&job);
        let copies = self.keeps_copies(domain).is_some();
        let Some(mapped) = self.mapped_in(domain) else { return };
        let start = iova.start();
        match result {
            // Success says that nothing is left, however much of it there was.
            UnmapResult::Gone { bytes } if bytes <= iova.len() && copies => {
                mapped.mark(start, RunState::Cached)
            }
            UnmapResult::Gone { bytes } if bytes <= iova.len() => _ = mapped.remove(start),
            UnmapResult::Failed { errno, .. } => mapped.mark(start, RunState::Suspect { gone: None, errno }),
            _ => mapped.mark(start, RunState::Suspect { gone: None, errno: 0 }),
        }
        self.last_invalidation += 1;
        let (id, pages) = (InvalidationId(self.last_invalidation), self.files_at(iova));
        self.advance_over(iova, effects);
        self.look_again(iova, pages, id, effects);
    }

    /// What is known of a file; nothing yet, where it is new.
    pub(super) fn file(&mut self, file: FileId) -> &mut super::FileEntry {
        let store = &self.store;
        self.files.entry(file).or_insert_with(|| super::FileEntry::of(store.as_ref(), file))
    }

    /// What is plainly mapped in a domain, in order, neighbours as one.
    pub fn live(&self, domain: DomainId) -> Vec<PageRange<Iova>> {
        let Ok(everywhere) = PageRange::<Iova>::new(0, LIMIT) else { return Vec::new() };
        self.domain(domain).map(|entry| entry.mapped.live(everywhere).collect()).unwrap_or_default()
    }

    /// The regions as they are to be written down.
    pub fn written(&self) -> impl Iterator<Item = Written> + '_ {
        self.regions.iter().map(|(id, region)| Written {
            region: *id,
            spec: region.spec,
            piece: region.pieces.first().copied().unwrap_or(passgate_bindings::PAGE),
            closing: region.closing,
        })
    }

    /// The highest numbers so far: of a region, of an invalidation.
    pub fn last(&self) -> (u32, u64) {
        (self.last_region, self.last_invalidation)
    }

    /// True from an invalidation's begin until it is over.
    pub fn is_open(&self, id: InvalidationId) -> bool {
        self.invalidations.contains_key(&id)
    }

    /// Bytes of all ranges of an open conversion.
    pub fn length_of(&self, id: InvalidationId) -> Option<u64> {
        let inv = self.invalidations.get(&id).filter(|inv| inv.is_conversion())?;
        Some(inv.receipt.ranges.len())
    }

    /// The invalidations that are open and were begun after this one.
    pub fn open_since(&self, last: InvalidationId) -> impl Iterator<Item = InvalidationId> + '_ {
        self.invalidations.range((Bound::Excluded(last), Bound::Unbounded)).map(|(id, _)| *id)
    }

    /// The pages that an open conversion holds.
    pub fn held_by(&self, id: InvalidationId) -> &[FilePages] {
        self.invalidations.get(&id).filter(|inv| inv.is_conversion()).map_or(&[], |inv| &inv.pages)
    }

    /// What holds pages of this range of a file; each whole.
    pub fn holds_over(&self, file: FileId, range: PageRange<Offset>) -> Vec<(PageRange<Offset>, HeldBy)> {
        self.files.get(&file).map(|entry| entry.holds.overlapping(range).collect()).unwrap_or_default()
    }

    /// What bears on the fences of a device, as it was last read.
    pub fn nature(&self, device: DeviceId) -> Option<Nature> {
        self.devices.get(&device).map(|entry| entry.nature)
    }

    /// What bears on the fences of each device, as it was last read.
    pub fn natures(&self) -> impl Iterator<Item = (DeviceId, Nature)> + '_ {
        self.devices.iter().map(|(id, device)| (*id, device.nature))
    }

    /// The devices that do not plainly run.
    pub fn stopped(&self) -> impl Iterator<Item = DeviceId> + '_ {
        self.devices.iter().filter(|(_, device)| !device.runs()).map(|(id, _)| *id)
    }
}

#[cfg(test)]
mod tests;
