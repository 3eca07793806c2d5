//! Everything by which a session outlives its process: the ledger's records, the state directory, and the descriptors that the
//! service manager stores.
//!
//! The changes of an event are written here before any of its effects is executed.

use std::time::Instant;

use passgate_backends::handover::DomainIds;

use super::fdstore::{FdStore, Name};
use super::persist::{PersistentState, StoredRegionInfo, Touched};
use super::records::Records;
use crate::gate::ledger::Store;
use crate::gate::{Effect, Event, Gate, RegionId};

/// The parts that a session has; none of them is needed.
#[derive(Debug)]
pub(super) struct Storage {
    records: Option<Records>,
    persistent: Option<PersistentState>,
    fd_store: Option<FdStore>,
}

impl Storage {
    pub(super) fn new(
        records: Option<Records>,
        persistent: Option<PersistentState>,
        fd_store: Option<FdStore>,
    ) -> Self {
        Self { records, persistent, fd_store }
    }

    /// Writes an event that the gate is about to take to the audit log. Returns the records for the next process that it may change;
    /// none where there are none.
    pub(super) fn event(&mut self, event: &Event) -> Option<Touched> {
        if let Some(records) = &mut self.records {
            records.record_event(event);
        }
        self.persistent.is_some().then(|| PersistentState::touched(event))
    }

    /// Writes what the event of [`Storage::event`] has changed, and its effects.
    pub(super) fn effects(&mut self, touched: Option<Touched>, gate: &Gate, effects: &[Effect]) {
        if let (Some(persistent), Some(touched)) = (&mut self.persistent, touched) {
            persistent.record_changes(touched, gate, effects);
        }
        if let Some(records) = &mut self.records {
            records.record_effects(effects, || gate.quarantined_ranges().collect());
        }
    }

    /// Writes all of the gate's state, after it has resumed from the records of an earlier process.
    pub(super) fn resumed(&mut self, gate: &Gate, effects: &[Effect]) {
        if let Some(persistent) = &mut self.persistent {
            persistent.record_all(gate, effects);
        }
        self.write_quarantine(gate);
    }

    /// Writes all that is in quarantine to the disk, with the id of the ledger that has it, too.
    pub(super) fn write_quarantine(&mut self, gate: &Gate) {
        if let (Some(records), Some(persistent)) = (&mut self.records, &self.persistent) {
            records.rewrite_quarantine(&gate.quarantined_ranges().collect::<Vec<_>>(), persistent.id());
        }
    }

    /// Takes the quarantine of the last daemon from the disk.
    pub(super) fn take_quarantine(&mut self) -> Vec<Event> {
        self.records.as_mut().map(Records::take_quarantine).unwrap_or_default()
    }

    /// As [`Storage::take_quarantine`], without what this ledger had and has lifted since.
    pub(super) fn take_quarantine_beyond_ledger(&mut self) -> Vec<Event> {
        let ledger = self.persistent.as_ref().and_then(PersistentState::id);
        self.records.as_mut().map(|records| records.take_quarantine_beyond(ledger)).unwrap_or_default()
    }

    /// Writes the session's properties of a region.
    pub(super) fn add_region_info(&mut self, region: RegionId, info: StoredRegionInfo) {
        if let Some(persistent) = &mut self.persistent {
            persistent.add_region_info(region, info);
        }
    }

    /// Completes the records for the next process ([`PersistentState::complete`]).
    pub(super) fn complete(&self, ids: DomainIds, devices: &[(String, bool)]) {
        if let Some(persistent) = &self.persistent {
            persistent.complete(ids, devices);
        }
    }

    /// Returns the store that the gate's ledger is kept in; none if the ledger ends with the process.
    pub(super) fn ledger(&self) -> Option<Store> {
        self.persistent.as_ref().map(|persistent| persistent.store().clone())
    }

    /// Returns the store of descriptors.
    pub(super) fn fd_store(&self) -> Option<&FdStore> {
        self.fd_store.as_ref()
    }

    /// Removes a descriptor from the store.
    pub(super) fn remove(&self, name: &Name) {
        if let Some(store) = &self.fd_store {
            store.remove(name.clone());
        }
    }

    /// Returns the time at which [`Storage::retry_quarantine`] must be called.
    pub(super) fn quarantine_retry_at(&self) -> Option<Instant> {
        self.records.as_ref().and_then(Records::quarantine_retry_at)
    }

    /// Writes the quarantine to the disk again if that failed before, and its time is due at `now`.
    pub(super) fn retry_quarantine(&mut self, now: Instant, gate: &Gate) {
        if let Some(records) = &mut self.records {
            records.retry_quarantine(now, || gate.quarantined_ranges().collect());
        }
    }

    /// Returns the number of lines of the audit log that could not be written.
    pub(super) fn dropped(&self) -> u64 {
        self.records.as_ref().map_or(0, Records::dropped)
    }

    /// Returns the records for the next process as text ([`super::Session::canonical`]).
    pub(super) fn canonical(&self) -> String {
        self.persistent.as_ref().map(PersistentState::canonical).unwrap_or_default()
    }

    #[cfg(test)]
    pub(super) fn set_persistent(&mut self, persistent: PersistentState) {
        self.persistent = Some(persistent);
    }

    #[cfg(test)]
    pub(super) fn set_fd_store(&mut self, store: FdStore) {
        self.fd_store = Some(store);
    }
}
