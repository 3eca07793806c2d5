use std::os::fd::{AsFd, AsRawFd};

use super::*;
use crate::gate::Door;

#[test]
fn reserved_range_that_memory_overlaps_is_found() {
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
    assert_eq!(unusable(&[], range(0xfee0_0000, PAGE)), None, "the usable ranges are not known");
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

/// A file with the device and inode number of another, as after the kernel's 32-bit inode counter has wrapped around.
fn with_the_numbers_of(fd: OwnedFd, other: &Identity) -> Examined {
    let Identity { device, inode, .. } = *other;
    let file = identity::identify(&fd).map(|found| Identity { device, inode, ..found });
    Examined { fd, file, claim: None }
}

#[test]
fn different_file_with_the_numbers_of_one_in_use_is_refused() {
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
    let open = files.get(id).unwrap();
    assert_eq!(identity::same_file(&*open, &one), Ok(true));
    // Once the first one is not in use any more, its numbers are free.
    drop(open);
    files.forget(id);
    let alone = vec![with_the_numbers_of(other, &found)];
    files.admit(CALLER, &region(2 << 20), alone, &[], &[]).unwrap();
}

/// The same file, opened read-only.
fn read_only(fd: &OwnedFd) -> OwnedFd {
    std::fs::File::open(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap().into()
}

#[test]
fn file_stays_open_with_the_widest_access_and_size_added() {
    const ORDERS: [[usize; 4]; 6] =
        [[0, 1, 2, 3], [3, 2, 1, 0], [1, 2, 0, 3], [2, 1, 3, 0], [0, 3, 1, 2], [1, 0, 2, 3]];
    for order in ORDERS {
        let (mut files, fd) = (Files::new(false), memfd());
        let before = identity::identify(&fd).unwrap();
        rustix::fs::ftruncate(&fd, 16 * PAGE).unwrap();
        let id = FileId { device: before.device, inode: before.inode };
        // Each access, with the size before and after the file has grown.
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
            let open = files.get(id).unwrap();
            assert_eq!((open.writable(), open.size() / PAGE), (writable, pages), "{order:?}: {view}");
            assert_eq!(identity::identify(&*open).unwrap().writable, writable, "{order:?}: {view}");
        }
    }
}

#[test]
fn passgate_converts_only_ranges_wholly_in_sole_mapper_memory() {
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
fn different_files_stored_under_one_name_are_not_restored() {
    let (one, other) = (memfd(), memfd());
    let found = identity::identify(&one).unwrap();
    let id = FileId { device: found.device, inode: found.inode };
    let clone = |fd: &OwnedFd| fd.try_clone().unwrap();
    let restores = |fds: Vec<OwnedFd>| {
        let mut files = Files::new(false);
        files.restore_file(id, &mut StoredFds::of(BTreeMap::from([(Name::Memory(id), fds)])));
        files.get(id).is_some()
    };
    assert!(restores(vec![clone(&one), clone(&one)]));
    // A file with other numbers is skipped.
    assert!(restores(vec![clone(&other), clone(&one)]));
    assert!(!restores(vec![clone(&other)]));
}
