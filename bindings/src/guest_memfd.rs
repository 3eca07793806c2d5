//! KVM's guest_memfd: the file behind a confidential guest's memory, as far as `kvm-ioctls` lacks it.
//!
//! What a kernel offers is probed ([`Support`]), never read off its version: the flags came with 6.18, conversion
//! in place is queued for a kernel after 7.3 and its capability number has moved between trees. The file knows
//! nothing of pins: a punch or a conversion to shared succeeds whatever device still has the page.

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use kvm_bindings::{KVM_CAP_GUEST_MEMFD, KVM_CAP_MEMORY_ATTRIBUTES, kvm_create_guest_memfd};
use kvm_ioctls::{Kvm, VmFd};
use rustix::io::Errno;
use vmm_sys_util::ioctl::{_IOC_READ, _IOC_WRITE, ioctl_expr, ioctl_with_mut_ref};

use crate::memory::{FileKind, GuestFile};
use crate::units::{Offset, PAGE};
use crate::{Failed, Gpa, PageRange};

/// `KVM_CAP_GUEST_MEMFD_FLAGS`: answers with the mask of [`Flags`], 0 before 6.18.
const CAP_GUEST_MEMFD_FLAGS: u64 = 244;

/// `KVM_MEMORY_ATTRIBUTE_PRIVATE` of `linux/kvm.h`.
const PRIVATE: u64 = kvm_bindings::KVM_MEMORY_ATTRIBUTE_PRIVATE as u64;

/// `struct kvm_memory_attributes2`, 128 bytes: the in-place conversion, as posted for the kernels after 7.3.
#[repr(C)]
#[derive(Default)]
struct MemoryAttributes2 {
    offset: u64,
    size: u64,
    attributes: u64,
    flags: u64,
    error_offset: u64,
    reserved: [u64; 11],
}

/// `_IOWR(KVMIO, 0xd2, struct kvm_memory_attributes2)`.
const KVM_SET_MEMORY_ATTRIBUTES2: libc::c_ulong =
    ioctl_expr(_IOC_READ | _IOC_WRITE, kvm_bindings::KVMIO, 0xd2, size_of::<MemoryAttributes2>() as u32);

bitflags::bitflags! {
    /// How a guest_memfd is made.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct Flags: u64 {
        /// The owner may map it (`GUEST_MEMFD_FLAG_MMAP`).
        const MMAP = 1 << 0;
        /// Its pages are shared from the start (`GUEST_MEMFD_FLAG_INIT_SHARED`).
        const INIT_SHARED = 1 << 1;
    }
}

/// The two states that a page of guest memory is converted between.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Conversion {
    /// The guest's alone.
    ToPrivate,
    /// Visible to the host and its devices.
    ToShared,
}

impl Conversion {
    fn attributes(self) -> u64 {
        match self {
            Self::ToPrivate => PRIVATE,
            Self::ToShared => 0,
        }
    }
}

/// What this kernel offers of guest_memfd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Support {
    /// `KVM_CAP_GUEST_MEMFD` of the default VM type.
    pub guest_memfd: bool,
    /// The creation flags it takes; empty before 6.18.
    pub flags: Flags,
    /// The attributes that `KVM_SET_MEMORY_ATTRIBUTES` takes, for the default VM type: 0 where it has none.
    pub attributes: u64,
    /// Whether the file itself converts in place (`KVM_SET_MEMORY_ATTRIBUTES2`), found by doing it.
    pub in_place: bool,
}

/// Why there is no guest_memfd here. The text is the message that the user reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unavailable {
    /// `/dev/kvm` cannot be opened.
    #[error(
        "cannot open /dev/kvm ({errno}): load the kvm module (and enable virtualisation in the firmware), or give \
         this user access to the device"
    )]
    Kvm {
        /// Why.
        errno: Errno,
    },
    /// The kernel lacks guest_memfd, or the flags that make it mappable.
    #[error(
        "this kernel's guest_memfd cannot be mapped by its owner ({support:?}): Linux 6.18 or newer is needed"
    )]
    Old {
        /// What it has.
        support: Support,
    },
    /// A call failed.
    #[error(transparent)]
    Failed(#[from] Failed),
}

impl Support {
    /// Probes this kernel, with a VM of the default type.
    pub fn probe() -> Result<Self, Unavailable> {
        Ok(Self::of(&vm()?))
    }

