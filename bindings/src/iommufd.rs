//! iommufd (include/uapi/linux/iommufd.h): the calls on `/dev/iommu` that the published crates lack or implement with
//! loss of information.
//!
//! Every mapping is made from a [`GuestFile`] and an offset, never from a bare address. That makes all calls safe: a device
//! can reach only pages of a file that Rust code accesses by volatile or atomic copies alone. A file that was mapped by
//! address stays open until the kernel has confirmed its unmap (`address_mappings.rs`).

use std::ops::RangeInclusive;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use iommufd_bindings as uapi;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use vfio_bindings::bindings::vfio::vfio_iommu_type1_dma_unmap;
use vmm_sys_util::ioctl::{_IOC_NONE, ioctl_expr, ioctl_with_mut_ref};

use crate::address_mappings::{AddressMappings, check};
use crate::memory::GuestFile;
use crate::units::Offset;
use crate::{Failed, Iova, PageRange, vfio};

mod options;
mod table;

pub use options::RlimitMode;
pub use table::{DeviceId, HwptId, PageTable};

/// The id of an IOAS (I/O address space object) within its iommufd.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IoasId(pub u32);

/// The IOVAs that an IOAS can map (`IOMMU_IOAS_IOVA_RANGES`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IovaRanges {
    /// The usable ranges, both ends included, in ascending order. Attaching a device may narrow them.
    pub ranges: Vec<RangeInclusive<Iova>>,
    /// The alignment of both ends of a mapping, in bytes.
    pub alignment: u64,
}

/// An open iommufd: it owns IOASes, and devices are bound to it.
#[derive(Debug)]
pub struct Iommufd {
    fd: OwnedFd,
    mappings: AddressMappings,
    /// The id of the IOAS that [`Iommufd::cut`] works on, plus one; 0 until [`Iommufd::set_compat_ioas`] has set one.
    compat: AtomicU32,
}

impl Iommufd {
    /// Opens `/dev/iommu`.
    pub fn open() -> Result<Self, Failed> {
        rustix::fs::open("/dev/iommu", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
            .map(Self::from_fd)
            .map_err(|errno| Failed::new("open /dev/iommu", errno))
    }

    /// Takes an iommufd that another process opened and passed. On a file of another kind every call fails with `ENOTTY`.
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self { fd, mappings: AddressMappings::default(), compat: AtomicU32::new(0) }
    }

    /// Allocates an empty IOAS (`IOMMU_IOAS_ALLOC`).
    pub fn ioas_alloc(&self) -> Result<IoasId, Failed> {
        let mut arg = uapi::iommu_ioas_alloc { size: size::<uapi::iommu_ioas_alloc>(), ..Default::default() };
        // SAFETY: the call's own structure, without pointers.
        unsafe { self.call("IOMMU_IOAS_ALLOC", uapi::IOMMUFD_CMD_IOAS_ALLOC, &mut arg) }?;
        Ok(IoasId(arg.out_ioas_id))
    }

    /// Destroys an IOAS, to which no device is attached, with all its mappings (`IOMMU_DESTROY`).
    pub fn ioas_destroy(&self, ioas: IoasId) -> Result<(), Failed> {
        let mark = self.mappings.mark();
        let mut arg = uapi::iommu_destroy { size: size::<uapi::iommu_destroy>(), id: ioas.0 };
        // SAFETY: the call's own structure, without pointers.
        unsafe { self.call("IOMMU_DESTROY", uapi::IOMMUFD_CMD_DESTROY, &mut arg) }?;
        self.mappings.remove_all(ioas.0, mark);
        Ok(())
    }

    /// Maps `iova` to the pages of `file` from `offset` on, by their address in this process (`IOMMU_IOAS_MAP`). Needed for
    /// files that [`Iommufd::map_file`] does not support: guest_memfd.
    pub fn map(
        &self,
        ioas: IoasId,
        iova: PageRange<Iova>,
        file: &Arc<GuestFile>,
        offset: Offset,
        writable: bool,
    ) -> Result<(), Failed> {
        const CALL: &str = "IOMMU_IOAS_MAP";
        check(file, offset, iova.len(), writable).map_err(|errno| Failed::new(CALL, errno))?;
        let mut arg = uapi::iommu_ioas_map {
            size: size::<uapi::iommu_ioas_map>(),
            flags: map_flags(writable),
            ioas_id: ioas.0,
            __reserved: 0,
            user_va: file.address(offset.0)?,
            length: iova.len(),
            iova: iova.start().0,
        };
        // SAFETY: `check` ensures that user_va..user_va+length lies in this process's mapping of `file`, which only
        // devices and the copies of `GuestFile` access; `mappings` keeps it mapped while the kernel may pin through it.
        unsafe { self.call(CALL, uapi::IOMMUFD_CMD_IOAS_MAP, &mut arg) }?;
        self.mappings.add(ioas.0, iova, Arc::clone(file));
        Ok(())
    }

