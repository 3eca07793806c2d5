//! Files that back guest memory, and this process's mappings of them.
//!
//! A domain maps a [`GuestFile`] for a device. For kernels and backends that pin by address, the file is also mapped into
//! this process. The daemon never accesses the contents; owners (VMM, demo, tests) read and write them by
//! [`GuestFile::read`] and [`GuestFile::write`].

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};

use crate::Failed;

/// The kind of a file that backs guest memory (fstatfs(2)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileKind {
    /// A memfd, or another file on tmpfs.
    Memfd,
    /// A file on hugetlbfs, with its page size in bytes.
    Hugetlb(u64),
    /// A guest_memfd of KVM.
    GuestMemfd,
}

/// A file that backs guest memory, and this process's mapping of the whole file, made when it is first needed.
#[derive(Debug)]
pub struct GuestFile {
    fd: OwnedFd,
    kind: FileKind,
    len: u64,
    writable: bool,
    mapping: OnceLock<Mapping>,
}

#[derive(Debug)]
struct Mapping {
    base: *mut u8,
    len: usize,
}

// SAFETY: the mapping is plain shared memory. Every access goes through `GuestFile`, which checks its bounds and makes
// volatile or atomic accesses only, so that concurrent writes by other threads or by a device are no data race.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: base and len are those of our own mmap, unmapped only here. No pointer into it outlives the GuestFile,
        // whose methods return none but the address that a domain pins (`address`).
        let _ = unsafe { rustix::mm::munmap(self.base.cast(), self.len) };
    }
}

impl GuestFile {
    /// Takes the file `fd` of `len` bytes. The caller has checked its kind.
    pub fn new(fd: OwnedFd, kind: FileKind, len: u64, writable: bool) -> Self {
        Self { fd, kind, len, writable, mapping: OnceLock::new() }
    }

