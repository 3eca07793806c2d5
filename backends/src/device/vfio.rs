//! A VFIO device, by its cdev in an iommufd or by its group in a type1 container, and the fences that it has.
//!
//! No BAR is mapped for anybody else: a mapped BAR keeps the device open past this process, and lets whoever has it
//! start the device again past any gate. A driver of ours may map doorbells into this process, with which they go.

mod ats;
mod resume;
mod still;

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
use super::{Device, FenceStep, Guard, Nature, StopClass};
use crate::iommu::iommufd::IommufdDomain;
use crate::iommu::type1::Type1Domain;
use crate::{Error, Result};

/// `VFIO_PCI_CONFIG_REGION_INDEX`.
const CONFIG: u32 = 7;

/// What to do where VFIO refuses a physical function with `EACCES` (drivers/vfio/pci/vfio_pci_core.c,
/// `vfio_pci_core_match_token_uuid`).
const NEEDS_TOKEN: &str = "; other processes have virtual functions of it, and VFIO demands the VF token that they share: \
                           stop them first";

/// An open VFIO device in its domain, with bus mastering on.
#[derive(Debug)]
pub struct VfioDevice {
    name: String,
    pci: PciDevice,
    stop: StopClass,
    config: Region,
    capabilities: Capabilities,
    ats: Ats,
    /// Signalled by the kernel once it wants the device back; none where it cannot.
    request: Option<OwnedFd>,
    seat: Seat,
}

/// Where the device sits. The order of the fields is the order of closing: first the device, then what it is in.
/// An iommufd that closed first would leave the device's DMA running in its address space.
#[derive(Debug)]
enum Seat {
    Cdev { cdev: Arc<Cdev>, domain: Arc<IommufdDomain> },
    Group { file: DeviceFile, _group: Arc<Group>, domain: Arc<Type1Domain> },
}

impl VfioDevice {
    /// Opens the device at PCI address `name` by its cdev and attaches it to `domain`, where the devices
    /// `together` are, or will be, as well.
    pub fn open_cdev(name: &str, domain: &Arc<IommufdDomain>, together: &[PciAddress]) -> Result<Self> {
        let candidate = candidate(Path::new(SYSFS), name)?;
        let device = candidate.pci.address().to_string();
        if candidate.pci.cdev().is_none() {
            return Err(Error::Host {
                what: format!(
                    "{device}: this kernel has no VFIO character devices (CONFIG_VFIO_DEVICE_CDEV)"
                ),
                mend: "use --iommu type1",
            });
        }
        let cdev = Cdev::open(&candidate.pci).map_err(|source| Error::Device {
            device,
            source,
            mend: match source.errno {
                Errno::ACCESS | Errno::PERM => {
                    "; run as root, or give this user the character device that the device's vfio-dev directory \
                     names, or pass it in as an open file"
                }
                _ => "",
            },
        })?;
        Self::seat_cdev(candidate, cdev, domain, together)
    }

    /// Takes the cdev of the device at PCI address `name`, opened by somebody with the right to, and attaches it
    /// to `domain`.
    pub fn from_cdev(name: &str, fd: OwnedFd, domain: &Arc<IommufdDomain>) -> Result<Self> {
        let candidate = candidate(Path::new(SYSFS), name)?;
        resume::is_cdev_of(&candidate, &fd)?;
        Self::seat_cdev(candidate, Cdev::from_fd(fd), domain, &[])
    }

    /// Opens the device at PCI address `name` by its group, which joins `domain` if it is not there yet.
    pub fn open_group(name: &str, domain: &Arc<Type1Domain>) -> Result<Self> {
        let candidate = candidate(Path::new(SYSFS), name)?;
        let address = candidate.pci.address();
        let group = domain.group(address, &candidate.group)?;
        let file = group.device(address).map_err(|source| Error::Device {
            device: address.to_string(),
            source,
            mend: match source.errno {
                Errno::BUSY => "; it is open already",
                Errno::ACCESS => NEEDS_TOKEN,
                _ => "",
            },
        })?;
        let seat = Seat::Group { file, _group: group, domain: Arc::clone(domain) };
        Self::new(candidate.pci, seat, StopClass::empty())
    }

