//! The border for memory: what a client passes is checked here once, and held until nothing needs it.

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
use super::fdstore::{Kept, Name};
use super::lasting::Aside;
use crate::gate::{Backing, Caller, ClientId, FileId, RegionId, RegionSpec, Written};
use crate::protocol::verbs::AddMemory;

/// Why memory is not taken, or not converted. The text is the message that the client reads.
#[derive(Debug, thiserror::Error)]
pub enum BorderError {
    /// Too few or too many descriptors.
    #[error("{given} file descriptors came along, {wanted} belong to this call")]
    Fds {
        /// How many came.
        given: usize,
        /// How many belong.
        wanted: usize,
    },
    /// The service manager did not hand it over.
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
    /// The start in the file and the guest-physical address do not fit the file's pages.
    #[error("offset and address must be multiples of the file's own pages of {page} bytes")]
    Misplaced {
        /// The file's.
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
    /// A driver of this daemon's has its own memory there.
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
        /// The first address of the reserved window.
        start: u64,
        /// Its last.
        last: u64,
    },
    /// The file gives up whole pages of its own only.
    #[error(
        "the file at {gpa} has pages of {page} bytes and gives up nothing smaller: convert multiples of that, or \
         begin and end the conversion yourself"
    )]
    SmallPunch {
        /// Where.
        gpa: Gpa,
        /// The file's.
        page: u64,
    },
}

impl BorderError {
    /// As a number, for the notification channel.
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

/// What a session knows of a region that the gate need not know.
#[derive(Debug)]
pub(super) struct Extra {
    gpa: PageRange<Gpa>,
    sole_mapper: bool,
    /// Bytes of the file's own pages.
    page: u64,
    /// The private side: held while the region is, touched never.
    private: Option<(FileId, OwnedFd)>,
}

/// The files that regions are of.
#[derive(Debug, Default)]
pub(super) struct Files {
    /// Whether a file will do that can be shrunk under the device.
    unsealed: bool,
    held: BTreeMap<FileId, (Arc<GuestFile>, bool)>,
    adding: Vec<(Caller, FileId, Extra)>,
    regions: BTreeMap<RegionId, Extra>,
    /// Where the guest sees each region.
    layout: BTreeMap<Gpa, RegionId>,
    /// Whether guest_memfd converts in place here; probed at the first one.
    in_place: Option<bool>,
}

impl Files {
    /// None yet; `unsealed` takes files, too, that can be shrunk.
    pub(super) fn new(unsealed: bool) -> Self {
        Self { unsealed, ..Self::default() }
    }

    /// As [`identity::check`], with what was accepted.
    fn check(&self, file: &Identity, offset: u64, len: u64, writable: bool) -> Result<(), FileError> {
        match identity::check(file, offset, len, writable) {
            Err(FileError::Shrinkable) if self.unsealed => Ok(()),
            checked => checked,
        }
    }

    /// Checks what a client passes, and holds it.
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
        self.hold(id, fd, &file)?;
        let page = match file.kind {
            FileKind::Hugetlb(page) => page,
            FileKind::Memfd | FileKind::GuestMemfd => PAGE,
        };
        let extra = Extra { gpa, sole_mapper: memory.sole_mapper && file.writable, page, private };
        self.adding.push((caller, id, extra));
        Ok(RegionSpec {
            gpa,
            backing: Backing { file: id, offset: Offset(memory.offset) },
            writable: memory.writable,
            piece: memory.piece,
            page,
            initial: memory.initial.into(),
        })
    }

