//! Guest memory files: a client's descriptors and addresses are checked here once, and the files stay open for as long as the
//! gate or a region needs them.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use passgate_bindings::guest_memfd::Support;
use passgate_bindings::identity::{self, FileError, Identity};
use passgate_bindings::memory::{FileKind, GuestFile};
use passgate_bindings::units::Offset;
use passgate_bindings::{Failed, Gpa, Iova, PAGE, PageRange, RangeError};
use rustix::io::fcntl_dupfd_cloexec;

use super::call::Examined;
use super::fdstore::{Name, StoredFds};
use super::persist::StoredRegionInfo;
use crate::gate::{Backing, Caller, ClientId, FileId, RegionId, RegionRecord, RegionSpec};
use crate::protocol::verbs::AddMemory;

/// The reason why memory is not added, or not converted. The text is the message that the client reads.
#[derive(Debug, thiserror::Error)]
pub enum BorderError {
    /// Too few or too many descriptors.
    #[error("{given} file descriptors came along, {wanted} belong to this call")]
    Fds {
        /// The number that was passed.
        given: usize,
        /// The number that belongs to the call.
        wanted: usize,
    },
    /// The service manager did not pass the file of an earlier process's region.
    #[error("its file did not come back")]
    NotKept,
    /// Not a page range.
    #[error(transparent)]
    Range(#[from] RangeError),
    /// Not a file for guest memory.
    #[error(transparent)]
    File(#[from] FileError),
    /// The second descriptor is no guest_memfd.
    #[error("the private side must be a guest_memfd, this is {0:?}")]
    NotPrivate(FileKind),
    /// The offset in the file or the guest-physical range is not aligned to the file's own pages.
    #[error("offset and address must be multiples of the file's own pages of {page} bytes")]
    Misplaced {
        /// Bytes of the file's pages.
        page: u64,
    },
    /// passgate may not convert there.
    #[error(
        "{gpa} is not in memory that was added with `sole_mapper`: begin and end the conversion yourself"
    )]
    NotSole {
        /// The first such address.
        gpa: Gpa,
    },
    /// A driver of this daemon's has its own memory mapped there ([`passgate_backends::Device::reserved`]).
    #[error(
        "{gpa} is where a driver of a device has memory of its own: no machine should have guest memory there"
    )]
    Reserved {
        /// The first such address.
        gpa: Gpa,
    },
    /// No device of the domain can use these IOVAs.
    #[error(
        "{gpa} is in {start:#x} to {last:#x}, addresses that the IOMMU or the platform reserves (interrupts, or beyond what \
         it translates): no machine with these devices can have guest memory there"
    )]
    Unusable {
        /// The first such address.
        gpa: Gpa,
        /// The first address of the reserved range.
        start: u64,
        /// The last address of the reserved range.
        last: u64,
    },
    /// The file can only give up whole pages of its own (hugetlbfs).
    #[error(
        "the file at {gpa} has pages of {page} bytes and gives up nothing smaller: convert multiples of that, or \
         begin and end the conversion yourself"
    )]
    SmallPunch {
        /// The first address of the part that is not aligned.
        gpa: Gpa,
        /// Bytes of the file's pages.
        page: u64,
    },
}

impl BorderError {
    /// Returns the errno that stands for the error on the notification channel.
    pub fn errno(&self) -> i32 {
        match self {
            Self::NotSole { .. } => 1,     // EPERM
            Self::Reserved { .. } => 16,   // EBUSY
            Self::SmallPunch { .. } => 95, // EOPNOTSUPP
            Self::File(FileError::ReadOnly | FileError::WriteSealed | FileError::Unreadable) => 13, // EACCES
            _ => 22,                       // EINVAL
        }
    }
}

/// The properties of a region that the session needs and the gate does not.
#[derive(Debug)]
pub(super) struct RegionInfo {
    gpa: PageRange<Gpa>,
    /// True if passgate is the only one that maps the region, so that it may convert there.
    sole_mapper: bool,
    /// Bytes of the file's own pages.
    page: u64,
    /// The private side: open while the region exists, never accessed.
    private: Option<(FileId, OwnedFd)>,
}

