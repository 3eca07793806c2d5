//! The state of a session that outlives its process, in the memory of a store. It is written before an effect is executed, and
//! after each result, so that at any instruction it states what is so, or that it is in doubt.
//!
//! Page states and mappings are in the store themselves (the gate's own trees). Beside them are records of regions, exclusions,
//! conversions without an end, stopped devices, and the ids that the kernel cannot list. After each event the records that it may
//! have changed are compared with the gate's state and rewritten, so that there is no second bookkeeping that could disagree.
//!
//! The order within a change: a new record is written before the record that it replaces is cleared. A process that finds both
//! takes the one that allows less.

mod canonical;
mod load;
mod record;
mod slots;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::os::fd::BorrowedFd;
use std::sync::atomic::Ordering::{Relaxed, Release};

use passgate_backends::handover::DomainIds;
use passgate_bindings::units::Offset;
use passgate_bindings::words::Words;
use passgate_bindings::{Failed, PageRange};

use crate::gate::ledger::{Full, Key, Mapped, Store, Table};
use crate::gate::{
    DeviceId, DomainId, Effect, Event, ExcludedBy, FileId, FilePages, Gate, InvalidationId, MapResult,
    Notice, RegionId, RegionRecord,
};

pub use load::{EarlierState, Exclusions, LoadError, read_exclusions};
pub(super) use record::StoredRegionInfo;
use slots::{Slot, Slots};

/// Bytes of the store's memory; only pages that are written take any. 16 TiB of guest memory take 2.2 GiB at worst.
const STORE_BYTES: u64 = 4 << 30;

// The kinds of the session's tables in the store; the gate's page states and mappings have the kinds 1 and 2.
/// The kind of the table with the counters, the ids and the devices.
const META_KIND: u64 = 101;
/// The kind of the tables with the regions.
const REGIONS_KIND: u64 = 102;
/// The kind of the tables with the exclusions.
const EXCLUSIONS_KIND: u64 = 103;
/// The kind of the tables with the session's properties of regions.
const REGION_INFOS_KIND: u64 = 104;
/// The kind of the tables with the conversions without an end.
const UNENDED_KIND: u64 = 105;

/// The one domain of a session.
const DOMAIN: DomainId = DomainId(0);

// The records of the meta table.
/// The index of the record with the counters.
const COUNTERS: usize = 0;
/// The index of the record with the ids of the domain.
const IDS: usize = 1;
/// The index of the first device's record; the others follow.
const FIRST_DEVICE: usize = 2;

// The words of the counters' record.
/// The highest number that a region had.
const REGION: usize = 1;
/// The highest number that an invalidation had.
const INVALIDATION: usize = 2;
/// The stopped devices, a bit for each.
const STOPPED: usize = 3;
/// Not 0 once the store was full and a record could not be written.
const OVERFLOWED: usize = 4;
/// The id of the ledger, a random number ([`PersistentState::id`]).
const LEDGER_ID: usize = 5;

/// The maximum number of devices whose names and stops are recorded; no VM has as many.
const MAX_DEVICES: usize = 64;

/// The state of a session that outlives its process.
#[derive(Debug)]
pub struct PersistentState {
    store: Store,
    meta: Table,
    region_slots: Slots,
    exclusion_slots: Slots,
    info_slots: Slots,
    unended_slots: Slots,
    /// The regions as they are recorded, with their records.
    region_records: BTreeMap<RegionId, (Slot, RegionRecord)>,
    /// The exclusions as they are recorded, by their first page.
    exclusion_records: BTreeMap<(FileId, Offset), (Slot, PageRange<Offset>, ExcludedBy)>,
    /// The records of the session's properties of regions.
    info_records: BTreeMap<RegionId, Slot>,
    /// The records of conversions without an end.
    unended_records: BTreeMap<InvalidationId, Slot>,
    /// The pages of each open invalidation, whose exclusions must be compared again when it ends.
    open: HashMap<InvalidationId, Vec<FilePages>>,
    /// The highest invalidation that was looked for among the open ones.
    last: u64,
    /// Records of an earlier process's exclusions, to be cleared once they are written anew.
    stale: Vec<Slot>,
}