    /// Maps `iova` to the pages of `file` from `offset` on, by file (`IOMMU_IOAS_MAP_FILE`, Linux 6.14). The kernel
    /// supports memfd and hugetlbfs and keeps its own reference to the file; `EINVAL` for a guest_memfd.
    pub fn map_file(
        &self,
        ioas: IoasId,
        iova: PageRange<Iova>,
        file: &GuestFile,
        offset: Offset,
        writable: bool,
    ) -> Result<(), Failed> {
        const CALL: &str = "IOMMU_IOAS_MAP_FILE";
        // The kernel checks neither the open mode nor the seals.
        check(file, offset, iova.len(), writable).map_err(|errno| Failed::new(CALL, errno))?;
        let mut arg = uapi::iommu_ioas_map_file {
            size: size::<uapi::iommu_ioas_map_file>(),
            flags: map_flags(writable),
            ioas_id: ioas.0,
            fd: file.as_fd().as_raw_fd(),
            start: offset.0,
            length: iova.len(),
            iova: iova.start().0,
        };
        // SAFETY: the call's own structure, without pointers; the pages are those of a GuestFile, which only devices and
        // its own copies access.
        unsafe { self.call(CALL, uapi::IOMMUFD_CMD_IOAS_MAP_FILE, &mut arg) }
    }

    /// Maps at `to` the pages that `from` maps already, without pinning them again (`IOMMU_IOAS_COPY`). `from` may be a
    /// part of a mapping.
    pub fn copy(
        &self,
        from: (IoasId, PageRange<Iova>),
        to: (IoasId, Iova),
        writable: bool,
    ) -> Result<(), Failed> {
        let mut arg = uapi::iommu_ioas_copy {
            size: size::<uapi::iommu_ioas_copy>(),
            flags: map_flags(writable),
            dst_ioas_id: to.0.0,
            src_ioas_id: from.0.0,
            length: from.1.len(),
            dst_iova: to.1.0,
            src_iova: from.1.start().0,
        };
        // SAFETY: the call's own structure, without pointers; the pages were mapped through this interface.
        unsafe { self.call("IOMMU_IOAS_COPY", uapi::IOMMUFD_CMD_IOAS_COPY, &mut arg) }?;
        self.mappings.copy((from.0.0, from.1), (to.0.0, to.1));
        Ok(())
    }

    /// Unmaps every mapping in `iova` and returns the number of bytes (`IOMMU_IOAS_UNMAP`). `ENOENT` both where nothing is
    /// mapped and where `iova` would cut a mapping. The kernel does not report what it had unmapped before an error: the
    /// partial count is always 0, and the state of the range is unknown.
    pub fn unmap(&self, ioas: IoasId, iova: PageRange<Iova>) -> Result<u64, Failed<u64>> {
        let mark = self.mappings.mark();
        let mut arg = uapi::iommu_ioas_unmap {
            size: size::<uapi::iommu_ioas_unmap>(),
            ioas_id: ioas.0,
            iova: iova.start().0,
            length: iova.len(),
        };
        // SAFETY: the call's own structure, without pointers.
        unsafe { self.call("IOMMU_IOAS_UNMAP", uapi::IOMMUFD_CMD_IOAS_UNMAP, &mut arg) }
            .map_err(|failed| Failed { call: failed.call, errno: failed.errno, partial: 0 })?;
        self.mappings.remove(ioas.0, iova, mark);
        Ok(arg.length)
    }

    /// Unmaps every mapping in `iova` of the compatibility IOAS ([`Iommufd::set_compat_ioas`]) by the VFIO-compatible call
    /// on the iommufd (`VFIO_IOMMU_UNMAP_DMA`), and returns the number of bytes, 0 for none. Unlike [`Iommufd::unmap`] it
    /// reports the bytes that it had unmapped before an error. With [`Iommufd::set_huge_pages`] off it *cuts* mappings at
    /// both ends of `iova`; otherwise a mapping that extends beyond `iova` is `ENOENT`.
    ///
    /// The kernel's maintainer considers this call legacy: callers probe it and have a fallback.
    pub fn cut(&self, iova: PageRange<Iova>) -> Result<u64, Failed<u64>> {
        let (mark, compat) = (self.mappings.mark(), self.compat.load(Ordering::Acquire));
        let mut arg = vfio_iommu_type1_dma_unmap {
            argsz: size::<vfio_iommu_type1_dma_unmap>(),
            flags: 0,
            iova: iova.start().0,
            size: iova.len(),
            ..Default::default()
        };
        // SAFETY: the call's own structure, without pointers; no flag requests the trailing bitmap.
        if unsafe { ioctl_with_mut_ref(&self.fd, vfio::number::IOMMU_UNMAP_DMA(), &mut arg) } < 0 {
            // The kernel writes the number of bytes unmapped into `size`, but not where it fails before the unmap begins:
            // then `size` still has the requested length.
            let partial = if arg.size == iova.len() { 0 } else { arg.size };
            return Err(Failed::last_with("VFIO_IOMMU_UNMAP_DMA", partial));
        }
        if let Some(space) = compat.checked_sub(1) {
            self.mappings.remove(space, iova, mark);
        }
        Ok(arg.size)
    }

