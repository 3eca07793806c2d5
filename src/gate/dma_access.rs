//! Access of a device's request to its pages: now, after what is in progress, or never.
//!
//! Asked by a back-end that delays a request because a page of it is not mapped. It changes nothing and promises nothing: by
//! the time the answer arrives the page may be unmapped again, and only the admission window
//! ([`passgate_backends::Window`]) admits a request.

use passgate_bindings::units::Address;
use passgate_bindings::{Gpa, Iova, PageRange};

use super::Gate;
use super::ledger::{ExcludedBy, PageState};
use super::memory::Region;

/// The access of a request to its pages. Of several pages the worst counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum DmaAccess {
    /// Every page is mapped.
    Open,
    /// Something that will be over is in the way: an invalidation between begin and end, a map or an unmap under way.
    Later,
    /// Some page is private, a hole, in quarantine, in no region, or may not be written to: the request is wrong.
    Never,
}

impl Gate {
    /// Returns the access of a request that touches these pages; `writes` where the device would write to them.
    pub fn admits(&self, iova: PageRange<Iova>, writes: bool) -> DmaAccess {
        let mut worst = DmaAccess::Open;
        let mut at = iova.start();
        while let Some(left) = PageRange::between(at, iova.end()) {
            let region = self.memory.region_at(Gpa(at.raw())).filter(|region| !region.is_closing());
            let Some(region) = region.filter(|region| region.spec().writable || !writes) else {
                return DmaAccess::Never;
            };
            let Some(part) = region.iova().intersection(left) else { return DmaAccess::Never };
            worst = worst.max(self.admits_in(region, part));
            if worst == DmaAccess::Never {
                return worst;
            }
            at = part.end();
        }
        worst
    }

    /// As [`Gate::admits`], for pages of one region.
    fn admits_in(&self, region: &Region, part: PageRange<Iova>) -> DmaAccess {
        let pages = region.pages_at(part);
        let Some(excluded) = self.memory.excluded(pages.file) else { return DmaAccess::Never };
        if excluded.overlapping(pages.range).any(|(_, by)| matches!(by, ExcludedBy::Quarantine(..))) {
            return DmaAccess::Never;
        }
        // A page between begin and end will be something else after it, whatever it is now.
        let clear = excluded.is_clear(pages.range);
        let mut worst = if clear { DmaAccess::Open } else { DmaAccess::Later };
        for free in excluded.gaps(pages.range) {
            if self.memory.states(pages.file, free).any(|(_, state)| state != PageState::Shared) {
                return DmaAccess::Never;
            }
            worst = worst.max(self.admits_shared(region, free.rebase(pages.range.start(), part.start())));
        }
        worst
    }

    /// As [`Gate::admits`], for shared pages that nothing excludes: mapped, or about to be.
    fn admits_shared(&self, region: &Region, part: PageRange<Iova>) -> DmaAccess {
        let missing = self
            .mappings
            .iter()
            .any(|domain| domain.mapped().live(part).map(PageRange::len).sum::<u64>() < part.len());
        if !missing {
            return DmaAccess::Open;
        }
        // After a failed map nobody tries again by itself: who waited for that might wait for ever.
        let comes = region.is_being_mapped()
            || self.invalidations.is_awaited(part)
            || self.mappings.iter().any(|domain| domain.mapped().runs(part).next().is_some());
        if comes { DmaAccess::Later } else { DmaAccess::Never }
    }
}

#[cfg(test)]
mod tests {
    use passgate_bindings::units::{Address, Offset};
    use passgate_bindings::words;
    use passgate_bindings::{Gpa, PAGE, PageRange};

    use super::super::*;
    use super::DmaAccess::{Later, Never, Open};

    const CALLER: Caller = Caller { client: ClientId(1), door: Door::Control, cookie: 1 };
    const FILE: FileId = FileId { device: 1, inode: 1 };

    fn range<A: Address>(page: u64, pages: u64) -> PageRange<A> {
        PageRange::new(page * PAGE, pages * PAGE).unwrap()
    }

    struct World {
        gate: Gate,
        effects: Effects,
    }

    impl World {
        /// Sixteen pages at 16, of which nothing is mapped yet.
        fn new(writable: bool) -> Self {
            let caps = DomainCaps::new(10_000, 1 << 30);
            let mut world = Self { gate: Gate::new(Policy::default(), words::private), effects: Vec::new() };
            world.tell(Event::DomainAdded { domain: DomainId(0), caps });
            world.add(16, 0, writable);
            world
        }

