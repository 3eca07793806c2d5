//! What of a session outlives its process: written into the store's memory before an effect leaves, and after each
//! result, so that at any instruction it says what is so, or that it is in doubt.
//!
//! Page states and mappings lie in the store themselves (the gate's own trees). Beside them are written down: regions,
//! holds, stopped devices, and the ids that the kernel cannot list. What a change touches is read off the gate again, so
//! that there is no second bookkeeping to go wrong.
//!
//! The order within a change: what comes is written before what it takes the place of is gone. Whoever reads both takes
//! the worse.

mod canonical;
mod line;
mod load;
mod slots;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::os::fd::BorrowedFd;
use std::sync::atomic::Ordering::{Relaxed, Release};

use passgate_backends::resume::Ids;
use passgate_bindings::units::Offset;
use passgate_bindings::words::Words;
use passgate_bindings::{Failed, PageRange};

use crate::gate::ledger::{Full, Key, Mapped, Store, Table};
use crate::gate::{
    DeviceId, DomainId, Effect, Event, FileId, FilePages, Gate, HeldBy, InvalidationId, MapResult, Notice,
    RegionId, Written,
};

pub(super) use line::Aside;
pub use load::{Holds, Left, LoadError, holds_in};
use slots::{Slot, Slots};

/// Bytes of the memory; only what is written of it takes any. 16 TiB of guest memory take 2.2 GiB at worst.
const BYTES: u64 = 4 << 30;

/// What kind of root is whose, in the store; the gate's page states and mappings have 1 and 2.
const META: u64 = 101;
const REGIONS: u64 = 102;
const HOLDS: u64 = 103;
const ASIDES: u64 = 104;
const UNENDED: u64 = 105;

/// The one domain of a session.
const DOMAIN: DomainId = DomainId(0);

/// Records of the meta table: the counters, the ids, then the devices' names.
const COUNTERS: usize = 0;
const IDS: usize = 1;
const NAMES: usize = 2;
/// Words of the counters.
const REGION: usize = 1;
const INVALIDATION: usize = 2;
const STOPPED: usize = 3;
const LOST: usize = 4;
const NAME: usize = 5;
/// Devices of which a stop is remembered; there are never so many.
const DEVICES: usize = 64;

/// What outlives the process.
#[derive(Debug)]
pub struct Lasting {
    store: Store,
    meta: Table,
    regions: Slots,
    holds: Slots,
    asides: Slots,
    unended: Slots,
    known: BTreeMap<RegionId, (Slot, Written)>,
    held: BTreeMap<(FileId, Offset), (Slot, PageRange<Offset>, HeldBy)>,
    beside: BTreeMap<RegionId, Slot>,
    unsettled: BTreeMap<InvalidationId, Slot>,
    open: HashMap<InvalidationId, Vec<FilePages>>,
    last: u64,
    /// Records of an earlier process that are written anew.
    stale: Vec<Slot>,
}

/// What an event may change.
#[derive(Debug, Default)]
pub(super) struct Touched {
    regions: bool,
    devices: bool,
    /// Pages of which a hold may begin without a word.
    held: Option<(FileId, PageRange<Offset>)>,
    /// Conversions that may be settled by it.
    settled: Settled,
}

/// Conversions without an end that an event may settle.
#[derive(Debug, Default, Clone, Copy)]
enum Settled {
    #[default]
    None,
    One(InvalidationId),
    Any,
}

impl Lasting {
    /// Nothing yet, in a new memfd.
    pub fn new() -> Result<Self, LoadError> {
        let store = Store::new(Words::memfd("passgate-ledger", BYTES)?)?;
        store.reserve(Key { kind: META, a: 0, b: 0 }, (NAMES + DEVICES) as u32)?;
        // There is room for it now: what is mapped must never be left out.
        Mapped::in_store(&store, DOMAIN)?;
        let mut name = [0; 8];
        rustix::rand::getrandom(&mut name, rustix::rand::GetRandomFlags::empty())
            .map_err(|errno| Failed::new("getrandom", errno))?;
        let (lasting, _) = Self::over(store)?;
        lasting.count(NAME, u64::from_ne_bytes(name));
        Ok(lasting)
    }

    /// Handles to what is in `store`, and the records that are there.
    fn over(store: Store) -> Result<(Self, load::Records), LoadError> {
        let meta = store.table(Key { kind: META, a: 0, b: 0 }).filter(|meta| meta.lines() >= NAMES + DEVICES);
        let meta = meta.ok_or(LoadError::Damaged("its first table is missing"))?;
        let (regions, of_regions) = Slots::open(&store, REGIONS);
        let (holds, of_holds) = Slots::open(&store, HOLDS);
        let (asides, of_asides) = Slots::open(&store, ASIDES);
        let (unended, of_unended) = Slots::open(&store, UNENDED);
        let lasting = Self {
            store,
            meta,
            regions,
            holds,
            asides,
            unended,
            known: BTreeMap::new(),
            held: BTreeMap::new(),
            beside: BTreeMap::new(),
            unsettled: BTreeMap::new(),
            open: HashMap::new(),
            last: 0,
            stale: Vec::new(),
        };
        let records =
            load::Records { regions: of_regions, holds: of_holds, asides: of_asides, unended: of_unended };
        Ok((lasting, records))
    }

    /// The memory, for the gate's page states.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// A number that no other ledger has. None of one that an earlier version made.
    pub fn id(&self) -> Option<u64> {
        let name = self.meta.line(COUNTERS)?[NAME].load(Relaxed);
        (name != 0).then_some(name)
    }

