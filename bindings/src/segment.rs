//! A file that is written through memory: what was appended outlives the process, whatever ends it.
//!
//! The file is allocated whole and mapped shared. An append is a copy into the page cache, without a system call;
//! kill -9 takes nothing back. What was not written yet reads as NUL bytes. A crash of the machine is another matter:
//! the file system writes back when it likes.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::{Ordering, compiler_fence};

use rustix::fs::{FallocateFlags, Mode, OFlags};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};

use crate::Failed;

/// A file of fixed length, filled from its start on.
///
/// The caller keeps others from shortening the file while it is open: a write to what is cut off is SIGBUS.
#[derive(Debug)]
pub struct Segment {
    base: *mut u8,
    len: usize,
    used: usize,
    file: OwnedFd,
}

// SAFETY: the mapping belongs to this value alone, and writing takes `&mut self`.
unsafe impl Send for Segment {}

impl Segment {
    /// Makes the file (mode 0600; `EEXIST` where there is one), gives it `len` bytes of disk (`ENOSPC` where there are
    /// none left, `EOPNOTSUPP` where the file system cannot), and maps it. Where that fails nothing is left of it.
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

    /// Bytes written so far.
    pub fn used(&self) -> u64 {
        self.used as u64
    }

    /// Bytes that can still be appended.
    pub fn room(&self) -> u64 {
        (self.len - self.used) as u64
    }

    /// Appends `bytes`, or nothing of them where there is no room; whether it did. Who dies in the middle leaves
    /// nothing that a reader sees: the first byte is written last, and it reads as NUL before.
    pub fn append(&mut self, bytes: &[u8]) -> bool {
        let Some((first, rest)) = bytes.split_first() else { return true };
        if bytes.len() > self.len - self.used {
            return false;
        }
        // SAFETY: `used + bytes.len() <= len`, as just checked, within our own mapping, which `bytes` cannot overlap:
        // no reference into it is ever handed out. That the file is not shortened is the caller's promise.
        unsafe {
            let at = self.base.add(self.used);
            std::ptr::copy_nonoverlapping(rest.as_ptr(), at.add(1), rest.len());
            // Only the order as this thread's own instructions have it matters: a process that dies keeps it.
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
        // What was never written is given back. It is no loss where that fails: a reader stops at the first NUL.
        let _ = rustix::fs::ftruncate(&self.file, self.used as u64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_what_was_appended_and_no_more() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("segment");
        let mut segment = Segment::create(&path, 4096).unwrap();
        assert!(segment.append(b"one\n") && segment.append(b"two\n"));
        // As a process that was killed leaves it: whole, with NULs behind.
        let seen = std::fs::read(&path).unwrap();
        assert_eq!((&seen[..8], seen.len()), (&b"one\ntwo\n"[..], 4096));
        assert!(seen[8..].iter().all(|byte| *byte == 0));
        assert!(!segment.append(&[b'x'; 4089]), "no room");
        assert_eq!(segment.used(), 8);
        drop(segment);
        assert_eq!(std::fs::read(&path).unwrap(), b"one\ntwo\n");
    }

    #[test]
    fn takes_no_file_that_is_there_and_leaves_none_that_fails() {
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
