//! The oracle: the true state of the world, independent of the gate: the owner of each region, the state of each page, and
//! the pages that no device may reach.
//!
//! It is derived only from what owners do and from the answers they get, never from the gate's state.

use std::fmt;

use passgate::gate::{
    Caller, Cause, ClientId, FileId, InvalidationId, PageState, Performer, Reason, RegionId, RegionSpec,
};
use passgate_bindings::units::Offset;
use passgate_bindings::{Gpa, Iova, PAGE, PageRange};
use passgate_sim::iommu::FileKey;
use rangemap::RangeSet;

use crate::action::FILE_PAGES;

/// A broken promise of SPECIFICATION.md.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BrokenPromise {
    /// Its number.
    pub promise: u8,
    /// A description of the breach.
    pub how: String,
}

impl fmt::Display for BrokenPromise {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "promise {} is broken: {}", self.promise, self.how)
    }
}

pub type CheckResult<T = ()> = Result<T, BrokenPromise>;

/// Returns from the function with `Err` of a broken promise.
macro_rules! broken {
    ($promise:expr, $($how:tt)*) => {
        return Err($crate::oracle::BrokenPromise { promise: $promise, how: format!($($how)*) })
    };
}
pub(crate) use broken;

#[derive(Debug, Clone, Copy)]
struct Page {
    state: PageState,
    /// The number of regions that show it.
    shown: u8,
    /// True while its owner may change it.
    granted: bool,
}

/// One file.
#[derive(Debug)]
pub struct File {
    pub id: FileId,
    pub key: FileKey,
    pages: Vec<Page>,
    /// A bit for each page, set while no device may reach it.
    forbidden: Vec<u64>,
    /// The ranges in quarantine: by the gate's notices, and from an earlier daemon.
    pub quarantine: Vec<QuarantinedRange>,
    /// The ranges that an operator has released from quarantine, although mappings there may still be in doubt.
    pub operator_released: RangeSet<u64>,
    /// True from the file's first region, or quarantine, until the gate forgets the file.
    pub in_use: bool,
}

/// A range in quarantine.
#[derive(Debug, Clone, Copy)]
pub struct QuarantinedRange {
    pub range: PageRange<Offset>,
    pub reason: Reason,
    pub since: InvalidationId,
    /// True if no proof about mappings lifts it.
    pub lasts: bool,
}

/// The state of a region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    Adding,
    Live,
    Closing,
}

#[derive(Debug, Clone)]
pub struct Region {
    pub id: RegionId,
    pub owner: ClientId,
    pub spec: RegionSpec,
    pub stage: Stage,
    /// Set once a map of it has failed while it was being added: it is closed without its owner's request.
    pub map_failed: bool,
}

impl Region {
    pub fn iova(&self) -> PageRange<Iova> {
        self.spec.gpa.rebase(Gpa(0), Iova(0))
    }

    pub fn pages(&self) -> PageRange<Offset> {
        self.spec.gpa.rebase(self.spec.gpa.start(), self.spec.backing.offset)
    }

    /// Returns the IOVA range at which devices see these pages of its file.
    pub fn iova_of(&self, range: PageRange<Offset>) -> Option<PageRange<Iova>> {
        let shared = self.pages().intersection(range)?;
        Some(shared.rebase(self.pages().start(), self.iova().start()))
    }
}

/// The phase of an invalidation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    Pending,
    Granted,
    Converting,
}

/// An invalidation of a client that is not over.
#[derive(Debug, Clone)]
pub struct Open {
    pub id: InvalidationId,
    pub caller: Caller,
    pub pages: Vec<(FileId, PageRange<Offset>)>,
    pub to: PageState,
    pub performer: Performer,
    pub phase: Phase,
    /// Set once the owner has changed its pages.
    pub changed: bool,
    /// Set once its last timer has expired.
    pub out_of_time: bool,
}

#[derive(Debug, Default)]
pub struct Oracle {
    pub files: Vec<File>,
    pub regions: Vec<Region>,
    pub open: Vec<Open>,
    /// Set when a page became forbidden, or a translation reachable, since the last check of what devices reach.
    pub dirty: bool,
}