    /// Probes what `vm`'s type offers.
    pub fn of(vm: &VmFd) -> Self {
        let cap = |cap: u64| u64::try_from(vm.check_extension_raw(cap)).unwrap_or(0);
        let flags = Flags::from_bits_truncate(cap(CAP_GUEST_MEMFD_FLAGS));
        let guest_memfd = cap(KVM_CAP_GUEST_MEMFD.into()) > 0;
        // Sharing a page that is shared already changes nothing, so the probe is the call itself: ENOTTY and
        // EINVAL both say that the kernel lacks it, and nothing but success says that it has it.
        let in_place = guest_memfd
            && create(vm, PAGE, flags).is_ok_and(|file| {
                PageRange::new(0, PAGE).is_ok_and(|page| convert(&file, page, Conversion::ToShared).is_ok())
            });
        Self { guest_memfd, flags, attributes: cap(KVM_CAP_MEMORY_ATTRIBUTES.into()), in_place }
    }
}

/// A VM of the default type, without memory or processors.
pub fn vm() -> Result<VmFd, Unavailable> {
    let kvm = Kvm::new().map_err(|e| Unavailable::Kvm { errno: Errno::from_raw_os_error(e.errno()) })?;
    Ok(kvm.create_vm().map_err(|e| failed("KVM_CREATE_VM", e))?)
}

/// Ordinary guest memory of `len` bytes (a multiple of the page size) in a guest_memfd that the host may map, and
/// the VM that it belongs to. The file keeps the VM alive; the handle is for who wants to run a guest in it.
pub fn shared(len: u64) -> Result<(VmFd, GuestFile), Unavailable> {
    let vm = vm()?;
    let flags = Flags::MMAP | Flags::INIT_SHARED;
    match create(&vm, len, flags) {
        Ok(file) => Ok((vm, file)),
        Err(failed) => {
            let support = Support::of(&vm);
            let able = support.guest_memfd && support.flags.contains(flags);
            Err(if able { failed.into() } else { Unavailable::Old { support } })
        }
    }
}

/// A guest_memfd of `len` bytes in `vm` (`KVM_CREATE_GUEST_MEMFD`).
pub fn create(vm: &VmFd, len: u64, flags: Flags) -> Result<GuestFile, Failed> {
    let args = kvm_create_guest_memfd { size: len, flags: flags.bits(), ..Default::default() };
    let fd = vm.create_guest_memfd(args).map_err(|e| failed("KVM_CREATE_GUEST_MEMFD", e))?;
    // SAFETY: the kernel has just made this fd for us; nobody else knows its number.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    Ok(GuestFile::new(fd, FileKind::GuestMemfd, len, true))
}

/// Converts pages of a guest_memfd in place (`KVM_SET_MEMORY_ATTRIBUTES2` on the file). On failure the partial
/// output is the offset that the kernel could not get past: `EAGAIN` there means that something still holds the
/// page. `EFAULT` may come after a conversion that did happen. Offered only where [`Support::in_place`].
pub fn convert(file: &impl AsFd, pages: PageRange<Offset>, to: Conversion) -> Result<(), Failed<u64>> {
    let mut args = MemoryAttributes2 {
        offset: pages.start().0,
        size: pages.len(),
        attributes: to.attributes(),
        ..Default::default()
    };
    // SAFETY: `args` is the 128 bytes that the call's number states, read and written by the kernel within the
    // call; a file that does not know the call reads nothing.
    let done =
        unsafe { ioctl_with_mut_ref(&file.as_fd().as_raw_fd(), KVM_SET_MEMORY_ATTRIBUTES2, &mut args) };
    if done < 0 { Err(Failed::last_with("KVM_SET_MEMORY_ATTRIBUTES2", args.error_offset)) } else { Ok(()) }
}

/// Converts guest-physical pages by the VM (`KVM_SET_MEMORY_ATTRIBUTES`). Only the process that made the VM may
/// (`EIO` else), and only for a VM type with private memory (`EINVAL` else).
pub fn set_attributes(vm: &VmFd, pages: PageRange<Gpa>, to: Conversion) -> Result<(), Failed> {
    vm.set_memory_attributes(kvm_bindings::kvm_memory_attributes {
        address: pages.start().0,
        size: pages.len(),
        attributes: to.attributes(),
        flags: 0,
    })
    .map_err(|e| failed("KVM_SET_MEMORY_ATTRIBUTES", e))
}

fn failed(call: &'static str, error: kvm_ioctls::Error) -> Failed {
    Failed::new(call, Errno::from_raw_os_error(error.errno()))
}
