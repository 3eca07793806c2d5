//! A VFIO container, `/dev/vfio/vfio`, with the type1v2 IOMMU: the IOVA space of the devices of its groups.

use std::ops::RangeInclusive;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::io::Errno;
use vfio_bindings::bindings::vfio as uapi;
use vfio_ioctls::{VfioContainer, VfioError};
use vmm_sys_util::ioctl::{ioctl_with_mut_ptr, ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};

use super::number;
use crate::address_mappings::{AddressMappings, Mark, check};
use crate::memory::GuestFile;
use crate::units::Offset;
use crate::{Failed, Iova, PageRange};

/// The maximum size in bytes of the kernel's answer to `VFIO_IOMMU_GET_INFO`; a longer one is cut off.
const MAX_INFO_BYTES: u32 = 1 << 20;
/// The maximum number of capabilities in that answer.
const MAX_CAPABILITIES: usize = 64;

/// The properties of a type1 IOMMU (`VFIO_IOMMU_GET_INFO`).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Type1Info {
    /// The supported page sizes: the bit of value N is set for pages of N bytes.
    pub page_sizes: u64,
    /// The usable IOVAs, both ends included; empty where the kernel does not report them.
    pub iova_ranges: Vec<RangeInclusive<Iova>>,
    /// The number of further mappings that can be made; none where the kernel does not report it (before Linux 5.10).
    pub mappings_left: Option<u32>,
}

/// An open VFIO container.
#[derive(Debug)]
pub struct Container {
    fd: OwnedFd,
    mappings: AddressMappings,
}

impl Container {
    /// Opens `/dev/vfio/vfio` and checks that it has the API version of this crate and type1v2; `ENODEV` otherwise.
    pub fn open() -> Result<Self, Failed> {
        const CALL: &str = "open /dev/vfio/vfio";
        let opened = VfioContainer::new(None).map_err(|error| match error {
            VfioError::OpenContainer(error) => {
                Failed::new(CALL, Errno::from_io_error(&error).unwrap_or(Errno::IO))
            }
            VfioError::VfioApiVersion => Failed::new("VFIO_GET_API_VERSION", Errno::NODEV),
            _ => Failed::new("VFIO_CHECK_EXTENSION(VFIO_TYPE1v2_IOMMU)", Errno::NODEV),
        })?;
        // SAFETY: `opened` keeps the descriptor open until the end of this function.
        let fd = unsafe { BorrowedFd::borrow_raw(opened.as_raw_fd()) };
        fd.try_clone_to_owned()
            .map(Self::from_fd)
            .map_err(|error| Failed::new(CALL, Errno::from_io_error(&error).unwrap_or(Errno::IO)))
    }

