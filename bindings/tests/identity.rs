//! The check of a client's descriptor, on every kind of file that a client could pass.

#![allow(clippy::unwrap_used)] // a panic fails the test

#[path = "../../tests/common/skip.rs"]
mod skip;

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use passgate_bindings::identity::{FileError, Identity, check, identify};
use passgate_bindings::memory::{FileKind, GuestFile};
use passgate_bindings::units::PAGE;
use passgate_bindings::{RangeError, guest_memfd};
use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags};
use skip::skip;

fn memfd(seals: SealFlags, flags: MemfdFlags) -> OwnedFd {
    let fd = rustix::fs::memfd_create("identity", flags | MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&fd, 4 << 20).unwrap();
    rustix::fs::fcntl_add_seals(&fd, seals).unwrap();
    fd
}

fn reopen(fd: &OwnedFd, flags: OFlags) -> OwnedFd {
    rustix::fs::open(format!("/proc/self/fd/{}", fd.as_raw_fd()), flags | OFlags::CLOEXEC, Mode::empty())
        .unwrap()
}

fn identity(fd: impl AsFd) -> Identity {
    identify(fd).unwrap()
}

#[test]
fn sealed_memfd_is_accepted() {
    let fd = memfd(SealFlags::SHRINK, MemfdFlags::empty());
    let file = identity(&fd);
    assert_eq!((file.kind, file.size, file.writable), (FileKind::Memfd, 4 << 20, true));
    assert_eq!(check(&file, 0, 4 << 20, true), Ok(()));
    assert_eq!(check(&file, PAGE, PAGE, true), Ok(()));
    let other = identity(memfd(SealFlags::SHRINK, MemfdFlags::empty()));
    assert_ne!((file.device, file.inode), (other.device, other.inode));
    assert_eq!(file, identity(fd.try_clone().unwrap()));
}

#[test]
fn file_without_shrink_seal_is_refused() {
    let file = identity(memfd(SealFlags::GROW, MemfdFlags::empty()));
    let error = check(&file, 0, PAGE, true).unwrap_err();
    assert_eq!(error, FileError::Shrinkable);
    assert!(error.to_string().contains("F_SEAL_SHRINK"));
}

#[test]
fn read_only_file_is_refused_for_writable_memory() {
    let fd = memfd(SealFlags::SHRINK, MemfdFlags::empty());
    let read_only = identity(reopen(&fd, OFlags::RDONLY));
    assert_eq!(check(&read_only, 0, PAGE, true), Err(FileError::ReadOnly));
    assert_eq!(check(&read_only, 0, PAGE, false), Ok(()));
    for seal in [SealFlags::WRITE, SealFlags::FUTURE_WRITE] {
        let sealed = identity(memfd(SealFlags::SHRINK | seal, MemfdFlags::empty()));
        assert_eq!(check(&sealed, 0, PAGE, true), Err(FileError::WriteSealed));
        assert_eq!(check(&sealed, 0, PAGE, false), Ok(()));
    }
}

#[test]
fn unreadable_descriptor_is_refused() {
    let fd = memfd(SealFlags::SHRINK, MemfdFlags::empty());
    for flags in [OFlags::WRONLY, OFlags::PATH] {
        assert_eq!(identify(reopen(&fd, flags)), Err(FileError::Unreadable));
    }
}

#[test]
fn range_of_partial_pages_or_beyond_the_file_is_refused() {
    let file = identity(memfd(SealFlags::SHRINK, MemfdFlags::empty()));
    let range = |offset, len| match check(&file, offset, len, true).unwrap_err() {
        FileError::Range { source, .. } => source,
        other => panic!("{other}"),
    };
    assert!(matches!(range(1, PAGE), RangeError::Unaligned { .. }));
    assert!(matches!(range(0, 0), RangeError::Empty { .. }));
    assert!(matches!(range(u64::MAX - PAGE + 1, PAGE), RangeError::TooHigh { .. }));
    assert!(matches!(check(&file, 4 << 20, PAGE, true), Err(FileError::TooShort { .. })));
    assert!(matches!(check(&file, 0, (4 << 20) + PAGE, true), Err(FileError::TooShort { .. })));
}

#[test]
fn file_of_another_kind_is_refused() {
    let (pipe, _inlet) = rustix::pipe::pipe().unwrap();
    let files: [OwnedFd; 6] = [
        pipe,
        tempfile::tempfile_in(".").unwrap().into(),
        std::fs::File::open("/proc/self/maps").unwrap().into(),
        std::fs::File::open("/").unwrap().into(),
        std::fs::File::options().read(true).write(true).open("/dev/null").unwrap().into(),
        rustix::event::eventfd(0, rustix::event::EventfdFlags::empty()).unwrap(),
    ];
    for fd in files {
        let error = identify(&fd).unwrap_err();
        assert!(matches!(error, FileError::Foreign { .. }), "{error}");
        assert!(error.to_string().contains("memfd_create"));
    }
    // On tmpfs, but it cannot be sealed.
    if let Ok(shm) = tempfile::tempfile_in("/dev/shm") {
        shm.set_len(PAGE).unwrap();
        assert_eq!(check(&identity(shm), 0, PAGE, true), Err(FileError::Shrinkable));
    }
}

#[test]
fn hugetlb_memfd_has_its_page_size() {
    let file = identity(memfd(SealFlags::SHRINK, MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB));
    assert_eq!(file.kind, FileKind::Hugetlb(2 << 20));
    assert_eq!(check(&file, 0, 4 << 20, true), Ok(()));
}

#[test]
fn guest_memfd_is_identified_by_its_inode() {
    let made = guest_memfd::shared(4 * PAGE);
    let (vm, file) = match made {
        Ok(made) => made,
        Err(why) => return skip(why),
    };
    let facts = identity(&file);
    assert_eq!((facts.kind, facts.size, facts.writable), (FileKind::GuestMemfd, 4 * PAGE, true));
    assert_eq!(check(&facts, 0, 4 * PAGE, true), Ok(()));
    assert!(matches!(check(&facts, 0, 5 * PAGE, true), Err(FileError::TooShort { .. })));
    assert_eq!(identity(file.as_fd().try_clone_to_owned().unwrap()), facts);
    // No other file, of the same VM or of another, has the same numbers.
    let flags = guest_memfd::Flags::MMAP | guest_memfd::Flags::INIT_SHARED;
    let sibling = guest_memfd::create(&vm, PAGE, flags).unwrap();
    let (_vm, other): (_, GuestFile) = guest_memfd::shared(PAGE).unwrap();
    let mut numbers = [identity(&sibling), identity(&other), facts].map(|facts| (facts.device, facts.inode));
    numbers.sort();
    assert!(numbers.windows(2).all(|pair| pair[0] != pair[1]), "{numbers:?}");
}
