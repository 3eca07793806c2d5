//! What an earlier process wrote down, read and judged: nothing in it is believed for its shape.

use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering::Relaxed;

use passgate_backends::resume::Ids;
use passgate_bindings::units::Offset;
use passgate_bindings::words::Words;
use passgate_bindings::{Failed, PageRange};

use super::line::{self, Aside};
use super::slots::{Line, Slot};
use super::{COUNTERS, DEVICES, DOMAIN, IDS, INVALIDATION, LOST, Lasting, NAMES, REGION, STOPPED};
use crate::gate::ledger::OpenError;
use crate::gate::ledger::{Full, Mapped, PageMap, Store};
use crate::gate::{DeviceId, FileId, HeldBy, Past, RegionId};

/// Why there is nothing to go on with. The text is a part of a message.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// What was kept as the ledger is no such memory.
    #[error("the ledger that was kept cannot be opened: {0}")]
    Memory(#[from] Failed),
    /// There is no ledger in it.
    #[error(transparent)]
    Store(#[from] OpenError),
    /// It has no room.
    #[error(transparent)]
    Full(#[from] Full),
    /// Something in it cannot be.
    #[error("the ledger that was kept is damaged: {0}")]
    Damaged(&'static str),
    /// The process that made it ended before everything was kept.
    #[error("the earlier daemon ended before everything was kept")]
    Incomplete,
    /// The process that made it could not write everything down.
    #[error("the earlier daemon's ledger was full, and is not complete")]
    Lost,
}

/// What an earlier process left in its ledger.
#[derive(Debug)]
pub struct Left {
    /// For the gate.
    pub past: Past,
    /// Its domain.
    pub ids: Ids,
    /// Its devices, in the order of their numbers.
    pub devices: Vec<String>,
    /// Those of them whose ATS was known to be off while they are attached.
    pub ats_unused: Vec<String>,
    pub(in crate::session) asides: Vec<(RegionId, Aside)>,
}

/// What an earlier process held, by file.
pub type Holds = Vec<(FileId, PageRange<Offset>, HeldBy)>;

/// What was held in the ledger in this memfd, which nobody goes on from. An error where it cannot be read whole, or was
/// kept before what it took over had been written into it.
pub fn holds_in(fd: OwnedFd) -> Result<Holds, LoadError> {
    let (mut lasting, records) = Lasting::over(Store::open(Words::from_fd(fd)?)?)?;
    lasting.made_of()?;
    let mut past = Past::default();
    lasting.counters(&mut past)?;
    lasting.holds_again(records.holds, &mut past)?;
    Ok(past.holds)
}

/// The records that are there.
pub(super) struct Records {
    pub(super) regions: Vec<(Slot, Line)>,
    pub(super) holds: Vec<(Slot, Line)>,
    pub(super) asides: Vec<(Slot, Line)>,
    pub(super) unended: Vec<(Slot, Line)>,
}

impl Lasting {
    /// What another process left in this memfd, and the ledger to go on with.
    pub fn open(fd: OwnedFd) -> Result<(Self, Left), LoadError> {
        let (mut lasting, records) = Self::over(Store::open(Words::from_fd(fd)?)?)?;
        let (ids, named) = lasting.made_of()?;
        let mut past = Past { unmapped: ids == Ids::Nothing, ..Past::default() };
        lasting.counters(&mut past)?;
        lasting.regions_again(records.regions, &mut past)?;
        lasting.holds_again(records.holds, &mut past)?;
        lasting.unended_again(records.unended, &mut past)?;
        let asides = lasting.asides_again(records.asides);
        lasting.forget_files(&past);
        if past.unmapped {
            Mapped::in_store(&lasting.store, DOMAIN)?.discard();
            Mapped::in_store(&lasting.store, DOMAIN)?;
        }
        let ats_unused = named.iter().filter(|(_, unused)| *unused).map(|(name, _)| name.clone()).collect();
        let devices = named.into_iter().map(|(name, _)| name).collect();
        Ok((lasting, Left { past, ids, devices, ats_unused, asides }))
    }

    /// The ids of the domain, and the devices: their names, and whether their ATS was known to be unused.
    fn made_of(&self) -> Result<(Ids, Vec<(String, bool)>), LoadError> {
        let read = |at: usize| -> Option<Line> {
            let words = self.meta.line(at)?;
            Some(std::array::from_fn(|nth| words[nth].load(Relaxed)))
        };
        let made = read(IDS).filter(|words| words[0] != 0).ok_or(LoadError::Incomplete)?;
        let (ids, count) = line::ids(&made).ok_or(LoadError::Damaged("the ids of its domain"))?;
        let name = |nth: usize| {
            let (at, name, unused) = line::name(&read(NAMES + nth)?)?;
            (at == nth).then_some((name, unused))
        };
        let names: Option<Vec<_>> = (0..count.min(DEVICES + 1)).map(name).collect();
        Ok((ids, names.ok_or(LoadError::Damaged("the names of its devices"))?))
    }

    fn counters(&mut self, past: &mut Past) -> Result<(), LoadError> {
        let counters = self.meta.line(COUNTERS).ok_or(LoadError::Damaged("its counters"))?;
        let read = |word: usize| counters[word].load(Relaxed);
        if read(LOST) != 0 {
            return Err(LoadError::Lost);
        }
        past.last_region = u32::try_from(read(REGION)).map_err(|_| LoadError::Damaged("its counters"))?;
        past.last_invalidation = read(INVALIDATION);
        if past.last_invalidation > u64::MAX / 2 || past.last_region > u32::MAX / 2 {
            return Err(LoadError::Damaged("its counters"));
        }
        self.last = past.last_invalidation;
        let stopped = read(STOPPED);
        past.stopped = (0..DEVICES as u16).filter(|bit| stopped >> bit & 1 == 1).map(DeviceId).collect();
        Ok(())
    }

    fn regions_again(&mut self, records: Vec<(Slot, Line)>, past: &mut Past) -> Result<(), LoadError> {
        for (slot, words) in records {
            let written = line::region(&words).ok_or(LoadError::Damaged("a region"))?;
            if written.region.0 > past.last_region {
                return Err(LoadError::Damaged("a region that was never added"));
            }
            // Twice where it was being written anew: once it is on its way out, it stays so.
            match self.known.get(&written.region).copied() {
                Some((_, known)) if known.closing || !written.closing => self.regions.clear(slot),
                Some((old, _)) => {
                    self.regions.clear(old);
                    self.known.insert(written.region, (slot, written));
                }
                None => _ = self.known.insert(written.region, (slot, written)),
            }
        }
        past.regions = self.known.values().map(|(_, written)| *written).collect();
        let mut places: Vec<_> = past.regions.iter().map(|region| region.spec.gpa).collect();
        places.sort_unstable();
        if places.windows(2).any(|pair| pair[0].overlaps(pair[1])) {
            return Err(LoadError::Damaged("two regions at one address"));
        }
        Ok(())
    }

    fn holds_again(&mut self, records: Vec<(Slot, Line)>, past: &mut Past) -> Result<(), LoadError> {
        for (slot, words) in records {
            let (file, range, by) = line::hold(&words).ok_or(LoadError::Damaged("a hold"))?;
            let (HeldBy::Open(id) | HeldBy::Quarantine(id, _)) = by;
            if id.0 > past.last_invalidation {
                return Err(LoadError::Damaged("a hold of what was never begun"));
            }
            past.holds.push((file, range, by));
            // The gate holds all of it anew, and that is written down before these are gone.
            self.stale.push(slot);
        }
        // Of two that overlap the gate takes the first: let it be the one that only a person lifts.
        past.holds.sort_by_key(|(.., by)| matches!(by, HeldBy::Quarantine(..)));
        Ok(())
    }

    fn unended_again(&mut self, records: Vec<(Slot, Line)>, past: &mut Past) -> Result<(), LoadError> {
        for (slot, words) in records {
            let id = line::unended(&words).filter(|id| id.0 <= past.last_invalidation);
            let id = id.ok_or(LoadError::Damaged("an open conversion"))?;
            match self.unsettled.insert(id, slot) {
                None => past.unended.push(id),
                Some(twice) => self.unended.clear(twice),
            }
        }
        Ok(())
    }

    fn asides_again(&mut self, records: Vec<(Slot, Line)>) -> Vec<(RegionId, Aside)> {
        let mut asides = Vec::new();
        for (slot, words) in records {
            match line::aside(&words).filter(|(region, _)| self.known.contains_key(region)) {
                Some((region, aside)) if !self.beside.contains_key(&region) => {
                    self.beside.insert(region, slot);
                    asides.push((region, aside));
                }
                _ => self.asides.clear(slot),
            }
        }
        asides
    }

    /// Page states of files that nothing is known of any more.
    fn forget_files(&self, past: &Past) {
        for file in PageMap::files(&self.store) {
            let of_region = past.regions.iter().any(|region| region.spec.backing.file == file);
            let of_hold = past.holds.iter().any(|(held, ..)| *held == file);
            if !of_region
                && !of_hold
                && let Ok(map) = PageMap::in_store(&self.store, file)
            {
                map.discard();
            }
        }
    }
}
