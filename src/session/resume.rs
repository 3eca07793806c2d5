//! What a session hands on to the next process, and how it goes on from what it was handed.

use passgate_backends::resume::Ids;

use super::Session;
use super::fdstore::{FdStore, Kept, Name};
use super::lasting::{Lasting, Left};
use crate::gate::{ClientId, FileId, InvalidationId};

/// By what a session outlives its process.
#[derive(Debug)]
pub struct Hold {
    /// Where its files are kept.
    pub store: FdStore,
    /// Where what it knows is kept.
    pub lasting: Lasting,
    /// What an earlier process left there, and the files that were kept for it.
    pub left: Option<(Left, Kept)>,
}

impl Session {
    /// Goes on from where another process ended.
    pub(super) fn go_on(&mut self, left: Left, mut kept: Kept) {
        let Left { mut past, asides, .. } = left;
        for region in &mut past.regions {
            let aside = asides.iter().find(|(id, _)| *id == region.region).map(|(_, aside)| *aside);
            if let Err(error) = self.files.again(region, aside, &mut kept) {
                log::error!("the memory at {} was not kept ({error}): it is closed", region.spec.gpa);
                region.closing = true;
            }
        }
        for (file, ..) in &past.holds {
            self.files.hold_again(*file, &mut kept);
        }
        self.gate.resume(past, &mut self.effects);
        if let Some(lasting) = &mut self.lasting {
            lasting.resumed(&self.gate, &self.effects);
        }
        if let Some(records) = &mut self.records {
            records.go_on(&self.gate.snapshot().quarantine);
        }
        for name in kept.names() {
            if let (Name::Memory(_) | Name::Private(_), Some(store)) = (&name, &self.store) {
                store.remove(name);
            }
        }
    }

    /// The ids are such, and all files of domain and devices are kept.
    pub fn complete(&self, ids: Ids) {
        if let Some(lasting) = &self.lasting {
            let names: Vec<_> = self.devices.iter().map(|device| device.name().to_owned()).collect();
            // Of software devices nothing outlives the process.
            lasting.complete(ids, if ids == Ids::Nothing { &[] } else { &names });
        }
    }

    /// Has a file that is not needed kept no longer.
    pub(super) fn let_go(&self, name: &Name) {
        let needed = match name {
            Name::Memory(file) => self.files.get(*file).is_some(),
            Name::Private(file) => self.files.has_private(*file),
            _ => true,
        };
        if let Some(store) = self.store.as_ref().filter(|_| !needed) {
            store.remove(name.clone());
        }
    }

    pub(super) fn forget(&mut self, file: FileId) {
        self.files.forget(file);
        self.let_go(&Name::Memory(file));
    }

    /// Whether memory of an earlier daemon's clients waits for somebody to come back for it.
    pub fn has_orphans(&self) -> bool {
        self.gate.has_orphans()
    }

    /// Whether this client may say what pages are that a conversion left in quarantine ([`crate::gate::Gate::may_settle`]).
    pub fn may_settle(&self, client: ClientId, invalidation: InvalidationId) -> bool {
        self.gate.may_settle(client, invalidation)
    }
}
