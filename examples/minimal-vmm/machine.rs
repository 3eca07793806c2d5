//! The VM: one processor, its memory, and what a conversion is for its type.
//!
//! A VM of the type that has private memory gets two backings, a memfd for what is shared and a guest_memfd for
//! what is private, and converts by attribute. The default type has one guest_memfd, shared and mappable: there a
//! page becomes private by leaving the file, and what the guest then touches is a fresh page.

use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};
use passgate::client::{AddMemory, Client, Outcome};
use passgate_bindings::guest_memfd::{self, Conversion, Flags};
use passgate_bindings::kvm::{VmType, attach};
use passgate_bindings::memory::GuestFile;
use passgate_bindings::{Failed, Gpa, PAGE, PageRange};
use rustix::io::Errno;

use crate::Result;
use crate::guest::{self, CODE, CODE_AT, MEMORY, PAGES};

/// Three pages below 4 GiB that KVM wants for itself on some processors.
const TSS: usize = 0xfffb_d000;

/// A VM with one processor.
pub(crate) struct Machine {
    vm: VmFd,
    vm_type: VmType,
    /// What devices are given.
    shared: &'static GuestFile,
    /// Where private pages come from, where that is another file.
    private: Option<GuestFile>,
}

impl Machine {
    /// A VM of the given type, or else of the best that this kernel has; its pages shared and stamped.
    pub(crate) fn new(vm_type: Option<VmType>) -> Result<(Self, VcpuFd)> {
        let vm_type = match vm_type {
            Some(vm_type) => vm_type,
            None if VmType::SwProtected.is_offered()? => VmType::SwProtected,
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
        // KVM uses their addresses for as long as the VM lives, and that is as long as this process does.
        let shared: &'static GuestFile = Box::leak(Box::new(shared));
        let code: &'static GuestFile = Box::leak(Box::new(GuestFile::memfd("minimal-vmm-code", PAGE)?));
        code.write(0, &CODE)?;
        for page in 0..PAGES {
            shared.store(page * PAGE, guest::stamp(page, guest::FIRST))?;
        }
        vm.set_tss_address(TSS)?;
        attach(&vm, 0, PageRange::new(CODE_AT, PAGE)?, code, None)?;
        attach(&vm, 1, PageRange::new(MEMORY, len)?, shared, Some(private.as_ref().unwrap_or(shared)))?;

        let processor = vm.create_vcpu(0)?;
        let mut sregs = processor.get_sregs()?;
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        processor.set_sregs(&sregs)?;
        let mut regs = processor.get_regs()?;
        (regs.rip, regs.rflags) = (CODE_AT, 2);
        processor.set_regs(&regs)?;
        Ok((Self { vm, vm_type, shared, private }, processor))
    }

    /// Its type.
    pub(crate) fn vm_type(&self) -> VmType {
        self.vm_type
    }

    /// How it converts: `attributes` or `punch`.
    pub(crate) fn kind(&self) -> &'static str {
        if self.private.is_some() { "attributes" } else { "punch" }
    }

    /// Tells passgate of the memory.
    pub(crate) fn add_to(&self, client: &mut Client) -> passgate::Result<()> {
        let memory = AddMemory::shared(MEMORY, PAGES * PAGE);
        match &self.private {
            None => client.add_memory(&memory, &[self.shared])?,
            Some(private) => {
                client.add_memory(&AddMemory { private: true, ..memory }, &[self.shared, private])?
            }
        };
        Ok(())
    }

    /// The word at byte `at` of a page, as the host sees it.
    pub(crate) fn load(&self, page: u64, at: u64) -> Result<u64, Failed> {
        self.shared.load(page * PAGE + at)
    }

    /// Makes a page private, or shared again. Whichever way, what was in it is gone.
    pub(crate) fn convert(&self, page: u64, to: Conversion) -> Result<(), Failed> {
        let at = page * PAGE;
        let Some(private) = &self.private else { return self.shared.punch(at, PAGE) };
        let gpa = guest::gpa(page).map_err(|_| Failed::new("convert", Errno::INVAL))?;
        guest_memfd::set_attributes(&self.vm, gpa, to)?;
        let left = if to == Conversion::ToPrivate { self.shared } else { private };
        left.punch(at, PAGE)
    }

    /// The call that converts, with a length that KVM cannot but refuse.
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

/// What passgate is told of a conversion. A kernel that lacks the call (`ENOTTY`) and one that dislikes its arguments
/// (`EINVAL`) say so before anything is touched; of every other failure a VMM cannot say how far it got, and must not
/// guess.
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

/// What the guest did that the VMM must see to.
pub(crate) enum Exit<'a> {
    /// It put these bytes on a port.
    Out(u16, &'a [u8]),
    /// It wants bytes from a port.
    In(u16, &'a mut [u8]),
}

/// Runs the guest until it wants something.
pub(crate) fn run(processor: &mut VcpuFd) -> Result<Option<Exit<'_>>> {
    match processor.run() {
        Ok(VcpuExit::IoOut(port, bytes)) => Ok(Some(Exit::Out(port, bytes))),
        Ok(VcpuExit::IoIn(port, bytes)) => Ok(Some(Exit::In(port, bytes))),
        Ok(other) => Err(format!("the guest stopped in a way that its code does not: {other:?}").into()),
        Err(error) if [libc_errno(Errno::INTR), libc_errno(Errno::AGAIN)].contains(&error.errno()) => {
            Ok(None)
        }
        Err(error) => Err(format!("KVM_RUN: {error}").into()),
    }
}

fn libc_errno(errno: Errno) -> i32 {
    errno.raw_os_error()
}
