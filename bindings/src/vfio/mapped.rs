//! A part of a device's region mapped into this process, for registers that are written all the time.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};
use vfio_bindings::bindings::vfio as uapi;

use super::device::{DeviceFile, Region};
use crate::{Failed, PAGE};

/// Mapped registers. They hold the device's file open, as every mapping does: drop them before the device is to go.
#[derive(Debug)]
pub struct Mapped {
    base: *mut u8,
    len: usize,
}

// SAFETY: plain registers of a device, only ever written by single 32-bit stores that no memory of Rust's depends on.
unsafe impl Send for Mapped {}
// SAFETY: as above.
unsafe impl Sync for Mapped {}

impl DeviceFile {
    /// Maps `len` bytes at `at` of `region`, both multiples of the page size. `EOPNOTSUPP` where the device does not
    /// let the region be mapped, `EINVAL` where the region has no such part.
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
        let offset = region.place(at).ok_or(Failed::new(CALL, Errno::INVAL))?;
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice; it overlays nothing of this process.
        let base = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), len, prot, MapFlags::SHARED, self.as_fd(), offset)
        };
        let base = base.map_err(|errno| Failed::new(CALL, errno))?;
        Ok(Mapped { base: base.cast(), len })
    }
}

impl Mapped {
    /// Writes the 32-bit register at `at`, after everything that was stored to memory before; whether there is one.
    pub fn store(&self, at: usize, value: u32) -> bool {
        let inside = at.checked_add(4).is_some_and(|end| end <= self.len);
        if !inside || !at.is_multiple_of(4) {
            return false;
        }
        // SAFETY: inside the mapping, which lives as long as self, and aligned; nobody forms another reference to it.
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
