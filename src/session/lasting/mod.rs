//! What of a session outlives its process: written into the store's memory before an effect leaves, and after each
//! result, so that at any instruction it says what is so, or that it is in doubt.
//!
//! Page states lie in the store themselves (the gate's own trees). Beside them are written down: every kernel mapping
//! with its borders, and what is under way; regions; holds; stopped devices; the ids that the kernel cannot list. What
//! a change touches is read off the gate again, so that there is no second bookkeeping to go wrong.
//!
//! The order within a change: what comes is written before what it takes the place of is gone. Whoever reads both takes
//! the worse.

mod line;
mod load;
mod slots;

use std::collections::{BTreeMap, HashMap};
use std::os::fd::BorrowedFd;
use std::sync::atomic::Ordering::{Relaxed, Release};

use passgate_backends::resume::Ids;
use passgate_bindings::units::{Address, Offset};
use passgate_bindings::words::Words;
use passgate_bindings::{Gpa, Iova, PAGE, PageRange};

use crate::gate::ledger::{Full, Key, Store, Table, Tree};
use crate::gate::{
    DomainId, Effect, Event, FileId, FilePages, Gate, HeldBy, InvalidationId, JobId, MapResult, Notice,
    RegionId, UnmapResult, Written,
};

pub(super) use line::Aside;
pub use load::{Left, LoadError};
use slots::{Slot, Slots};

/// Bytes of the memory; only what is written of it takes any. 16 TiB of guest memory take 2.2 GiB at worst.
const BYTES: u64 = 4 << 30;

/// What kind of root is whose, in the store; the gate's page states have 1.
const MAPPED: u64 = 100;
const META: u64 = 101;
const REGIONS: u64 = 102;
const HOLDS: u64 = 103;
const ASIDES: u64 = 104;

/// The one domain of a session.
const DOMAIN: DomainId = DomainId(0);

/// The value of a page in the tree of mappings: nothing there; a mapping begins; it goes on; in doubt.
const NOTHING: u8 = 0;
const BEGINS: u8 = 1;
const GOES_ON: u8 = 2;
const DOUBT: u8 = 3;

/// Records of the meta table: the counters, the ids, then the devices' names.
const COUNTERS: usize = 0;
const IDS: usize = 1;
const NAMES: usize = 2;
/// Words of the counters.
const REGION: usize = 1;
const INVALIDATION: usize = 2;
const STOPPED: usize = 3;
const LOST: usize = 4;
/// Devices of which a stop is remembered; there are never so many.
const DEVICES: usize = 64;

/// What outlives the process.
#[derive(Debug)]
pub struct Lasting {
    store: Store,
    mapped: Tree,
    meta: Table,
    regions: Slots,
    holds: Slots,
    asides: Slots,
    known: BTreeMap<RegionId, (Slot, Written)>,
    held: BTreeMap<(FileId, Offset), (Slot, PageRange<Offset>, HeldBy)>,
    beside: BTreeMap<RegionId, Slot>,
    open: HashMap<InvalidationId, Vec<FilePages>>,
    jobs: HashMap<JobId, Vec<PageRange<Iova>>>,
    last: u64,
    /// Records of an earlier process that are written anew.
    stale: Vec<Slot>,
}

/// What an event may change.
#[derive(Debug, Default)]
pub(super) struct Touched {
    iova: Vec<PageRange<Iova>>,
    /// Everything that is in doubt.
    doubt: bool,
    regions: bool,
    devices: bool,
}

impl Lasting {
    /// Nothing yet, in a new memfd.
    pub fn new() -> Result<Self, LoadError> {
        let store = Store::new(Words::memfd("passgate-ledger", BYTES)?)?;
        store.reserve(Key { kind: META, a: 0, b: 0 }, (NAMES + DEVICES) as u32)?;
        Self::over(store).map(|(lasting, _)| lasting)
    }

    /// Handles to what is in `store`, and the records that are there.
    fn over(store: Store) -> Result<(Self, load::Records), LoadError> {
        let meta = store.table(Key { kind: META, a: 0, b: 0 }).filter(|meta| meta.lines() >= NAMES + DEVICES);
        let meta = meta.ok_or(LoadError::Damaged("its first table is missing"))?;
        let mapped = Tree::new(&store, Key { kind: MAPPED, a: 0, b: 0 })?;
        let (regions, of_regions) = Slots::open(&store, REGIONS);
        let (holds, of_holds) = Slots::open(&store, HOLDS);
        let (asides, of_asides) = Slots::open(&store, ASIDES);
        let lasting = Self {
            store,
            mapped,
            meta,
            regions,
            holds,
            asides,
            known: BTreeMap::new(),
            held: BTreeMap::new(),
            beside: BTreeMap::new(),
            open: HashMap::new(),
            jobs: HashMap::new(),
            last: 0,
            stale: Vec::new(),
        };
        Ok((lasting, load::Records { regions: of_regions, holds: of_holds, asides: of_asides }))
    }

