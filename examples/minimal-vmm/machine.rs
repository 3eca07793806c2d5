//! The VM: one vCPU, its memory, and the conversion of pages for its type.
//!
//! A VM type with private memory has two files, a memfd for shared pages and a guest_memfd for private ones, and converts by
//! attribute. The default type has one shared, mappable guest_memfd: there a page becomes private when it is punched out of
//! the file, and the guest's next access allocates a new page.

use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};
use passgate_bindings::guest_memfd::{self, Conversion, Flags};
use passgate_bindings::kvm::{VmType, attach};
use passgate_bindings::memory::GuestFile;
use passgate_bindings::{Failed, Gpa, PAGE, PageRange};
use passgate_client::{AddMemory, Client, Outcome};
use rustix::io::Errno;

use crate::Result;
use crate::guest::{self, CODE, CODE_AT, MEMORY, PAGES};

/// The address of three pages below 4 GiB that KVM needs on Intel processors (KVM_SET_TSS_ADDR).
const TSS_ADDRESS: usize = 0xfffb_d000;

/// A VM with one vCPU.
pub(crate) struct Machine {
    vm: VmFd,
    vm_type: VmType,
    /// The file that devices may access.
    shared: &'static GuestFile,
    /// The file of private pages; none where that is `shared`, too.
    private: Option<GuestFile>,
}

impl Machine {
    /// Creates a VM of the given type, or by default of a type with private memory where the kernel has one. All pages are
    /// shared and stamped.
    pub(crate) fn new(vm_type: Option<VmType>) -> Result<(Self, VcpuFd)> {
        let vm_type = match vm_type {
            Some(vm_type) => vm_type,
            None if VmType::SwProtected.is_supported()? => VmType::SwProtected,
            None => VmType::Default,
        };
        let vm = vm_type.create()?;
        let len = PAGES * PAGE;
        let (shared, private) = match vm_type {
            VmType::Default => (guest_memfd::create(&vm, len, Flags::MMAP | Flags::INIT_SHARED)?, None),
            VmType::SwProtected => {
                let private = guest_memfd::create(&vm, len, Flags::empty())?;
                (GuestFile::memfd("minimal-vmm", len)?, Some(private))
            }
        };
        // Leaked: KVM uses their addresses as long as the VM exists, which is as long as this process.
        let shared: &'static GuestFile = Box::leak(Box::new(shared));
        let code: &'static GuestFile = Box::leak(Box::new(GuestFile::memfd("minimal-vmm-code", PAGE)?));
        code.write(0, &CODE)?;
        for page in 0..PAGES {
            shared.store(page * PAGE, guest::stamp(page, guest::FIRST_GENERATION))?;
        }
        vm.set_tss_address(TSS_ADDRESS)?;
        attach(&vm, 0, PageRange::new(CODE_AT, PAGE)?, code, None)?;
        attach(&vm, 1, PageRange::new(MEMORY, len)?, shared, Some(private.as_ref().unwrap_or(shared)))?;

        let vcpu = vm.create_vcpu(0)?;
        let mut sregs = vcpu.get_sregs()?;
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        vcpu.set_sregs(&sregs)?;
        let mut regs = vcpu.get_regs()?;
        // Bit 1 of RFLAGS is always 1.
        (regs.rip, regs.rflags) = (CODE_AT, 2);
        vcpu.set_regs(&regs)?;
        Ok((Self { vm, vm_type, shared, private }, vcpu))
    }

    /// Returns the type of the VM.
    pub(crate) fn vm_type(&self) -> VmType {
        self.vm_type
    }

    /// Returns the kind of its conversions: `attributes` or `punch`.
    pub(crate) fn kind(&self) -> &'static str {
        if self.private.is_some() { "attributes" } else { "punch" }
    }

    /// Adds the memory to passgate.
    pub(crate) fn add_to(&self, client: &mut Client) -> passgate_client::Result<()> {
        let memory = AddMemory::shared(MEMORY, PAGES * PAGE);
        match &self.private {
            None => client.add_memory(&memory, &[self.shared])?,
            Some(private) => {
                client.add_memory(&AddMemory { private: true, ..memory }, &[self.shared, private])?
            }
        };
        Ok(())
    }

    /// Returns the 8 bytes at byte `at` of a page in the shared file.
    pub(crate) fn load(&self, page: u64, at: u64) -> Result<u64, Failed> {
        self.shared.load(page * PAGE + at)
    }

    /// Converts a page. Its contents are lost in both directions.
    pub(crate) fn convert(&self, page: u64, to: Conversion) -> Result<(), Failed> {
        let at = page * PAGE;
        let Some(private) = &self.private else { return self.shared.punch(at, PAGE) };
        let gpa = guest::gpa(page).map_err(|_| Failed::new("convert", Errno::INVAL))?;
        guest_memfd::set_attributes(&self.vm, gpa, to)?;
        let old = if to == Conversion::ToPrivate { self.shared } else { private };
        old.punch(at, PAGE)
    }

    /// Makes the call that converts, with a length that KVM refuses; none where KVM accepts it.
    pub(crate) fn fail_to_convert(&self, pages: PageRange<Gpa>) -> Option<Failed> {
        let attributes = kvm_bindings::kvm_memory_attributes {
            address: pages.start().0,
            size: pages.len() - 1,
            attributes: kvm_bindings::KVM_MEMORY_ATTRIBUTE_PRIVATE.into(),
            flags: 0,
        };
        let done = self.vm.set_memory_attributes(attributes);
        done.err().map(|e| Failed::new("KVM_SET_MEMORY_ATTRIBUTES", Errno::from_raw_os_error(e.errno())))
    }
}

/// Returns the outcome to report for a conversion. `ENOTTY` (the kernel lacks the call) and `EINVAL` (invalid arguments) are
/// returned before anything is changed. After every other failure the VMM cannot know how far the conversion got, and
/// reports *unknown*.
pub(crate) fn outcome(converted: Result<(), Failed>) -> Outcome {
    match converted {
        Ok(()) => Outcome::Committed,
        Err(failed)
            if failed.call == "KVM_SET_MEMORY_ATTRIBUTES"
                && [Errno::INVAL, Errno::NOTTY].contains(&failed.errno) =>
        {
            Outcome::NotCommitted
        }
        Err(failed) => Outcome::Unknown { errno: failed.errno.raw_os_error(), offset: 0 },
    }
}

/// An exit of the guest that the VMM must handle.
pub(crate) enum Exit<'a> {
    /// The guest has written these bytes to an I/O port.
    Out(u16, &'a [u8]),
    /// The guest reads these bytes from an I/O port.
    In(u16, &'a mut [u8]),
}

/// Runs the guest until its next exit; none for an interrupted run.
pub(crate) fn run(vcpu: &mut VcpuFd) -> Result<Option<Exit<'_>>> {
    match vcpu.run() {
        Ok(VcpuExit::IoOut(port, bytes)) => Ok(Some(Exit::Out(port, bytes))),
        Ok(VcpuExit::IoIn(port, bytes)) => Ok(Some(Exit::In(port, bytes))),
        Ok(other) => Err(format!("unexpected exit of the guest: {other:?}").into()),
        Err(error) if [raw(Errno::INTR), raw(Errno::AGAIN)].contains(&error.errno()) => Ok(None),
        Err(error) => Err(format!("KVM_RUN: {error}").into()),
    }
}

fn raw(errno: Errno) -> i32 {
    errno.raw_os_error()
}
