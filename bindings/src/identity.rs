//! The identity of a file that a client passes, and the check that it may back guest memory.
//!
//! Before a client's descriptor is mapped or pinned, [`identify`] queries the kernel about it and [`check`] validates the
//! result. Only tmpfs, hugetlbfs and guest_memfd are accepted: a file system in user space (FUSE) could delay, shrink or
//! fake its files.
//!
//! The order of the queries matters: a FUSE file system may answer fstat and fstatfs late or never, so the queries that
//! the kernel answers by itself come first (open mode, seals, the name in `/proc`). Only files on tmpfs and hugetlbfs
//! report seals. A guest_memfd has none; up to Linux 6.18 it is recognised by the name that KVM gives its anonymous
//! inode, later by its file system. One case remains: a file of a FUSE file system that is named like KVM's can delay
//! fstatfs, so callers query on a thread that may block.
//!
//! Device and inode number do not identify a file for certain: guest_memfd and hugetlbfs have 32-bit inode numbers, so a
//! client that creates 2^32 files gets one with the numbers of another. Where the numbers are those of a file that is
//! open here, [`same_file`] compares the two inodes (docs/decisions/0010-file-identity.md).

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::fs::{OFlags, SealFlags};
use rustix::io::Errno;

use crate::Failed;
use crate::memory::FileKind;
use crate::units::{Offset, PageRange};

/// `TMPFS_MAGIC` (include/uapi/linux/magic.h).
const TMPFS: u64 = 0x0102_1994;
/// `HUGETLBFS_MAGIC` (include/uapi/linux/magic.h).
const HUGETLBFS: u64 = 0x9584_58f6;
/// `GUEST_MEMFD_MAGIC` (include/uapi/linux/magic.h): "GMEM".
const GUEST_MEMFD: u64 = 0x474d_454d;
/// The link target in `/proc/self/fd` of a guest_memfd on an anonymous inode.
const ANON_GUEST_MEMFD: &str = "anon_inode:[kvm-gmem]";
/// The prefix of the link target of a file on a file system that the kernel mounts for itself. Such a file may be KVM's;
/// the magic number of its file system decides.
const KERNEL_MOUNT_PREFIX: &str = "/[";

/// The properties of a file as the kernel reports them, not validated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// The kind of file.
    pub kind: FileKind,
    /// `st_dev`; with `inode` the file's identity while it is open (but see [`same_file`]).
    pub device: u64,
    /// `st_ino`.
    pub inode: u64,
    /// Its size in bytes.
    pub size: u64,
    /// True where the descriptor was opened for reading and writing.
    pub writable: bool,
    /// Its seals; none for a guest_memfd, which cannot shrink.
    pub seals: SealFlags,
}

/// The reason why a file cannot back guest memory. Its text is the error message for the client.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FileError {
    /// It is not on tmpfs, hugetlbfs or guest_memfd.
    #[error("`{name}` cannot be guest memory: pass a memfd (memfd_create), a hugetlb memfd or a guest_memfd")]
    Foreign {
        /// Its name in `/proc/self/fd`.
        name: String,
    },
    /// It was opened with O_PATH or O_WRONLY.
    #[error("the descriptor cannot be read: open it O_RDWR (or O_RDONLY for memory that devices only read)")]
    Unreadable,
    /// It was opened read-only, for memory that devices write to.
    #[error("the descriptor is read-only: open it O_RDWR, or add the memory as read-only")]
    ReadOnly,
    /// It is sealed against writing, for memory that devices write to.
    #[error(
        "the file is sealed against writing: pass one without F_SEAL_WRITE and F_SEAL_FUTURE_WRITE, or add the memory as read-only"
    )]
    WriteSealed,
    /// It is not sealed against shrinking: it could be truncated while a device uses it.
    #[error(
        "the file may be shrunk: seal it with fcntl(F_ADD_SEALS, F_SEAL_SHRINK) before passing it (memfd_create needs MFD_ALLOW_SEALING)"
    )]
    Shrinkable,
    /// The range is not a [`PageRange`].
    #[error("offset {offset:#x} and length {len:#x} are not a range of whole pages: {source}")]
    Range {
        /// The first byte of the range.
        offset: u64,
        /// The length of the range in bytes.
        len: u64,
        /// The reason.
        source: crate::RangeError,
    },
    /// The file ends before the range.
    #[error(
        "the file has {size:#x} bytes and the range {range} ends behind it: ftruncate it to its full size first"
    )]
    TooShort {
        /// The file's size in bytes.
        size: u64,
        /// The requested range.
        range: PageRange<Offset>,
    },
    /// Another file that is in use has the same numbers.
    #[error(
        "another file that is in use has the same device and inode number ({device:#x}, {inode:#x}): make the memfd anew and \
         pass that one"
    )]
    Collides {
        /// `st_dev` of both.
        device: u64,
        /// `st_ino` of both.
        inode: u64,
    },
    /// A query failed.
    #[error("cannot examine the descriptor: {0}")]
    Failed(#[from] Failed),
}

