//! A VFIO device, opened by its cdev in an iommufd or by its group in a type1 container, and its fences.
//!
//! No BAR mapping is handed out: a BAR mapping keeps the device open after this process has ended, and its owner could
//! start the device again without the gate. A driver may map doorbells into this process; they are unmapped when it
//! ends.

mod ats;
mod quiesce;
mod resume;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use passgate_bindings::Failed;
use passgate_bindings::vfio::config::{COMMAND, Capabilities, is_gone};
use passgate_bindings::vfio::device::{REQUEST_IRQ, Region};
use passgate_bindings::vfio::pci::{PciDevice, SYSFS};
use passgate_bindings::vfio::{Cdev, DeviceFile, Group, PciAddress};
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

use self::ats::Ats;
use super::refusal::{Candidate, candidate};
use super::{Device, DeviceTraits, Guard, Step, Steps};
use crate::iommu::iommufd::IommufdDomain;
use crate::iommu::type1::Type1Domain;
use crate::{Error, Result};

/// `VFIO_PCI_CONFIG_REGION_INDEX`.
const CONFIG: u32 = 7;

/// The remedy if VFIO refuses a physical function with `EACCES` (drivers/vfio/pci/vfio_pci_core.c,
/// `vfio_pci_core_match_token_uuid`).
const NEEDS_TOKEN: &str = "; other processes have virtual functions of it, and VFIO demands the VF token that they share: \
                           stop them first";

/// An open VFIO device in its domain, with bus mastering on.
#[derive(Debug)]
pub struct VfioDevice {
    name: String,
    pci: PciDevice,
    stop: Steps,
    config: Region,
    capabilities: Capabilities,
    ats: Ats,
    /// The eventfd that the kernel signals when the device is to be unbound or removed; none if it does not support
    /// that.
    request: Option<OwnedFd>,
    handle: Handle,
}

/// The open device and its domain. The order of the fields is the order of closing: the device first, then its domain.
/// If the iommufd closed first, the device's DMA would continue in its address space.
#[derive(Debug)]
enum Handle {
    Cdev { cdev: Arc<Cdev>, domain: Arc<IommufdDomain> },
    Group { file: DeviceFile, _group: Arc<Group>, domain: Arc<Type1Domain> },
}

impl VfioDevice {
    /// Opens the device at PCI address `name` by its cdev and attaches it to `domain`. `together` are the devices that
    /// are or will be in the domain, which determine whether a detach is proof.
    pub fn open_cdev(name: &str, domain: &Arc<IommufdDomain>, together: &[PciAddress]) -> Result<Self> {
        let candidate = candidate(Path::new(SYSFS), name)?;
        let device = candidate.pci.address().to_string();
        if candidate.pci.cdev().is_none() {
            return Err(Error::Host {
                what: format!(
                    "{device}: this kernel has no VFIO character devices (CONFIG_VFIO_DEVICE_CDEV)"
                ),
                remedy: "use --iommu type1",
            });
        }
        let cdev = Cdev::open(&candidate.pci).map_err(|source| Error::Device {
            device,
            source,
            remedy: match source.errno {
                Errno::ACCESS | Errno::PERM => {
                    "; run as root, or give this user the character device that the device's vfio-dev directory \
                     names, or pass it in as an open file"
                }
                _ => "",
            },
        })?;
        Self::attach_cdev(candidate, cdev, domain, together)
    }

    /// Takes the cdev of the device at PCI address `name`, opened by a process with the permission to, and attaches it
    /// to `domain`.
    pub fn from_cdev(name: &str, fd: OwnedFd, domain: &Arc<IommufdDomain>) -> Result<Self> {
        let candidate = candidate(Path::new(SYSFS), name)?;
        resume::is_cdev_of(&candidate, &fd)?;
        Self::attach_cdev(candidate, Cdev::from_fd(fd), domain, &[])
    }

    /// Opens the device at PCI address `name` by its group, which is added to `domain` if it is not in it yet.
    pub fn open_group(name: &str, domain: &Arc<Type1Domain>) -> Result<Self> {
        let candidate = candidate(Path::new(SYSFS), name)?;
        let address = candidate.pci.address();
        let group = domain.group(address, &candidate.group)?;
        let file = group.device(address).map_err(|source| Error::Device {
            device: address.to_string(),
            source,
            remedy: match source.errno {
                Errno::BUSY => "; it is open already",
                Errno::ACCESS => NEEDS_TOKEN,
                _ => "",
            },
        })?;
        let handle = Handle::Group { file, _group: group, domain: Arc::clone(domain) };
        Self::new(candidate.pci, handle, Steps::empty())
    }

