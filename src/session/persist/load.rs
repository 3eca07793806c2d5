//! Reading the records of an earlier process. Every value is checked before it is used.

use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering::Relaxed;

use passgate_backends::handover::DomainIds;
use passgate_bindings::units::Offset;
use passgate_bindings::words::Words;
use passgate_bindings::{Failed, PageRange};

use super::record::{self, StoredRegionInfo};
use super::slots::{Record, Slot};
use super::{
    COUNTERS, DOMAIN, FIRST_DEVICE, IDS, INVALIDATION, MAX_DEVICES, OVERFLOWED, PersistentState, REGION,
    STOPPED,
};
use crate::gate::ledger::OpenError;
use crate::gate::ledger::{Full, Mapped, PageMap, Store};
use crate::gate::{DeviceId, ExcludedBy, FileId, RecordedState, RegionId};

/// The reason why a process cannot resume from a ledger. The text is a part of a message.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The file is not a memfd of a store.
    #[error("the ledger that was kept cannot be opened: {0}")]
    Memory(#[from] Failed),
    /// There is no store in it.
    #[error(transparent)]
    Store(#[from] OpenError),
    /// The store has no room.
    #[error(transparent)]
    Full(#[from] Full),
    /// A value in it is impossible.
    #[error("the ledger that was kept is damaged: {0}")]
    Damaged(&'static str),
    /// The process that made it ended before [`PersistentState::complete`].
    #[error("the earlier daemon ended before everything was kept")]
    Incomplete,
    /// The store was full, and a record is missing.
    #[error("the earlier daemon's ledger was full, and is not complete")]
    Overflowed,
}

/// The state that an earlier process left in its ledger.
#[derive(Debug)]
pub struct EarlierState {
    /// The state of the gate.
    pub past: RecordedState,
    /// The ids of the domain.
    pub ids: DomainIds,
    /// The names of the devices, in the order of their numbers.
    pub devices: Vec<String>,
    /// The names of the devices whose ATS was known to be off while they are attached.
    pub ats_unused: Vec<String>,
    /// The session's properties of the regions.
    pub(in crate::session) region_infos: Vec<(RegionId, StoredRegionInfo)>,
}

/// The exclusions of an earlier process: open conversions and quarantine.
pub type Exclusions = Vec<(FileId, PageRange<Offset>, ExcludedBy)>;

/// Returns the exclusions in the ledger in this memfd, for a process that does not resume from it. An error if the ledger is not
/// complete: then there may be others.
pub fn read_exclusions(fd: OwnedFd) -> Result<Exclusions, LoadError> {
    let (mut persistent, records) = PersistentState::over(Store::open(Words::from_fd(fd)?)?)?;
    persistent.load_ids()?;
    let mut past = RecordedState::default();
    persistent.load_counters(&mut past)?;
    persistent.load_exclusions(records.exclusions, &mut past)?;
    Ok(past.exclusions)
}

/// The records that were found in a store.
pub(super) struct FoundRecords {
    pub(super) regions: Vec<(Slot, Record)>,
    pub(super) exclusions: Vec<(Slot, Record)>,
    pub(super) region_infos: Vec<(Slot, Record)>,
    pub(super) unended: Vec<(Slot, Record)>,
}

impl PersistentState {
    /// Opens the ledger in this memfd, to resume from it. Returns the state that is in it, too.
    pub fn open(fd: OwnedFd) -> Result<(Self, EarlierState), LoadError> {
        let (mut persistent, records) = Self::over(Store::open(Words::from_fd(fd)?)?)?;
        let (ids, named) = persistent.load_ids()?;
        let mut past = RecordedState { unmapped: ids == DomainIds::Nothing, ..RecordedState::default() };
        persistent.load_counters(&mut past)?;
        persistent.load_regions(records.regions, &mut past)?;
        persistent.load_exclusions(records.exclusions, &mut past)?;
        persistent.load_unended(records.unended, &mut past)?;
        let region_infos = persistent.load_region_infos(records.region_infos);
        persistent.discard_unused_files(&past);
        if past.unmapped {
            // The mappings ended with their process: the domain begins with an empty table.
            Mapped::in_store(&persistent.store, DOMAIN)?.discard();
            Mapped::in_store(&persistent.store, DOMAIN)?;
        }
        let ats_unused = named.iter().filter(|(_, unused)| *unused).map(|(name, _)| name.clone()).collect();
        let devices = named.into_iter().map(|(name, _)| name).collect();
        Ok((persistent, EarlierState { past, ids, devices, ats_unused, region_infos }))
    }

    /// Returns the ids of the domain and its devices; of each the name, and true if its ATS was known to be off.
    fn load_ids(&self) -> Result<(DomainIds, Vec<(String, bool)>), LoadError> {
        let read = |at: usize| -> Option<Record> {
            let words = self.meta.line(at)?;
            Some(std::array::from_fn(|nth| words[nth].load(Relaxed)))
        };
        let ids = read(IDS).filter(|words| words[0] != 0).ok_or(LoadError::Incomplete)?;
        let (ids, count) = record::decode_ids(&ids).ok_or(LoadError::Damaged("the ids of its domain"))?;
        let name = |nth: usize| {
            let (at, name, unused) = record::decode_device(&read(FIRST_DEVICE + nth)?)?;
            (at == nth).then_some((name, unused))
        };
        // One more than the maximum has no record, so that a count beyond it is an error.
        let names: Option<Vec<_>> = (0..count.min(MAX_DEVICES + 1)).map(name).collect();
        Ok((ids, names.ok_or(LoadError::Damaged("the names of its devices"))?))
    }

    fn load_counters(&mut self, past: &mut RecordedState) -> Result<(), LoadError> {
        let counters = self.meta.line(COUNTERS).ok_or(LoadError::Damaged("its counters"))?;
        let read = |word: usize| counters[word].load(Relaxed);
        if read(OVERFLOWED) != 0 {
            return Err(LoadError::Overflowed);
        }
        past.last_region = u32::try_from(read(REGION)).map_err(|_| LoadError::Damaged("its counters"))?;
        past.last_invalidation = read(INVALIDATION);
        // The upper half of the numbers is reserved, so that no gate runs out of them after a restart.
        if past.last_invalidation > u64::MAX / 2 || past.last_region > u32::MAX / 2 {
            return Err(LoadError::Damaged("its counters"));
        }
        self.last = past.last_invalidation;
        let stopped = read(STOPPED);
        past.stopped = (0..MAX_DEVICES as u16).filter(|bit| stopped >> bit & 1 == 1).map(DeviceId).collect();
        Ok(())
    }

    fn load_regions(
        &mut self,
        records: Vec<(Slot, Record)>,
        past: &mut RecordedState,
    ) -> Result<(), LoadError> {
        for (slot, words) in records {
            let written = record::decode_region(&words).ok_or(LoadError::Damaged("a region"))?;
            if written.region.0 > past.last_region {
                return Err(LoadError::Damaged("a region that was never added"));
            }
            // A region has two records if the process ended while it was rewritten. If either says that it is being closed, it is:
            // a region that is being closed is never opened again.
            match self.region_records.get(&written.region).copied() {
                Some((_, known)) if known.closing || !written.closing => self.region_slots.clear(slot),
                Some((old, _)) => {
                    self.region_slots.clear(old);
                    self.region_records.insert(written.region, (slot, written));
                }
                None => _ = self.region_records.insert(written.region, (slot, written)),
            }
        }
        past.regions = self.region_records.values().map(|(_, written)| *written).collect();
        let mut ranges: Vec<_> = past.regions.iter().map(|region| region.spec.gpa).collect();
        ranges.sort_unstable();
        if ranges.windows(2).any(|pair| pair[0].overlaps(pair[1])) {
            return Err(LoadError::Damaged("two regions at one address"));
        }
        Ok(())
    }

    fn load_exclusions(
        &mut self,
        records: Vec<(Slot, Record)>,
        past: &mut RecordedState,
    ) -> Result<(), LoadError> {
        for (slot, words) in records {
            let exclusion = record::decode_exclusion(&words);
            let (file, range, by) = exclusion.ok_or(LoadError::Damaged("an exclusion"))?;
            let (ExcludedBy::Open(id) | ExcludedBy::Quarantine(id, _)) = by;
            if id.0 > past.last_invalidation {
                return Err(LoadError::Damaged("an exclusion by an invalidation that never began"));
            }
            past.exclusions.push((file, range, by));
            // The gate excludes all of these pages again, and the new records are written before these are cleared.
            self.stale.push(slot);
        }
        // Of two that overlap the gate takes the first. That must be the open conversion: its quarantine lasts until an operator
        // releases it, whereas a proof may lift the other.
        past.exclusions.sort_by_key(|(.., by)| matches!(by, ExcludedBy::Quarantine(..)));
        Ok(())
    }

    fn load_unended(
        &mut self,
        records: Vec<(Slot, Record)>,
        past: &mut RecordedState,
    ) -> Result<(), LoadError> {
        for (slot, words) in records {
            let id = record::decode_unended(&words).filter(|id| id.0 <= past.last_invalidation);
            let id = id.ok_or(LoadError::Damaged("an open conversion"))?;
            match self.unended_records.insert(id, slot) {
                None => past.unended.push(id),
                Some(duplicate) => self.unended_slots.clear(duplicate),
            }
        }
        Ok(())
    }

    fn load_region_infos(&mut self, records: Vec<(Slot, Record)>) -> Vec<(RegionId, StoredRegionInfo)> {
        let mut infos = Vec::new();
        for (slot, words) in records {
            let info = record::decode_region_info(&words);
            match info.filter(|(region, _)| self.region_records.contains_key(region)) {
                Some((region, info)) if !self.info_records.contains_key(&region) => {
                    self.info_records.insert(region, slot);
                    infos.push((region, info));
                }
                _ => self.info_slots.clear(slot),
            }
        }
        infos
    }

    /// Discards the page states of files that are in no region and of which no page is excluded.
    fn discard_unused_files(&self, past: &RecordedState) {
        for file in PageMap::files(&self.store) {
            let in_region = past.regions.iter().any(|region| region.spec.backing.file == file);
            let is_excluded = past.exclusions.iter().any(|(excluded, ..)| *excluded == file);
            if !in_region
                && !is_excluded
                && let Ok(map) = PageMap::in_store(&self.store, file)
            {
                map.discard();
            }
        }
    }
}
