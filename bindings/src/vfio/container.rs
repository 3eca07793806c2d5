//! A VFIO container, `/dev/vfio/vfio`, with the type1v2 IOMMU: the address space of its groups' devices.

use std::ops::RangeInclusive;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::io::Errno;
use vfio_bindings::bindings::vfio as uapi;
use vfio_ioctls::{VfioContainer, VfioError};
use vmm_sys_util::ioctl::{ioctl_with_mut_ptr, ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};

use super::number;
use crate::memory::GuestFile;
use crate::units::Offset;
use crate::windows::{Windows, check};
use crate::{Failed, Iova, PageRange};

/// What a type1 IOMMU can do (`VFIO_IOMMU_GET_INFO`).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Type1Info {
    /// A bit for each page size, in bytes.
    pub page_sizes: u64,
    /// The usable IOVAs, both ends included; empty where the kernel does not say.
    pub iova_ranges: Vec<RangeInclusive<Iova>>,
    /// How many mappings can be made yet; none where the kernel does not say (before Linux 5.10).
    pub mappings_left: Option<u32>,
}

/// An open VFIO container.
#[derive(Debug)]
pub struct Container {
    fd: OwnedFd,
    windows: Windows,
}

impl Container {
    /// Opens `/dev/vfio/vfio` and checks that it speaks our version and has type1v2. `NODEV` where it has not.
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

    /// Takes a container that somebody with the right to open one has passed.
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self { fd, windows: Windows::default() }
    }

    /// Makes it a type1v2 IOMMU (`VFIO_SET_IOMMU`). `EINVAL` before a group is in it, `EPERM` where the machine
    /// has no interrupt remapping.
    pub fn set_type1(&self) -> Result<(), Failed> {
        // SAFETY: the call takes a number.
        match unsafe { ioctl_with_val(&self.fd, number::SET_IOMMU(), uapi::VFIO_TYPE1v2_IOMMU.into()) } {
            0.. => Ok(()),
            _ => Err(Failed::last("VFIO_SET_IOMMU(VFIO_TYPE1v2_IOMMU)")),
        }
    }

    /// What the IOMMU can do (`VFIO_IOMMU_GET_INFO`).
    pub fn info(&self) -> Result<Type1Info, Failed> {
        let mut words = vec![0_u64; size_of::<uapi::vfio_iommu_type1_info>() / 8];
        loop {
            let argsz = words.len() * 8;
            // argsz is the first u32; a kernel that knows more than fits says so there.
            words.fill(0);
            words[0] = u64::from_ne_bytes(first_u32(argsz as u32)); // a few KiB at most
            // SAFETY: the kernel reads and writes at most argsz bytes, which the words hold; they outlive the
            // call, and u64 is as aligned as the structure.
            if unsafe { ioctl_with_mut_ptr(&self.fd, number::IOMMU_GET_INFO(), words.as_mut_ptr()) } < 0 {
                return Err(Failed::last("VFIO_IOMMU_GET_INFO"));
            }
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
            match u32_at(&bytes, 0) {
                Some(wanted) if wanted as usize > argsz && wanted <= 1 << 20 => {
                    words.resize((wanted as usize).div_ceil(8), 0);
                }
                _ => return Ok(parse_info(&bytes)),
            }
        }
    }

    /// Maps `iova` to the pages of `file` from `offset` on and pins them (`VFIO_IOMMU_MAP_DMA`). `ENOSPC` when
    /// the container holds as many mappings as it may.
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
        // SAFETY: vaddr..vaddr+size lies in the window of `file`, as `check` has seen, which only volatile copies
        // and devices touch; `windows` keeps it mapped for as long as the kernel may pin through it.
        if unsafe { ioctl_with_ref(&self.fd, number::IOMMU_MAP_DMA(), &arg) } < 0 {
            return Err(Failed::last(CALL));
        }
        self.windows.hold(0, iova, Arc::clone(file));
        Ok(())
    }

    /// Takes away every mapping in `iova` and returns its bytes, 0 for none (`VFIO_IOMMU_UNMAP_DMA`). `EINVAL`,
    /// with nothing changed, where a mapping sticks out at either end. On an error the kernel writes no size back
    /// and the partial count is 0.
    pub fn unmap(&self, iova: PageRange<Iova>) -> Result<u64, Failed<u64>> {
        self.unmap_dma(0, iova.start().0, iova.len(), |mark| self.windows.release(0, iova, mark))
    }

    /// Takes away every mapping there is and returns its bytes (`VFIO_DMA_UNMAP_FLAG_ALL`, Linux 5.12).
    pub fn unmap_all(&self) -> Result<u64, Failed<u64>> {
        self.unmap_dma(uapi::VFIO_DMA_UNMAP_FLAG_ALL, 0, 0, |mark| self.windows.release_all(0, mark))
    }

    fn unmap_dma(
        &self,
        flags: u32,
        iova: u64,
        size: u64,
        gone: impl FnOnce(crate::windows::Mark),
    ) -> Result<u64, Failed<u64>> {
        let mark = self.windows.mark();
        let mut arg = uapi::vfio_iommu_type1_dma_unmap {
            argsz: size_of::<uapi::vfio_iommu_type1_dma_unmap>() as u32,
            flags,
            iova,
            size,
            ..Default::default()
        };
        // SAFETY: the call's own structure, without pointers; no flag asks for the trailing bitmap.
        if unsafe { ioctl_with_mut_ref(&self.fd, number::IOMMU_UNMAP_DMA(), &mut arg) } < 0 {
            let partial = if arg.size == size { 0 } else { arg.size };
            return Err(Failed::last_with("VFIO_IOMMU_UNMAP_DMA", partial));
        }
        gone(mark);
        Ok(arg.size)
    }
}

