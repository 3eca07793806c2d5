//! New memory: it is examined by a call, checked, and passed to the gate, where it may have to wait for memory that is being
//! closed.

use std::os::fd::OwnedFd;

use passgate_bindings::{Gpa, PageRange};

use super::fdstore::Name;
use super::{Call, Examined, Next, Session};
use crate::gate::{Caller, Event, FileId, RegionSpec};
use crate::protocol::verbs::AddMemory;

impl Session {
    /// Takes a client's memory: it is examined by a call, then checked, then passed to the gate.
    pub fn add_memory(&mut self, caller: Caller, memory: AddMemory, fds: Vec<OwnedFd>) {
        let store = self.storage.fd_store().cloned();
        let in_use = self.files.all();
        self.queued_steps.push_back(Next::Call(Call::Examine { caller, memory, fds, in_use, store }));
    }

    /// Takes a client's memory, and what its files are.
    pub(super) fn admit(&mut self, caller: Caller, memory: &AddMemory, files: Vec<Examined>) {
        let (reserved, usable) = (self.hardware.reserved(), self.hardware.usable_iova());
        let stored: Vec<_> = if self.storage.fd_store().is_some() {
            files.iter().enumerate().filter_map(|(nth, file)| file.store_name(nth)).collect()
        } else {
            Vec::new()
        };
        match self.files.admit(caller, memory, files, &reserved, usable) {
            Ok(spec) => self.add_region(caller, spec),
            Err(error) => {
                stored.into_iter().for_each(|name| self.remove_stored(&name));
                self.queued_steps.push_back(Next::Refused(caller, error));
            }
        }
    }

    /// Closes examined files of a request that is not pursued any more, and removes them from the descriptor store unless they
    /// are needed.
    pub fn unwanted(&mut self, files: Vec<Examined>) {
        let names: Vec<_> = files.iter().enumerate().filter_map(|(nth, file)| file.store_name(nth)).collect();
        // With their claims, which would prevent the removal.
        drop(files);
        if self.storage.fd_store().is_some() {
            names.iter().for_each(|name| self.remove_stored(name));
        }
    }

    /// Returns true if a region that is not being closed overlaps `gpa`.
    pub fn is_taken(&self, gpa: PageRange<Gpa>) -> bool {
        self.gate.is_taken(gpa)
    }

    /// Adds a region, or defers it while a region in its way is being closed.
    fn add_region(&mut self, caller: Caller, spec: RegionSpec) {
        if self.gate.close_to_wait_for(caller.client, &spec).is_some() {
            self.deferred_regions.defer(caller, spec, self.clock.now());
        } else {
            self.handle(Event::AddRegion { caller, spec });
        }
    }

    /// Adds the deferred regions that need not wait any more, or whose deadline has passed. Returns true if there were any.
    pub(super) fn add_deferred(&mut self) -> bool {
        if self.deferred_regions.is_empty() {
            return false;
        }
        let mut added = false;
        // One by one: each that is added may be in the way of the next.
        while let Some((caller, spec)) =
            self.deferred_regions.take(|client, spec| self.gate.close_to_wait_for(client, spec))
        {
            self.handle(Event::AddRegion { caller, spec });
            added = true;
        }
        added
    }

    /// Closes the file and the private side of a region that was not added, unless they are needed.
    pub(super) fn forget_rejected(&mut self, (file, private): (FileId, Option<FileId>)) {
        self.forget(file);
        if let Some(private) = private {
            self.remove_stored(&Name::Private(private));
        }
    }
}