impl File {
    pub fn new(id: FileId, key: FileKey) -> Self {
        let page = Page { state: PageState::Unknown, shown: 0, granted: false };
        Self {
            id,
            key,
            pages: vec![page; FILE_PAGES as usize],
            forbidden: vec![u64::MAX; FILE_PAGES.div_ceil(64) as usize],
            quarantine: Vec::new(),
            operator_released: RangeSet::new(),
            in_use: false,
        }
    }

    fn indexes(range: PageRange<Offset>) -> std::ops::Range<usize> {
        let clip = |at: Offset| (at.0 / PAGE).min(FILE_PAGES) as usize;
        clip(range.start())..clip(range.end())
    }

    fn change(&mut self, range: PageRange<Offset>, mut change: impl FnMut(&mut Page)) {
        for index in Self::indexes(range) {
            let page = &mut self.pages[index];
            change(page);
            let open = page.shown > 0 && !page.granted && page.state == PageState::Shared;
            let bit = 1 << (index % 64);
            let word = &mut self.forbidden[index / 64];
            *word = if open { *word & !bit } else { *word | bit };
        }
    }

    /// Returns the first page of `range` that no device may reach.
    pub fn first_forbidden(&self, range: PageRange<Offset>) -> Option<u64> {
        let Range { start, end } = Self::indexes(range);
        let mut at = start;
        while at < end {
            let word = self.forbidden[at / 64] >> (at % 64);
            let found = at + word.trailing_zeros() as usize;
            if word != 0 && found < end {
                return Some(found as u64);
            }
            at = (at / 64 + 1) * 64;
        }
        None
    }

    pub fn is_quarantined(&self, range: PageRange<Offset>) -> bool {
        self.quarantine.iter().any(|quarantined| quarantined.range.overlaps(range))
    }

    /// Returns the cause for which the page is in quarantine; none if it is not.
    pub fn cause(&self, page: PageRange<Offset>) -> Option<Cause> {
        self.quarantine
            .iter()
            .find(|quarantined| quarantined.range.overlaps(page))
            .map(|quarantined| quarantined.reason.cause)
    }

    /// True if all of `range` is in quarantine.
    pub fn is_fully_quarantined(&self, range: PageRange<Offset>) -> bool {
        let within =
            |quarantined: &QuarantinedRange| quarantined.range.intersection(range).map_or(0, PageRange::len);
        self.quarantine.iter().map(within).sum::<u64>() == range.len()
    }

    /// Returns the bytes of a region of this file by page state; none if the region reaches beyond the file.
    pub fn bytes(&self, regions: &[Region], id: RegionId) -> Option<[u64; 4]> {
        let range = regions.iter().find(|region| region.id == id)?.pages();
        let mut bytes = [0; 4];
        for page in self.pages.get((range.start().0 / PAGE) as usize..(range.end().0 / PAGE) as usize)? {
            bytes[page.state as usize] += PAGE;
        }
        Some(bytes)
    }

    /// Returns the state of a page as text, for messages.
    pub fn describe(&self, page: u64) -> String {
        format!("{:?}", self.pages[page as usize])
    }

    /// Returns the parts of `range` that are not in quarantine.
    pub fn free_of_quarantine(&self, range: PageRange<Offset>) -> Vec<PageRange<Offset>> {
        let free = without(range, self.quarantine.iter().map(|quarantined| quarantined.range));
        free.iter().filter_map(|part| PageRange::between(Offset(part.start), Offset(part.end))).collect()
    }

    /// True if every page of `range` is in quarantine or has been released by an operator.
    pub fn is_quarantined_or_released(&self, range: PageRange<Offset>) -> bool {
        let remaining = without(range, self.quarantine.iter().map(|quarantined| quarantined.range));
        remaining.iter().all(|part| self.operator_released.gaps(part).next().is_none())
    }

    /// True if devices should be able to reach the page.
    pub fn is_wanted(&self, page: u64) -> bool {
        self.first_forbidden(page_range(page)).is_none() && !self.is_quarantined(page_range(page))
    }
}

use std::ops::Range;