    /// Returns the IOAS that the VFIO-compatible calls work on (`IOMMU_VFIO_IOAS_GET`); `ENODEV` where none is set.
    pub fn compat_ioas(&self) -> Result<IoasId, Failed> {
        self.vfio_ioas(uapi::iommufd_vfio_ioas_op_IOMMU_VFIO_IOAS_GET, 0).map(IoasId)
    }

    /// Sets the IOAS that the VFIO-compatible calls work on (`IOMMU_VFIO_IOAS_SET`), for all users of this iommufd.
    pub fn set_compat_ioas(&self, ioas: IoasId) -> Result<(), Failed> {
        self.vfio_ioas(uapi::iommufd_vfio_ioas_op_IOMMU_VFIO_IOAS_SET, ioas.0)?;
        self.compat.store(ioas.0 + 1, Ordering::Release);
        Ok(())
    }

    /// Returns the IOVAs that the IOAS can map now (`IOMMU_IOAS_IOVA_RANGES`).
    pub fn iova_ranges(&self, ioas: IoasId) -> Result<IovaRanges, Failed> {
        let mut found = vec![uapi::iommu_iova_range::default(); 16];
        loop {
            let mut arg = uapi::iommu_ioas_iova_ranges {
                size: size::<uapi::iommu_ioas_iova_ranges>(),
                ioas_id: ioas.0,
                num_iovas: u32::try_from(found.len()).unwrap_or(u32::MAX),
                allowed_iovas: found.as_mut_ptr() as u64,
                ..Default::default()
            };
            // SAFETY: the kernel writes at most num_iovas ranges to allowed_iovas; the vector has that many and outlives
            // the call.
            match unsafe { self.call("IOMMU_IOAS_IOVA_RANGES", uapi::IOMMUFD_CMD_IOAS_IOVA_RANGES, &mut arg) }
            {
                // EMSGSIZE reports the number of ranges in num_iovas. The list may have grown since: try again.
                Err(failed) if failed.errno == Errno::MSGSIZE && arg.num_iovas as usize > found.len() => {
                    found.resize(arg.num_iovas as usize, uapi::iommu_iova_range::default());
                }
                Err(failed) => return Err(failed),
                Ok(()) => {
                    found.truncate(arg.num_iovas as usize);
                    let ranges = found.iter().map(|r| Iova(r.start)..=Iova(r.last)).collect();
                    return Ok(IovaRanges { ranges, alignment: arg.out_iova_alignment });
                }
            }
        }
    }

    /// Reserves `ranges` for mappings: attaching a device that would narrow them fails from now on
    /// (`IOMMU_IOAS_ALLOW_IOVAS`). Replaces the earlier list; an empty list removes the restriction.
    pub fn allow_iovas(&self, ioas: IoasId, ranges: &[PageRange<Iova>]) -> Result<(), Failed> {
        const CALL: &str = "IOMMU_IOAS_ALLOW_IOVAS";
        let list: Vec<_> = ranges
            .iter()
            .map(|r| uapi::iommu_iova_range { start: r.start().0, last: r.end().0 - 1 })
            .collect();
        let mut arg = uapi::iommu_ioas_allow_iovas {
            size: size::<uapi::iommu_ioas_allow_iovas>(),
            ioas_id: ioas.0,
            num_iovas: u32::try_from(list.len()).map_err(|_| Failed::new(CALL, Errno::OVERFLOW))?,
            allowed_iovas: list.as_ptr() as u64,
            ..Default::default()
        };
        // SAFETY: the kernel reads num_iovas ranges from allowed_iovas; the vector has that many and outlives the call.
        unsafe { self.call(CALL, uapi::IOMMUFD_CMD_IOAS_ALLOW_IOVAS, &mut arg) }
    }

    /// Moves the locked-memory accounting of all pinned pages to this process (`IOMMU_IOAS_CHANGE_PROCESS`, Linux 6.14).
    /// `EINVAL` where a mapping of the iommufd was made by address.
    pub fn change_process(&self) -> Result<(), Failed> {
        let mut arg = uapi::iommu_ioas_change_process {
            size: size::<uapi::iommu_ioas_change_process>(),
            __reserved: 0,
        };
        // SAFETY: the call's own structure, without pointers.
        unsafe { self.call("IOMMU_IOAS_CHANGE_PROCESS", uapi::IOMMUFD_CMD_IOAS_CHANGE_PROCESS, &mut arg) }
    }

