//! Large mappings that lost pages, and how they become large again.
//!
//! Where pages leave a mapping, its place on the grid is *frayed*: it takes more kernel mappings than it need. Once it has
//! been quiet for a while and all of it is shared again, it is unmapped as a whole and mapped as one. That is a window, so
//! it is done only where windows are allowed ([`Hitless`]), and never while anything is under way.
//! A place that keeps being split is mapped page by page meanwhile, so that it need not be split again.

use std::collections::BTreeMap;

use passgate_bindings::units::Address;
use passgate_bindings::{Gpa, Iova, PAGE, PageRange};

use super::Gate;
use super::effect::Effects;
use super::event::{Caller, ClientId, DomainId, Door};
use super::hitless::Hitless;
use super::invalidation::After;
use super::ledger::PageState;
use super::ledger::mapped::objects;

/// Moments ([`super::Event::Quiet`]) without a change after which a place is quiet: more than one, for the first is cut short.
const QUIET: u32 = 2;
/// Splits of one place, without a quiet moment, from which on it is mapped page by page.
const HOT: u32 = 4;
/// Places that are mapped anew in one moment.
const AT_ONCE: usize = 16;
/// Places that are remembered; of what frays beyond them nothing is merged.
const MOST: usize = 65_536;
/// The longest place that is mapped page by page.
const CHURN: u64 = 2 << 20;

/// What frayed in one domain, by where on the grid of its region's mappings.
#[derive(Debug, Default)]
pub(super) struct Frayed {
    places: BTreeMap<Iova, Place>,
    now: u32,
}

#[derive(Debug)]
struct Place {
    touched: u32,
    splits: u32,
}

impl Frayed {
    pub(super) fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// Something changed in the place at `start`.
    fn touch(&mut self, start: Iova, split: bool) {
        if self.places.len() >= MOST && !self.places.contains_key(&start) {
            return;
        }
        let place = self.places.entry(start).or_insert(Place { touched: 0, splits: 0 });
        place.touched = self.now;
        place.splits = place.splits.saturating_add(u32::from(split));
    }

    fn is_hot(&self, start: Iova) -> bool {
        self.places.get(&start).is_some_and(|place| place.splits >= HOT)
    }

    /// The first place in `range` that keeps being split, behind its start.
    pub(super) fn first_hot(&self, range: PageRange<Iova>) -> Option<Iova> {
        let mut within = self.places.range(range.start()..range.end());
        within.find(|(_, place)| place.splits >= HOT).map(|(at, _)| *at)
    }

    /// Time passes; the places that have been quiet, as many as may be done at once.
    fn quiet(&mut self) -> Vec<Iova> {
        self.now = self.now.wrapping_add(1);
        let now = self.now;
        let quiet = |place: &Place| now.wrapping_sub(place.touched) >= QUIET;
        let ripe: Vec<_> =
            self.places.iter().filter(|(_, p)| quiet(p)).map(|(at, _)| *at).take(AT_ONCE).collect();
        ripe.iter().for_each(|at| _ = self.places.remove(at));
        ripe
    }
}

/// The place of a grid of `piece` bytes at which `at` lies.
fn place(at: Iova, piece: u64) -> Iova {
    Iova(at.raw() / piece * piece)
}

impl Gate {
    /// Whether something waits for a quiet moment ([`super::Event::Quiet`]).
    pub fn is_frayed(&self) -> bool {
        self.domains.iter().any(|domain| !domain.frayed.is_empty())
    }

    /// Pages of `range` come or go: takes down where its ends lie inside a place on the grid.
    pub(super) fn fray(&mut self, domain: DomainId, range: PageRange<Iova>) {
        let Some((index, piece)) = self.grid(domain, range.start()) else { return };
        if piece == PAGE || !self.merges(domain) {
            return;
        }
        let entry = &mut self.domains[index];
        let split = !entry.able.cut;
        let last = Iova(range.end().raw() - PAGE);
        for (edge, end) in [(range.start(), range.start()), (last, range.end())] {
            if !end.raw().is_multiple_of(piece) {
                entry.frayed.touch(place(edge, piece), split);
            }
        }
    }