impl AsFd for Container {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Reads `struct vfio_iommu_type1_info` and the chain of capabilities behind it. Every offset comes from the
/// kernel and is checked all the same; a chain that runs in circles ends after 64 links.
fn parse_info(bytes: &[u8]) -> Type1Info {
    let mut info = Type1Info { page_sizes: u64_at(bytes, 8).unwrap_or(0), ..Type1Info::default() };
    if u32_at(bytes, 4).unwrap_or(0) & uapi::VFIO_IOMMU_INFO_CAPS == 0 {
        return info;
    }
    let mut at = u32_at(bytes, 16).unwrap_or(0) as usize;
    for _ in 0..64 {
        // struct vfio_info_cap_header: u16 id, u16 version, u32 next.
        let (Some(id), Some(next), Some(value)) =
            (bytes.get(at..at + 2), u32_at(bytes, at + 4), u32_at(bytes, at + 8))
        else {
            break;
        };
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

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(bytes.get(at..at.checked_add(8)?)?.try_into().ok()?))
}

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
    fn the_capabilities_are_read_whatever_their_order() {
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
    fn a_chain_that_leaves_the_buffer_or_runs_in_circles_ends() {
        let caps = uapi::VFIO_IOMMU_INFO_CAPS;
        assert_eq!(parse_info(&[]), Type1Info::default());
        assert_eq!(parse_info(&words(&[24, caps, 0, 0, u32::MAX, 0])), Type1Info::default());
        let mut circle = words(&[36, caps, 0, 0, 24, 0]);
        circle.extend(words(&[3 | 1 << 16, 24, 7]));
        assert_eq!(parse_info(&circle).mappings_left, Some(7));
        let mut greedy = words(&[40, caps, 0, 0, 24, 0]);
        greedy.extend(words(&[1 | 1 << 16, 0, u32::MAX, 0]));
        assert_eq!(parse_info(&greedy).iova_ranges, []);
    }

    #[test]
    fn a_file_of_another_kind_knows_no_call() {
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
