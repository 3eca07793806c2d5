//! A VM of our own: its type, and the files behind its memory.
//!
//! `kvm-ioctls` leaves one thing to its callers that no caller can keep by care alone: KVM goes on using the
//! user-space address of a memory slot for as long as any descriptor of the VM lives, which no lifetime in Rust can
//! follow. So [`attach`] takes memory that stays for good.

use std::os::fd::{AsFd, AsRawFd};

use kvm_bindings::{
    KVM_CAP_VM_TYPES, KVM_MEM_GUEST_MEMFD, KVM_X86_DEFAULT_VM, KVM_X86_SW_PROTECTED_VM,
    kvm_userspace_memory_region2,
};
use kvm_ioctls::{Kvm, VmFd};
use rustix::io::Errno;

use crate::guest_memfd::Unavailable;
use crate::memory::GuestFile;
use crate::{Failed, Gpa, PageRange};

/// The types of VM that need no confidential hardware.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VmType {
    /// `KVM_X86_DEFAULT_VM`: every page is shared, and leaves by being punched out of its file.
    Default,
    /// `KVM_X86_SW_PROTECTED_VM`: pages are shared or private by attribute, each from a file of its own.
    SwProtected,
}

impl VmType {
    /// The kernel's number for it.
    fn raw(self) -> u32 {
        match self {
            Self::Default => KVM_X86_DEFAULT_VM,
            Self::SwProtected => KVM_X86_SW_PROTECTED_VM,
        }
    }

    /// Its name in the kernel's header, less the prefix.
    pub fn word(self) -> &'static str {
        match self {
            Self::Default => "default",
            Self::SwProtected => "sw-protected",
        }
    }

    /// Whether this kernel makes VMs of this type (`KVM_CAP_VM_TYPES`).
    pub fn is_offered(self) -> Result<bool, Unavailable> {
        let types = open()?.check_extension_raw(KVM_CAP_VM_TYPES.into());
        // Before the capability there was one type, and a call that fails knows of no other.
        let types = u64::try_from(types).ok().filter(|types| *types != 0).unwrap_or(1);
        Ok(types >> self.raw() & 1 == 1)
    }

    /// A VM of this type, without memory or processors.
    pub fn create(self) -> Result<VmFd, Unavailable> {
        let vm = open()?.create_vm_with_type(self.raw().into());
        vm.map_err(|e| failed("KVM_CREATE_VM", e).into())
    }
}

/// Puts memory into a VM as one slot (`KVM_SET_USER_MEMORY_REGION2`): `window` from its start on is what the host
/// sees, `private` the guest_memfd that the guest's own pages come from. Where one guest_memfd is both, give it
/// twice. The window is borrowed for good, because the VM uses its address for as long as it lives. `EINVAL` where
/// a file is shorter than the slot.
pub fn attach(
    vm: &VmFd,
    slot: u32,
    gpa: PageRange<Gpa>,
    window: &'static GuestFile,
    private: Option<&GuestFile>,
) -> Result<(), Failed> {
    const CALL: &str = "KVM_SET_USER_MEMORY_REGION2";
    let short = |file: &GuestFile| file.size() < gpa.len();
    if short(window) || private.is_some_and(short) || !window.writable() {
        return Err(Failed::new(CALL, Errno::INVAL));
    }
    let fd = private.map(|file| file.as_fd().as_raw_fd());
    let region = kvm_userspace_memory_region2 {
        slot,
        flags: if fd.is_some() { KVM_MEM_GUEST_MEMFD } else { 0 },
        guest_phys_addr: gpa.start().0,
        memory_size: gpa.len(),
        userspace_addr: window.address(0)?,
        guest_memfd: fd.and_then(|fd| u32::try_from(fd).ok()).unwrap_or(0),
        ..Default::default()
    };
    // SAFETY: `userspace_addr` and the `memory_size` bytes behind it are the window of a `&'static GuestFile`: mapped
    // writable, as long as the slot (both just checked), and never unmapped, so that they outlive the VM whoever
    // keeps it. What the guest writes there races with nothing that Rust relies on (see `GuestFile`).
    unsafe { vm.set_user_memory_region2(region) }.map_err(|e| failed(CALL, e))
}

fn open() -> Result<Kvm, Unavailable> {
    Kvm::new().map_err(|e| Unavailable::Kvm { errno: Errno::from_raw_os_error(e.errno()) })
}

fn failed(call: &'static str, error: kvm_ioctls::Error) -> Failed {
    Failed::new(call, Errno::from_raw_os_error(error.errno()))
}