/// The records that an event may change.
#[derive(Debug, Default)]
pub(super) struct Touched {
    regions: bool,
    devices: bool,
    /// Pages that may become excluded without an effect that says so.
    excluded: Option<(FileId, PageRange<Offset>)>,
    /// The conversions without an end that the event may settle.
    settled: Settled,
}

/// The conversions without an end that an event may settle.
#[derive(Debug, Default, Clone, Copy)]
enum Settled {
    #[default]
    None,
    One(InvalidationId),
    Any,
}

impl PersistentState {
    /// Returns empty records in a new memfd.
    pub fn new() -> Result<Self, LoadError> {
        let store = Store::new(Words::memfd("passgate-ledger", STORE_BYTES)?)?;
        let meta = Key { kind: META_KIND, a: 0, b: 0 };
        store.reserve(meta, (FIRST_DEVICE + MAX_DEVICES) as u32)?;
        // Made now, while there is room for it: without this table mappings would not outlive the process.
        Mapped::in_store(&store, DOMAIN)?;
        let mut id = [0; 8];
        rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty())
            .map_err(|errno| Failed::new("getrandom", errno))?;
        let (persistent, _) = Self::over(store)?;
        persistent.set_counter(LEDGER_ID, u64::from_ne_bytes(id));
        Ok(persistent)
    }

    /// Returns handles to the tables in `store`, and the records that are in them.
    fn over(store: Store) -> Result<(Self, load::FoundRecords), LoadError> {
        let meta = store.table(Key { kind: META_KIND, a: 0, b: 0 });
        let meta = meta.filter(|meta| meta.lines() >= FIRST_DEVICE + MAX_DEVICES);
        let meta = meta.ok_or(LoadError::Damaged("its first table is missing"))?;
        let (region_slots, regions) = Slots::open(&store, REGIONS_KIND);
        let (exclusion_slots, exclusions) = Slots::open(&store, EXCLUSIONS_KIND);
        let (info_slots, region_infos) = Slots::open(&store, REGION_INFOS_KIND);
        let (unended_slots, unended) = Slots::open(&store, UNENDED_KIND);
        let persistent = Self {
            store,
            meta,
            region_slots,
            exclusion_slots,
            info_slots,
            unended_slots,
            region_records: BTreeMap::new(),
            exclusion_records: BTreeMap::new(),
            info_records: BTreeMap::new(),
            unended_records: BTreeMap::new(),
            open: HashMap::new(),
            last: 0,
            stale: Vec::new(),
        };
        Ok((persistent, load::FoundRecords { regions, exclusions, region_infos, unended }))
    }

    /// Returns the store, in which the gate's page states and mappings are, too.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Returns the random number by which the ledger is identified; none for one that an earlier version made.
    pub fn id(&self) -> Option<u64> {
        let id = self.meta.line(COUNTERS)?[LEDGER_ID].load(Relaxed);
        (id != 0).then_some(id)
    }

    /// Returns the memfd of the store.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.store.words().fd()
    }

    /// Records the ids of the domain and its devices; of each device the name, and if its ATS is known to be off. Their files must
    /// be stored before: from now on a later process resumes from this ledger.
    pub fn complete(&self, ids: DomainIds, devices: &[(String, bool)]) {
        for (nth, (name, ats_unused)) in devices.iter().enumerate() {
            self.write(FIRST_DEVICE + nth, record::encode_device(nth, name, *ats_unused));
        }
        // Last: without the ids a ledger is incomplete.
        self.write(IDS, record::encode_ids(ids, devices.len()));
    }

    /// Returns the records that an event may change. Must be called before the gate takes the event.
    pub(super) fn touched(event: &Event) -> Touched {
        match event {
            Event::Mapped { result: MapResult::Mapped, .. }
            | Event::Unmapped { .. }
            | Event::FlightEnded { .. }
            | Event::Begin { .. }
            | Event::End { .. }
            | Event::Converted { .. }
            | Event::MustUnmap { .. }
            | Event::Quiet => Touched::default(),
            Event::Fenced { .. } | Event::Attached { .. } | Event::DeviceTraits { .. } => {
                Touched { devices: true, ..Touched::default() }
            }
            // Quarantine of an earlier daemon: no notice reports it, and the next daemon must find it here.
            Event::Quarantine { file, range, .. } => {
                Touched { excluded: Some((*file, *range)), ..Touched::default() }
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

    /// Records the gate's state after an event, as far as the event and its effects touched it. Must be called before any of the
    /// effects is executed.
    pub(super) fn record_changes(&mut self, touched: Touched, gate: &Gate, effects: &[Effect]) {
        let Touched { mut regions, mut devices, excluded, settled } = touched;
        let mut pages: Vec<(FileId, PageRange<Offset>)> = excluded.into_iter().collect();
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
        self.set_counter(REGION, last_region.into());
        self.set_counter(INVALIDATION, last);
        // Not number by number: a quarantine read from disk may have raised the counter far beyond the last one.
        for id in gate.open_since(InvalidationId(self.last)) {
            let excluded = gate.held_by(id);
            if !excluded.is_empty() {
                pages.extend(excluded.iter().map(|part| (part.file, part.range)));
                self.open.insert(id, excluded.to_vec());
            }
        }
        self.last = last;
        // The records that are replaced are cleared last, after the new ones are written.
        let mut old_regions = Vec::new();
        if regions {
            self.record_regions(gate, &mut old_regions);
        }
        if devices {
            let stopped = gate.stopped().filter(|device| usize::from(device.0) < MAX_DEVICES);
            self.set_counter(STOPPED, stopped.fold(0, |bits, device| bits | 1 << device.0));
            gate.all_traits().for_each(|(device, traits)| self.record_ats(device, !traits.ats));
        }
        let mut old_exclusions = Vec::new();
        for (file, range) in pages {
            self.record_exclusions(gate, file, range, &mut old_exclusions);
        }
        self.record_unended(gate, settled);
        old_exclusions.into_iter().for_each(|slot| self.exclusion_slots.clear(slot));
        old_regions.into_iter().for_each(|slot| self.region_slots.clear(slot));
    }

    /// Records all of the gate's state, after it has resumed from these records.
    pub(super) fn record_all(&mut self, gate: &Gate, effects: &[Effect]) {
        let mut old_exclusions = Vec::new();
        for status in gate.quarantined_ranges() {
            self.record_exclusions(gate, status.file, status.range, &mut old_exclusions);
        }
        let touched = Touched { regions: true, devices: true, excluded: None, settled: Settled::Any };
        self.record_changes(touched, gate, effects);
        for slot in old_exclusions.into_iter().chain(std::mem::take(&mut self.stale)) {
            self.exclusion_slots.clear(slot);
        }
    }

    /// Records the regions; appends the records that are to be cleared to `old`.
    fn record_regions(&mut self, gate: &Gate, old: &mut Vec<Slot>) {
        let now: BTreeMap<RegionId, RegionRecord> =
            gate.written().map(|written| (written.region, written)).collect();
        for (id, written) in &now {
            if self.region_records.get(id).is_some_and(|(_, recorded)| recorded == written) {
                continue;
            }
            match self.region_slots.put(record::encode_region(written)) {
                Ok(slot) => {
                    old.extend(self.region_records.insert(*id, (slot, *written)).map(|(slot, _)| slot));
                }
                Err(Full { .. }) => self.mark_overflowed(),
            }
        }
        let closed: Vec<_> = self.region_records.keys().filter(|id| !now.contains_key(id)).copied().collect();
        for id in closed {
            old.extend(self.region_records.remove(&id).map(|(slot, _)| slot));
            if let Some(slot) = self.info_records.remove(&id) {
                self.info_slots.clear(slot);
            }
        }
    }

    /// Records the exclusions over a range; appends the records that are to be cleared to `old`.
    fn record_exclusions(
        &mut self,
        gate: &Gate,
        file: FileId,
        range: PageRange<Offset>,
        old: &mut Vec<Slot>,
    ) {
        let now = gate.exclusions_over(file, range);
        for (excluded, by) in &now {
            let key = (file, excluded.start());
            let recorded = self.exclusion_records.get(&key);
            if recorded.is_some_and(|(_, range, recorded_by)| range == excluded && recorded_by == by) {
                continue;
            }
            match self.exclusion_slots.put(record::encode_exclusion(file, *excluded, *by)) {
                Ok(slot) => {
                    let record = (slot, *excluded, *by);
                    old.extend(self.exclusion_records.insert(key, record).map(|(slot, ..)| slot));
                }
                Err(Full { .. }) => self.mark_overflowed(),
            }
        }
        // The last exclusion that begins before the range may reach into it, and has ended or was cut short.
        let first = self.exclusion_records.range(..(file, range.start())).next_back();
        let first = first
            .filter(|((of, _), (_, excluded, _))| *of == file && excluded.overlaps(range))
            .map(|(key, _)| *key);
        let first = first.unwrap_or((file, range.start()));
        let stays = |start: Offset| now.iter().any(|(excluded, _)| excluded.start() == start);
        let ended: Vec<_> = self
            .exclusion_records
            .range(first..(file, range.end()))
            .map(|(key, _)| *key)
            .filter(|(_, at)| !stays(*at))
            .collect();
        old.extend(ended.into_iter().filter_map(|key| Some(self.exclusion_records.remove(&key)?.0)));
    }

    /// Records the conversions without an end. Called before the exclusion by an open conversion is cleared in favour of its
    /// quarantine, so that a restart in between finds at least one of them.
    fn record_unended(&mut self, gate: &Gate, settled: Settled) {
        match settled {
            Settled::None => return,
            Settled::One(id) => {
                let slot = if gate.is_unended(id) { None } else { self.unended_records.remove(&id) };
                return slot.into_iter().for_each(|slot| self.unended_slots.clear(slot));
            }
            Settled::Any => {}
        }
        #[cfg(test)]
        tests::UNENDED_COMPARISONS.set(tests::UNENDED_COMPARISONS.get() + 1);
        let now: BTreeSet<InvalidationId> = gate.unended().collect();
        let recorded = &self.unended_records;
        for id in now.iter().filter(|id| !recorded.contains_key(id)).copied().collect::<Vec<_>>() {
            match self.unended_slots.put(record::encode_unended(id)) {
                Ok(slot) => _ = self.unended_records.insert(id, slot),
                Err(Full { .. }) => self.mark_overflowed(),
            }
        }
        let settled: Vec<_> = self.unended_records.keys().filter(|id| !now.contains(id)).copied().collect();
        for slot in settled.into_iter().filter_map(|id| self.unended_records.remove(&id)).collect::<Vec<_>>()
        {
            self.unended_slots.clear(slot);
        }
    }

    /// Records the session's properties of a region.
    pub(super) fn add_region_info(&mut self, region: RegionId, info: StoredRegionInfo) {
        match self.info_slots.put(record::encode_region_info(region, info)) {
            Ok(slot) => _ = self.info_records.insert(region, slot),
            Err(Full { .. }) => self.mark_overflowed(),
        }
    }

    /// Records if a device's ATS is known to be off, unless the device has no record yet.
    fn record_ats(&self, device: DeviceId, unused: bool) {
        let nth = usize::from(device.0);
        let words = self.meta.line(FIRST_DEVICE + nth).filter(|_| nth < MAX_DEVICES);
        let Some(words) = words.filter(|words| words[0].load(Relaxed) != 0) else { return };
        let (word, value) = (&words[record::ATS_WORD], record::ats_word(unused));
        if word.load(Relaxed) != value {
            word.store(value, Release);
        }
    }

    fn set_counter(&self, word: usize, value: u64) {
        if let Some(counters) = self.meta.line(COUNTERS)
            && counters[word].load(Relaxed) != value
        {
            counters[word].store(value, Release);
        }
    }

    /// Records that the store is full and a record is missing: no later process resumes from it.
    fn mark_overflowed(&self) {
        if let Some(counters) = self.meta.line(COUNTERS)
            && counters[OVERFLOWED].swap(1, Release) == 0
        {
            log::error!("the ledger's memory is full: a restart will not keep this VM's memory mapped");
        }
    }

    fn write(&self, at: usize, record: slots::Record) {
        let Some(words) = self.meta.line(at) else { return };
        for (word, value) in words.iter().zip(record).skip(1) {
            word.store(value, Relaxed);
        }
        // Last: with this word the record exists.
        words[0].store(record[0], Release);
    }
}

#[cfg(test)]
mod tests;
