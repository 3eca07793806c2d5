//! Zeroed memory that is accessed only as atomic 64-bit words, and whose pages are allocated when first written.
//!
//! In a memfd it outlives the process: a process that has the descriptor finds it as the last store left it. The file's
//! length is sealed, so that no access can run past its end. The *contents* are only as trustworthy as every process that
//! had the descriptor; the reader must validate them.

use std::alloc::{Layout, handle_alloc_error};
use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};

use crate::Failed;

/// `TMPFS_MAGIC` (include/uapi/linux/magic.h): the file system of a memfd.
const TMPFS: u64 = 0x0102_1994;
/// The size of a word in bytes.
const WORD_BYTES: u64 = size_of::<AtomicU64>() as u64;

/// A fixed number of atomic 64-bit words, zero until written.
#[derive(Debug)]
pub struct Words {
    base: NonNull<AtomicU64>,
    words: usize,
    file: Option<OwnedFd>,
}

// SAFETY: the memory is this value's own mapping, and is accessible only as `&[AtomicU64]`, which any thread (and, for a
// memfd, any process) may access concurrently.
unsafe impl Send for Words {}
// SAFETY: as above.
unsafe impl Sync for Words {}

impl Words {
    /// Maps `bytes` bytes (a multiple of 8, not 0; `EINVAL` otherwise) of private memory. Nothing is reserved: a page is
    /// allocated when it is first written.
    pub fn anonymous(bytes: u64) -> Result<Self, Failed> {
        let len = mapping_length(bytes)?;
        let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::NORESERVE);
        // SAFETY: a new mapping at an address that the kernel chooses overlaps no other.
        let base = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), len, prot, flags) };
        Self::from_mapping(base.map_err(|errno| Failed::new("mmap", errno))?, len, None)
    }

    /// Creates a memfd of `bytes` bytes (a multiple of 8, not 0; `EINVAL` otherwise), named `name` in `/proc`, with its
    /// length sealed.
    pub fn memfd(name: &str, bytes: u64) -> Result<Self, Failed> {
        mapping_length(bytes)?;
        let file = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
            .map_err(|errno| Failed::new("memfd_create", errno))?;
        rustix::fs::ftruncate(&file, bytes).map_err(|errno| Failed::new("ftruncate", errno))?;
        rustix::fs::fcntl_add_seals(&file, SEALS).map_err(|errno| Failed::new("F_ADD_SEALS", errno))?;
        Self::from_fd(file)
    }

    /// Maps a memfd that [`Words::memfd`] of this or another process created. `EINVAL` where it is not a memfd or its length
    /// is not valid, `EPERM` where its length is not sealed, `EACCES` where it is not open for reading and writing.
    pub fn from_fd(file: OwnedFd) -> Result<Self, Failed> {
        // Seals first: only tmpfs and hugetlbfs have them. fstatfs and fstat of a FUSE file could block.
        let seals = rustix::fs::fcntl_get_seals(&file).map_err(|errno| Failed::new("F_GET_SEALS", errno))?;
        let fs = rustix::fs::fstatfs(&file).map_err(|errno| Failed::new("fstatfs", errno))?;
        // Width and signedness of the field depend on the architecture.
        if fs.f_type as u64 & 0xffff_ffff != TMPFS {
            return Err(Failed::new("fstatfs", Errno::INVAL));
        }
        if !seals.contains(SEALS) {
            return Err(Failed::new("F_GET_SEALS", Errno::PERM));
        }
        let stat = rustix::fs::fstat(&file).map_err(|errno| Failed::new("fstat", errno))?;
        let len = mapping_length(u64::try_from(stat.st_size).unwrap_or(0))?;
        let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED | MapFlags::NORESERVE);
        // SAFETY: a new mapping at an address that the kernel chooses overlaps no other; the seals fix the length of the
        // file, so that no access raises SIGBUS.
        let base = unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, prot, flags, &file, 0) };
        Self::from_mapping(base.map_err(|errno| Failed::new("mmap", errno))?, len, Some(file))
    }

    /// Returns the memfd, or none for private memory.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.file.as_ref().map(AsFd::as_fd)
    }

    /// Takes the mapping of `len` bytes at `base`.
    fn from_mapping(base: *mut std::ffi::c_void, len: usize, file: Option<OwnedFd>) -> Result<Self, Failed> {
        let base = NonNull::new(base.cast()).ok_or(Failed::new("mmap", Errno::NOMEM))?;
        Ok(Self { base, words: len / size_of::<AtomicU64>(), file })
    }
}

/// Bytes of address space that [`private`] asks for.
const PRIVATE_BYTES: u64 = 2 << 30;
/// The least that it returns.
const MIN_PRIVATE_BYTES: u64 = 64 << 10;

