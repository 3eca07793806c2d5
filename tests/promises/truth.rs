//! What is true in the world, whatever the gate believes: who owns which memory, what its pages are, and which
//! of them no device may reach now.
//!
//! It hears only what owners do and what they are answered; it never looks into the gate.

use std::fmt;

use passgate::gate::{
    Caller, Cause, ClientId, FileId, InvalidationId, PageState, Performer, Reason, RegionId, RegionSpec,
};
use passgate_backends::iommu::sim::FileKey;
use passgate_bindings::units::Offset;
use passgate_bindings::{Gpa, Iova, PAGE, PageRange};
use rangemap::RangeSet;

use crate::action::FILE_PAGES;

/// A promise of SPECIFICATION.md that was broken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Broken {
    /// Its number.
    pub promise: u8,
    /// How.
    pub how: String,
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "promise {} is broken: {}", self.promise, self.how)
    }
}

pub type Kept<T = ()> = Result<T, Broken>;

/// `Err` of a broken promise.
macro_rules! broken {
    ($promise:expr, $($how:tt)*) => {
        return Err($crate::truth::Broken { promise: $promise, how: format!($($how)*) })
    };
}
pub(crate) use broken;

#[derive(Debug, Clone, Copy)]
struct Page {
    state: PageState,
    /// Regions that show it.
    shown: u8,
    /// Whether an owner may be changing it now.
    granted: bool,
}

/// One file.
#[derive(Debug)]
pub struct File {
    pub id: FileId,
    pub key: FileKey,
    pages: Vec<Page>,
    /// A bit for each page that no device may reach.
    forbidden: Vec<u64>,
    /// Ranges that the gate has put into quarantine, or was told of at its start.
    pub quarantine: Vec<Held>,
    /// Ranges that a person took out of it, whatever is still in doubt there.
    pub vouched: RangeSet<u64>,
    /// Whether the gate has the file (a region of it was added, and it was not let go).
    pub held: bool,
}

/// A range in quarantine.
#[derive(Debug, Clone, Copy)]
pub struct Held {
    pub range: PageRange<Offset>,
    pub reason: Reason,
    pub since: InvalidationId,
    /// Whether no proof about mappings lifts it.
    pub lasts: bool,
}

/// How a region fares.
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
    /// Whether a map of it failed while it was being added: it goes without its owner's death.
    pub doomed: bool,
}

impl Region {
    pub fn iova(&self) -> PageRange<Iova> {
        self.spec.gpa.rebase(Gpa(0), Iova(0))
    }

    pub fn pages(&self) -> PageRange<Offset> {
        self.spec.gpa.rebase(self.spec.gpa.start(), self.spec.backing.offset)
    }

    /// Where devices see these pages of its file.
    pub fn iova_of(&self, range: PageRange<Offset>) -> Option<PageRange<Iova>> {
        let shared = self.pages().intersection(range)?;
        Some(shared.rebase(self.pages().start(), self.iova().start()))
    }
}

/// How an invalidation fares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    Asked,
    Granted,
    Converting,
}

/// A begin that is not over.
#[derive(Debug, Clone)]
pub struct Open {
    pub id: InvalidationId,
    pub caller: Caller,
    pub pages: Vec<(FileId, PageRange<Offset>)>,
    pub to: PageState,
    pub performer: Performer,
    pub phase: Phase,
    /// Whether the owner has changed something.
    pub touched: bool,
    /// The last timer was told to be over.
    pub out_of_time: bool,
}

#[derive(Debug, Default)]
pub struct Truth {
    pub files: Vec<File>,
    pub regions: Vec<Region>,
    pub open: Vec<Open>,
    /// Something became forbidden, or reachable, since the last look.
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
            vouched: RangeSet::new(),
            held: false,
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

    /// The first page of `range` that no device may reach.
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

    pub fn quarantined(&self, range: PageRange<Offset>) -> bool {
        self.quarantine.iter().any(|held| held.range.overlaps(range))
    }

    /// Why the page is in quarantine, if it is.
    pub fn cause(&self, page: PageRange<Offset>) -> Option<Cause> {
        self.quarantine.iter().find(|held| held.range.overlaps(page)).map(|held| held.reason.cause)
    }

    /// Whether all of `range` is in quarantine.
    pub fn quarantined_whole(&self, range: PageRange<Offset>) -> bool {
        let within = |held: &Held| held.range.intersection(range).map_or(0, PageRange::len);
        self.quarantine.iter().map(within).sum::<u64>() == range.len()
    }

    /// Bytes of a region of this file by state; none where it reaches beyond the file.
    pub fn bytes(&self, regions: &[Region], id: RegionId) -> Option<[u64; 4]> {
        let range = regions.iter().find(|region| region.id == id)?.pages();
        let mut bytes = [0; 4];
        for page in self.pages.get((range.start().0 / PAGE) as usize..(range.end().0 / PAGE) as usize)? {
            bytes[page.state as usize] += PAGE;
        }
        Some(bytes)
    }