        fn tell(&mut self, event: Event) {
            self.gate.handle(event, &mut self.effects);
        }

        fn add(&mut self, page: u64, offset: u64, writable: bool) {
            self.add_pages(range(page, 16), offset, writable);
        }

        fn add_pages(&mut self, gpa: PageRange<Gpa>, offset: u64, writable: bool) {
            let backing = Backing { file: FILE, offset: Offset(offset * PAGE) };
            let (piece, initial) = (PAGE, PageState::Shared);
            let spec = RegionSpec { gpa, backing, writable, piece, page: PAGE, initial };
            self.tell(Event::AddRegion { caller: CALLER, spec });
        }

        /// The calls that were asked for have this result.
        fn return_calls(&mut self, map: MapResult, unmap: Option<i32>) {
            while let Some(at) =
                self.effects.iter().position(|e| matches!(e, Effect::Map { .. } | Effect::Unmap { .. }))
            {
                match self.effects.remove(at) {
                    Effect::Map { job, .. } => self.tell(Event::Mapped { job, result: map }),
                    Effect::Unmap { job, bytes, .. } => {
                        let result = match unmap {
                            None => UnmapResult::Gone { bytes: bytes.unwrap_or(PAGE) },
                            Some(errno) => UnmapResult::Failed { errno, bytes: 0 },
                        };
                        self.tell(Event::Unmapped { job, result, took_ns: 1 });
                    }
                    _ => unreachable!(),
                }
            }
        }

        fn all_goes_well(&mut self) {
            self.return_calls(MapResult::Mapped, None);
        }

        fn begin(&mut self, page: u64, pages: u64, to: PageState) -> InvalidationId {
            let (ranges, performer) = (range(page, pages).into(), Performer::Client);
            self.tell(Event::Begin { caller: CALLER, ranges, to, performer, deadline_ns: 1 << 40 });
            InvalidationId(self.gate.last().1)
        }

        fn end(&mut self, invalidation: InvalidationId, outcome: Outcome) {
            self.tell(Event::End { caller: CALLER, invalidation, outcome });
        }

        /// Of one page.
        fn says(&self, page: u64) -> DmaAccess {
            assert_eq!(self.gate.admits(range(page, 1), false), self.gate.admits(range(page, 1), true));
            self.gate.admits(range(page, 1), true)
        }
    }

    #[test]
    fn region_admits_requests_once_mapped_and_none_outside() {
        let mut world = World::new(true);
        assert_eq!(world.says(20), Later, "it is being mapped");
        world.all_goes_well();
        assert_eq!(world.gate.admits(range(16, 16), true), Open);
        for (page, pages) in [(15, 1), (15, 2), (32, 1), (31, 2), (0, 100)] {
            assert_eq!(world.gate.admits(range(page, pages), false), Never, "{page}+{pages}");
        }
    }

    #[test]
    fn read_only_region_admits_reads_and_never_writes() {
        let mut world = World::new(false);
        assert_eq!(world.gate.admits(range(20, 1), false), Later);
        assert_eq!(world.gate.admits(range(20, 1), true), Never);
        world.all_goes_well();
        assert_eq!(world.gate.admits(range(16, 16), false), Open);
        assert_eq!(world.gate.admits(range(20, 1), true), Never);
    }

    #[test]
    fn range_over_regions_is_admitted_like_its_worst_page() {
        let mut world = World::new(true);
        world.add(32, 16, false);
        world.all_goes_well();
        assert_eq!(world.gate.admits(range(30, 4), false), Open);
        assert_eq!(world.gate.admits(range(30, 4), true), Never);
        let id = world.begin(33, 1, PageState::Private);
        assert_eq!(world.gate.admits(range(30, 4), false), Later);
        world.all_goes_well();
        world.end(id, Outcome::Committed);
        assert_eq!(world.gate.admits(range(30, 4), false), Never);
        assert_eq!(world.gate.admits(range(30, 3), false), Open);
    }

    #[test]
    fn range_over_regions_waits_for_a_conversion_in_either() {
        for page in [31, 32] {
            let mut world = World::new(true);
            world.add(32, 16, true);
            world.all_goes_well();
            world.begin(page, 1, PageState::Private);
            assert_eq!(world.gate.admits(range(30, 4), true), Later, "{page}");
        }
    }

