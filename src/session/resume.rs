//! A session's handover from one process to the next, and the files that the service manager stores for it.

use std::sync::{Arc, Weak};

use passgate_backends::handover::DomainIds;
use passgate_bindings::memory::GuestFile;

use super::Session;
use super::fdstore::{FdStore, Name, StoredFds};
use super::persist::{EarlierState, PersistentState};
use crate::gate::ledger::exclusions::gaps;
use crate::gate::{Cause, ClientId, Event, ExcludedBy, FileId, InvalidationId, Reason, RecordedState};

/// The means by which a session outlives its process.
#[derive(Debug)]
pub struct Persistence {
    /// The store of its descriptors.
    pub store: FdStore,
    /// The ledger and the records beside it.
    pub persistent: PersistentState,
    /// The state that an earlier process left in the ledger, and the descriptors that were stored for it.
    pub earlier: Option<(EarlierState, StoredFds)>,
    /// If no state of an earlier process is taken over: the ranges that stay in quarantine all the same, as events for a gate
    /// without regions, and the files that they are in.
    pub quarantine: Option<(Vec<Event>, StoredFds)>,
}

impl Session {
    /// Resumes from the state that another process left. The session's gate must have its domain and devices, and no memory.
    pub(super) fn resume_from(&mut self, left: EarlierState, mut kept: StoredFds) {
        let EarlierState { mut past, region_infos, .. } = left;
        for region in &mut past.regions {
            let info = region_infos.iter().find(|(id, _)| *id == region.region).map(|(_, info)| *info);
            if let Err(error) = self.files.restore_region(region, info, &mut kept) {
                log::error!("the memory at {} was not kept ({error}): it is closed", region.spec.gpa);
                region.closing = true;
            }
        }
        add_quarantine_on_disk(&mut past, self.storage.take_quarantine_beyond_ledger());
        for (file, ..) in &past.exclusions {
            self.files.restore_file(*file, &mut kept);
        }
        self.gate.resume(past, self.effects.list());
        // Before any effect is executed, so that the domain knows the mappings before the first call over them. What is in
        // doubt is being unmapped, and is not among the live ranges.
        for (id, domain) in self.hardware.domains() {
            for range in self.gate.live(id) {
                domain.resumed(range);
            }
        }
        self.storage.resumed(&self.gate, self.effects.pending());
        // The descriptors that no region or quarantine has taken are not needed any more.
        for name in kept.names() {
            if let Name::Memory(_) | Name::Private(_) = &name {
                self.storage.remove(&name);
            }
        }
    }

    /// Completes the records for the next process, with the ids of the domain's kernel objects. The files of domain and devices
    /// must be stored before.
    pub fn complete(&self, ids: DomainIds) {
        let named = self.hardware.devices().iter().zip(self.gate.all_traits());
        let names: Vec<_> =
            named.map(|(device, (_, traits))| (device.name().to_owned(), !traits.ats)).collect();
        // Nothing of a software domain outlives its process: the next daemon assigns new devices.
        self.storage.complete(ids, if ids == DomainIds::Nothing { &[] } else { &names });
    }

    /// Removes a file from the descriptor store, unless it is needed.
    pub(super) fn remove_stored(&self, name: &Name) {
        let needed = match name {
            Name::Memory(file) => self.files.get(*file).is_some(),
            Name::Private(file) => self.files.has_private(*file),
            _ => true,
        };
        if !needed {
            self.storage.remove(name);
        }
    }

    /// Closes a file that the gate does not need any more ([`crate::gate::Effect::ForgetFile`]). The gate is asked again: another
    /// region of the file may have been added since the effect.
    pub(super) fn forget(&mut self, file: FileId) {
        if self.gate.knows(file) || self.files.is_adding(file) {
            return;
        }
        self.files.forget(file);
        self.remove_stored(&Name::Memory(file));
    }

    /// Returns the open files of guest memory.
    pub fn guest_files(&self) -> Vec<Weak<GuestFile>> {
        self.files.all().iter().map(Arc::downgrade).collect()
    }

    /// Returns true while memory of an earlier daemon's clients waits to be adopted.
    pub fn has_orphans(&self) -> bool {
        self.gate.has_orphans()
    }

    /// Returns true if this client may say what the pages are that a conversion left in quarantine
    /// ([`crate::gate::Gate::may_settle`]).
    pub fn may_settle(&self, client: ClientId, invalidation: InvalidationId) -> bool {
        self.gate.may_settle(client, invalidation)
    }
}

/// Adds to `past` what is in quarantine on disk and is not excluded in the ledger. No event of this process can prove anything
/// about these pages, so they stay in quarantine until an operator releases them.
fn add_quarantine_on_disk(past: &mut RecordedState, on_disk: Vec<Event>) {
    for event in on_disk {
        let Event::Quarantine { file, range, invalidation, reason } = event else { continue };
        let mut excluded: Vec<_> = past
            .exclusions
            .iter()
            .filter(|(of, excluded, _)| *of == file && excluded.overlaps(range))
            .map(|(_, excluded, _)| *excluded)
            .collect();
        excluded.sort_unstable();
        let missing: Vec<_> = gaps(range, excluded.into_iter()).collect();
        if missing.is_empty() {
            continue;
        }
        log::warn!(
            "{} ranges are in quarantine on disk and not in the ledger: they stay there",
            missing.len()
        );
        // 0 is no invalidation. A number so high that no gate reaches it would leave this one without numbers.
        let id = InvalidationId(invalidation.0.clamp(1, u64::MAX / 2));
        past.last_invalidation = past.last_invalidation.max(id.0);
        // A cause that no proof about mappings lifts.
        let reason = Reason { cause: Cause::OwnerUnknown, ..reason };
        past.exclusions
            .extend(missing.into_iter().map(|range| (file, range, ExcludedBy::Quarantine(id, reason))));
    }
}

#[cfg(test)]
mod tests;