/// Queries the kernel for the kind and properties of the file behind `fd`.
pub fn identify(fd: impl AsFd) -> Result<Identity, FileError> {
    let fd = fd.as_fd();
    let open = rustix::fs::fcntl_getfl(fd).map_err(|e| Failed::new("F_GETFL", e))?;
    let access = open & OFlags::RWMODE;
    if open.contains(OFlags::PATH) || access == OFlags::WRONLY {
        return Err(FileError::Unreadable);
    }
    let (kind, seals) = match rustix::fs::fcntl_get_seals(fd) {
        Ok(seals) => (kind_with_seals(fd)?, seals),
        Err(Errno::INVAL) => (kind_without_seals(fd)?, SealFlags::empty()),
        Err(errno) => return Err(Failed::new("F_GET_SEALS", errno).into()),
    };
    let stat = rustix::fs::fstat(fd).map_err(|e| Failed::new("fstat", e))?;
    Ok(Identity {
        kind,
        device: stat.st_dev,
        inode: stat.st_ino,
        size: u64::try_from(stat.st_size).unwrap_or(0),
        writable: access == OFlags::RDWR,
        seals,
    })
}

/// The inotify instance that compares files. A watch lasts no longer than one comparison.
static INOTIFY: Mutex<Option<OwnedFd>> = Mutex::new(None);

/// `F_DUPFD_QUERY` (include/uapi/linux/fcntl.h, Linux 6.10): compares the open file descriptions of two descriptors.
const DUPFD_QUERY: i32 = 1024 + 3;
/// `KCMP_FILE` (include/uapi/linux/kcmp.h): the same comparison, where kcmp(2) is available and permitted.
const KCMP_FILE: i32 = 0;

/// Returns true where both descriptors refer to one inode, whatever its numbers are and however each was opened.
///
/// Descriptors of one open file description refer to one file; that is the usual case, since a client passes the same
/// descriptor for each of its regions. A guest_memfd cannot be reopened, so another description of one is another file.
/// Otherwise inotify decides: it has one watch per inode, so adding a watch twice returns the same watch descriptor
/// (inotify_add_watch(2)). That needs read permission on the inode. All three compare inodes, not their numbers.
pub fn same_file(a: impl AsFd, b: impl AsFd) -> Result<bool, Failed> {
    let (a, b) = (a.as_fd(), b.as_fd());
    let one_description = same_description(a, b);
    if one_description == Some(true) {
        return Ok(true);
    }
    match same_inode(a, b) {
        Err(failed) if failed.errno == Errno::ACCESS && one_description == Some(false) => {
            match identify(a).is_ok_and(|file| file.kind == FileKind::GuestMemfd) {
                true => Ok(false),
                false => Err(failed),
            }
        }
        answer => answer,
    }
}

