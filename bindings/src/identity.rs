//! Which file a foreign descriptor is, and whether it will do as guest memory.
//!
//! A client passes descriptors; before any is mapped or pinned, [`identify`] asks the kernel what it is and
//! [`check`] judges the answer. Nothing that a file system in user space could delay, shrink or fake is let past:
//! only tmpfs, hugetlbfs and guest_memfd.
//!
//! The order of the questions matters: a file system in user space may answer fstat and fstatfs late or never,
//! so the questions that the kernel answers by itself come first (open mode, seals, the name in `/proc`). Only a
//! file on tmpfs or hugetlbfs has seals to report. A guest_memfd has none; up to Linux 6.18 it is known by the
//! name that KVM gave its anonymous inode, later by its file system. What is left is a file of a client's own file
//! system that is named like KVM's: it can delay fstatfs, so callers ask on a thread that may wait.
//!
//! Device and inode name a file only as far as the kernel's numbers go: guest_memfd and hugetlbfs count inodes in 32 bits, so
//! that somebody who makes four thousand million files has one with the numbers of another. Where numbers are those of a
//! file that is open here, [`same_file`] asks the kernel whether it is that file (docs/decisions/0010-file-identity.md).

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::fs::{OFlags, SealFlags};
use rustix::io::Errno;

use crate::Failed;
use crate::memory::FileKind;
use crate::units::{Offset, PageRange};

/// `TMPFS_MAGIC`.
const TMPFS: u64 = 0x0102_1994;
/// `HUGETLBFS_MAGIC`.
const HUGETLBFS: u64 = 0x9584_58f6;
/// `GUEST_MEMFD_MAGIC`: "GMEM".
const GUEST_MEMFD: u64 = 0x474d_454d;
/// What `/proc/self/fd` shows for a guest_memfd on an anonymous inode.
const ANON_GUEST_MEMFD: &str = "anon_inode:[kvm-gmem]";
/// How it begins for a file of an in-kernel file system that KVM may have made; then the magic decides.
const UNNAMED: &str = "/[";

/// What the kernel says of a file: facts, no judgement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// What backs it.
    pub kind: FileKind,
    /// `st_dev`; with `inode` the file's name for as long as anyone has it open.
    pub device: u64,
    /// `st_ino`.
    pub inode: u64,
    /// Bytes.
    pub size: u64,
    /// Whether the descriptor was opened for reading and writing.
    pub writable: bool,
    /// Its seals; none for a guest_memfd, which cannot shrink.
    pub seals: SealFlags,
}

