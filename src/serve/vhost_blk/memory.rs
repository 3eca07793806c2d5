//! The front-end's memory table: its regions at the gate, and their mappings in this process.
//!
//! The removal of a region is an invalidation that cannot be refused: first no worker accesses the region any more, then it is
//! unmapped from every domain with proof, and only then the front-end is answered. A region that is added is mapped for the
//! drive before a worker sees it.

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use passgate_bindings::identity::{self, FileError};
use passgate_bindings::memory::GuestFile;
use vhost::vhost_user::message::VhostUserMemoryRegion;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};

use crate::client::{AddMemory, AdoptedRegion, Client};

/// The time for which a new region waits for memory at its addresses that an earlier front-end has left: it is not closed while
/// a conversion of it is open.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);
/// The time between two attempts during that wait.
const RETRY_INTERVAL: Duration = Duration::from_millis(5);

/// A change of the memory table that has failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum MemoryError {
    /// The file is not suitable for guest memory.
    #[error("memory at {gpa:#x}: {source}")]
    File {
        /// The guest-physical address of the region.
        gpa: u64,
        /// The reason.
        source: FileError,
    },
    /// This process cannot map it.
    #[error("memory at {gpa:#x} cannot be mapped here: {why}")]
    Mapping {
        /// The guest-physical address of the region.
        gpa: u64,
        /// The reason.
        why: String,
    },
    /// The gate has refused to add or could not remove the region.
    #[error("memory at {gpa:#x}: {source}")]
    Gate {
        /// The guest-physical address of the region.
        gpa: u64,
        /// The gate's error.
        source: crate::client::Error,
    },
    /// There is no such region.
    #[error("there is no memory of {len:#x} bytes at {gpa:#x} to be removed")]
    Unknown {
        /// The guest-physical address of the region.
        gpa: u64,
        /// The length in bytes.
        len: u64,
    },
}

/// A region as a front-end describes it, without its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shape {
    pub(super) gpa: u64,
    pub(super) len: u64,
    /// The offset of the region in its file.
    pub(super) offset: u64,
}

impl Shape {
    pub(super) fn of(region: &VhostUserMemoryRegion) -> Self {
        Self { gpa: region.guest_phys_addr, len: region.memory_size, offset: region.mmap_offset }
    }
}

/// A region of the table.
#[derive(Debug)]
struct Region {
    shape: Shape,
    /// The address of the region in the front-end's address space, in which the addresses of rings are given.
    user: u64,
    /// The device and inode number of the file.
    file: (u64, u64),
    /// The number of the region at the gate.
    id: u32,
    mapping: Arc<GuestRegionMmap>,
}

impl Region {
    /// Returns true if this is the region that the front-end describes. The kernel decides whether the file is the same, because
    /// another file may have the same numbers (docs/decisions/0010-file-identity.md).
    fn is(&self, shape: Shape, numbers: (u64, u64), file: &File) -> bool {
        let current = self.mapping.file_offset();
        let same = |current: &FileOffset| identity::same_file(file, current.file()) == Ok(true);
        self.shape == shape && self.file == numbers && current.is_some_and(same)
    }
}

/// The memory table of one front-end.
#[derive(Debug)]
pub(super) struct Table {
    /// The connection to the gate. Regions that it has added are removed when it is closed.
    client: Client,
    regions: Vec<Region>,
    /// Regions of an earlier daemon's front-end, which a restart has left mapped. They are matched with the regions that this
    /// front-end adds; those that its first table does not have are removed.
    adopted: Vec<AdoptedRegion>,
    /// The files of an earlier daemon's regions, for as long as the session has them open.
    inherited_files: Vec<Weak<GuestFile>>,
}

impl Table {
    /// Returns an empty table. `inherited_files` are the files of an earlier daemon's regions.
    pub(super) fn new(mut client: Client, inherited_files: Vec<Weak<GuestFile>>) -> Self {
        // An error means that there is nothing to adopt.
        let adopted = if inherited_files.is_empty() { None } else { client.adopt().ok() };
        let adopted = adopted.map(|all| all.regions).unwrap_or_default();
        Self { client, regions: Vec::new(), adopted, inherited_files }
    }