/// Returns true where both descriptors refer to one open file description, none where the kernel cannot compare them.
fn same_description(a: BorrowedFd<'_>, b: BorrowedFd<'_>) -> Option<bool> {
    // SAFETY: the call takes two descriptors, which are open while they are borrowed, and no pointer.
    match unsafe { libc::fcntl(a.as_raw_fd(), DUPFD_QUERY, b.as_raw_fd()) } {
        0 => return Some(false),
        1 => return Some(true),
        _ => {}
    }
    let own = rustix::process::getpid().as_raw_nonzero().get();
    // SAFETY: as above; both descriptors belong to this process.
    match unsafe { libc::syscall(libc::SYS_kcmp, own, own, KCMP_FILE, a.as_raw_fd(), b.as_raw_fd()) } {
        0 => Some(true),
        // Less, greater, or different without an order (kcmp(2)).
        1..=3 => Some(false),
        _ => None,
    }
}

/// Returns true where both descriptors refer to one inode.
fn same_inode(a: BorrowedFd<'_>, b: BorrowedFd<'_>) -> Result<bool, Failed> {
    let failed = |call: &'static str| move |errno: Errno| Failed::new(call, errno);
    let mut shared = INOTIFY.lock().unwrap_or_else(PoisonError::into_inner);
    let inotify = match shared.take() {
        Some(inotify) => inotify,
        None => {
            inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).map_err(failed("inotify_init1"))?
        }
    };
    let inotify = shared.insert(inotify);
    let watch = |fd: BorrowedFd<'_>| {
        let link = format!("/proc/self/fd/{}", fd.as_raw_fd());
        inotify::add_watch(&*inotify, link, WatchFlags::DELETE_SELF).map_err(failed("inotify_add_watch"))
    };
    let first = watch(a)?;
    let second = watch(b);
    // An error means that the kernel has removed the watch already.
    _ = inotify::remove_watch(&*inotify, first);
    if let Ok(second) = second
        && second != first
    {
        _ = inotify::remove_watch(&*inotify, second);
    }
    // Each removed watch queues an IN_IGNORED event: discard it, so that the queue does not grow.
    let mut events = [0; 512];
    while rustix::io::read(&*inotify, &mut events[..]).is_ok_and(|read| read > 0) {}
    Ok(second? == first)
}

/// Returns the kind of a file that has seals.
fn kind_with_seals(fd: BorrowedFd<'_>) -> Result<FileKind, FileError> {
    match file_system(fd)? {
        (TMPFS, _) => Ok(FileKind::Memfd),
        (HUGETLBFS, page) => Ok(FileKind::Hugetlb(page)),
        _ => Err(FileError::Foreign { name: name(fd)? }),
    }
}

/// Returns the kind of a file that has no seals.
fn kind_without_seals(fd: BorrowedFd<'_>) -> Result<FileKind, FileError> {
    let name = name(fd)?;
    let is_guest_memfd = name == ANON_GUEST_MEMFD
        || (name.starts_with(KERNEL_MOUNT_PREFIX) && file_system(fd)?.0 == GUEST_MEMFD);
    if is_guest_memfd { Ok(FileKind::GuestMemfd) } else { Err(FileError::Foreign { name }) }
}

/// Returns the file system's magic number and its block size in bytes.
fn file_system(fd: BorrowedFd<'_>) -> Result<(u64, u64), Failed> {
    let fs = rustix::fs::fstatfs(fd).map_err(|e| Failed::new("fstatfs", e))?;
    // Width and signedness of both fields depend on the architecture.
    Ok((fs.f_type as u64 & 0xffff_ffff, fs.f_bsize as u64))
}

/// Returns the link target in `/proc/self/fd`. Only files of the kernel itself have a target that is not a path.
fn name(fd: BorrowedFd<'_>) -> Result<String, Failed> {
    let link = format!("/proc/self/fd/{}", fd.as_raw_fd());
    rustix::fs::readlink(link, Vec::new())
        .map(|name| name.to_string_lossy().into_owned())
        .map_err(|e| Failed::new("readlink(/proc/self/fd)", e))
}