/// The open files of guest memory, and the regions that show them.
#[derive(Debug, Default)]
pub(super) struct Files {
    /// True if files are accepted that can be shrunk under the device.
    unsealed: bool,
    /// The open files; true if the file converts in place.
    files: BTreeMap<FileId, (Arc<GuestFile>, bool)>,
    /// The regions that the gate has not answered yet, by their callers.
    adding: Vec<(Caller, FileId, RegionInfo)>,
    regions: BTreeMap<RegionId, RegionInfo>,
    /// The regions by their first guest-physical address.
    layout: BTreeMap<Gpa, RegionId>,
    /// True if this kernel converts guest_memfd in place; none until it is probed for the first such file.
    in_place: Option<bool>,
}

impl Files {
    /// Returns an empty set. With `unsealed`, files are accepted that can be shrunk.
    pub(super) fn new(unsealed: bool) -> Self {
        Self { unsealed, ..Self::default() }
    }

    /// Checks a file as [`identity::check`] does, but accepts one that can be shrunk if `unsealed` is set.
    fn check(&self, file: &Identity, offset: u64, len: u64, writable: bool) -> Result<(), FileError> {
        match identity::check(file, offset, len, writable) {
            Err(FileError::Shrinkable) if self.unsealed => Ok(()),
            checked => checked,
        }
    }

    /// Checks a client's memory, and opens its file for as long as it is needed. `reserved` are the IOVAs at which drivers of
    /// this process have memory of their own, `usable` those that devices can use.
    pub(super) fn admit(
        &mut self,
        caller: Caller,
        memory: &AddMemory,
        files: Vec<Examined>,
        reserved: &[PageRange<Iova>],
        usable: &[RangeInclusive<Iova>],
    ) -> Result<RegionSpec, BorderError> {
        let (given, wanted) = (files.len(), 1 + usize::from(memory.private));
        let mut files = files.into_iter();
        // The claim is dropped at the end, once `adding` says that the file is needed.
        let (Some(Examined { fd, file, claim: _claim }), private, true) =
            (files.next(), files.next(), given == wanted)
        else {
            return Err(BorderError::Fds { given, wanted });
        };
        let gpa = PageRange::new(memory.gpa, memory.length)?;
        let taken = reserved.iter().find_map(|range| range.rebase(Iova(0), Gpa(0)).intersection(gpa));
        if let Some(taken) = taken {
            return Err(BorderError::Reserved { gpa: taken.start() });
        }
        if let Some((gpa, start, last)) = unusable(usable, gpa) {
            return Err(BorderError::Unusable { gpa, start, last });
        }
        let file = file?;
        self.check(&file, memory.offset, memory.length, memory.writable)?;
        if let FileKind::Hugetlb(page) = file.kind
            && [memory.gpa, memory.length, memory.offset].iter().any(|n| !n.is_multiple_of(page))
        {
            return Err(BorderError::Misplaced { page });
        }
        let private = private.map(|private| check_private(private, memory)).transpose()?;
        let id = FileId { device: file.device, inode: file.inode };
        self.add_file(id, fd, &file)?;
        let page = match file.kind {
            FileKind::Hugetlb(page) => page,
            FileKind::Memfd | FileKind::GuestMemfd => PAGE,
        };
        let info = RegionInfo { gpa, sole_mapper: memory.sole_mapper && file.writable, page, private };
        self.adding.push((caller, id, info));
        Ok(RegionSpec {
            gpa,
            backing: Backing { file: id, offset: Offset(memory.offset) },
            writable: memory.writable,
            piece: memory.piece,
            page,
            initial: memory.initial,
        })
    }

    /// Opens a file for guest memory. If it is open already, the descriptor with the wider access and the larger size stays: a
    /// region that devices only read may have come first, or the file may have grown since. A different file with the
    /// numbers of an open one is refused: page states and mappings of the two would be taken for each other's.
    fn add_file(&mut self, id: FileId, fd: OwnedFd, file: &Identity) -> Result<(), FileError> {
        if let Some((open, _)) = self.files.get(&id)
            && !identity::same_file(&fd, &**open)?
        {
            return Err(FileError::Collides { device: id.device, inode: id.inode });
        }
        let open = self.files.get(&id).map(|(open, _)| open);
        let writable = file.writable || open.is_some_and(|open| open.writable());
        let size = open.map_or(file.size, |open| open.size().max(file.size));
        if open.is_some_and(|open| (open.writable(), open.size()) == (writable, size)) {
            return Ok(());
        }
        let fd = match open {
            // The file has grown, and the new descriptor is read-only.
            Some(open) if !file.writable && open.writable() => {
                fcntl_dupfd_cloexec(&**open, 0).map_err(|errno| Failed::new("F_DUPFD_CLOEXEC", errno))?
            }
            _ => fd,
        };
        let in_place = file.kind == FileKind::GuestMemfd && self.probe_in_place();
        let file = GuestFile::new(fd, file.kind, size, writable);
        self.files.insert(id, (Arc::new(file), in_place));
        Ok(())
    }