    /// Replaces the table by these regions. Regions that are in both are not touched. `show` must replace the memory that workers
    /// see; it is called before regions are removed from the gate, and again once the new ones are added.
    pub(super) fn set(
        &mut self,
        wanted: Vec<(Shape, u64, File)>,
        mut show: impl FnMut(GuestMemoryMmap),
    ) -> Result<(), MemoryError> {
        let mut identified = Vec::with_capacity(wanted.len());
        for (shape, user, file) in wanted {
            let found = identity::identify(&file);
            let found = found.map_err(|source| MemoryError::File { gpa: shape.gpa, source })?;
            identified.push((shape, user, file, (found.device, found.inode)));
        }
        let is_wanted = |region: &Region| {
            identified.iter().any(|(shape, _, file, numbers)| region.is(*shape, *numbers, file))
        };
        let (unchanged, removed): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.regions).into_iter().partition(is_wanted);
        self.regions = unchanged;
        if !removed.is_empty() {
            show(self.guest_memory()?);
        }
        for region in &removed {
            self.remove_from_gate(region)?;
        }
        drop(removed);
        for (shape, user, file, numbers) in identified {
            match self.regions.iter_mut().find(|region| region.is(shape, numbers, &file)) {
                Some(region) => region.user = user,
                None => self.insert(shape, user, file, numbers)?,
            }
        }
        show(self.guest_memory()?);
        self.drop_adopted()
    }

    /// Removes the regions of an earlier daemon's front-end that this one does not have.
    fn drop_adopted(&mut self) -> Result<(), MemoryError> {
        for AdoptedRegion { region, gpa, .. } in std::mem::take(&mut self.adopted) {
            self.client.remove_memory(region).map_err(|source| MemoryError::Gate { gpa, source })?;
        }
        Ok(())
    }

    /// Adds one region. `show` is called once it is mapped for the drive.
    pub(super) fn add(
        &mut self,
        shape: Shape,
        user: u64,
        file: File,
        show: impl FnOnce(GuestMemoryMmap),
    ) -> Result<(), MemoryError> {
        let found = identity::identify(&file);
        let found = found.map_err(|source| MemoryError::File { gpa: shape.gpa, source })?;
        self.insert(shape, user, file, (found.device, found.inode))?;
        show(self.guest_memory()?);
        Ok(())
    }

    /// Removes one region. `show` is called before it is removed from the gate. Returns once it is mapped for no device.
    pub(super) fn remove(
        &mut self,
        shape: Shape,
        user: u64,
        show: impl FnOnce(GuestMemoryMmap),
    ) -> Result<(), MemoryError> {
        let same = |region: &Region| {
            region.shape.gpa == shape.gpa && region.shape.len == shape.len && region.user == user
        };
        let index = self.regions.iter().position(same);
        let index = index.ok_or(MemoryError::Unknown { gpa: shape.gpa, len: shape.len })?;
        let region = self.regions.remove(index);
        show(self.guest_memory()?);
        self.remove_from_gate(&region)
    }

    /// Removes all regions. Returns once they are mapped for no device, or with the first error if one may still be.
    pub(super) fn clear(&mut self) -> Result<(), MemoryError> {
        let regions = std::mem::take(&mut self.regions);
        let results: Vec<_> = regions.iter().map(|region| self.remove_from_gate(region)).collect();
        results.into_iter().collect()
    }

    /// Returns the guest-physical address of an address of the front-end; none if it is in no region.
    pub(super) fn gpa(&self, user: u64) -> Option<u64> {
        let inside = |region: &&Region| user.checked_sub(region.user).is_some_and(|at| at < region.shape.len);
        let region = self.regions.iter().find(inside)?;
        Some(region.shape.gpa + (user - region.user))
    }

    /// Returns true if this guest-physical address is in a region.
    pub(super) fn has(&self, gpa: u64) -> bool {
        let inside =
            |region: &Region| gpa.checked_sub(region.shape.gpa).is_some_and(|at| at < region.shape.len);
        self.regions.iter().any(inside)
    }

    /// Returns the memory that workers are to see.
    fn guest_memory(&self) -> Result<GuestMemoryMmap, MemoryError> {
        if self.regions.is_empty() {
            return Ok(GuestMemoryMmap::new());
        }
        let mut mappings: Vec<_> = self.regions.iter().map(|region| Arc::clone(&region.mapping)).collect();
        mappings.sort_by_key(|mapping| mapping.start_addr());
        GuestMemoryMmap::from_arc_regions(mappings)
            .map_err(|error| MemoryError::Mapping { gpa: self.regions[0].shape.gpa, why: error.to_string() })
    }

    /// Adds a region to the gate, or matches it with an adopted one, and maps it in this process.
    fn insert(
        &mut self,
        shape: Shape,
        user: u64,
        file: File,
        numbers: (u64, u64),
    ) -> Result<(), MemoryError> {
        let Shape { gpa, len, offset } = shape;
        let is_inherited = || {
            let mut files = self.inherited_files.iter().filter_map(Weak::upgrade);
            files.any(|inherited| identity::same_file(&file, &*inherited) == Ok(true))
        };
        let same = |adopted: &AdoptedRegion| {
            (adopted.gpa, adopted.length, adopted.offset, adopted.writable) == (gpa, len, offset, true)
                && (adopted.device, adopted.inode) == numbers
                && is_inherited()
        };
        let id = match self.adopted.iter().position(same) {
            Some(index) => self.adopted.swap_remove(index).region,
            None => {
                // Adopted memory that overlaps the new region and is not the same belongs to no front-end any more.
                if self.adopted.iter().any(|adopted| {
                    adopted.gpa < gpa.saturating_add(len) && gpa < adopted.gpa.saturating_add(adopted.length)
                }) {
                    self.drop_adopted()?;
                }
                // First, because the gate's border checks the file, its seals and its size: only then it is safe to map it here.
                self.add_to_gate(shape, &file)?
            }
        };
        let mapping = map_region(shape, file);
        let mapping = match mapping {
            Ok(mapping) => Arc::new(mapping),
            Err(error) => {
                let removed = self.client.remove_memory(id);
                return removed.map_err(|source| MemoryError::Gate { gpa, source }).and(Err(error));
            }
        };
        self.regions.push(Region { shape, user, file: numbers, id, mapping });
        Ok(())
    }

    /// Adds a region to the gate. Waits up to [`CLOSE_TIMEOUT`] for memory of an earlier front-end at its addresses to be closed,
    /// because a front-end that reconnects may give its disk up after one refusal.
    fn add_to_gate(&mut self, shape: Shape, file: &File) -> Result<u32, MemoryError> {
        let Shape { gpa, len, offset } = shape;
        let memory = AddMemory { offset, ..AddMemory::shared(gpa, len) };
        let (until, mut last) = (Instant::now() + CLOSE_TIMEOUT, false);
        loop {
            match self.client.add_memory(&memory, &[&file.as_fd()]) {
                Ok(added) => return Ok(added.region),
                Err(source) if last || Instant::now() > until => {
                    return Err(MemoryError::Gate { gpa, source });
                }
                // If nothing is in the way now, it may have been closed since the attempt: one last attempt.
                Err(_) => last = !self.is_in_use(gpa, len),
            }
            if !last {
                std::thread::sleep(RETRY_INTERVAL);
            }
        }
    }

    /// Returns true if a region that is not this front-end's overlaps these addresses.
    fn is_in_use(&mut self, gpa: u64, len: u64) -> bool {
        let Ok(status) = self.client.status() else { return false };
        status.regions.iter().any(|other| {
            let overlaps =
                other.gpa < gpa.saturating_add(len) && gpa < other.gpa.saturating_add(other.length);
            overlaps && !self.regions.iter().any(|region| region.id == other.region)
        })
    }

    fn remove_from_gate(&mut self, region: &Region) -> Result<(), MemoryError> {
        let gpa = region.shape.gpa;
        self.client.remove_memory(region.id).map_err(|source| MemoryError::Gate { gpa, source })
    }
}

/// Maps a region in this process.
fn map_region(shape: Shape, file: File) -> Result<GuestRegionMmap, MemoryError> {
    let Shape { gpa, len, offset } = shape;
    let region = VhostUserMemoryRegion::new(gpa, len, 0, offset);
    let failed = |why: String| MemoryError::Mapping { gpa, why };
    let mapping = region.mmap_region(file).map_err(|error| failed(error.to_string()))?;
    let overflows = || failed("it ends beyond the address space".to_owned());
    GuestRegionMmap::new(mapping, GuestAddress(gpa)).ok_or_else(overflows)
}

#[cfg(test)]
#[path = "memory_tests.rs"]
mod tests;
