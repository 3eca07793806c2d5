//! The front-end's memory table: regions of the gate, and this process's own view of them.
//!
//! A region that goes is an invalidation, from a client that hears no "no": first no worker looks at it any more, then
//! it is taken out of every domain with proof, and only then the front-end is answered. A region that comes is mapped
//! for the drive before any worker sees it.

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use passgate_bindings::identity::{self, FileError};
use passgate_bindings::memory::GuestFile;
use vhost::vhost_user::message::VhostUserMemoryRegion;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};

use crate::client::{AddMemory, AdoptedRegion, Client};

/// How long memory is waited for that an earlier front-end could not remove, because a conversion of it was open.
const GOING: Duration = Duration::from_secs(5);
/// How often it is looked for.
const AGAIN: Duration = Duration::from_millis(5);

/// Why the table is not as the front-end would have it.
#[derive(Debug, thiserror::Error)]
pub(super) enum MemoryError {
    /// Not a file for guest memory.
    #[error("memory at {gpa:#x}: {source}")]
    File {
        /// Where.
        gpa: u64,
        /// What is wrong.
        source: FileError,
    },
    /// This process cannot map it.
    #[error("memory at {gpa:#x} cannot be mapped here: {why}")]
    Window {
        /// Where.
        gpa: u64,
        /// Why.
        why: String,
    },
    /// The gate has not taken it, or could not let go of it.
    #[error("memory at {gpa:#x}: {source}")]
    Gate {
        /// Where.
        gpa: u64,
        /// What it said.
        source: crate::Error,
    },
    /// There is no such region.
    #[error("there is no memory of {len:#x} bytes at {gpa:#x} to be removed")]
    Unknown {
        /// Where.
        gpa: u64,
        /// How long.
        len: u64,
    },
}

/// A region as a front-end describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shape {
    pub(super) gpa: u64,
    pub(super) len: u64,
    /// Where in its file it begins.
    pub(super) offset: u64,
}

impl Shape {
    pub(super) fn of(region: &VhostUserMemoryRegion) -> Self {
        Self { gpa: region.guest_phys_addr, len: region.memory_size, offset: region.mmap_offset }
    }
}

/// A region that is there.
#[derive(Debug)]
struct Region {
    shape: Shape,
    /// Where the front-end has it in its own address space: its rings' addresses are of that kind.
    user: u64,
    /// Device and inode of its file.
    file: (u64, u64),
    /// Its number at the gate.
    id: u32,
    window: Arc<GuestRegionMmap>,
}

impl Region {
    /// True where this is the region that the front-end describes. A file is this one's only where the kernel says so:
    /// another one may have its numbers (docs/decisions/0010-file-identity.md).
    fn is(&self, shape: Shape, numbers: (u64, u64), file: &File) -> bool {
        let held = self.window.file_offset();
        let same = |held: &FileOffset| identity::same_file(file, held.file()) == Ok(true);
        self.shape == shape && self.file == numbers && held.is_some_and(same)
    }
}

/// All regions of one front-end.
#[derive(Debug)]
pub(super) struct Table {
    /// Its own connection: what was added goes when it is closed.
    client: Client,
    regions: Vec<Region>,
    /// What an earlier daemon's front-end had, which a restart has kept mapped, until this one says what it has.
    adopted: Vec<AdoptedRegion>,
    /// The files of these, and maybe others, while the session holds them.
    kept: Vec<Weak<GuestFile>>,
}

impl Table {
    /// An empty one. `kept` are the files of what an earlier daemon has left.
    pub(super) fn new(mut client: Client, kept: Vec<Weak<GuestFile>>) -> Self {
        // An error says that there is nothing.
        let adopted = if kept.is_empty() { None } else { client.adopt().ok() };
        let adopted = adopted.map(|all| all.regions).unwrap_or_default();
        Self { client, regions: Vec::new(), adopted, kept }
    }

