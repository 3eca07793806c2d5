//! BAR mappings: a part of a device's region mapped into this process, for registers that are written often (doorbells).

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};
use vfio_bindings::bindings::vfio as uapi;

use super::device::{DeviceFile, Region};
use crate::{Failed, PAGE};

/// A BAR mapping. It keeps the device open, even when its file is closed: drop it before the device is to be closed.
#[derive(Debug)]
pub struct Mapped {
    base: *mut u8,
    len: usize,
}

// SAFETY: the mapping has device registers, which are accessed only by single atomic 32-bit stores.
unsafe impl Send for Mapped {}
// SAFETY: as above.
unsafe impl Sync for Mapped {}

impl DeviceFile {
    /// Maps `len` bytes at offset `at` of `region`, both multiples of the page size. `EOPNOTSUPP` where the region cannot be
    /// mapped or is read-only, `EINVAL` where the bytes are not in the region.
    pub fn map(&self, region: Region, at: u64, len: usize) -> Result<Mapped, Failed> {
        const CALL: &str = "mmap of a device region";
        let wanted = uapi::VFIO_REGION_INFO_FLAG_MMAP | uapi::VFIO_REGION_INFO_FLAG_WRITE;
        if region.flags & wanted != wanted {
            return Err(Failed::new(CALL, Errno::OPNOTSUPP));
        }
        let inside = at.checked_add(len as u64).is_some_and(|end| end <= region.size);
        if !inside || len == 0 || !at.is_multiple_of(PAGE) || !(len as u64).is_multiple_of(PAGE) {
            return Err(Failed::new(CALL, Errno::INVAL));
        }
        let offset = region.file_offset(at).ok_or(Failed::new(CALL, Errno::INVAL))?;
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses overlaps no other.
        let base = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), len, prot, MapFlags::SHARED, self.as_fd(), offset)
        };
        let base = base.map_err(|errno| Failed::new(CALL, errno))?;
        Ok(Mapped { base: base.cast(), len })
    }
}

impl Mapped {
    /// Writes the 32-bit register at offset `at` and returns true; false where `at` is unaligned or outside the mapping. A
    /// release store: the device sees all earlier stores to memory before this one.
    pub fn store(&self, at: usize, value: u32) -> bool {
        let inside = at.checked_add(4).is_some_and(|end| end <= self.len);
        if !inside || !at.is_multiple_of(4) {
            return false;
        }
        // SAFETY: aligned, and inside the mapping, which lives as long as self; all references to it are to atomics.
        let register = unsafe { &*self.base.add(at).cast::<AtomicU32>() };
        register.store(value.to_le(), Ordering::Release);
        true
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: base and len are those of our own mmap, unmapped only here.
        let _ = unsafe { rustix::mm::munmap(self.base.cast(), self.len) };
    }
}