    /// Whether what frayed in a domain is merged. Where pages are cut it costs a window to gain little (IOMMU pages are small
    /// either way, and mappings not counted), so only where windows are no matter.
    fn merges(&self, domain: DomainId) -> bool {
        let cuts = self.domain(domain).is_some_and(|entry| entry.able.cut);
        self.windows(domain) && (!cuts || self.policy.hitless == Hitless::Off)
    }

    /// The domain's index, and the bytes per kernel mapping at `at`, while a region is there.
    fn grid(&self, domain: DomainId, at: Iova) -> Option<(usize, u64)> {
        let index = self.domains.iter().position(|entry| entry.id == domain)?;
        Some((index, *self.region_at(Gpa(at.raw()))?.pieces.get(index)?))
    }

    /// Whether the place at `at` is mapped page by page for now, and where it ends.
    pub(super) fn churns(&self, domain: DomainId, at: Iova, piece: u64) -> Option<Iova> {
        let entry = self.domain(domain)?;
        let start = place(at, piece);
        let room = entry.able.max_mappings.saturating_sub(entry.mapped.objects() + entry.reserved);
        let fits = piece <= CHURN && piece / PAGE <= room;
        (fits && entry.frayed.is_hot(start)).then_some(Iova(start.raw() + piece))
    }

    /// A moment has passed: what has been quiet in it is mapped in large pieces again.
    pub(super) fn quiet(&mut self, effects: &mut Effects) {
        for index in 0..self.domains.len() {
            let domain = self.domains[index].id;
            let ready = self.clearing.is_empty()
                && self.domains[index].mapped.unsettled() + self.domains[index].mapped.filling() == 0
                && !self.busy(domain);
            if !ready {
                continue;
            }
            let may = self.merges(domain) && self.keeps_copies(domain).is_none();
            let ripe = self.domains[index].frayed.quiet();
            for start in ripe.into_iter().filter(|_| may) {
                self.merge(domain, start, effects);
            }
        }
    }

    /// Maps the place at `start` as one, where all of it is shared and mapped in parts.
    fn merge(&mut self, domain: DomainId, start: Iova, effects: &mut Effects) {
        let Some((index, piece)) = self.grid(domain, start).or_else(|| self.behind(domain, start)) else {
            return;
        };
        let Some(whole) = PageRange::between(start, Iova(start.raw() + piece)) else { return };
        let region = self.region_at(Gpa(start.raw())).or_else(|| self.region_from(start));
        let Some(region) = region.filter(|region| !region.closing) else { return };
        let Some(range) = region.iova().intersection(whole) else { return };
        let pages = region.pages_at(range);
        let shared = self.files.get(&pages.file).is_some_and(|file| {
            file.holds.is_clear(pages.range)
                && file.pages.runs(pages.range).all(|(_, state)| state == PageState::Shared)
        });
        let mapped = &self.domains[index].mapped;
        let in_parts = mapped.live(range).eq([range]) && mapped.starts(range) > objects(range, piece);
        if !shared || !in_parts {
            return;
        }
        let caller = Caller { client: ClientId(0), door: Door::Control, cookie: 0 };
        let gpa = range.rebase(Iova(0), Gpa(0));
        let deadline = self.policy.close_deadline_ns;
        let id =
            self.start(caller, gpa.into(), PageState::Shared, After::Merged(domain), vec![range], deadline);
        self.clear(id, effects);
    }

    /// As [`Gate::grid`], where the place begins before its region does.
    fn behind(&self, domain: DomainId, start: Iova) -> Option<(usize, u64)> {
        self.grid(domain, self.region_from(start)?.iova().start())
    }

    /// The first region that begins at or behind `at`.
    fn region_from(&self, at: Iova) -> Option<&super::region::Region> {
        let (_, id) = self.layout.range(Gpa(at.raw())..).next()?;
        self.regions.get(id)
    }
}
