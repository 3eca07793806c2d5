//! A file that is appended to through a shared mapping, so that appended data survives the death of the process.
//!
//! The file is fully allocated and mapped shared. An append copies into the page cache without a system call, so that not
//! even SIGKILL loses it. The part that is not written yet reads as NUL bytes. After a crash of the machine the file has
//! only what the file system had written back.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::{Ordering, compiler_fence};

use rustix::fs::{FallocateFlags, Mode, OFlags};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};

use crate::Failed;

/// A file of fixed length, filled from its start on.
///
/// The caller must ensure that nothing truncates the file while it is open: a write to the truncated part raises SIGBUS.
#[derive(Debug)]
pub struct Segment {
    base: *mut u8,
    len: usize,
    used: usize,
    file: OwnedFd,
}

// SAFETY: this value alone owns the mapping, and writing takes `&mut self`.
unsafe impl Send for Segment {}

impl Segment {
    /// Creates the file with mode 0600 (`EEXIST` where it exists), allocates `len` bytes on disk (`ENOSPC`, or `EOPNOTSUPP`
    /// where the file system does not support that), and maps it. On an error the file is removed again.
    pub fn create(path: &Path, len: u64) -> Result<Self, Failed> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let file = rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR)
            .map_err(|errno| Failed::new("open", errno))?;
        Self::over(file, len).inspect_err(|_| {
            let _ = rustix::fs::unlink(path);
        })
    }

    fn over(file: OwnedFd, len: u64) -> Result<Self, Failed> {
        rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, len)
            .map_err(|errno| Failed::new("fallocate", errno))?;
        let len = usize::try_from(len).map_err(|_| Failed::new("mmap", Errno::NOMEM))?;
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice aliases nothing of ours.
        let base = unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, prot, MapFlags::SHARED, &file, 0) }
            .map_err(|errno| Failed::new("mmap", errno))?;
        Ok(Self { base: base.cast(), len, used: 0, file })
    }

    /// Returns the number of bytes appended so far.
    pub fn used(&self) -> u64 {
        self.used as u64
    }

    /// Returns the number of bytes that can still be appended.
    pub fn room(&self) -> u64 {
        (self.len - self.used) as u64
    }

    /// Appends all of `bytes` and returns true, or appends nothing and returns false where there is no room. The first byte
    /// is written last and reads as NUL before, so that a reader never sees an append that the death of this process
    /// interrupted.
    pub fn append(&mut self, bytes: &[u8]) -> bool {
        let Some((first, rest)) = bytes.split_first() else { return true };
        if bytes.len() > self.len - self.used {
            return false;
        }
        // SAFETY: `used + bytes.len() <= len`, as just checked, within our own mapping, which `bytes` cannot overlap: no
        // reference into it is ever returned. The caller ensures that the file is not truncated.
        unsafe {
            let at = self.base.add(self.used);
            std::ptr::copy_nonoverlapping(rest.as_ptr(), at.add(1), rest.len());
            // A compiler fence is enough: a process that dies leaves the stores of a thread in program order.
            compiler_fence(Ordering::Release);
            at.write_volatile(*first);
        }
        self.used += bytes.len();
        true
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        // SAFETY: base and len are those of our own mmap, unmapped only here.
        let _ = unsafe { rustix::mm::munmap(self.base.cast(), self.len) };
        // Frees the unused part. An error does no harm: a reader stops at the first NUL.
        let _ = rustix::fs::ftruncate(&self.file, self.used as u64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn appended_bytes_are_in_the_file_before_and_after_drop() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("segment");
        let mut segment = Segment::create(&path, 4096).unwrap();
        assert!(segment.append(b"one\n") && segment.append(b"two\n"));
        // The same as a killed process leaves: the whole length, with NUL bytes after the data.
        let seen = std::fs::read(&path).unwrap();
        assert_eq!((&seen[..8], seen.len()), (&b"one\ntwo\n"[..], 4096));
        assert!(seen[8..].iter().all(|byte| *byte == 0));
        assert!(!segment.append(&[b'x'; 4089]), "no room");
        assert_eq!(segment.used(), 8);
        drop(segment);
        assert_eq!(std::fs::read(&path).unwrap(), b"one\ntwo\n");
    }

    #[test]
    fn create_refuses_an_existing_file_and_removes_one_that_fails() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("segment");
        std::fs::write(&path, b"old").unwrap();
        assert_eq!(Segment::create(&path, 4096).unwrap_err().errno, Errno::EXIST);
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        let huge = dir.path().join("huge");
        assert!(Segment::create(&huge, 1 << 55).is_err());
        assert!(!huge.exists());
    }
}