    /// Makes the table these regions. What was there and stays so is not touched. `see` is called when the workers
    /// must look at other memory than before.
    pub(super) fn set(
        &mut self,
        wanted: Vec<(Shape, u64, File)>,
        mut see: impl FnMut(GuestMemoryMmap),
    ) -> Result<(), MemoryError> {
        let mut identified = Vec::with_capacity(wanted.len());
        for (shape, user, file) in wanted {
            let found = identity::identify(&file);
            let found = found.map_err(|source| MemoryError::File { gpa: shape.gpa, source })?;
            identified.push((shape, user, file, (found.device, found.inode)));
        }
        let stays = |region: &Region| {
            identified.iter().any(|(shape, _, file, numbers)| region.is(*shape, *numbers, file))
        };
        let (kept, gone): (Vec<_>, Vec<_>) = std::mem::take(&mut self.regions).into_iter().partition(stays);
        self.regions = kept;
        if !gone.is_empty() {
            see(self.view()?);
        }
        for region in &gone {
            self.let_go(region)?;
        }
        drop(gone);
        for (shape, user, file, numbers) in identified {
            match self.regions.iter_mut().find(|region| region.is(shape, numbers, &file)) {
                Some(region) => region.user = user,
                None => self.take(shape, user, file, numbers)?,
            }
        }
        see(self.view()?);
        self.drop_adopted()
    }

    /// What was kept and is not this front-end's goes.
    fn drop_adopted(&mut self) -> Result<(), MemoryError> {
        for AdoptedRegion { region, gpa, .. } in std::mem::take(&mut self.adopted) {
            self.client.remove_memory(region).map_err(|source| MemoryError::Gate { gpa, source })?;
        }
        Ok(())
    }

    /// Adds one region.
    pub(super) fn add(
        &mut self,
        shape: Shape,
        user: u64,
        file: File,
        see: impl FnOnce(GuestMemoryMmap),
    ) -> Result<(), MemoryError> {
        let found = identity::identify(&file);
        let found = found.map_err(|source| MemoryError::File { gpa: shape.gpa, source })?;
        self.take(shape, user, file, (found.device, found.inode))?;
        see(self.view()?);
        Ok(())
    }

    /// Removes one region; returns when no device sees it any more.
    pub(super) fn remove(
        &mut self,
        shape: Shape,
        user: u64,
        see: impl FnOnce(GuestMemoryMmap),
    ) -> Result<(), MemoryError> {
        let same = |region: &Region| {
            region.shape.gpa == shape.gpa && region.shape.len == shape.len && region.user == user
        };
        let index = self.regions.iter().position(same);
        let index = index.ok_or(MemoryError::Unknown { gpa: shape.gpa, len: shape.len })?;
        let region = self.regions.remove(index);
        see(self.view()?);
        self.let_go(&region)
    }

    /// Lets go of all regions; returns when no device sees them any more, or it is known that one may.
    pub(super) fn clear(&mut self) -> Result<(), MemoryError> {
        let regions = std::mem::take(&mut self.regions);
        let gone: Vec<_> = regions.iter().map(|region| self.let_go(region)).collect();
        gone.into_iter().collect()
    }

    /// The guest-physical address of one of the front-end's own, where it is in a region.
    pub(super) fn gpa(&self, user: u64) -> Option<u64> {
        let inside = |region: &&Region| user.checked_sub(region.user).is_some_and(|at| at < region.shape.len);
        let region = self.regions.iter().find(inside)?;
        Some(region.shape.gpa + (user - region.user))
    }

    /// Returns true where this guest-physical address is in a region.
    pub(super) fn has(&self, gpa: u64) -> bool {
        let inside =
            |region: &Region| gpa.checked_sub(region.shape.gpa).is_some_and(|at| at < region.shape.len);
        self.regions.iter().any(inside)
    }

    /// What workers see of it.
    fn view(&self) -> Result<GuestMemoryMmap, MemoryError> {
        if self.regions.is_empty() {
            return Ok(GuestMemoryMmap::new());
        }
        let mut windows: Vec<_> = self.regions.iter().map(|region| Arc::clone(&region.window)).collect();
        windows.sort_by_key(|window| window.start_addr());
        GuestMemoryMmap::from_arc_regions(windows)
            .map_err(|error| MemoryError::Window { gpa: self.regions[0].shape.gpa, why: error.to_string() })
    }