    /// Holds a file. Where it is held already, the wider of the two descriptors stays: a region that is only read
    /// may have come first, or the file may have grown since. Where another file with these numbers is held, it is
    /// refused: page states and mappings of the two would be taken for each other's.
    fn hold(&mut self, id: FileId, fd: OwnedFd, file: &Identity) -> Result<(), FileError> {
        if let Some((held, _)) = self.held.get(&id)
            && !identity::same_file(&fd, &**held)?
        {
            return Err(FileError::Collides { device: id.device, inode: id.inode });
        }
        let held = self.held.get(&id).map(|(held, _)| held);
        let writable = file.writable || held.is_some_and(|held| held.writable());
        let size = held.map_or(file.size, |held| held.size().max(file.size));
        if held.is_some_and(|held| (held.writable(), held.size()) == (writable, size)) {
            return Ok(());
        }
        let fd = match held {
            // The file has grown, and the new descriptor may not write to it.
            Some(held) if !file.writable && held.writable() => {
                fcntl_dupfd_cloexec(&**held, 0).map_err(|errno| Failed::new("F_DUPFD_CLOEXEC", errno))?
            }
            _ => fd,
        };
        let in_place = file.kind == FileKind::GuestMemfd && self.probe();
        let held = GuestFile::new(fd, file.kind, size, writable);
        self.held.insert(id, (Arc::new(held), in_place));
        Ok(())
    }

    /// Every file that is held.
    pub(super) fn all(&self) -> Vec<Arc<GuestFile>> {
        self.held.values().map(|(file, _)| Arc::clone(file)).collect()
    }

    fn probe(&mut self) -> bool {
        *self.in_place.get_or_insert_with(|| Support::probe().is_ok_and(|support| support.in_place))
    }

    /// The file, while it is held.
    pub(super) fn get(&self, id: FileId) -> Option<Arc<GuestFile>> {
        self.held.get(&id).map(|(file, _)| Arc::clone(file))
    }

    /// Whether the file converts in place.
    pub(super) fn in_place(&self, id: FileId) -> bool {
        self.held.get(&id).is_some_and(|(_, in_place)| *in_place)
    }

    /// The gate has admitted what this caller passed.
    pub(super) fn added(&mut self, caller: Caller, region: RegionId) -> Option<Aside> {
        let index = self.adding.iter().position(|(adding, ..)| *adding == caller)?;
        let (_, _, extra) = self.adding.swap_remove(index);
        let private = extra.private.as_ref().map(|(file, _)| *file);
        let aside = Aside { sole_mapper: extra.sole_mapper, private };
        self.insert(region, extra);
        Some(aside)
    }

    /// Takes a region's files as they were kept for an earlier process, checked as a client's are.
    pub(super) fn again(
        &mut self,
        region: &Written,
        aside: Option<Aside>,
        kept: &mut Kept,
    ) -> Result<(), BorderError> {
        let RegionSpec { gpa, backing, writable, page, .. } = region.spec;
        self.hold_again(backing.file, kept);
        let file =
            self.held.get(&backing.file).map(|(file, _)| Arc::clone(file)).ok_or(BorderError::NotKept)?;
        self.check(&identity::identify(&*file)?, backing.offset.0, gpa.len(), writable)?;
        let aside = aside.unwrap_or(Aside { sole_mapper: false, private: None });
        let private = aside.private.and_then(|id| Some((id, self.private_again(id, kept)?)));
        self.insert(region.region, Extra { gpa, sole_mapper: aside.sole_mapper, page, private });
        Ok(())
    }

    /// Takes a file as it was kept for an earlier process: the widest descriptor of it. None where what was kept under its
    /// name are several files: which of them it is nobody knows.
    pub(super) fn hold_again(&mut self, id: FileId, kept: &mut Kept) {
        for fd in kept.all(&Name::Memory(id)) {
            match identity::identify(&fd) {
                Ok(file) if (file.device, file.inode) == (id.device, id.inode) => {
                    if let Err(error) = self.hold(id, fd, &file) {
                        log::error!("what was kept as {}: {error}", Name::Memory(id));
                        self.held.remove(&id);
                        return;
                    }
                }
                Ok(_) => log::warn!("what was kept as {} is another file", Name::Memory(id)),
                Err(error) => log::warn!("what was kept as {}: {error}", Name::Memory(id)),
            }
        }
    }

    fn private_again(&self, id: FileId, kept: &mut Kept) -> Option<OwnedFd> {
        let held = self.regions.values().filter_map(|extra| extra.private.as_ref());
        if let Some((_, fd)) = held.into_iter().find(|(held, _)| *held == id) {
            return fd.try_clone().ok();
        }
        kept.one(&Name::Private(id))
    }