    /// What a page is, why it may not be reached.
    pub fn describe(&self, page: u64) -> String {
        format!("{:?}", self.pages[page as usize])
    }

    /// The parts of `range` that are in no quarantine.
    pub fn free_of_quarantine(&self, range: PageRange<Offset>) -> Vec<PageRange<Offset>> {
        let free = without(range, self.quarantine.iter().map(|held| held.range));
        free.iter().filter_map(|part| PageRange::between(Offset(part.start), Offset(part.end))).collect()
    }

    /// Whether all of `range` is in quarantine, or a person has vouched for it.
    pub fn is_told(&self, range: PageRange<Offset>) -> bool {
        let left = without(range, self.quarantine.iter().map(|held| held.range));
        left.iter().all(|part| self.vouched.gaps(part).next().is_none())
    }

    /// Whether devices ought to reach the page.
    pub fn is_wanted(&self, page: u64) -> bool {
        self.first_forbidden(page_range(page)).is_none() && !self.quarantined(page_range(page))
    }
}

use std::ops::Range;

/// What of `range` is in none of `parts`.
fn without(range: PageRange<Offset>, parts: impl Iterator<Item = PageRange<Offset>>) -> RangeSet<u64> {
    let mut left = RangeSet::new();
    left.insert(range.start().0..range.end().0);
    parts.for_each(|part| left.remove(part.start().0..part.end().0));
    left
}

/// One page of a file.
pub fn page_range(page: u64) -> PageRange<Offset> {
    PageRange::new(page * PAGE, PAGE).expect("a page of a small file")
}

impl Truth {
    pub fn file(&mut self, id: FileId) -> Option<&mut File> {
        self.files.iter_mut().find(|file| file.id == id)
    }

    pub fn region(&mut self, id: RegionId) -> Option<&mut Region> {
        self.regions.iter_mut().find(|region| region.id == id)
    }

    pub fn open(&mut self, id: InvalidationId) -> Option<&mut Open> {
        self.open.iter_mut().find(|open| open.id == id)
    }

    /// A region comes: what no other region of the file has told is now as its owner says.
    pub fn add(&mut self, region: Region) {
        let (backing, range) = (region.spec.backing, region.pages());
        self.dirty = true;
        self.regions.push(region.clone());
        let Some(file) = self.file(backing.file) else { return };
        file.held = true;
        file.change(range, |page| {
            if page.shown == 0 {
                page.state = region.spec.initial;
            }
            page.shown += 1;
        });
        // What its last owner could not say, the next cannot either.
        let unknown: Vec<_> = file.quarantine.iter().filter(|q| q.lasts).map(|q| q.range).collect();
        for held in unknown {
            file.change(held, |page| page.state = PageState::Unknown);
        }
    }

    /// A region is gone: its owner does with the memory what he likes.
    pub fn remove(&mut self, id: RegionId) {
        let Some(index) = self.regions.iter().position(|region| region.id == id) else { return };
        let region = self.regions.swap_remove(index);
        self.dirty = true;
        if let Some(file) = self.file(region.spec.backing.file) {
            file.change(region.pages(), |page| page.shown -= 1);
        }
    }

    /// The owner may change these pages from now on, or may no more.
    pub fn grant(&mut self, pages: &[(FileId, PageRange<Offset>)], granted: bool) {
        self.dirty = true;
        for (id, range) in pages {
            if let Some(file) = self.file(*id) {
                file.change(*range, |page| page.granted = granted);
            }
        }
    }

    /// The pages are something else now.
    pub fn become_state(&mut self, pages: &[(FileId, PageRange<Offset>)], state: PageState) {
        self.dirty = true;
        for (id, range) in pages {
            if let Some(file) = self.file(*id) {
                file.change(*range, |page| page.state = state);
            }
        }
    }

    /// Every place at which these pages show, with the region.
    pub fn aliases(
        &self,
        file: FileId,
        range: PageRange<Offset>,
    ) -> impl Iterator<Item = (&Region, PageRange<Iova>)> {
        let of_file = self.regions.iter().filter(move |region| region.spec.backing.file == file);
        of_file.filter_map(move |region| Some((region, region.iova_of(range)?)))
    }

    /// The pages of files that a guest-physical range shows, or the first address that shows none.
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

    /// The open invalidations over these pages.
    pub fn open_over(&self, file: FileId, range: PageRange<Offset>) -> impl Iterator<Item = &Open> {
        self.open.iter().filter(move |open| open.pages.iter().any(|(f, r)| *f == file && r.overlaps(range)))
    }
}
