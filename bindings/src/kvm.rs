//! KVM virtual machines: their types, and their memory slots.
//!
//! KVM uses the user-space address of a memory slot as long as any descriptor of the VM is open, which no Rust lifetime can
//! express and `kvm-ioctls` leaves to its caller. So [`attach`] takes memory that is never unmapped.

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

/// The VM types that need no confidential-computing hardware (include/uapi/asm/kvm.h on x86).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VmType {
    /// `KVM_X86_DEFAULT_VM`: every page is shared; a page is taken away by punching it out of its file.
    Default,
    /// `KVM_X86_SW_PROTECTED_VM`: an attribute makes a page shared or private; each state has a file of its own.
    SwProtected,
}

impl VmType {
    /// Returns its number in the kernel's header.
    fn raw(self) -> u32 {
        match self {
            Self::Default => KVM_X86_DEFAULT_VM,
            Self::SwProtected => KVM_X86_SW_PROTECTED_VM,
        }
    }

    /// Returns its name: the one in the kernel's header, without the prefix.
    pub fn word(self) -> &'static str {
        match self {
            Self::Default => "default",
            Self::SwProtected => "sw-protected",
        }
    }

    /// Returns true where the kernel supports this type (`KVM_CAP_VM_TYPES`).
    pub fn is_supported(self) -> Result<bool, Unavailable> {
        let types = open()?.check_extension_raw(KVM_CAP_VM_TYPES.into());
        // A kernel without the capability has the default type (bit 0) only.
        let types = u64::try_from(types).ok().filter(|types| *types != 0).unwrap_or(1);
        Ok(types >> self.raw() & 1 == 1)
    }

    /// Creates a VM of this type, without memory or vCPUs.
    pub fn create(self) -> Result<VmFd, Unavailable> {
        let vm = open()?.create_vm_with_type(self.raw().into());
        vm.map_err(|e| failed("KVM_CREATE_VM", e).into())
    }
}

/// Adds memory to a VM as one slot (`KVM_SET_USER_MEMORY_REGION2`): `shared`, from its start on, backs the shared pages,
/// and `private` is the guest_memfd that backs the private ones. A guest_memfd that backs both is passed twice. `shared`
/// is borrowed for `'static`, because the VM uses its address while any descriptor of the VM is open. `EINVAL` where a
/// file is shorter than the slot or `shared` is not writable.
pub fn attach(
    vm: &VmFd,
    slot: u32,
    gpa: PageRange<Gpa>,
    shared: &'static GuestFile,
    private: Option<&GuestFile>,
) -> Result<(), Failed> {
    const CALL: &str = "KVM_SET_USER_MEMORY_REGION2";
    let short = |file: &GuestFile| file.size() < gpa.len();
    if short(shared) || private.is_some_and(short) || !shared.writable() {
        return Err(Failed::new(CALL, Errno::INVAL));
    }
    let fd = private.map(|file| file.as_fd().as_raw_fd());
    let region = kvm_userspace_memory_region2 {
        slot,
        flags: if fd.is_some() { KVM_MEM_GUEST_MEMFD } else { 0 },
        guest_phys_addr: gpa.start().0,
        memory_size: gpa.len(),
        userspace_addr: shared.address(0)?,
        guest_memfd: fd.and_then(|fd| u32::try_from(fd).ok()).unwrap_or(0),
        ..Default::default()
    };
    // SAFETY: the `memory_size` bytes at `userspace_addr` are this process's mapping of a `&'static GuestFile`: writable
    // and at least as long as the slot (both checked above), and never unmapped, so that they outlive every descriptor of
    // the VM. Writes by the guest race only with the volatile and atomic accesses of `GuestFile`.
    unsafe { vm.set_user_memory_region2(region) }.map_err(|e| failed(CALL, e))
}

fn open() -> Result<Kvm, Unavailable> {
    Kvm::new().map_err(|e| Unavailable::Kvm { errno: Errno::from_raw_os_error(e.errno()) })
}

fn failed(call: &'static str, error: kvm_ioctls::Error) -> Failed {
    Failed::new(call, Errno::from_raw_os_error(error.errno()))
}