    /// Returns every open file.
    pub(super) fn all(&self) -> Vec<Arc<GuestFile>> {
        self.files.values().map(|(file, _)| Arc::clone(file)).collect()
    }

    fn probe_in_place(&mut self) -> bool {
        *self.in_place.get_or_insert_with(|| Support::probe().is_ok_and(|support| support.in_place))
    }

    /// Returns the file, if it is open.
    pub(super) fn get(&self, id: FileId) -> Option<Arc<GuestFile>> {
        self.files.get(&id).map(|(file, _)| Arc::clone(file))
    }

    /// Returns true if the file is open and converts in place.
    pub(super) fn converts_in_place(&self, id: FileId) -> bool {
        self.files.get(&id).is_some_and(|(_, in_place)| *in_place)
    }

    /// The gate has added the region that this caller asked for. Returns its properties, for the next process; none if the caller
    /// has no region that is being added.
    pub(super) fn added(&mut self, caller: Caller, region: RegionId) -> Option<StoredRegionInfo> {
        let index = self.adding.iter().position(|(adding, ..)| *adding == caller)?;
        let (_, _, info) = self.adding.swap_remove(index);
        let private = info.private.as_ref().map(|(file, _)| *file);
        let stored = StoredRegionInfo { sole_mapper: info.sole_mapper, private };
        self.insert(region, info);
        Some(stored)
    }

    /// Opens the files of an earlier process's region from those that were stored for it, with the checks of a client's files.
    pub(super) fn restore_region(
        &mut self,
        region: &RegionRecord,
        info: Option<StoredRegionInfo>,
        kept: &mut StoredFds,
    ) -> Result<(), BorderError> {
        let RegionSpec { gpa, backing, writable, page, .. } = region.spec;
        self.restore_file(backing.file, kept);
        let file =
            self.files.get(&backing.file).map(|(file, _)| Arc::clone(file)).ok_or(BorderError::NotKept)?;
        self.check(&identity::identify(&*file)?, backing.offset.0, gpa.len(), writable)?;
        let info = info.unwrap_or(StoredRegionInfo { sole_mapper: false, private: None });
        let private = info.private.and_then(|id| Some((id, self.restore_private(id, kept)?)));
        self.insert(region.region, RegionInfo { gpa, sole_mapper: info.sole_mapper, page, private });
        Ok(())
    }

    /// Opens a file from the descriptors that were stored for it: the widest of them. If these are different files, none is
    /// opened: it is not known which of them the ledger means.
    pub(super) fn restore_file(&mut self, id: FileId, kept: &mut StoredFds) {
        for fd in kept.all(&Name::Memory(id)) {
            match identity::identify(&fd) {
                Ok(file) if (file.device, file.inode) == (id.device, id.inode) => {
                    if let Err(error) = self.add_file(id, fd, &file) {
                        log::error!("the file stored as {}: {error}", Name::Memory(id));
                        self.files.remove(&id);
                        return;
                    }
                }
                Ok(_) => log::warn!("the file stored as {} is another file", Name::Memory(id)),
                Err(error) => log::warn!("the file stored as {}: {error}", Name::Memory(id)),
            }
        }
    }

    fn restore_private(&self, id: FileId, kept: &mut StoredFds) -> Option<OwnedFd> {
        // Several regions may have one private side, of which there is one descriptor.
        let open = self.regions.values().filter_map(|info| info.private.as_ref());
        if let Some((_, fd)) = open.into_iter().find(|(open, _)| *open == id) {
            return fd.try_clone().ok();
        }
        kept.one(&Name::Private(id))
    }

    /// Returns true if this file is the private side of a region, also of one that is being added.
    pub(super) fn has_private(&self, id: FileId) -> bool {
        let adding = self.adding.iter().map(|(.., info)| info);
        let mut all = self.regions.values().chain(adding).filter_map(|info| info.private.as_ref());
        all.any(|(file, _)| *file == id)
    }