    fn seat_cdev(
        candidate: Candidate,
        cdev: Cdev,
        domain: &Arc<IommufdDomain>,
        together: &[PciAddress],
    ) -> Result<Self> {
        let device = candidate.pci.address().to_string();
        let failed = |source, mend| Error::Device { device: device.clone(), source, mend };
        let cdev = Arc::new(cdev);
        domain.bind(&cdev).map_err(|source| {
            let mend = match source.errno {
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
            failed(source, mend)
        })?;
        domain.attach(&cdev).map_err(|source| failed(source, ""))?;
        let stop = if let Some(other) = candidate.stays(together) {
            log::warn!(
                "{device} shares IOMMU group {} with {other}: detaching it alone stops no DMA, so it is not offered \
                 as a fence",
                candidate.group.id
            );
            StopClass::empty()
        } else {
            StopClass::DETACH
        };
        Self::new(candidate.pci, Seat::Cdev { cdev, domain: Arc::clone(domain) }, stop)
    }

    fn new(pci: PciDevice, seat: Seat, stop: StopClass) -> Result<Self> {
        let device = Self::opened(pci, seat, stop, false)?;
        // It was attached just before.
        device.ats.attached(device.ats_on().ok());
        device.set_master(true)?;
        Ok(device)
    }

    /// The device as it is, with nothing changed; `ats_unused` where an earlier process knew that ATS is off while it is
    /// attached.
    fn opened(pci: PciDevice, seat: Seat, stop: StopClass, ats_unused: bool) -> Result<Self> {
        let name = pci.address().to_string();
        let fail = |source| Error::Device { device: name.clone(), source, mend: "" };
        let info = seat.file().info().map_err(fail)?;
        let config = seat.file().region(CONFIG).map_err(fail)?;
        let migrates = seat.file().can_stop().map_err(fail)?;
        let capabilities = Capabilities::default();
        let (ats, request) = (Ats::new(true, false), hear_requests(&name, seat.file()));
        let mut device = Self { name, pci, stop, config, capabilities, ats, request, seat };
        device.answers()?;
        device.capabilities = device.find_capabilities()?;
        device.ats = Ats::new(device.capabilities.ats.is_some(), ats_unused);
        device.stop.set(StopClass::RESET, info.resets());
        device.stop.set(StopClass::STOP, migrates);
        device.stop.set(StopClass::MASTER, device.capabilities.express.is_some());
        Ok(device)
    }

    /// Vendor and device id, from configuration space.
    pub fn ids(&self) -> Result<(u16, u16)> {
        let [a, b, c, d] = self.read_u32(self.config, 0)?.to_le_bytes();
        Ok((u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d])))
    }

    /// Class code: base class, subclass and programming interface, from configuration space.
    pub fn class(&self) -> Result<u32> {
        Ok(self.read_u32(self.config, 8)? >> 8)
    }

    /// The region with this index, for a driver of this kind of device.
    pub(super) fn region(&self, index: u32) -> Result<Region> {
        self.seat.file().region(index).map_err(|failed| self.failed(failed))
    }

    /// The open device, for a driver of this kind of device.
    pub(super) fn file(&self) -> &DeviceFile {
        self.seat.file()
    }

    /// Reads `bytes` at `at` of a region. All ones are [`Error::Gone`] where the device does not answer, and never taken
    /// for what a register holds.
    pub(super) fn read(&self, region: Region, at: u64, bytes: &mut [u8]) -> Result<()> {
        self.seat.file().read(region, at, bytes).map_err(|f| self.failed(f.without_partial()))?;
        if bytes.iter().all(|byte| *byte == u8::MAX) { self.answers() } else { Ok(()) }
    }

    /// [`Error::Gone`] where the device does not answer.
    fn answers(&self) -> Result<()> {
        let mut command = [0; 4];
        let read = self.seat.file().read(self.config, COMMAND.into(), &mut command);
        read.map_err(|f| self.failed(f.without_partial()))?;
        if is_gone(u32::from_le_bytes(command)) {
            return Err(Error::Gone { device: self.name.clone() });
        }
        Ok(())
    }

    /// Reads the 32-bit register at `at` of a region.
    pub(super) fn read_u32(&self, region: Region, at: u64) -> Result<u32> {
        let mut bytes = [0; 4];
        self.read(region, at, &mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }

    /// Writes the 32-bit register at `at` of a region.
    pub(super) fn write_u32(&self, region: Region, at: u64, value: u32) -> Result<()> {
        let written = self.seat.file().write(region, at, &value.to_le_bytes());
        written.map_err(|f| self.failed(f.without_partial()))
    }

    /// The error that a failed call on this device is.
    pub(super) fn failed(&self, source: Failed) -> Error {
        Error::Device { device: self.name.clone(), source, mend: "" }
    }

    /// Puts the device into its address space, out of whatever state an attach before has left it in.
    fn sit(&self) -> Result<()> {
        let Seat::Cdev { cdev, domain } = &self.seat else { return Ok(()) };
        domain.detach(cdev).map_err(|failed| self.failed(failed))?;
        domain.attach(cdev).map_err(|failed| self.failed(failed))
    }

    /// False where a replace of the domain's that failed has left the device detached.
    pub(super) fn is_attached(&self) -> bool {
        match &self.seat {
            Seat::Cdev { cdev, domain } => domain.is_attached(cdev),
            Seat::Group { .. } => true,
        }
    }

    /// Lets the device issue requests.
    fn run(&self) -> Result<()> {
        if self.stop.has(FenceStep::Stop) {
            self.migration_run()?;
        }
        self.set_master(true)
    }

    /// Takes the device out of its address space where that is possible, else switches bus mastering off.
    fn unseat(&self) -> Result<()> {
        match &self.seat {
            Seat::Cdev { cdev, domain } => domain.detach(cdev).map_err(|failed| self.failed(failed)),
            Seat::Group { .. } => self.set_master(false),
        }
    }

    fn unsupported(&self, step: FenceStep) -> Error {
        let what = match step {
            FenceStep::Drain => "draining its DMA",
            FenceStep::Stop => "stopping it by its migration state",
            FenceStep::Master => "seeing its transactions end",
            FenceStep::Detach => "detaching it from its address space",
            FenceStep::Reset => "resetting it",
        };
        Error::Unsupported { device: self.name.clone(), what }
    }
}