    fn vfio_ioas(&self, op: u32, id: u32) -> Result<u32, Failed> {
        let mut arg = uapi::iommu_vfio_ioas {
            size: size::<uapi::iommu_vfio_ioas>(),
            ioas_id: id,
            op: op as u16, // enum iommufd_vfio_ioas_op, 0 to 2
            __reserved: 0,
        };
        // SAFETY: the call's own structure, without pointers.
        unsafe { self.call("IOMMU_VFIO_IOAS", uapi::IOMMUFD_CMD_VFIO_IOAS, &mut arg) }?;
        Ok(arg.ioas_id)
    }

    /// Makes the call `command`.
    ///
    /// # Safety
    /// `arg` must be the structure of `command`, with its size in its size field, and each pointer in it must be valid for
    /// the accesses of the call.
    unsafe fn call<T>(&self, name: &'static str, command: u32, arg: &mut T) -> Result<(), Failed> {
        // SAFETY: ensured by the caller; a file that is not an iommufd does not support the number (`ENOTTY`).
        match unsafe { ioctl_with_mut_ref(&self.fd, number(command), arg) } {
            0.. => Ok(()),
            _ => Err(Failed::last(name)),
        }
    }
}

impl AsFd for Iommufd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Returns `_IO(IOMMUFD_TYPE, command)`: in iommufd the structure carries its size, not the ioctl number.
fn number(command: u32) -> std::ffi::c_ulong {
    ioctl_expr(_IOC_NONE, u32::from(uapi::IOMMUFD_TYPE), command, 0)
}

fn size<T>() -> u32 {
    size_of::<T>() as u32 // less than 100 bytes
}

fn map_flags(writable: bool) -> u32 {
    let write = if writable { uapi::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_WRITEABLE } else { 0 };
    uapi::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_FIXED_IOVA
        | uapi::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_READABLE
        | write
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::PAGE;

    #[test]
    fn ioctl_numbers_match_the_header() {
        assert_eq!(number(uapi::IOMMUFD_CMD_DESTROY), 0x3b80);
        assert_eq!(number(uapi::IOMMUFD_CMD_IOAS_MAP), 0x3b85);
        assert_eq!(number(uapi::IOMMUFD_CMD_IOAS_UNMAP), 0x3b86);
        assert_eq!(number(uapi::IOMMUFD_CMD_IOAS_MAP_FILE), 0x3b8f);
        assert_eq!(number(uapi::IOMMUFD_CMD_IOAS_CHANGE_PROCESS), 0x3b92);
    }

    #[test]
    fn calls_on_another_file_fail_with_enotty() {
        let memfd = GuestFile::memfd("not-iommu", PAGE).unwrap();
        let iommufd = Iommufd::from_fd(memfd.as_fd().try_clone_to_owned().unwrap());
        assert_eq!(iommufd.ioas_alloc(), Err(Failed::new("IOMMU_IOAS_ALLOC", Errno::NOTTY)));
        let range = PageRange::new(0, PAGE).unwrap();
        let failed = iommufd.unmap(IoasId(1), range).unwrap_err();
        assert_eq!((failed.errno, failed.partial), (Errno::NOTTY, 0));
        let failed = iommufd.cut(range).unwrap_err();
        assert_eq!((failed.errno, failed.partial), (Errno::NOTTY, 0));
    }

    #[test]
    fn map_beyond_the_file_fails_before_the_kernel_call() {
        let file = Arc::new(GuestFile::memfd("two", 2 * PAGE).unwrap());
        let iommufd = Iommufd::from_fd(file.as_fd().try_clone_to_owned().unwrap());
        let range = PageRange::new(0, 2 * PAGE).unwrap();
        let failed = iommufd.map(IoasId(1), range, &file, Offset(PAGE), false).unwrap_err();
        assert_eq!(failed, Failed::new("IOMMU_IOAS_MAP", Errno::INVAL));
        let failed = iommufd.map_file(IoasId(1), range, &file, Offset(u64::MAX), false).unwrap_err();
        assert_eq!(failed, Failed::new("IOMMU_IOAS_MAP_FILE", Errno::INVAL));
        let failed = iommufd.map(IoasId(1), range, &file, Offset(0), true).unwrap_err();
        assert_eq!(failed.errno, Errno::NOTTY, "this call reaches the kernel");
        assert_eq!(Arc::strong_count(&file), 1, "a failed map keeps no file open");
    }
}
