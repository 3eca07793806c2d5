//! KVM's guest_memfd, the file that backs a confidential guest's memory: the calls that `kvm-ioctls` lacks.
//!
//! The features of a kernel are probed ([`Support`]), never inferred from its version: the creation flags came with
//! Linux 6.18; in-place conversion is queued for a kernel after 7.3, and its capability number has differed between
//! development trees. The file does not track pins: a punch or a conversion to shared succeeds even while a device has
//! the page pinned.

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use kvm_bindings::{KVM_CAP_GUEST_MEMFD, KVM_CAP_MEMORY_ATTRIBUTES, kvm_create_guest_memfd};
use kvm_ioctls::{Kvm, VmFd};
use rustix::io::Errno;
use vmm_sys_util::ioctl::{_IOC_READ, _IOC_WRITE, ioctl_expr, ioctl_with_mut_ref};

use crate::memory::{FileKind, GuestFile};
use crate::units::{Offset, PAGE};
use crate::{Failed, Gpa, PageRange};

/// `KVM_CAP_GUEST_MEMFD_FLAGS` (include/uapi/linux/kvm.h): returns the mask of supported [`Flags`], 0 before Linux 6.18.
const CAP_GUEST_MEMFD_FLAGS: u64 = 244;

/// `KVM_MEMORY_ATTRIBUTE_PRIVATE` of `linux/kvm.h`.
const PRIVATE: u64 = kvm_bindings::KVM_MEMORY_ATTRIBUTE_PRIVATE as u64;

/// `struct kvm_memory_attributes2`, 128 bytes: the argument of the in-place conversion, as posted for kernels after 7.3.
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
    /// Creation flags of a guest_memfd (`KVM_CREATE_GUEST_MEMFD`).
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct Flags: u64 {
        /// Its owner may mmap it (`GUEST_MEMFD_FLAG_MMAP`).
        const MMAP = 1 << 0;
        /// Its pages are shared from the start (`GUEST_MEMFD_FLAG_INIT_SHARED`).
        const INIT_SHARED = 1 << 1;
    }
}

/// A conversion of pages of guest memory between private and shared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Conversion {
    /// To private: only the guest may access it.
    ToPrivate,
    /// To shared: the host and its devices may access it.
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

/// The guest_memfd features of the running kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Support {
    /// True where the default VM type has `KVM_CAP_GUEST_MEMFD`.
    pub guest_memfd: bool,
    /// The supported creation flags; empty before Linux 6.18.
    pub flags: Flags,
    /// The attributes that `KVM_SET_MEMORY_ATTRIBUTES` supports for the default VM type; 0 for none.
    pub attributes: u64,
    /// True where the file itself converts in place (`KVM_SET_MEMORY_ATTRIBUTES2`); probed by a conversion.
    pub in_place: bool,
}

/// The reason why no guest_memfd can be created. Its text is the error message for the user.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unavailable {
    /// `/dev/kvm` cannot be opened.
    #[error(
        "cannot open /dev/kvm ({errno}): load the kvm module (and enable virtualisation in the firmware), or give \
         this user access to the device"
    )]
    Kvm {
        /// The errno of open(2).
        errno: Errno,
    },
    /// The kernel lacks guest_memfd, or the flags that make it mappable.
    #[error(
        "this kernel's guest_memfd cannot be mapped by its owner ({support:?}): Linux 6.18 or newer is needed"
    )]
    Unsupported {
        /// The features that the kernel has.
        support: Support,
    },
    /// A call failed.
    #[error(transparent)]
    Failed(#[from] Failed),
}

impl Support {
    /// Probes the running kernel, with a VM of the default type.
    pub fn probe() -> Result<Self, Unavailable> {
        Ok(Self::of(&vm()?))
    }