    /// Creates a memfd of `len` bytes, sealed against shrinking.
    pub fn memfd(name: &str, len: u64) -> Result<Self, Failed> {
        let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
            .map_err(|e| Failed::new("memfd_create", e))?;
        rustix::fs::ftruncate(&fd, len).map_err(|e| Failed::new("ftruncate", e))?;
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK).map_err(|e| Failed::new("F_ADD_SEALS", e))?;
        Ok(Self::new(fd, FileKind::Memfd, len, true))
    }

    /// Creates a memfd of `len` bytes on hugetlbfs, sealed against shrinking. `page` is the page size in bytes: 2 MiB or
    /// 1 GiB, `EINVAL` otherwise, `ENODEV` where the kernel does not support it. `len` is a multiple of `page`.
    ///
    /// The pages are reserved when the file is first mapped into this process, by the first call that needs that: it
    /// returns `ENOMEM` where /proc/sys/vm/nr_hugepages (or hugepages-1048576kB/nr_hugepages in
    /// /sys/kernel/mm/hugepages) is too low.
    pub fn memfd_huge(name: &str, len: u64, page: u64) -> Result<Self, Failed> {
        const CALL: &str = "memfd_create(MFD_HUGETLB)";
        let size = match page {
            0x20_0000 => MemfdFlags::HUGE_2MB,
            0x4000_0000 => MemfdFlags::HUGE_1GB,
            _ => return Err(Failed::new(CALL, Errno::INVAL)),
        };
        if len == 0 || !len.is_multiple_of(page) {
            return Err(Failed::new(CALL, Errno::INVAL));
        }
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | MemfdFlags::HUGETLB | size;
        let fd = rustix::fs::memfd_create(name, flags).map_err(|e| Failed::new(CALL, e))?;
        rustix::fs::ftruncate(&fd, len).map_err(|e| Failed::new("ftruncate", e))?;
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK).map_err(|e| Failed::new("F_ADD_SEALS", e))?;
        Ok(Self::new(fd, FileKind::Hugetlb(page), len, true))
    }

    /// Returns the kind of the file.
    pub fn kind(&self) -> FileKind {
        self.kind
    }

    /// Returns the size of the file in bytes, all of which may be guest memory.
    pub fn size(&self) -> u64 {
        self.len
    }

    /// Returns true where devices may write to the file.
    pub fn writable(&self) -> bool {
        self.writable
    }

    /// Returns the address of `offset` in this process, for a domain that pins by address. Valid as long as this value.
    /// `EINVAL` beyond the file, the errno of mmap(2) where the file cannot be mapped.
    pub fn address(&self, offset: u64) -> Result<u64, Failed> {
        if offset >= self.len {
            return Err(Failed::new("address", Errno::INVAL));
        }
        Ok(self.mapping()?.base as u64 + offset)
    }

    /// Copies `bytes.len()` bytes from `offset` into `bytes`. `EINVAL` beyond the file. An access to a private page of a
    /// guest_memfd, or to a part that was truncated, raises SIGBUS.
    pub fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<(), Failed> {
        let from = self.span(offset, bytes.len())?;
        for (i, byte) in bytes.iter_mut().enumerate() {
            // SAFETY: `span` has checked that offset + len lies in the mapping, which lives as long as self.
            *byte = unsafe { from.add(i).read_volatile() };
        }
        Ok(())
    }

    /// Copies `bytes` to `offset`. Errors as in [`GuestFile::read`], and `EACCES` for a read-only file.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), Failed> {
        if !self.writable {
            return Err(Failed::new("write", Errno::ACCESS));
        }
        let to = self.span(offset, bytes.len())?;
        for (i, byte) in bytes.iter().enumerate() {
            // SAFETY: as in `read`; the mapping has PROT_WRITE because the file is writable.
            unsafe { to.add(i).write_volatile(*byte) };
        }
        Ok(())
    }

    /// Reads the naturally aligned `u64` at `offset` in one access.
    pub fn load(&self, offset: u64) -> Result<u64, Failed> {
        let at = self.word(offset)?;
        // SAFETY: `word` has checked bounds and alignment; this type accesses the memory only atomically or by volatile
        // bytes.
        Ok(unsafe { &*at }.load(std::sync::atomic::Ordering::Acquire))
    }

    /// Writes the naturally aligned `u64` at `offset` in one access.
    pub fn store(&self, offset: u64, value: u64) -> Result<(), Failed> {
        if !self.writable {
            return Err(Failed::new("store", Errno::ACCESS));
        }
        let at = self.word(offset)?;
        // SAFETY: as in `load`; the mapping has PROT_WRITE because the file is writable.
        unsafe { &*at }.store(value, std::sync::atomic::Ordering::Release);
        Ok(())
    }

    /// Frees the pages of `offset..offset+len` by fallocate(2) with PUNCH_HOLE and KEEP_SIZE; later accesses find zeroes.
    /// Succeeds even while the pages are pinned.
    ///
    /// `EINVAL`, without a system call, for a part of a hugetlbfs page: the kernel frees whole pages only. It would write
    /// zeroes to the rest without freeing it, and return 0 (`hugetlbfs_punch_hole` in fs/hugetlbfs/inode.c).
    pub fn punch(&self, offset: u64, len: u64) -> Result<(), Failed> {
        if let FileKind::Hugetlb(page) = self.kind
            && !(offset.is_multiple_of(page) && len.is_multiple_of(page))
        {
            let call = "fallocate(PUNCH_HOLE) of part of a hugetlbfs page, which would be zeroed and not freed \
                        (punch whole pages of the file)";
            return Err(Failed::new(call, Errno::INVAL));
        }
        rustix::fs::fallocate(&self.fd, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, len)
            .map_err(|e| Failed::new("fallocate(PUNCH_HOLE)", e))
    }

    /// Returns a pointer to the aligned `u64` at `offset`; `EINVAL` where it is not aligned or beyond the file.
    fn word(&self, offset: u64) -> Result<*const std::sync::atomic::AtomicU64, Failed> {
        if !offset.is_multiple_of(8) {
            return Err(Failed::new("word", Errno::INVAL));
        }
        Ok(self.span(offset, 8)?.cast_const().cast())
    }

    /// Returns a pointer to the `len` bytes at `offset`; `EINVAL` beyond the file.
    fn span(&self, offset: u64, len: usize) -> Result<*mut u8, Failed> {
        match offset.checked_add(len as u64) {
            // SAFETY: offset + len lies within the mapping, as just checked.
            Some(end) if end <= self.len => Ok(unsafe { self.mapping()?.base.add(offset as usize) }),
            _ => Err(Failed::new("span", Errno::INVAL)),
        }
    }

    /// Returns this process's mapping of the file, which the first successful call makes. A failure is not stored: the next
    /// call may find enough memory.
    fn mapping(&self) -> Result<&Mapping, Failed> {
        if let Some(mapping) = self.mapping.get() {
            return Ok(mapping);
        }
        let prot = if self.writable { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ };
        let len = usize::try_from(self.len).map_err(|_| Failed::new("mmap", Errno::INVAL))?;
        // SAFETY: a fresh mapping at an address of the kernel's choice aliases nothing of ours.
        let base =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, prot, MapFlags::SHARED, &self.fd, 0) }
                .map_err(|errno| Failed::new("mmap", errno))?;
        let made = Mapping { base: base.cast(), len };
        // If another thread was faster, its mapping stays, and this one is dropped (and unmapped) with the closure.
        Ok(self.mapping.get_or_init(move || made))
    }
}

impl AsFd for GuestFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HUGE: u64 = 2 << 20;

    #[test]
    fn punch_of_a_partial_huge_page_is_refused() {
        let file = match GuestFile::memfd_huge("huge", 2 * HUGE, HUGE) {
            // The kernel has no hugetlbfs.
            Err(failed) if matches!(failed.errno, Errno::NODEV | Errno::NOSYS) => return,
            file => file.unwrap(),
        };
        assert_eq!((file.kind(), file.size()), (FileKind::Hugetlb(HUGE), 2 * HUGE));
        for (offset, len) in [(0, 4096), (4096, HUGE), (HUGE, HUGE + 4096)] {
            let failed = file.punch(offset, len).unwrap_err();
            assert_eq!(failed.errno, Errno::INVAL);
            assert!(failed.to_string().contains("zeroed and not freed"), "{failed}");
        }
        file.punch(HUGE, HUGE).unwrap();
    }

    #[test]
    fn memfd_huge_refuses_partial_pages_and_unknown_page_sizes() {
        for (len, page) in [(0, HUGE), (HUGE + 4096, HUGE), (HUGE, 4096), (1 << 30, 16 << 20)] {
            let failed = GuestFile::memfd_huge("huge", len, page).unwrap_err();
            assert_eq!(failed, Failed::new("memfd_create(MFD_HUGETLB)", Errno::INVAL));
        }
    }
}