    /// Its memfd.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.store.words().fd()
    }

    /// The domain and its devices are such, and all of their files are kept: from here on there is something to go on
    /// with.
    pub fn complete(&self, ids: Ids, devices: &[(String, bool)]) {
        for (nth, (name, ats_unused)) in devices.iter().enumerate() {
            self.write(NAMES + nth, line::of_name(nth, name, *ats_unused));
        }
        self.write(IDS, line::of_ids(ids, devices.len()));
    }

    /// What may change by an event that the gate is about to be told.
    pub(super) fn touched(event: &Event) -> Touched {
        match event {
            Event::Mapped { result: MapResult::Mapped, .. }
            | Event::Unmapped { .. }
            | Event::Released { .. }
            | Event::Begin { .. }
            | Event::End { .. }
            | Event::Converted { .. }
            | Event::Insists { .. }
            | Event::Quiet => Touched::default(),
            Event::Fenced { .. } | Event::Attached { .. } | Event::DeviceNature { .. } => {
                Touched { devices: true, ..Touched::default() }
            }
            // What an earlier daemon had in quarantine, which nobody is told of: the next must find it here.
            Event::Quarantine { file, range, .. } => {
                Touched { held: Some((*file, *range)), ..Touched::default() }
            }
            Event::Release { invalidation, .. } => {
                Touched { regions: true, settled: Settled::One(*invalidation), ..Touched::default() }
            }
            Event::ClientGone { .. } | Event::Adopt { .. } => {
                Touched { regions: true, settled: Settled::Any, ..Touched::default() }
            }
            _ => Touched { regions: true, ..Touched::default() },
        }
    }

    /// Writes down what the gate knows now of what an event and its effects touched, before any of these is done.
    pub(super) fn follow(&mut self, touched: Touched, gate: &Gate, effects: &[Effect]) {
        let Touched { mut regions, mut devices, held, settled } = touched;
        let mut pages: Vec<(FileId, PageRange<Offset>)> = held.into_iter().collect();
        for effect in effects {
            match effect {
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
        // Not number by number: what came from a file on disk may have made them jump.
        for id in gate.open_since(InvalidationId(self.last)) {
            let held = gate.held_by(id);
            if !held.is_empty() {
                pages.extend(held.iter().map(|part| (part.file, part.range)));
                self.open.insert(id, held.to_vec());
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
            gate.natures().for_each(|(device, nature)| self.note_ats(device, !nature.ats));
        }
        let mut free = Vec::new();
        for (file, range) in pages {
            self.follow_holds(gate, file, range, &mut free);
        }
        self.follow_unended(gate, settled);
        free.into_iter().for_each(|slot| self.holds.clear(slot));
        gone.into_iter().for_each(|slot| self.regions.clear(slot));
    }

    /// Writes down all that the gate knows, which has just gone on from what was here.
    pub(super) fn resumed(&mut self, gate: &Gate, effects: &[Effect]) {
        let mut free = Vec::new();
        for status in gate.quarantined_ranges() {
            self.follow_holds(gate, status.file, status.range, &mut free);
        }
        let touched = Touched { regions: true, devices: true, held: None, settled: Settled::Any };
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
        let closed: Vec<_> = self.known.keys().filter(|id| !now.contains_key(id)).copied().collect();
        for id in closed {
            gone.extend(self.known.remove(&id).map(|(slot, _)| slot));
            if let Some(slot) = self.beside.remove(&id) {
                self.asides.clear(slot);
            }
        }
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
        let over: Vec<_> = self
            .held
            .range(first..(file, range.end()))
            .map(|(key, _)| *key)
            .filter(|(_, at)| !stays(*at))
            .collect();
        free.extend(over.into_iter().filter_map(|key| Some(self.held.remove(&key)?.0)));
    }

    /// Written before the hold of an open conversion makes way for its quarantine, so that a restart in between finds
    /// the one or the other.
    fn follow_unended(&mut self, gate: &Gate, settled: Settled) {
        match settled {
            Settled::None => return,
            Settled::One(id) => {
                let slot = if gate.is_unended(id) { None } else { self.unsettled.remove(&id) };
                return slot.into_iter().for_each(|slot| self.unended.clear(slot));
            }
            Settled::Any => {}
        }
        #[cfg(test)]
        tests::REBUILT.set(tests::REBUILT.get() + 1);
        let now: BTreeSet<InvalidationId> = gate.unended().collect();
        for id in now.iter().filter(|id| !self.unsettled.contains_key(id)).copied().collect::<Vec<_>>() {
            match self.unended.put(line::of_unended(id)) {
                Ok(slot) => _ = self.unsettled.insert(id, slot),
                Err(Full { .. }) => self.lose(),
            }
        }
        let settled: Vec<_> = self.unsettled.keys().filter(|id| !now.contains(id)).copied().collect();
        for slot in settled.into_iter().filter_map(|id| self.unsettled.remove(&id)).collect::<Vec<_>>() {
            self.unended.clear(slot);
        }
    }

    /// Keeps what the session must know of a region that the gate need not.
    pub(super) fn add_aside(&mut self, region: RegionId, aside: Aside) {
        match self.asides.put(line::of_aside(region, aside)) {
            Ok(slot) => _ = self.beside.insert(region, slot),
            Err(Full { .. }) => self.lose(),
        }
    }

    /// Writes down whether a device's ATS is known to be unused, where its name is written already.
    fn note_ats(&self, device: DeviceId, unused: bool) {
        let line = self.meta.line(NAMES + usize::from(device.0)).filter(|_| usize::from(device.0) < DEVICES);
        let Some(words) = line.filter(|words| words[0].load(Relaxed) != 0) else { return };
        let (word, value) = (&words[line::ATS_WORD], line::ats_word(unused));
        if word.load(Relaxed) != value {
            word.store(value, Release);
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

#[cfg(test)]
mod tests;