    /// The memory, for the gate's page states.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Its memfd.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.store.words().fd()
    }

    /// The domain and its devices are such, and all of their files are kept: from here on there is something to go on
    /// with.
    pub fn complete(&self, ids: Ids, devices: &[String]) {
        for (nth, name) in devices.iter().enumerate() {
            self.write(NAMES + nth, line::of_name(nth, name));
        }
        self.write(IDS, line::of_ids(ids, devices.len()));
    }

    /// What may change by an event that the gate is about to be told.
    pub(super) fn touched(&mut self, event: &Event) -> Touched {
        let mut touched = Touched::default();
        match event {
            Event::Mapped { job, result } => {
                touched.iova = self.jobs.remove(job).unwrap_or_default();
                touched.regions = !matches!(result, MapResult::Mapped);
            }
            Event::Unmapped { job, result: UnmapResult::InFlight { .. }, .. } => {
                touched.iova = self.jobs.get(job).cloned().unwrap_or_default();
            }
            Event::Unmapped { job, .. } | Event::Released { job } => {
                touched.iova = self.jobs.remove(job).unwrap_or_default();
            }
            Event::Begin { .. } | Event::End { .. } | Event::Converted { .. } | Event::Quiet => {}
            Event::Fenced { .. } | Event::Attached { .. } => {
                touched.doubt = true;
                touched.devices = true;
            }
            _ => touched.regions = true,
        }
        touched
    }

    /// Writes down what the gate knows now of what an event and its effects touched, before any of these is done.
    pub(super) fn follow(&mut self, touched: Touched, gate: &Gate, effects: &[Effect]) {
        let Touched { mut iova, doubt, mut regions, mut devices } = touched;
        let mut pages: Vec<(FileId, PageRange<Offset>)> = Vec::new();
        for effect in effects {
            match effect {
                Effect::Map { job, iova: range, .. } | Effect::Unmap { job, iova: range, .. } => {
                    self.jobs.insert(*job, vec![*range]);
                    iova.push(*range);
                }
                Effect::Replace { job, gone, .. } => {
                    self.jobs.insert(*job, gone.clone());
                    iova.extend(gone);
                }
                Effect::Fence { .. } | Effect::Attach { .. } => devices = true,
                Effect::Receipt(receipt) => {
                    let over = self.open.remove(&receipt.invalidation).unwrap_or_default();
                    pages.extend(over.iter().map(|part| (part.file, part.range)));
                }
                Effect::Notice(
                    Notice::Quarantined { file, range, .. }
                    | Notice::Freed { file, range, .. }
                    | Notice::Released { file, range, .. },
                ) => pages.push((*file, *range)),
                Effect::Notice(Notice::RegionClosed { .. }) | Effect::Arm { .. } => regions = true,
                _ => {}
            }
        }
        let (last_region, last) = gate.last();
        self.count(REGION, last_region.into());
        self.count(INVALIDATION, last);
        for id in self.last + 1..=last {
            let held = gate.held_by(InvalidationId(id));
            if !held.is_empty() {
                pages.extend(held.iter().map(|part| (part.file, part.range)));
                self.open.insert(InvalidationId(id), held.to_vec());
            }
        }
        self.last = last;
        let mut gone = Vec::new();
        if regions {
            self.follow_regions(gate, &mut gone);
        }
        if devices {
            let stopped = gate.stopped().filter(|device| usize::from(device.0) < DEVICES);
            self.count(STOPPED, stopped.fold(0, |bits, device| bits | 1 << device.0));
        }
        let mut free = Vec::new();
        for (file, range) in pages {
            self.follow_holds(gate, file, range, &mut free);
        }
        if doubt {
            iova.extend(self.in_doubt());
        }
        for range in iova {
            if self.follow_mapped(gate, range).is_err() {
                self.lose();
            }
        }
        free.into_iter().for_each(|slot| self.holds.clear(slot));
        gone.into_iter().for_each(|slot| self.regions.clear(slot));
    }

    /// Writes down all that the gate knows, which has just gone on from what was here.
    pub(super) fn resumed(&mut self, gate: &Gate, effects: &[Effect]) {
        let (mut pages, mut iova) = (Vec::new(), Vec::new());
        for Written { spec, .. } in gate.written() {
            iova.push(spec.gpa.rebase(Gpa(0), Iova(0)));
        }
        for status in gate.snapshot().quarantine {
            pages.push((status.file, status.range));
        }
        let touched = Touched { iova, doubt: false, regions: true, devices: true };
        let mut free = Vec::new();
        for (file, range) in pages {
            self.follow_holds(gate, file, range, &mut free);
        }
        self.follow(touched, gate, effects);
        for slot in free.into_iter().chain(std::mem::take(&mut self.stale)) {
            self.holds.clear(slot);
        }
    }

    fn follow_regions(&mut self, gate: &Gate, gone: &mut Vec<Slot>) {
        let now: BTreeMap<RegionId, Written> =
            gate.written().map(|written| (written.region, written)).collect();
        for (id, written) in &now {
            if self.known.get(id).is_some_and(|(_, known)| known == written) {
                continue;
            }
            match self.regions.put(line::of_region(written)) {
                Ok(slot) => gone.extend(self.known.insert(*id, (slot, *written)).map(|(slot, _)| slot)),
                Err(Full { .. }) => self.lose(),
            }
        }
        gone.extend(self.known.extract_if(.., |id, _| !now.contains_key(id)).map(|(_, (slot, _))| slot));
        let closed: Vec<_> = self.beside.extract_if(.., |id, _| !now.contains_key(id)).collect();
        closed.into_iter().for_each(|(_, slot)| self.asides.clear(slot));
    }

    fn follow_holds(&mut self, gate: &Gate, file: FileId, range: PageRange<Offset>, free: &mut Vec<Slot>) {
        let now = gate.holds_over(file, range);
        for (held, by) in &now {
            let key = (file, held.start());
            if self.held.get(&key).is_some_and(|(_, known, known_by)| known == held && known_by == by) {
                continue;
            }
            match self.holds.put(line::of_hold(file, *held, *by)) {
                Ok(slot) => free.extend(self.held.insert(key, (slot, *held, *by)).map(|(slot, ..)| slot)),
                Err(Full { .. }) => self.lose(),
            }
        }
        // A hold that began before the range and is gone, or has been cut short, shares a page with it.
        let first = self.held.range(..(file, range.start())).next_back();
        let first =
            first.filter(|((of, _), (_, held, _))| *of == file && held.overlaps(range)).map(|(key, _)| *key);
        let first = first.unwrap_or((file, range.start()));
        let stays = |start: Offset| now.iter().any(|(held, _)| held.start() == start);
        let over = self.held.extract_if(first..(file, range.end()), |(_, start), _| !stays(*start));
        free.extend(over.map(|(_, (slot, ..))| slot));
    }

    /// Writes down what is mapped in `range` now.
    fn follow_mapped(&mut self, gate: &Gate, range: PageRange<Iova>) -> Result<(), Full> {
        let page = |at: Iova| at.raw() / PAGE;
        let (mut at, mut begins) = (range.start(), Vec::new());
        for (found, live) in gate.mapped_over(DOMAIN, range) {
            let Some(part) = found.intersection(range) else { continue };
            self.mapped.set(page(at)..page(part.start()), NOTHING)?;
            let mut from = page(part.start());
            if live && found.start() == part.start() {
                // One that is there already is left alone.
                if self.mapped.get(from) == BEGINS {
                    from += 1;
                } else {
                    begins.push(from);
                }
            }
            self.mapped.set(from..page(part.end()), if live { GOES_ON } else { DOUBT })?;
            at = part.end();
        }
        self.mapped.set(page(at)..page(range.end()), NOTHING)?;
        // What a cut has left behind the range begins there now.
        if let Some(behind) = PageRange::between(range.end(), Iova(range.end().raw() + PAGE))
            && gate
                .mapped_over(DOMAIN, behind)
                .first()
                .is_some_and(|(next, live)| *live && next.start() == range.end())
        {
            begins.push(page(range.end()));
        }
        begins.into_iter().try_for_each(|page| self.mapped.set(page..page + 1, BEGINS))
    }

    /// What is in doubt, in all regions.
    fn in_doubt(&self) -> Vec<PageRange<Iova>> {
        let mut found = Vec::new();
        for (_, written) in self.known.values() {
            let gpa = written.spec.gpa;
            let pages = gpa.start().raw() / PAGE..gpa.end().raw() / PAGE;
            let doubt = self.mapped.spans(pages).filter(|(_, value)| *value == DOUBT);
            found.extend(doubt.filter_map(|(span, _)| {
                PageRange::new(span.start * PAGE, (span.end - span.start) * PAGE).ok()
            }));
        }
        found
    }

    /// Keeps what the session must know of a region that the gate need not.
    pub(super) fn add_aside(&mut self, region: RegionId, aside: Aside) {
        match self.asides.put(line::of_aside(region, aside)) {
            Ok(slot) => _ = self.beside.insert(region, slot),
            Err(Full { .. }) => self.lose(),
        }
    }

    fn count(&self, word: usize, value: u64) {
        if let Some(counters) = self.meta.line(COUNTERS)
            && counters[word].load(Relaxed) != value
        {
            counters[word].store(value, Release);
        }
    }

    /// Something could not be written down: there is nothing to go on with any more.
    fn lose(&self) {
        if let Some(counters) = self.meta.line(COUNTERS)
            && counters[LOST].swap(1, Release) == 0
        {
            log::error!("the ledger's memory is full: a restart will not keep this VM's memory mapped");
        }
    }

    fn write(&self, at: usize, line: slots::Line) {
        let Some(words) = self.meta.line(at) else { return };
        for (word, value) in words.iter().zip(line).skip(1) {
            word.store(value, Relaxed);
        }
        words[0].store(line[0], Release);
    }
}