    fn attach_cdev(
        candidate: Candidate,
        cdev: Cdev,
        domain: &Arc<IommufdDomain>,
        together: &[PciAddress],
    ) -> Result<Self> {
        let device = candidate.pci.address().to_string();
        let failed = |source, remedy| Error::Device { device: device.clone(), source, remedy };
        let cdev = Arc::new(cdev);
        domain.bind(&cdev).map_err(|source| {
            let remedy = match source.errno {
                Errno::INVAL => "; another process has this device: stop it first",
                Errno::ACCESS => NEEDS_TOKEN,
                Errno::BUSY => {
                    "; another process, or a driver of the host, has its IOMMU group: stop it first"
                }
                Errno::PERM => {
                    "; this machine has no interrupt remapping: switch it on, or accept the risk with \
                     iommufd.allow_unsafe_interrupts=1"
                }
                _ => "",
            };
            failed(source, remedy)
        })?;
        domain.attach(&cdev).map_err(|source| failed(source, ""))?;
        let stop = if let Some(other) = candidate.first_outside(together) {
            log::warn!(
                "{device} shares IOMMU group {} with {other}: detaching it alone stops no DMA, so it is not offered \
                 as a fence",
                candidate.group.id
            );
            Steps::empty()
        } else {
            Steps::DETACH
        };
        Self::new(candidate.pci, Handle::Cdev { cdev, domain: Arc::clone(domain) }, stop)
    }

    fn new(pci: PciDevice, handle: Handle, stop: Steps) -> Result<Self> {
        let device = Self::opened(pci, handle, stop, false)?;
        // Valid here, because the device has just been attached.
        device.ats.attached(device.ats_on().ok());
        device.set_master(true)?;
        Ok(device)
    }

    /// Makes the object for an open device and changes nothing in the device. `ats_unused` is set if an earlier process
    /// has read ATS as off after the last attach.
    fn opened(pci: PciDevice, handle: Handle, stop: Steps, ats_unused: bool) -> Result<Self> {
        let name = pci.address().to_string();
        let fail = |source| Error::Device { device: name.clone(), source, remedy: "" };
        let info = handle.file().info().map_err(fail)?;
        let config = handle.file().region(CONFIG).map_err(fail)?;
        let migrates = handle.file().can_stop().map_err(fail)?;
        let capabilities = Capabilities::default();
        let (ats, request) = (Ats::new(true, false), register_request_irq(&name, handle.file()));
        let mut device = Self { name, pci, stop, config, capabilities, ats, request, handle };
        device.check_present()?;
        device.capabilities = device.find_capabilities()?;
        device.ats = Ats::new(device.capabilities.ats.is_some(), ats_unused);
        device.stop.set(Steps::RESET, info.resets());
        device.stop.set(Steps::STOP, migrates);
        device.stop.set(Steps::MASTER, device.capabilities.express.is_some());
        Ok(device)
    }

    /// Returns vendor and device id, from configuration space.
    pub fn ids(&self) -> Result<(u16, u16)> {
        let [a, b, c, d] = self.read_u32(self.config, 0)?.to_le_bytes();
        Ok((u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d])))
    }

    /// Returns the class code (base class, subclass and programming interface), from configuration space.
    pub fn class(&self) -> Result<u32> {
        Ok(self.read_u32(self.config, 8)? >> 8)
    }

    /// Returns the region with this index, for a driver.
    pub fn region(&self, index: u32) -> Result<Region> {
        self.handle.file().region(index).map_err(|failed| self.failed(failed))
    }

    /// Returns the open device, for a driver.
    pub fn file(&self) -> &DeviceFile {
        self.handle.file()
    }

    /// Reads `bytes` at `at` of a region. If all of them are 0xff, checks that the device still responds
    /// ([`Error::Gone`] otherwise), so that the result is never mistaken for the content of a register.
    pub fn read(&self, region: Region, at: u64, bytes: &mut [u8]) -> Result<()> {
        self.handle.file().read(region, at, bytes).map_err(|f| self.failed(f.without_partial()))?;
        if bytes.iter().all(|byte| *byte == u8::MAX) { self.check_present() } else { Ok(()) }
    }

    /// Checks that the device responds; [`Error::Gone`] otherwise.
    fn check_present(&self) -> Result<()> {
        let mut command = [0; 4];
        let read = self.handle.file().read(self.config, COMMAND.into(), &mut command);
        read.map_err(|f| self.failed(f.without_partial()))?;
        if is_gone(u32::from_le_bytes(command)) {
            return Err(Error::Gone { device: self.name.clone() });
        }
        Ok(())
    }

    /// Reads the 32-bit register at `at` of a region.
    pub fn read_u32(&self, region: Region, at: u64) -> Result<u32> {
        let mut bytes = [0; 4];
        self.read(region, at, &mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }

    /// Writes the 32-bit register at `at` of a region.
    pub fn write_u32(&self, region: Region, at: u64, value: u32) -> Result<()> {
        let written = self.handle.file().write(region, at, &value.to_le_bytes());
        written.map_err(|f| self.failed(f.without_partial()))
    }

    /// Returns the error for a failed call on this device.
    pub fn failed(&self, source: Failed) -> Error {
        Error::Device { device: self.name.clone(), source, remedy: "" }
    }

    /// Attaches the device to its domain, whatever state an earlier attach has left it in. Does nothing on type1.
    fn reattach(&self) -> Result<()> {
        let Handle::Cdev { cdev, domain } = &self.handle else { return Ok(()) };
        domain.detach(cdev).map_err(|failed| self.failed(failed))?;
        domain.attach(cdev).map_err(|failed| self.failed(failed))
    }

    /// Returns false if a failed replace in its domain has left the device detached.
    pub(super) fn is_attached(&self) -> bool {
        match &self.handle {
            Handle::Cdev { cdev, domain } => domain.is_attached(cdev),
            Handle::Group { .. } => true,
        }
    }

    /// Lets the device issue requests, by its migration state and Bus Master Enable.
    fn run(&self) -> Result<()> {
        if self.stop.has(Step::Stop) {
            self.migration_run()?;
        }
        self.set_master(true)
    }

    /// Detaches the device, or, on type1, switches bus mastering off.
    fn isolate(&self) -> Result<()> {
        match &self.handle {
            Handle::Cdev { cdev, domain } => domain.detach(cdev).map_err(|failed| self.failed(failed)),
            Handle::Group { .. } => self.set_master(false),
        }
    }

    fn unsupported(&self, step: Step) -> Error {
        let what = match step {
            Step::Drain => "draining its DMA",
            Step::Stop => "stopping it by its migration state",
            Step::Master => "waiting until no transaction is pending",
            Step::Detach => "detaching it from its address space",
            Step::Reset => "resetting it",
        };
        Error::Unsupported { device: self.name.clone(), what }
    }
}