/// Checks that `len` bytes of the file from `offset` on may back guest memory, which devices write to if `writable`. Makes
/// no system call: everything that it needs is in `file`.
pub fn check(file: &Identity, offset: u64, len: u64, writable: bool) -> Result<(), FileError> {
    let range =
        PageRange::<Offset>::new(offset, len).map_err(|source| FileError::Range { offset, len, source })?;
    if range.end().0 > file.size {
        return Err(FileError::TooShort { size: file.size, range });
    }
    if writable && !file.writable {
        return Err(FileError::ReadOnly);
    }
    if writable && file.seals.intersects(SealFlags::WRITE | SealFlags::FUTURE_WRITE) {
        return Err(FileError::WriteSealed);
    }
    // A guest_memfd cannot be truncated.
    if file.kind != FileKind::GuestMemfd && !file.seals.contains(SealFlags::SHRINK) {
        return Err(FileError::Shrinkable);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns another open file description of the same file.
    fn reopened(fd: &OwnedFd) -> OwnedFd {
        let link = format!("/proc/self/fd/{}", fd.as_raw_fd());
        rustix::fs::open(link, OFlags::RDONLY | OFlags::CLOEXEC, rustix::fs::Mode::empty()).unwrap()
    }

    #[test]
    fn same_file_compares_inodes_across_reopened_descriptors() {
        use rustix::fs::{MemfdFlags, memfd_create};
        let plain = || memfd_create("same", MemfdFlags::CLOEXEC).unwrap();
        let huge = || memfd_create("same", MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB);
        let mut pairs = vec![(plain(), plain())];
        if let (Ok(a), Ok(b)) = (huge(), huge()) {
            pairs.push((a, b));
        }
        for _ in 0..100 {
            for (a, b) in &pairs {
                assert_eq!(same_file(a, b), Ok(false));
                assert_eq!(same_file(a, a), Ok(true));
                assert_eq!(same_file(a, a.try_clone().unwrap()), Ok(true));
                assert_eq!(same_file(reopened(a), a), Ok(true));
                assert_eq!(same_file(reopened(b), reopened(a)), Ok(false));
                // Each comparison by itself.
                let (again, copy) = (reopened(a), a.try_clone().unwrap());
                for (one, other, description, inode) in
                    [(a, b, false, false), (a, &again, false, true), (a, &copy, true, true)]
                {
                    assert_eq!(same_inode(one.as_fd(), other.as_fd()), Ok(inode));
                    let answer = same_description(one.as_fd(), other.as_fd());
                    assert!(answer.is_none_or(|answer| answer == description), "{answer:?}");
                }
            }
        }
    }

    #[test]
    fn same_file_compares_guest_memfds() {
        let make = || {
            let vm = kvm_ioctls::Kvm::new().ok()?.create_vm().ok()?;
            crate::guest_memfd::create(&vm, 1 << 20, crate::guest_memfd::Flags::empty()).ok()
        };
        // Without KVM, or with a KVM without guest_memfd, there is nothing to compare.
        let (Some(a), Some(b)) = (make(), make()) else { return };
        let copy = a.as_fd().try_clone_to_owned().unwrap();
        assert_eq!((same_file(&a, &b), same_file(&a, copy)), (Ok(false), Ok(true)));
    }

    #[test]
    fn same_file_is_right_in_concurrent_threads_and_leaves_no_watch() {
        let files: Vec<OwnedFd> = (0..4)
            .map(|_| rustix::fs::memfd_create("same", rustix::fs::MemfdFlags::CLOEXEC).unwrap())
            .collect();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for (i, a) in files.iter().enumerate() {
                        for (j, b) in files.iter().enumerate() {
                            assert_eq!(same_file(a, b), Ok(i == j));
                        }
                    }
                });
            }
        });
        let shared = INOTIFY.lock().unwrap();
        let fd = shared.as_ref().unwrap().as_raw_fd();
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).unwrap();
        assert!(!info.contains("inotify wd"), "{info}");
    }
}