    /// Takes a container that another process opened and passed.
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self { fd, mappings: AddressMappings::default() }
    }

    /// Sets its IOMMU type to type1v2 (`VFIO_SET_IOMMU`). `EINVAL` before it has a group, `EPERM` where the machine has no
    /// interrupt remapping.
    pub fn set_type1(&self) -> Result<(), Failed> {
        // SAFETY: the call takes a number.
        match unsafe { ioctl_with_val(&self.fd, number::SET_IOMMU(), uapi::VFIO_TYPE1v2_IOMMU.into()) } {
            0.. => Ok(()),
            _ => Err(Failed::last("VFIO_SET_IOMMU(VFIO_TYPE1v2_IOMMU)")),
        }
    }

    /// Returns the properties of the IOMMU (`VFIO_IOMMU_GET_INFO`).
    pub fn info(&self) -> Result<Type1Info, Failed> {
        let mut words = vec![0_u64; size_of::<uapi::vfio_iommu_type1_info>() / 8];
        loop {
            let argsz = words.len() * 8;
            // argsz is the first u32. The kernel writes a larger one there if its answer has more bytes.
            words.fill(0);
            words[0] = u64::from_ne_bytes(first_u32(argsz as u32)); // at most MAX_INFO_BYTES
            // SAFETY: the kernel reads and writes at most argsz bytes, the size of `words`, which outlive the call and
            // have the alignment of the structure.
            if unsafe { ioctl_with_mut_ptr(&self.fd, number::IOMMU_GET_INFO(), words.as_mut_ptr()) } < 0 {
                return Err(Failed::last("VFIO_IOMMU_GET_INFO"));
            }
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
            match u32_at(&bytes, 0) {
                Some(wanted) if wanted as usize > argsz && wanted <= MAX_INFO_BYTES => {
                    words.resize((wanted as usize).div_ceil(8), 0);
                }
                _ => return Ok(parse_info(&bytes)),
            }
        }
    }

    /// Maps `iova` to the pages of `file` from `offset` on and pins them (`VFIO_IOMMU_MAP_DMA`). `ENOSPC` at the limit of
    /// the container's mappings (the module parameter `dma_entry_limit` of vfio_iommu_type1).
    pub fn map(
        &self,
        iova: PageRange<Iova>,
        file: &Arc<GuestFile>,
        offset: Offset,
        writable: bool,
    ) -> Result<(), Failed> {
        const CALL: &str = "VFIO_IOMMU_MAP_DMA";
        check(file, offset, iova.len(), writable).map_err(|errno| Failed::new(CALL, errno))?;
        let write = if writable { uapi::VFIO_DMA_MAP_FLAG_WRITE } else { 0 };
        let arg = uapi::vfio_iommu_type1_dma_map {
            argsz: size_of::<uapi::vfio_iommu_type1_dma_map>() as u32,
            flags: uapi::VFIO_DMA_MAP_FLAG_READ | write,
            vaddr: file.address(offset.0)?,
            iova: iova.start().0,
            size: iova.len(),
        };
        // SAFETY: `check` ensures that vaddr..vaddr+size lies in this process's mapping of `file`, which only devices and
        // the copies of `GuestFile` access; `mappings` keeps it mapped while the kernel may pin through it.
        if unsafe { ioctl_with_ref(&self.fd, number::IOMMU_MAP_DMA(), &arg) } < 0 {
            return Err(Failed::last(CALL));
        }
        self.mappings.add(0, iova, Arc::clone(file));
        Ok(())
    }

    /// Unmaps every mapping in `iova` and returns the number of bytes, 0 for none (`VFIO_IOMMU_UNMAP_DMA`). `EINVAL`, with
    /// nothing unmapped, where a mapping extends beyond either end. The error has the bytes that the kernel reports as
    /// unmapped; 0 where it reports none.
    pub fn unmap(&self, iova: PageRange<Iova>) -> Result<u64, Failed<u64>> {
        self.unmap_dma(0, iova.start().0, iova.len(), |mark| self.mappings.remove(0, iova, mark))
    }

    /// Unmaps every mapping of the container and returns the number of bytes (`VFIO_DMA_UNMAP_FLAG_ALL`, Linux 5.12).
    pub fn unmap_all(&self) -> Result<u64, Failed<u64>> {
        self.unmap_dma(uapi::VFIO_DMA_UNMAP_FLAG_ALL, 0, 0, |mark| self.mappings.remove_all(0, mark))
    }

    /// Makes the unmap call, and calls `unmapped` once it has succeeded.
    fn unmap_dma(
        &self,
        flags: u32,
        iova: u64,
        size: u64,
        unmapped: impl FnOnce(Mark),
    ) -> Result<u64, Failed<u64>> {
        let mark = self.mappings.mark();
        let mut arg = uapi::vfio_iommu_type1_dma_unmap {
            argsz: size_of::<uapi::vfio_iommu_type1_dma_unmap>() as u32,
            flags,
            iova,
            size,
            ..Default::default()
        };
        // SAFETY: the call's own structure, without pointers; no flag requests the trailing bitmap.
        if unsafe { ioctl_with_mut_ref(&self.fd, number::IOMMU_UNMAP_DMA(), &mut arg) } < 0 {
            // The kernel writes the number of bytes unmapped into `size`, but not on every error.
            let partial = if arg.size == size { 0 } else { arg.size };
            return Err(Failed::last_with("VFIO_IOMMU_UNMAP_DMA", partial));
        }
        unmapped(mark);
        Ok(arg.size)
    }
}