/// Returns private memory of 2 GiB, or of as much as `RLIMIT_AS` leaves, halved until the kernel maps it. Nothing of it is
/// reserved. Like an allocation it ends the process where there is no memory even for 64 KiB.
pub fn private() -> Words {
    let sizes = std::iter::successors(Some(PRIVATE_BYTES), |bytes| Some(bytes / 2));
    let mut sizes = sizes.take_while(|bytes| *bytes >= MIN_PRIVATE_BYTES);
    let made = sizes.find_map(|bytes| Words::anonymous(bytes).ok());
    made.unwrap_or_else(|| handle_alloc_error(Layout::new::<[u64; MIN_PRIVATE_BYTES as usize / 8]>()))
}

/// The seals that fix the length of the file.
const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);

/// Returns `bytes` as the length of a mapping; `EINVAL` unless it is a positive number of whole words.
fn mapping_length(bytes: u64) -> Result<usize, Failed> {
    match usize::try_from(bytes) {
        Ok(len) if bytes > 0 && bytes.is_multiple_of(WORD_BYTES) => Ok(len),
        _ => Err(Failed::new("mmap", Errno::INVAL)),
    }
}

impl Deref for Words {
    type Target = [AtomicU64];

    fn deref(&self) -> &[AtomicU64] {
        // SAFETY: base and words are those of our own mapping, which is page-aligned, zeroed by the kernel, and mapped until
        // this value is dropped. Every bit pattern is a valid AtomicU64, and there are no references of another type.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.words) }
    }
}

impl Drop for Words {
    fn drop(&mut self) {
        // SAFETY: base and length are those of our own mmap, unmapped only here; borrows of it end before this value.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.words * size_of::<AtomicU64>()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering::Relaxed;

    #[test]
    fn memfd_words_survive_a_reopen() {
        let words = Words::memfd("words", 1 << 30).unwrap();
        assert_eq!(words.len(), 1 << 27);
        words[0].store(7, Relaxed);
        words[(1 << 27) - 1].store(9, Relaxed);
        let fd = words.fd().unwrap().try_clone_to_owned().unwrap();
        let blocks = rustix::fs::fstat(&fd).unwrap().st_blocks;
        assert!(blocks * 512 <= 3 * 4096, "only written pages are allocated, not {blocks} blocks");
        drop(words);
        let again = Words::from_fd(fd).unwrap();
        assert_eq!((again[0].load(Relaxed), again[1].load(Relaxed)), (7, 0));
        assert_eq!(again[(1 << 27) - 1].load(Relaxed), 9);
    }

    #[test]
    fn descriptor_without_sealed_length_is_refused() {
        let errno = |file: OwnedFd| Words::from_fd(file).unwrap_err().errno;
        let memfd = || rustix::fs::memfd_create("words", MemfdFlags::ALLOW_SEALING).unwrap();
        let sealed = |file: OwnedFd| {
            rustix::fs::fcntl_add_seals(&file, SEALS).unwrap();
            file
        };
        let unsealed = memfd();
        rustix::fs::ftruncate(&unsealed, 4096).unwrap();
        assert_eq!(errno(unsealed), Errno::PERM);
        assert_eq!(errno(sealed(memfd())), Errno::INVAL, "the file is empty");
        let odd = memfd();
        rustix::fs::ftruncate(&odd, 4095).unwrap();
        assert_eq!(errno(sealed(odd)), Errno::INVAL, "the file ends within a word");
        let plain = tempfile::tempfile_in("/proc/self/cwd").unwrap();
        assert!([Errno::INVAL, Errno::PERM].contains(&errno(plain.into())));
        let words = Words::memfd("words", 4096).unwrap();
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&words.fd().unwrap()));
        let readable = std::fs::File::open(path).unwrap();
        assert_eq!(errno(readable.into()), Errno::ACCESS);
        let fd = words.fd().unwrap();
        assert_eq!(rustix::fs::ftruncate(fd, 0).unwrap_err(), Errno::PERM);
        assert_eq!(rustix::fs::ftruncate(fd, 8192).unwrap_err(), Errno::PERM);
    }

    #[test]
    fn anonymous_words_are_zeroed() {
        let words = Words::anonymous(1 << 32).unwrap();
        assert!(words.fd().is_none());
        assert_eq!(words.len(), 1 << 29);
        assert_eq!(words[1 << 28].load(Relaxed), 0);
        assert_eq!(Words::anonymous(0).unwrap_err().errno, Errno::INVAL);
        assert_eq!(Words::anonymous(12).unwrap_err().errno, Errno::INVAL);
        assert_eq!(private()[0].load(Relaxed), 0);
    }
}