    #[test]
    fn request_waits_until_the_last_map_of_a_large_region() {
        let mut world = World::new(true);
        world.all_goes_well();
        world.add_pages(range(64, 2048), 64, true);
        assert!(world.gate.live(DomainId(0)).iter().all(|live| live.end() <= range(64, 1).start()));
        assert_eq!((world.says(64), world.says(64 + 2047)), (Later, Later));
        world.all_goes_well();
        assert_eq!(world.gate.admits(range(64, 2048), true), Open);
    }

    #[test]
    fn request_waits_for_a_conversion_and_then_follows_its_outcome() {
        for (to, after) in [(PageState::Private, Never), (PageState::Hole, Never), (PageState::Shared, Later)]
        {
            let mut world = World::new(true);
            world.all_goes_well();
            let id = world.begin(20, 2, to);
            assert_eq!((world.says(20), world.says(19), world.says(22)), (Later, Open, Open), "unmapping");
            world.all_goes_well();
            assert_eq!((world.says(21), world.says(19)), (Later, Open), "granted");
            world.end(id, Outcome::Committed);
            assert_eq!(world.says(20), after, "{to:?}");
            world.all_goes_well();
            assert_eq!(world.says(20), if after == Never { Never } else { Open }, "{to:?}");
            assert_eq!(world.says(19), Open);
        }
    }

    #[test]
    fn page_converted_back_to_shared_is_admitted() {
        let mut world = World::new(true);
        world.all_goes_well();
        let id = world.begin(20, 1, PageState::Private);
        world.all_goes_well();
        world.end(id, Outcome::Committed);
        let id = world.begin(20, 1, PageState::Shared);
        assert_eq!(world.says(20), Later, "it may be shared after the end");
        world.end(id, Outcome::Committed);
        world.all_goes_well();
        assert_eq!(world.says(20), Open);
    }

    #[test]
    fn not_committed_page_is_mapped_again() {
        let mut world = World::new(true);
        world.all_goes_well();
        let id = world.begin(20, 1, PageState::Private);
        world.all_goes_well();
        world.end(id, Outcome::NotCommitted);
        assert_eq!(world.says(20), Later, "its map is under way");
        world.all_goes_well();
        assert_eq!(world.says(20), Open);
    }

    #[test]
    fn quarantined_page_is_never_admitted_until_released() {
        let mut world = World::new(true);
        world.all_goes_well();
        let id = world.begin(20, 1, PageState::Private);
        world.all_goes_well();
        world.end(id, Outcome::Unknown { errno: 5, offset: 0 });
        assert_eq!(world.says(20), Never);
        // An unmap that fails, of a device that nothing stops.
        world.begin(24, 1, PageState::Private);
        world.return_calls(MapResult::Mapped, Some(5));
        assert_eq!((world.says(24), world.says(25)), (Never, Open));
        world.tell(Event::Release { caller: CALLER, invalidation: id, to: PageState::Shared });
        assert_eq!(world.says(20), Later);
        world.all_goes_well();
        assert_eq!(world.says(20), Open);
    }

    #[test]
    fn range_with_a_quarantined_page_is_never_admitted() {
        for (lost, open) in [(20, 22), (22, 20)] {
            let mut world = World::new(true);
            world.all_goes_well();
            let id = world.begin(lost, 1, PageState::Private);
            world.all_goes_well();
            world.end(id, Outcome::Unknown { errno: 5, offset: 0 });
            world.begin(open, 1, PageState::Private);
            assert_eq!((world.says(lost), world.says(open)), (Never, Later));
            assert_eq!(world.gate.admits(range(20, 4), true), Never, "{lost}, {open}");
        }
    }

    #[test]
    fn request_does_not_wait_for_a_failed_map() {
        for (result, after) in [
            (MapResult::Refused { errno: 12 }, Never),
            (MapResult::Unknown { errno: 12 }, Never),
            (MapResult::Mapped, Open),
        ] {
            let mut world = World::new(true);
            world.all_goes_well();
            let id = world.begin(20, 1, PageState::Private);
            world.all_goes_well();
            world.end(id, Outcome::NotCommitted);
            assert_eq!(world.says(20), Later);
            world.return_calls(result, None);
            assert_eq!(world.says(20), after, "{result:?}");
        }
    }

    #[test]
    fn request_to_a_closing_region_is_never_admitted() {
        let mut world = World::new(true);
        world.all_goes_well();
        world.tell(Event::RemoveRegion { caller: CALLER, region: RegionId(1) });
        assert_eq!(world.says(20), Never, "its unmap is under way");
        world.all_goes_well();
        assert_eq!(world.says(20), Never);
    }
}