impl AsFd for Container {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Reads `struct vfio_iommu_type1_info` and the chain of capabilities after it. Every offset is checked, although it comes
/// from the kernel; a cyclic chain ends after [`MAX_CAPABILITIES`].
fn parse_info(bytes: &[u8]) -> Type1Info {
    let mut info = Type1Info { page_sizes: u64_at(bytes, 8).unwrap_or(0), ..Type1Info::default() };
    if u32_at(bytes, 4).unwrap_or(0) & uapi::VFIO_IOMMU_INFO_CAPS == 0 {
        return info;
    }
    let mut at = u32_at(bytes, 16).unwrap_or(0) as usize;
    for _ in 0..MAX_CAPABILITIES {
        // struct vfio_info_cap_header: u16 id, u16 version, u32 next.
        let (Some(id), Some(next), Some(value)) =
            (bytes.get(at..at + 2), u32_at(bytes, at + 4), u32_at(bytes, at + 8))
        else {
            break;
        };
        // Offset 0 ends the chain.
        if at == 0 {
            break;
        }
        match u32::from(u16::from_ne_bytes([id[0], id[1]])) {
            uapi::VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE => {
                let pairs = bytes.get(at + 16..).unwrap_or_default().chunks_exact(16);
                info.iova_ranges = pairs
                    .take(value as usize)
                    .filter_map(|pair| Some(Iova(u64_at(pair, 0)?)..=Iova(u64_at(pair, 8)?)))
                    .collect();
            }
            uapi::VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL => info.mappings_left = Some(value),
            _ => {}
        }
        at = next as usize;
    }
    info
}

/// Returns the u32 at offset `at`, or none beyond the end.
fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

/// Returns the u64 at offset `at`, or none beyond the end.
fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(bytes.get(at..at.checked_add(8)?)?.try_into().ok()?))
}

/// Returns 8 bytes with `value` first in memory and 0 after it.
fn first_u32(value: u32) -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&value.to_ne_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::PAGE;

    fn words(values: &[u32]) -> Vec<u8> {
        values.iter().flat_map(|value| value.to_ne_bytes()).collect()
    }

    #[test]
    fn info_capabilities_are_read_in_any_order() {
        let caps = uapi::VFIO_IOMMU_INFO_PGSIZES | uapi::VFIO_IOMMU_INFO_CAPS;
        // argsz, flags, page sizes (u64), cap_offset, pad; then DMA_AVAIL at 24, then two ranges at 36.
        let mut bytes = words(&[84, caps, 0x1000, 0, 24, 0]);
        bytes.extend(words(&[3 | 1 << 16, 36, 65535]));
        bytes.extend(words(&[1 | 1 << 16, 0, 2, 0, 0, 0, 0xfedf_ffff, 0, 0xfef0_0000, 0, u32::MAX, 0x7f]));
        let info = parse_info(&bytes);
        assert_eq!(info.page_sizes, 0x1000);
        assert_eq!(info.mappings_left, Some(65535));
        let ranges = [Iova(0)..=Iova(0xfedf_ffff), Iova(0xfef0_0000)..=Iova(0x7f_ffff_ffff)];
        assert_eq!(info.iova_ranges, ranges);
    }

    #[test]
    fn info_chain_ends_outside_the_buffer_and_in_a_cycle() {
        let caps = uapi::VFIO_IOMMU_INFO_CAPS;
        assert_eq!(parse_info(&[]), Type1Info::default());
        assert_eq!(parse_info(&words(&[24, caps, 0, 0, u32::MAX, 0])), Type1Info::default());
        let mut cycle = words(&[36, caps, 0, 0, 24, 0]);
        cycle.extend(words(&[3 | 1 << 16, 24, 7]));
        assert_eq!(parse_info(&cycle).mappings_left, Some(7));
        let mut too_many = words(&[40, caps, 0, 0, 24, 0]);
        too_many.extend(words(&[1 | 1 << 16, 0, u32::MAX, 0]));
        assert_eq!(parse_info(&too_many).iova_ranges, []);
    }

    #[test]
    fn calls_on_another_file_fail_with_enotty() {
        let file = Arc::new(GuestFile::memfd("not-a-container", PAGE).unwrap());
        let container = Container::from_fd(file.as_fd().try_clone_to_owned().unwrap());
        let range = PageRange::new(0, PAGE).unwrap();
        assert_eq!(container.set_type1().unwrap_err().errno, Errno::NOTTY);
        assert_eq!(container.info().unwrap_err().errno, Errno::NOTTY);
        assert_eq!(container.map(range, &file, Offset(0), true).unwrap_err().errno, Errno::NOTTY);
        assert_eq!(container.unmap(range).unwrap_err().partial, 0);
        let beyond = container.map(range, &file, Offset(PAGE), true).unwrap_err();
        assert_eq!(beyond, Failed::new("VFIO_IOMMU_MAP_DMA", Errno::INVAL));
    }
}
