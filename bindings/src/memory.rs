//! Guest memory of this process: a file that backs it, and the window through which the CPU sees it.
//!
//! [`GuestFile`] is what a domain maps for a device: file, kind, identity, and (for the kernels and back-ends
//! that pin by address) a window of this process's address space over it. The daemon never touches the bytes;
//! owners (VMM, demo, tests) read and write them through [`GuestFile::read`] and [`GuestFile::write`].

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};

use crate::Failed;

/// What kind of file backs guest memory (`fstatfs`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileKind {
    /// tmpfs, as `memfd_create` makes it.
    Memfd,
    /// hugetlbfs, with its page size in bytes.
    Hugetlb(u64),
    /// KVM's guest_memfd.
    GuestMemfd,
}

/// A file that backs guest memory, and this process's window over the whole of it.
#[derive(Debug)]
pub struct GuestFile {
    fd: OwnedFd,
    kind: FileKind,
    len: u64,
    writable: bool,
    window: OnceLock<Window>,
}

#[derive(Debug)]
struct Window {
    base: *mut u8,
    len: usize,
}

// SAFETY: the window is plain shared memory; every access goes through `GuestFile`, which bounds it and copies
// byte by byte without forming references, so that no thread relies on what another (or a device) writes.
unsafe impl Send for Window {}
// SAFETY: as above.
unsafe impl Sync for Window {}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: base and len are those of our own mmap, unmapped only here; no pointer into it outlives the
        // GuestFile, whose methods hand out none but the address that a domain pins (`address`).
        let _ = unsafe { rustix::mm::munmap(self.base.cast(), self.len) };
    }
}

impl GuestFile {
    /// Takes `fd`, `len` bytes long, of a kind that the caller has checked.
    pub fn new(fd: OwnedFd, kind: FileKind, len: u64, writable: bool) -> Self {
        Self { fd, kind, len, writable, window: OnceLock::new() }
    }