    /// Whether some region's private side is this file.
    pub(super) fn has_private(&self, id: FileId) -> bool {
        let adding = self.adding.iter().map(|(.., extra)| extra);
        let mut all = self.regions.values().chain(adding).filter_map(|extra| extra.private.as_ref());
        all.any(|(file, _)| *file == id)
    }

    /// The gate has not: returns the file that came for nothing and its private side.
    pub(super) fn refused(&mut self, caller: Caller) -> Option<(FileId, Option<FileId>)> {
        let index = self.adding.iter().position(|(adding, ..)| *adding == caller)?;
        let (_, file, extra) = self.adding.swap_remove(index);
        Some((file, extra.private.map(|(private, _)| private)))
    }

    /// The client is gone; its regions go by themselves. Returns the files, with their private sides, of what it was adding.
    pub(super) fn client_gone(&mut self, client: ClientId) -> Vec<(FileId, Option<FileId>)> {
        let gone = self.adding.extract_if(.., |(caller, ..)| caller.client == client);
        gone.map(|(_, file, extra)| (file, extra.private.map(|(private, _)| private))).collect()
    }

    /// True while a region of the file is being added.
    pub(super) fn is_adding(&self, file: FileId) -> bool {
        self.adding.iter().any(|(_, adding, _)| *adding == file)
    }

    /// The region is gone; its private side, where it had one.
    pub(super) fn close_region(&mut self, region: RegionId) -> Option<FileId> {
        let extra = self.regions.remove(&region)?;
        // Memory that came there since stays.
        if self.layout.get(&extra.gpa.start()) == Some(&region) {
            self.layout.remove(&extra.gpa.start());
        }
        extra.private.map(|(file, _)| file)
    }

    /// Nothing needs the file any more.
    pub(super) fn forget(&mut self, file: FileId) {
        self.held.remove(&file);
    }

    /// The region at `gpa`.
    fn at(&self, gpa: Gpa) -> Option<&Extra> {
        let (_, region) = self.layout.range(..=gpa).next_back()?;
        self.regions.get(region).filter(|extra| extra.gpa.contains(gpa))
    }

    fn insert(&mut self, region: RegionId, extra: Extra) {
        self.layout.insert(extra.gpa.start(), region);
        self.regions.insert(region, extra);
    }

    /// Whether every part of `range` was added as passgate's own to map.
    pub(super) fn may_convert(&self, range: PageRange<Gpa>) -> Result<(), BorderError> {
        let mut at = range.start();
        while at < range.end() {
            let sole = self.at(at).filter(|extra| extra.sole_mapper);
            let extra = sole.ok_or(BorderError::NotSole { gpa: at })?;
            let end = extra.gpa.end().min(range.end());
            if !at.0.is_multiple_of(extra.page) || !end.0.is_multiple_of(extra.page) {
                return Err(BorderError::SmallPunch { gpa: at, page: extra.page });
            }
            at = end;
        }
        Ok(())
    }
}

/// Returns the first address of `gpa` that is in none of the `usable` ranges, which are in order and apart, and the window
/// between these that it is in. Where none is known all are usable.
fn unusable(usable: &[RangeInclusive<Iova>], gpa: PageRange<Gpa>) -> Option<(Gpa, u64, u64)> {
    let (first, last) = (gpa.start().0, gpa.end().0 - 1);
    let mut windows = Vec::new();
    let mut next = Some(0);
    for range in usable {
        let before = range.start().0.checked_sub(1);
        windows.extend(next.zip(before).filter(|(start, last)| start <= last));
        next = range.end().0.checked_add(1);
    }
    windows.extend(next.filter(|_| !usable.is_empty()).map(|start| (start, u64::MAX)));
    let (start, end) = windows.into_iter().find(|(start, end)| *start <= last && first <= *end)?;
    Some((Gpa(first.max(start)), start, end))
}