impl Handle {
    fn file(&self) -> &DeviceFile {
        match self {
            Self::Cdev { cdev, .. } => cdev.device(),
            Self::Group { file, .. } => file,
        }
    }
}

impl Device for VfioDevice {
    fn name(&self) -> &str {
        &self.name
    }

    fn stop_class(&self) -> Steps {
        self.stop
    }

    fn wanted(&self) -> Option<BorrowedFd<'_>> {
        self.request.as_ref().map(AsFd::as_fd)
    }

    fn traits(&self) -> DeviceTraits {
        DeviceTraits {
            ats: self.ats.caches(self.ats_on().ok()),
            tdi: self.pci.is_bound_tdi(),
            tolerant: false,
        }
    }

    /// A reset leaves bus mastering off, so the device cannot issue requests until [`Device::attach`].
    fn fence(&self, step: Step) -> Result<()> {
        match (step, &self.handle) {
            _ if !self.stop.has(step) => Err(self.unsupported(step)),
            (Step::Stop, _) => self.migration_stop(),
            (Step::Master, _) => self.master_off(),
            (Step::Detach, Handle::Cdev { cdev, domain }) => domain.detach(cdev).map_err(|f| self.failed(f)),
            (Step::Reset, handle) => {
                handle.file().reset().map_err(|failed| self.failed(failed))?;
                self.set_master(false)
            }
            _ => Err(self.unsupported(step)),
        }
    }

    /// Detaches the device first: after a failed attach the hardware may be detached although the kernel reports it as
    /// attached, and only a detach and an attach together restore it.
    ///
    /// If a later step fails, the device is detached again, or on type1 its bus mastering switched off. That may fail
    /// too, so the state of a device whose attach has failed is unknown.
    fn attach(&self) -> Result<()> {
        self.ats.attaching();
        let attached = self.reattach().and_then(|()| self.run());
        match attached {
            Ok(()) => self.ats.attached(self.ats_on().ok()),
            Err(_) => {
                if let Err(error) = self.isolate() {
                    log::warn!("{error}; its attach failed before");
                }
            }
        }
        attached
    }

    fn guard(&self) -> Guard<'_> {
        match &self.handle {
            Handle::Cdev { cdev, .. } => Guard::Cdev(cdev.as_fd()),
            Handle::Group { file, domain, .. } => {
                Guard::Type1 { container: domain.container().as_fd(), device: file.as_fd() }
            }
        }
    }
}

impl Drop for VfioDevice {
    /// Stops the device explicitly: closing the file does so only if no other process has the file open.
    fn drop(&mut self) {
        if let Err(error) = self.isolate() {
            log::warn!("closing: {error}");
        }
    }
}

/// Registers an eventfd for VFIO's request interrupt, which the kernel signals when the device is to be unbound or
/// removed. None if the device does not have that interrupt: an unbind then waits until this process ends.
fn register_request_irq(name: &str, file: &DeviceFile) -> Option<OwnedFd> {
    let registered = || {
        if file.irq_info(REQUEST_IRQ)?.count == 0 {
            return Err(Failed::new("VFIO_DEVICE_GET_IRQ_INFO", Errno::NOENT));
        }
        let request = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let request = request.map_err(|errno| Failed::new("eventfd", errno))?;
        file.set_irqs(REQUEST_IRQ, 0, &[Some(request.as_fd())])?;
        Ok(request)
    };
    registered()
        .inspect_err(|failed| {
            log::warn!("{name}: requests to unbind or remove it are not signalled: {failed}")
        })
        .ok()
}