    /// A new memfd of `len` bytes, sealed against shrinking.
    pub fn memfd(name: &str, len: u64) -> Result<Self, Failed> {
        let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
            .map_err(|e| Failed::new("memfd_create", e))?;
        rustix::fs::ftruncate(&fd, len).map_err(|e| Failed::new("ftruncate", e))?;
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK).map_err(|e| Failed::new("F_ADD_SEALS", e))?;
        Ok(Self::new(fd, FileKind::Memfd, len, true))
    }

    /// A new memfd of `len` bytes on hugetlbfs, of pages of `page` bytes (2 MiB or 1 GiB; the kernel calls other
    /// sizes `EINVAL`, and those it does not offer `ENODEV`), sealed against shrinking. `len` is a multiple of
    /// `page`. The pages are reserved by the window, at the first call that needs it: `ENOMEM` then where
    /// /proc/sys/vm/nr_hugepages (or hugepages-1048576kB/nr_hugepages in /sys/kernel/mm/hugepages) has too few.
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

    /// What the file is.
    pub fn kind(&self) -> FileKind {
        self.kind
    }

    /// Bytes of the file that are guest memory.
    pub fn size(&self) -> u64 {
        self.len
    }

    /// Whether a device may write to it.
    pub fn writable(&self) -> bool {
        self.writable
    }

    /// The user-space address of `offset`, for a domain that pins by address. The window lives as long as this
    /// value. `EINVAL` beyond the file, the errno of `mmap` where the file cannot be mapped.
    pub fn address(&self, offset: u64) -> Result<u64, Failed> {
        if offset >= self.len {
            return Err(Failed::new("address", Errno::INVAL));
        }
        Ok(self.window()?.base as u64 + offset)
    }

    /// Copies `bytes.len()` bytes from `offset` into `bytes`. The file must be touchable there: a private page
    /// of a guest_memfd, or a truncated file, is SIGBUS.
    pub fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<(), Failed> {
        let from = self.span(offset, bytes.len())?;
        for (i, byte) in bytes.iter_mut().enumerate() {
            // SAFETY: `span` has checked offset + len against the window, which lives as long as self.
            *byte = unsafe { from.add(i).read_volatile() };
        }
        Ok(())
    }

    /// Copies `bytes` to `offset`. As [`GuestFile::read`]; `EACCES` on a read-only file.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), Failed> {
        if !self.writable {
            return Err(Failed::new("write", Errno::ACCESS));
        }
        let to = self.span(offset, bytes.len())?;
        for (i, byte) in bytes.iter().enumerate() {
            // SAFETY: as in `read`; the window was mapped PROT_WRITE because the file is writable.
            unsafe { to.add(i).write_volatile(*byte) };
        }
        Ok(())
    }

    /// Reads the naturally aligned `u64` at `offset` in one access.
    pub fn load(&self, offset: u64) -> Result<u64, Failed> {
        let at = self.word(offset)?;
        // SAFETY: bounds and alignment checked by `word`; shared memory is only ever accessed atomically or
        // byte-wise volatile through this type.
        Ok(unsafe { &*at }.load(std::sync::atomic::Ordering::Acquire))
    }

    /// Writes the naturally aligned `u64` at `offset` in one access.
    pub fn store(&self, offset: u64, value: u64) -> Result<(), Failed> {
        if !self.writable {
            return Err(Failed::new("store", Errno::ACCESS));
        }
        let at = self.word(offset)?;
        // SAFETY: as in `load`; writable.
        unsafe { &*at }.store(value, std::sync::atomic::Ordering::Release);
        Ok(())
    }

    /// Gives the pages of `offset..offset+len` back to the file system; the next touch finds zeroes.
    /// `fallocate(2)` with PUNCH_HOLE and KEEP_SIZE. It succeeds whatever pins exist.
    ///
    /// `EINVAL` for a part of a page of hugetlbfs, and the kernel is not asked: it frees whole pages only, writes
    /// zeroes into the rest, which keeps its memory, and returns 0 (`hugetlbfs_punch_hole` in fs/hugetlbfs/inode.c).
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

    fn word(&self, offset: u64) -> Result<*const std::sync::atomic::AtomicU64, Failed> {
        if !offset.is_multiple_of(8) {
            return Err(Failed::new("word", Errno::INVAL));
        }
        Ok(self.span(offset, 8)?.cast_const().cast())
    }

    fn span(&self, offset: u64, len: usize) -> Result<*mut u8, Failed> {
        match offset.checked_add(len as u64) {
            // SAFETY: offset + len lies within the window, as just checked.
            Some(end) if end <= self.len => Ok(unsafe { self.window()?.base.add(offset as usize) }),
            _ => Err(Failed::new("span", Errno::INVAL)),
        }
    }

    /// The window, made at the first call that succeeds. A failure is not kept: memory that is short now may be there
    /// for the next call.
    fn window(&self) -> Result<&Window, Failed> {
        if let Some(window) = self.window.get() {
            return Ok(window);
        }
        let prot = if self.writable { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ };
        let len = usize::try_from(self.len).map_err(|_| Failed::new("mmap", Errno::INVAL))?;
        // SAFETY: a fresh mapping at an address of the kernel's choice aliases nothing of ours.
        let base =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, prot, MapFlags::SHARED, &self.fd, 0) }
                .map_err(|errno| Failed::new("mmap", errno))?;
        let made = Window { base: base.cast(), len };
        // Where another thread was faster, its window stays, and this one is dropped with the closure.
        Ok(self.window.get_or_init(move || made))
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
    fn a_part_of_a_huge_page_is_not_punched() {
        let file = match GuestFile::memfd_huge("huge", 2 * HUGE, HUGE) {
            // This kernel has no hugetlbfs: there is nothing to punch.
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
    fn a_huge_memfd_is_made_of_whole_pages_of_a_size_that_there_is() {
        for (len, page) in [(0, HUGE), (HUGE + 4096, HUGE), (HUGE, 4096), (1 << 30, 16 << 20)] {
            let failed = GuestFile::memfd_huge("huge", len, page).unwrap_err();
            assert_eq!(failed, Failed::new("memfd_create(MFD_HUGETLB)", Errno::INVAL));
        }
    }
}