/// Why a file will not do as guest memory. The text is the message that the client reads.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FileError {
    /// It is not on tmpfs, hugetlbfs or guest_memfd.
    #[error("`{name}` cannot be guest memory: pass a memfd (memfd_create), a hugetlb memfd or a guest_memfd")]
    Foreign {
        /// Its name in `/proc/self/fd`.
        name: String,
    },
    /// O_PATH or O_WRONLY.
    #[error("the descriptor cannot be read: open it O_RDWR (or O_RDONLY for memory that devices only read)")]
    Unreadable,
    /// Opened read-only, for a mapping that devices write to.
    #[error("the descriptor is read-only: open it O_RDWR, or add the memory as read-only")]
    ReadOnly,
    /// Sealed against writing, for a mapping that devices write to.
    #[error(
        "the file is sealed against writing: pass one without F_SEAL_WRITE and F_SEAL_FUTURE_WRITE, or add the memory as read-only"
    )]
    WriteSealed,
    /// Anyone could truncate it under the device.
    #[error(
        "the file may be shrunk: seal it with fcntl(F_ADD_SEALS, F_SEAL_SHRINK) before passing it (memfd_create needs MFD_ALLOW_SEALING)"
    )]
    Shrinkable,
    /// The range is not pages of it.
    #[error("offset {offset:#x} and length {len:#x} are not a range of whole pages: {source}")]
    Range {
        /// Where it starts.
        offset: u64,
        /// Its length in bytes.
        len: u64,
        /// What is wrong.
        source: crate::RangeError,
    },
    /// The file ends before the range.
    #[error(
        "the file has {size:#x} bytes and the range {range} ends behind it: ftruncate it to its full size first"
    )]
    TooShort {
        /// The file's size.
        size: u64,
        /// The range asked for.
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
    /// The kernel would not say.
    #[error("cannot examine the descriptor: {0}")]
    Failed(#[from] Failed),
}

/// Asks the kernel what `fd` is.
pub fn identify(fd: impl AsFd) -> Result<Identity, FileError> {
    let fd = fd.as_fd();
    let open = rustix::fs::fcntl_getfl(fd).map_err(|e| Failed::new("F_GETFL", e))?;
    let access = open & OFlags::RWMODE;
    if open.contains(OFlags::PATH) || access == OFlags::WRONLY {
        return Err(FileError::Unreadable);
    }
    let (kind, seals) = match rustix::fs::fcntl_get_seals(fd) {
        Ok(seals) => (sealable(fd)?, seals),
        Err(Errno::INVAL) => (sealless(fd)?, SealFlags::empty()),
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

/// The inotify instance by which files are compared; nothing is ever watched for longer than that takes.
static WATCHES: Mutex<Option<OwnedFd>> = Mutex::new(None);

/// `F_DUPFD_QUERY` (include/uapi/linux/fcntl.h): whether two descriptors are of one open file description. Linux 6.10.
const DUPFD_QUERY: i32 = 1024 + 3;
/// `KCMP_FILE` (include/uapi/linux/kcmp.h): the same question, where the kernel has kcmp(2) and lets it be asked.
const KCMP_FILE: i32 = 0;

/// True where both descriptors are of one file (one inode), whatever its numbers are and however each was opened.
///
/// One open file description is of one file: a client passes the same descriptor for each of its regions, and most often
/// that is the answer. A guest_memfd cannot be opened a second time, so that another description is another file. Else
/// inotify is asked, which has one watch for an inode, so that watching it twice gives the same watch descriptor
/// (inotify(7), "inotify_add_watch"); that needs leave to read the inode. The kernel compares inodes, not numbers.
pub fn same_file(a: impl AsFd, b: impl AsFd) -> Result<bool, Failed> {
    let (a, b) = (a.as_fd(), b.as_fd());
    let described = same_description(a, b);
    if described == Some(true) {
        return Ok(true);
    }
    match same_inode(a, b) {
        Err(failed) if failed.errno == Errno::ACCESS && described == Some(false) => {
            match identify(a).is_ok_and(|file| file.kind == FileKind::GuestMemfd) {
                true => Ok(false),
                false => Err(failed),
            }
        }
        answer => answer,
    }
}

/// Whether both descriptors are of one open file description; none where the kernel does not say.
fn same_description(a: BorrowedFd<'_>, b: BorrowedFd<'_>) -> Option<bool> {
    // SAFETY: the call takes two descriptors, which are open for as long as they are borrowed, and no memory.
    match unsafe { libc::fcntl(a.as_raw_fd(), DUPFD_QUERY, b.as_raw_fd()) } {
        0 => return Some(false),
        1 => return Some(true),
        _ => {}
    }
    let own = rustix::process::getpid().as_raw_nonzero().get();
    // SAFETY: as above; both descriptors are of this process, which may always look at itself.
    match unsafe { libc::syscall(libc::SYS_kcmp, own, own, KCMP_FILE, a.as_raw_fd(), b.as_raw_fd()) } {
        0 => Some(true),
        1..=3 => Some(false),
        _ => None,
    }
}

/// Whether both descriptors are of one inode.
fn same_inode(a: BorrowedFd<'_>, b: BorrowedFd<'_>) -> Result<bool, Failed> {
    let failed = |call: &'static str| move |errno: Errno| Failed::new(call, errno);
    let mut watches = WATCHES.lock().unwrap_or_else(PoisonError::into_inner);
    let inotify = match watches.take() {
        Some(inotify) => inotify,
        None => {
            inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).map_err(failed("inotify_init1"))?
        }
    };
    let inotify = watches.insert(inotify);
    let watch = |fd: BorrowedFd<'_>| {
        let link = format!("/proc/self/fd/{}", fd.as_raw_fd());
        inotify::add_watch(&*inotify, link, WatchFlags::DELETE_SELF).map_err(failed("inotify_add_watch"))
    };
    let first = watch(a)?;
    let second = watch(b);
    // A watch may have gone by itself; that each is removed is all that counts.
    _ = inotify::remove_watch(&*inotify, first);
    if let Ok(second) = second
        && second != first
    {
        _ = inotify::remove_watch(&*inotify, second);
    }
    // A removed watch leaves an event behind (IN_IGNORED), which nobody needs.
    let mut events = [0; 512];
    while rustix::io::read(&*inotify, &mut events[..]).is_ok_and(|read| read > 0) {}
    Ok(second? == first)
}

/// The kind of a file that has seals.
fn sealable(fd: BorrowedFd<'_>) -> Result<FileKind, FileError> {
    match file_system(fd)? {
        (TMPFS, _) => Ok(FileKind::Memfd),
        (HUGETLBFS, page) => Ok(FileKind::Hugetlb(page)),
        _ => Err(FileError::Foreign { name: name(fd)? }),
    }
}

/// The kind of a file that has none.
fn sealless(fd: BorrowedFd<'_>) -> Result<FileKind, FileError> {
    let name = name(fd)?;
    let known = name == ANON_GUEST_MEMFD || (name.starts_with(UNNAMED) && file_system(fd)?.0 == GUEST_MEMFD);
    if known { Ok(FileKind::GuestMemfd) } else { Err(FileError::Foreign { name }) }
}

/// Type and block size of the file system.
fn file_system(fd: BorrowedFd<'_>) -> Result<(u64, u64), Failed> {
    let fs = rustix::fs::fstatfs(fd).map_err(|e| Failed::new("fstatfs", e))?;
    // Both are of another width, and signed or not, on every architecture.
    Ok((fs.f_type as u64 & 0xffff_ffff, fs.f_bsize as u64))
}

/// What `/proc/self/fd` shows. Only the kernel's own files have names that are no path.
fn name(fd: BorrowedFd<'_>) -> Result<String, Failed> {
    let link = format!("/proc/self/fd/{}", fd.as_raw_fd());
    rustix::fs::readlink(link, Vec::new())
        .map(|name| name.to_string_lossy().into_owned())
        .map_err(|e| Failed::new("readlink(/proc/self/fd)", e))
}

/// Whether `len` bytes from `offset` of the file may become guest memory, which devices write to where
/// `writable`. Pure: everything it judges is in `file`.
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
    // A guest_memfd has no truncate at all.
    if file.kind != FileKind::GuestMemfd && !file.seals.contains(SealFlags::SHRINK) {
        return Err(FileError::Shrinkable);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The same file, opened anew.
    fn reopened(fd: &OwnedFd) -> OwnedFd {
        let link = format!("/proc/self/fd/{}", fd.as_raw_fd());
        rustix::fs::open(link, OFlags::RDONLY | OFlags::CLOEXEC, rustix::fs::Mode::empty()).unwrap()
    }

    #[test]
    fn one_file_is_itself_however_it_was_opened_and_no_other_is() {
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
                // Each way of asking by itself.
                let (again, copy) = (reopened(a), a.try_clone().unwrap());
                for (one, other, description, inode) in
                    [(a, b, false, false), (a, &again, false, true), (a, &copy, true, true)]
                {
                    assert_eq!(same_inode(one.as_fd(), other.as_fd()), Ok(inode));
                    let said = same_description(one.as_fd(), other.as_fd());
                    assert!(said.is_none_or(|said| said == description), "{said:?}");
                }
            }
        }
    }

    #[test]
    fn a_guest_memfd_is_itself_and_no_other_is() {
        let make = || {
            let vm = kvm_ioctls::Kvm::new().ok()?.create_vm().ok()?;
            crate::guest_memfd::create(&vm, 1 << 20, crate::guest_memfd::Flags::empty()).ok()
        };
        // Where there is no KVM, or one without guest_memfd, there is nothing to compare.
        let (Some(a), Some(b)) = (make(), make()) else { return };
        let copy = a.as_fd().try_clone_to_owned().unwrap();
        assert_eq!((same_file(&a, &b), same_file(&a, copy)), (Ok(false), Ok(true)));
    }

    #[test]
    fn a_comparison_watches_nothing_afterwards_and_many_threads_do_not_mislead_each_other() {
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
        let watches = WATCHES.lock().unwrap();
        let fd = watches.as_ref().unwrap().as_raw_fd();
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).unwrap();
        assert!(!info.contains("inotify wd"), "{info}");
    }
}