fn check_private(private: Examined, memory: &AddMemory) -> Result<(FileId, OwnedFd), BorderError> {
    let file = private.file?;
    if file.kind != FileKind::GuestMemfd {
        return Err(BorderError::NotPrivate(file.kind));
    }
    identity::check(&file, memory.offset, memory.length, false)?;
    Ok((FileId { device: file.device, inode: file.inode }, private.fd))
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd, AsRawFd};

    use super::*;
    use crate::gate::Door;

    #[test]
    fn the_reserved_window_that_memory_meets_is_found() {
        let usable = [Iova(0)..=Iova(0xfedf_ffff), Iova(0xfef0_0000)..=Iova((1 << 39) - 1)];
        let range = |start, len| PageRange::new(start, len).unwrap();
        let msi = (0xfee0_0000, 0xfeef_ffff);
        for (start, len, found) in [
            (0, 0xfee0_0000, None),
            (0xfef0_0000, 1 << 30, None),
            (0, 1 << 32, Some((0xfee0_0000, msi.0, msi.1))),
            (0xfee0_1000, PAGE, Some((0xfee0_1000, msi.0, msi.1))),
            (0xfeef_f000, 2 * PAGE, Some((0xfeef_f000, msi.0, msi.1))),
            ((1 << 39) - PAGE, 2 * PAGE, Some((1 << 39, 1 << 39, u64::MAX))),
        ] {
            let found = found.map(|(gpa, start, last)| (Gpa(gpa), start, last));
            assert_eq!(unusable(&usable, range(start, len)), found, "{start:#x}+{len:#x}");
        }
        assert_eq!(unusable(&[], range(0xfee0_0000, PAGE)), None, "nothing is known");
        let high = [Iova(0x1000)..=Iova(u64::MAX)];
        assert_eq!(unusable(&high, range(0, PAGE)), Some((Gpa(0), 0, 0xfff)));
        assert_eq!(unusable(&high, range(PAGE, PAGE)), None);
        let error = BorderError::Unusable { gpa: Gpa(0xfee0_1000), start: msi.0, last: msi.1 }.to_string();
        assert!(error.contains("0xfee00000 to 0xfeefffff"), "{error}");
    }

    const CALLER: Caller = Caller { client: ClientId(1), door: Door::Control, cookie: 1 };

    fn memfd() -> OwnedFd {
        GuestFile::memfd("files", 8 * PAGE).unwrap().as_fd().try_clone_to_owned().unwrap()
    }

    /// A file that the kernel gives the numbers of another, as it does once its 32-bit count of inodes has come round.
    fn with_the_numbers_of(fd: OwnedFd, other: &Identity) -> Examined {
        let Identity { device, inode, .. } = *other;
        let file = identity::identify(&fd).map(|found| Identity { device, inode, ..found });
        Examined { fd, file, claim: None }
    }

    #[test]
    fn a_file_with_the_numbers_of_another_in_use_is_refused_and_the_same_file_is_not() {
        let mut files = Files::new(false);
        let (one, other) = (memfd(), memfd());
        let found = identity::identify(&one).unwrap();
        let region = |gpa: u64| AddMemory::shared(gpa, 8 * PAGE);
        let examined = |fd: &OwnedFd| {
            let fd = fd.try_clone().unwrap();
            vec![Examined { file: identity::identify(&fd), fd, claim: None }]
        };
        files.admit(CALLER, &region(0), examined(&one), &[], &[]).unwrap();
        files.admit(CALLER, &region(1 << 20), examined(&one), &[], &[]).unwrap();
        let collides = vec![with_the_numbers_of(other.try_clone().unwrap(), &found)];
        let error = files.admit(CALLER, &region(2 << 20), collides, &[], &[]).unwrap_err();
        assert!(matches!(error, BorderError::File(FileError::Collides { .. })), "{error}");
        let id = FileId { device: found.device, inode: found.inode };
        let held = files.get(id).unwrap();
        assert_eq!(identity::same_file(&*held, &one), Ok(true));
        // Without the first one in use, its numbers are free.
        drop(held);
        files.forget(id);
        let alone = vec![with_the_numbers_of(other, &found)];
        files.admit(CALLER, &region(2 << 20), alone, &[], &[]).unwrap();
    }

    /// The same file, opened to be read only.
    fn read_only(fd: &OwnedFd) -> OwnedFd {
        std::fs::File::open(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap().into()
    }

    #[test]
    fn a_file_is_held_as_wide_as_the_widest_that_was_added() {
        const ORDERS: [[usize; 4]; 6] =
            [[0, 1, 2, 3], [3, 2, 1, 0], [1, 2, 0, 3], [2, 1, 3, 0], [0, 3, 1, 2], [1, 0, 2, 3]];
        for order in ORDERS {
            let (mut files, fd) = (Files::new(false), memfd());
            let before = identity::identify(&fd).unwrap();
            rustix::fs::ftruncate(&fd, 16 * PAGE).unwrap();
            let id = FileId { device: before.device, inode: before.inode };
            // Each access, before and after the file has grown.
            let views = [(false, 8), (false, 16), (true, 8), (true, 16)];
            let (mut writable, mut pages) = (false, 0);
            for view in order {
                let (writes, size) = views[view];
                let fd = if writes { fd.try_clone().unwrap() } else { read_only(&fd) };
                let file = identity::identify(&fd).map(|file| Identity { size: size * PAGE, ..file });
                let gpa = (view as u64) << 20;
                let memory = AddMemory { writable: writes, ..AddMemory::shared(gpa, size * PAGE) };
                files.admit(CALLER, &memory, vec![Examined { fd, file, claim: None }], &[], &[]).unwrap();
                (writable, pages) = (writable || writes, pages.max(size));
                let held = files.get(id).unwrap();
                assert_eq!((held.writable(), held.size() / PAGE), (writable, pages), "{order:?}: {view}");
                assert_eq!(identity::identify(&*held).unwrap().writable, writable, "{order:?}: {view}");
            }
        }
    }

    #[test]
    fn passgate_converts_what_lies_in_its_own_memory_from_the_first_page_to_the_last() {
        let (mut files, fd) = (Files::new(false), memfd());
        for (nth, sole_mapper) in [(1, true), (2, false), (3, true)] {
            let caller = Caller { cookie: nth, ..CALLER };
            let memory = AddMemory { sole_mapper, ..AddMemory::shared(nth * 8 * PAGE, 8 * PAGE) };
            let (file, fd) = (identity::identify(&fd), fd.try_clone().unwrap());
            let examined = Examined { fd, file, claim: None };
            files.admit(caller, &memory, vec![examined], &[], &[]).unwrap();
            files.added(caller, RegionId(nth as u32)).unwrap();
        }
        for (page, pages, foreign) in [
            (8, 8, None),
            (24, 8, None),
            (7, 2, Some(7)),
            (15, 2, Some(16)),
            (16, 8, Some(16)),
            (23, 2, Some(23)),
            (8, 24, Some(16)),
            (31, 2, Some(32)),
        ] {
            let result = files.may_convert(PageRange::new(page * PAGE, pages * PAGE).unwrap());
            let found = match result {
                Ok(()) => None,
                Err(BorderError::NotSole { gpa }) => Some(gpa.0 / PAGE),
                Err(error) => panic!("{error}"),
            };
            assert_eq!(found, foreign, "{pages} pages from {page} on");
        }
    }

    #[test]
    fn of_two_files_that_were_kept_under_one_name_none_is_taken() {
        let (one, other) = (memfd(), memfd());
        let found = identity::identify(&one).unwrap();
        let id = FileId { device: found.device, inode: found.inode };
        let clone = |fd: &OwnedFd| fd.try_clone().unwrap();
        let keeps = |fds: Vec<OwnedFd>| {
            let mut files = Files::new(false);
            files.hold_again(id, &mut Kept::of(BTreeMap::from([(Name::Memory(id), fds)])));
            files.get(id).is_some()
        };
        assert!(keeps(vec![clone(&one), clone(&one)]));
        // One of another shape or number is passed over.
        assert!(keeps(vec![clone(&other), clone(&one)]));
        assert!(!keeps(vec![clone(&other)]));
    }
}