    /// The gate has refused the region that this caller asked for. Returns its file and private side, which may not be needed;
    /// none if the caller has no region that is being added.
    pub(super) fn refused(&mut self, caller: Caller) -> Option<(FileId, Option<FileId>)> {
        let index = self.adding.iter().position(|(adding, ..)| *adding == caller)?;
        let (_, file, info) = self.adding.swap_remove(index);
        Some((file, info.private.map(|(private, _)| private)))
    }

    /// The client is gone. Returns the files and private sides of the regions that it was adding, which may not be needed. Its other
    /// regions are closed by the gate.
    pub(super) fn client_gone(&mut self, client: ClientId) -> Vec<(FileId, Option<FileId>)> {
        let gone = self.adding.extract_if(.., |(caller, ..)| caller.client == client);
        gone.map(|(_, file, info)| (file, info.private.map(|(private, _)| private))).collect()
    }

    /// Returns true while a region of the file is being added.
    pub(super) fn is_adding(&self, file: FileId) -> bool {
        self.adding.iter().any(|(_, adding, _)| *adding == file)
    }

    /// Forgets a region that is closed. Returns its private side.
    pub(super) fn close_region(&mut self, region: RegionId) -> Option<FileId> {
        let info = self.regions.remove(&region)?;
        // A region that was added there since has taken its place in the layout.
        if self.layout.get(&info.gpa.start()) == Some(&region) {
            self.layout.remove(&info.gpa.start());
        }
        info.private.map(|(file, _)| file)
    }

    /// Closes a file that nothing needs any more.
    pub(super) fn forget(&mut self, file: FileId) {
        self.files.remove(&file);
    }

    /// Returns the region at `gpa`.
    fn region_at(&self, gpa: Gpa) -> Option<&RegionInfo> {
        let (_, region) = self.layout.range(..=gpa).next_back()?;
        self.regions.get(region).filter(|info| info.gpa.contains(gpa))
    }

    fn insert(&mut self, region: RegionId, info: RegionInfo) {
        self.layout.insert(info.gpa.start(), region);
        self.regions.insert(region, info);
    }

    /// Returns an error if passgate may not convert a part of `range`: it is not in memory that was added with `sole_mapper`, or it
    /// begins or ends inside a page of its file.
    pub(super) fn may_convert(&self, range: PageRange<Gpa>) -> Result<(), BorderError> {
        let mut at = range.start();
        while at < range.end() {
            let sole = self.region_at(at).filter(|info| info.sole_mapper);
            let info = sole.ok_or(BorderError::NotSole { gpa: at })?;
            let end = info.gpa.end().min(range.end());
            if !at.0.is_multiple_of(info.page) || !end.0.is_multiple_of(info.page) {
                return Err(BorderError::SmallPunch { gpa: at, page: info.page });
            }
            at = end;
        }
        Ok(())
    }
}

/// Returns the first address of `gpa` that is in none of the `usable` ranges, which are ascending and apart, with the first and
/// last address of the reserved range that it is in. If `usable` is empty the ranges are not known, and every address is taken
/// to be usable.
fn unusable(usable: &[RangeInclusive<Iova>], gpa: PageRange<Gpa>) -> Option<(Gpa, u64, u64)> {
    let (first, last) = (gpa.start().0, gpa.end().0 - 1);
    let mut reserved = Vec::new();
    let mut next = Some(0);
    for range in usable {
        let before = range.start().0.checked_sub(1);
        reserved.extend(next.zip(before).filter(|(start, last)| start <= last));
        next = range.end().0.checked_add(1);
    }
    reserved.extend(next.filter(|_| !usable.is_empty()).map(|start| (start, u64::MAX)));
    let (start, end) = reserved.into_iter().find(|(start, end)| *start <= last && first <= *end)?;
    Some((Gpa(first.max(start)), start, end))
}

/// Returns the private side of a client's memory, if it is a guest_memfd with these pages.
fn check_private(private: Examined, memory: &AddMemory) -> Result<(FileId, OwnedFd), BorderError> {
    let file = private.file?;
    if file.kind != FileKind::GuestMemfd {
        return Err(BorderError::NotPrivate(file.kind));
    }
    identity::check(&file, memory.offset, memory.length, false)?;
    Ok((FileId { device: file.device, inode: file.inode }, private.fd))
}

#[cfg(test)]
mod tests;