    /// Probes the features of `vm`'s type.
    pub fn of(vm: &VmFd) -> Self {
        let cap = |cap: u64| u64::try_from(vm.check_extension_raw(cap)).unwrap_or(0);
        let flags = Flags::from_bits_truncate(cap(CAP_GUEST_MEMFD_FLAGS));
        let guest_memfd = cap(KVM_CAP_GUEST_MEMFD.into()) > 0;
        // The probe is the call itself: converting a shared page to shared has no effect. ENOTTY and EINVAL both mean
        // that the kernel lacks the call; only success shows that it has it.
        let in_place = guest_memfd
            && create(vm, PAGE, flags).is_ok_and(|file| {
                PageRange::new(0, PAGE).is_ok_and(|page| convert(&file, page, Conversion::ToShared).is_ok())
            });
        Self { guest_memfd, flags, attributes: cap(KVM_CAP_MEMORY_ATTRIBUTES.into()), in_place }
    }
}

/// Creates a VM of the default type, without memory or vCPUs.
pub fn vm() -> Result<VmFd, Unavailable> {
    let kvm = Kvm::new().map_err(|e| Unavailable::Kvm { errno: Errno::from_raw_os_error(e.errno()) })?;
    Ok(kvm.create_vm().map_err(|e| failed("KVM_CREATE_VM", e))?)
}

/// Creates a guest_memfd of `len` bytes (a multiple of the page size) that the host may map and whose pages are shared,
/// and the VM that it belongs to. The file keeps the VM alive; the VM's handle is needed only to run a guest in it.
pub fn shared(len: u64) -> Result<(VmFd, GuestFile), Unavailable> {
    let vm = vm()?;
    let flags = Flags::MMAP | Flags::INIT_SHARED;
    match create(&vm, len, flags) {
        Ok(file) => Ok((vm, file)),
        Err(failed) => {
            let support = Support::of(&vm);
            let supported = support.guest_memfd && support.flags.contains(flags);
            Err(if supported { failed.into() } else { Unavailable::Unsupported { support } })
        }
    }
}

/// Creates a guest_memfd of `len` bytes in `vm` (`KVM_CREATE_GUEST_MEMFD`).
pub fn create(vm: &VmFd, len: u64, flags: Flags) -> Result<GuestFile, Failed> {
    let args = kvm_create_guest_memfd { size: len, flags: flags.bits(), ..Default::default() };
    let fd = vm.create_guest_memfd(args).map_err(|e| failed("KVM_CREATE_GUEST_MEMFD", e))?;
    // SAFETY: the kernel has just created this descriptor for this call; nothing else owns it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    Ok(GuestFile::new(fd, FileKind::GuestMemfd, len, true))
}

/// Converts pages of a guest_memfd in place (`KVM_SET_MEMORY_ATTRIBUTES2` on the file). The partial output of a failure
/// is the offset at which the kernel stopped: `EAGAIN` means that the page there still has references, for example a
/// pin. `EFAULT` may be returned after a conversion that did happen. Supported only where [`Support::in_place`] is set.
pub fn convert(file: &impl AsFd, pages: PageRange<Offset>, to: Conversion) -> Result<(), Failed<u64>> {
    let mut args = MemoryAttributes2 {
        offset: pages.start().0,
        size: pages.len(),
        attributes: to.attributes(),
        ..Default::default()
    };
    // SAFETY: `args` has the 128 bytes that the ioctl number encodes; the kernel reads and writes them within the call
    // only. A file that does not support the ioctl reads nothing.
    let done =
        unsafe { ioctl_with_mut_ref(&file.as_fd().as_raw_fd(), KVM_SET_MEMORY_ATTRIBUTES2, &mut args) };
    if done < 0 { Err(Failed::last_with("KVM_SET_MEMORY_ATTRIBUTES2", args.error_offset)) } else { Ok(()) }
}

/// Converts guest-physical pages of a VM (`KVM_SET_MEMORY_ATTRIBUTES`). `EIO` in a process other than the one that
/// created the VM, `EINVAL` for a VM type without private memory.
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