    fn take(&mut self, shape: Shape, user: u64, file: File, numbers: (u64, u64)) -> Result<(), MemoryError> {
        let Shape { gpa, len, offset } = shape;
        let is_kept = || {
            let mut held = self.kept.iter().filter_map(Weak::upgrade);
            held.any(|held| identity::same_file(&file, &*held) == Ok(true))
        };
        let same = |kept: &AdoptedRegion| {
            (kept.gpa, kept.length, kept.offset, kept.writable) == (gpa, len, offset, true)
                && (kept.device, kept.inode) == numbers
                && is_kept()
        };
        let id = match self.adopted.iter().position(same) {
            Some(kept) => self.adopted.swap_remove(kept).region,
            None => {
                // What lies there is in the way, and nobody's any more.
                if self.adopted.iter().any(|kept| {
                    kept.gpa < gpa.saturating_add(len) && gpa < kept.gpa.saturating_add(kept.length)
                }) {
                    self.drop_adopted()?;
                }
                // The gate's border checks the file, its seals and its size first: mapping it here is safe after that.
                self.add_to_gate(shape, &file)?
            }
        };
        let window = window(shape, file);
        let window = match window {
            Ok(window) => Arc::new(window),
            Err(error) => {
                let gone = self.client.remove_memory(id);
                return gone.map_err(|source| MemoryError::Gate { gpa, source }).and(Err(error));
            }
        };
        self.regions.push(Region { shape, user, file: numbers, id, window });
        Ok(())
    }

    /// Adds a region to the gate. What an earlier front-end has left in its place goes: that is waited for, because a
    /// front-end that comes back may give its disk up where it is refused once.
    fn add_to_gate(&mut self, shape: Shape, file: &File) -> Result<u32, MemoryError> {
        let Shape { gpa, len, offset } = shape;
        let memory = AddMemory { offset, ..AddMemory::shared(gpa, len) };
        let (until, mut last) = (Instant::now() + GOING, false);
        loop {
            match self.client.add_memory(&memory, &[&file.as_fd()]) {
                Ok(added) => return Ok(added.region),
                Err(source) if last || Instant::now() > until => {
                    return Err(MemoryError::Gate { gpa, source });
                }
                // It may have gone in between: one more try then.
                Err(_) => last = !self.is_in_use(gpa, len),
            }
            if !last {
                std::thread::sleep(AGAIN);
            }
        }
    }

    /// Whether memory that is not this front-end's lies there.
    fn is_in_use(&mut self, gpa: u64, len: u64) -> bool {
        let Ok(status) = self.client.status() else { return false };
        status.regions.iter().any(|other| {
            let overlaps =
                other.gpa < gpa.saturating_add(len) && gpa < other.gpa.saturating_add(other.length);
            overlaps && !self.regions.iter().any(|region| region.id == other.region)
        })
    }

    fn let_go(&mut self, region: &Region) -> Result<(), MemoryError> {
        let gpa = region.shape.gpa;
        self.client.remove_memory(region.id).map_err(|source| MemoryError::Gate { gpa, source })
    }
}

/// This process's own view of a region.
fn window(shape: Shape, file: File) -> Result<GuestRegionMmap, MemoryError> {
    let Shape { gpa, len, offset } = shape;
    let region = VhostUserMemoryRegion::new(gpa, len, 0, offset);
    let failed = |why: String| MemoryError::Window { gpa, why };
    let mapping = region.mmap_region(file).map_err(|error| failed(error.to_string()))?;
    let overflows = || failed("it ends beyond the address space".to_owned());
    GuestRegionMmap::new(mapping, GuestAddress(gpa)).ok_or_else(overflows)
}

#[cfg(test)]
#[path = "memory_tests.rs"]
mod tests;