impl Seat {
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

    fn stop_class(&self) -> StopClass {
        self.stop
    }

    fn wanted(&self) -> Option<BorrowedFd<'_>> {
        self.request.as_ref().map(AsFd::as_fd)
    }

    fn nature(&self) -> Nature {
        Nature { ats: self.ats.caches(self.ats_on().ok()), tdi: self.pci.is_bound_tdi() }
    }

    /// After a reset the device cannot issue requests until [`Device::attach`].
    fn fence(&self, step: FenceStep) -> Result<()> {
        match (step, &self.seat) {
            _ if !self.stop.has(step) => Err(self.unsupported(step)),
            (FenceStep::Stop, _) => self.migration_stop(),
            (FenceStep::Master, _) => self.master_off(),
            (FenceStep::Detach, Seat::Cdev { cdev, domain }) => {
                domain.detach(cdev).map_err(|f| self.failed(f))
            }
            (FenceStep::Reset, seat) => {
                seat.file().reset().map_err(|failed| self.failed(failed))?;
                self.set_master(false)
            }
            _ => Err(self.unsupported(step)),
        }
    }

    /// Detaches first: after a failed attach the hardware may be detached although the kernel says otherwise, and
    /// only both together bring it back.
    ///
    /// Where a later step fails the device is stopped again as surely as it can be. That may fail as well, so of a
    /// device whose attach has failed nothing is known.
    fn attach(&self) -> Result<()> {
        self.ats.attaching();
        let brought = self.sit().and_then(|()| self.run());
        match brought {
            Ok(()) => self.ats.attached(self.ats_on().ok()),
            Err(_) => {
                if let Err(error) = self.unseat() {
                    log::warn!("{error}; its attach failed before");
                }
            }
        }
        brought
    }

    fn guard(&self) -> Guard<'_> {
        match &self.seat {
            Seat::Cdev { cdev, .. } => Guard::Cdev(cdev.as_fd()),
            Seat::Group { file, domain, .. } => {
                Guard::Type1 { container: domain.container().as_fd(), device: file.as_fd() }
            }
        }
    }
}

impl Drop for VfioDevice {
    /// Closing the file does all this, unless somebody else keeps the file open too.
    fn drop(&mut self) {
        if let Err(error) = self.unseat() {
            log::warn!("closing: {error}");
        }
    }
}

/// Has the kernel signal an eventfd once it wants the device back. Where it cannot, whoever unbinds the device waits until
/// this process ends.
fn hear_requests(name: &str, file: &DeviceFile) -> Option<OwnedFd> {
    let heard = || {
        if file.irq_info(REQUEST_IRQ)?.count == 0 {
            return Err(Failed::new("VFIO_DEVICE_GET_IRQ_INFO", Errno::NOENT));
        }
        let request = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let request = request.map_err(|errno| Failed::new("eventfd", errno))?;
        file.set_irqs(REQUEST_IRQ, 0, &[Some(request.as_fd())])?;
        Ok(request)
    };
    heard()
        .inspect_err(|failed| log::warn!("{name}: it is not told when the host wants it back: {failed}"))
        .ok()
}