/// Returns what of `range` is in none of `parts`.
fn without(range: PageRange<Offset>, parts: impl Iterator<Item = PageRange<Offset>>) -> RangeSet<u64> {
    let mut remaining = RangeSet::new();
    remaining.insert(range.start().0..range.end().0);
    parts.for_each(|part| remaining.remove(part.start().0..part.end().0));
    remaining
}

/// Returns the range of one page of a file.
pub fn page_range(page: u64) -> PageRange<Offset> {
    PageRange::new(page * PAGE, PAGE).expect("a page of a small file")
}

impl Oracle {
    pub fn file(&mut self, id: FileId) -> Option<&mut File> {
        self.files.iter_mut().find(|file| file.id == id)
    }

    pub fn region(&mut self, id: RegionId) -> Option<&mut Region> {
        self.regions.iter_mut().find(|region| region.id == id)
    }

    pub fn open(&mut self, id: InvalidationId) -> Option<&mut Open> {
        self.open.iter_mut().find(|open| open.id == id)
    }

    /// Adds a region: pages that no other region of the file shows take the state that its owner states.
    pub fn add(&mut self, region: Region) {
        let (backing, range) = (region.spec.backing, region.pages());
        self.dirty = true;
        self.regions.push(region.clone());
        let Some(file) = self.file(backing.file) else { return };
        file.in_use = true;
        file.change(range, |page| {
            if page.shown == 0 {
                page.state = region.spec.initial;
            }
            page.shown += 1;
        });
        // A quarantine that no proof lifts outlasts its owner: the pages stay unknown whatever the next owner states.
        let unknown: Vec<_> = file.quarantine.iter().filter(|q| q.lasts).map(|q| q.range).collect();
        for quarantined in unknown {
            file.change(quarantined, |page| page.state = PageState::Unknown);
        }
    }

    /// Removes a region: from now on its owner may do anything with the memory.
    pub fn remove(&mut self, id: RegionId) {
        let Some(index) = self.regions.iter().position(|region| region.id == id) else { return };
        let region = self.regions.swap_remove(index);
        self.dirty = true;
        if let Some(file) = self.file(region.spec.backing.file) {
            file.change(region.pages(), |page| page.shown -= 1);
        }
    }

    /// Sets whether the owner may change these pages.
    pub fn grant(&mut self, pages: &[(FileId, PageRange<Offset>)], granted: bool) {
        self.dirty = true;
        for (id, range) in pages {
            if let Some(file) = self.file(*id) {
                file.change(*range, |page| page.granted = granted);
            }
        }
    }

    /// Sets the state of these pages.
    pub fn set_state(&mut self, pages: &[(FileId, PageRange<Offset>)], state: PageState) {
        self.dirty = true;
        for (id, range) in pages {
            if let Some(file) = self.file(*id) {
                file.change(*range, |page| page.state = state);
            }
        }
    }

    /// Returns every IOVA range at which these pages are shown, with its region.
    pub fn aliases(
        &self,
        file: FileId,
        range: PageRange<Offset>,
    ) -> impl Iterator<Item = (&Region, PageRange<Iova>)> {
        let of_file = self.regions.iter().filter(move |region| region.spec.backing.file == file);
        of_file.filter_map(move |region| Some((region, region.iova_of(range)?)))
    }

    /// Returns the pages of files that a guest-physical range shows.
    ///
    /// # Errors
    ///
    /// The first address that no region covers.
    pub fn resolve(&self, range: PageRange<Gpa>) -> Result<Vec<(FileId, PageRange<Offset>)>, Gpa> {
        let mut pages = Vec::new();
        let mut at = range.start();
        while at < range.end() {
            let region = self.regions.iter().find(|region| region.spec.gpa.contains(at)).ok_or(at)?;
            let stop = region.spec.gpa.end().min(range.end());
            let part = PageRange::between(at, stop).ok_or(at)?;
            pages.push((
                region.spec.backing.file,
                part.rebase(region.spec.gpa.start(), region.spec.backing.offset),
            ));
            at = stop;
        }
        Ok(pages)
    }

    /// Returns the open invalidations over these pages.
    pub fn open_over(&self, file: FileId, range: PageRange<Offset>) -> impl Iterator<Item = &Open> {
        self.open.iter().filter(move |open| open.pages.iter().any(|(f, r)| *f == file && r.overlaps(range)))
    }
}
