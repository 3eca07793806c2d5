//! The fixture of a trial: the machine's devices, pages with a pattern, and checks.

use std::path::Path;
use std::sync::Arc;

use libtest_mimic::Failed;
use passgate_backends::device::refusal::candidate;
use passgate_backends::device::vfio::VfioDevice;
use passgate_backends::iommu::iommufd::IommufdDomain;
use passgate_backends::iommu::type1::Type1Domain;
use passgate_backends::{Accept, Assignment, Device, Domain, Kind, Tables, Unmap, assign};
use passgate_bindings::memory::GuestFile;
use passgate_bindings::units::Offset;
use passgate_bindings::vfio::PciAddress;
use passgate_bindings::vfio::pci::SYSFS;
use passgate_bindings::{Iova, PAGE, PageRange, guest_memfd};
use passgate_exercise::Drivers;

/// The first IOVA at which the trials map.
pub const BASE: u64 = 0x4000_0000;

/// The machine, for one kind of domain.
pub struct Bench {
    pub kind: Kind,
    pub tables: Tables,
    pub edu: Vec<String>,
    pub nvme: String,
    pub igb: String,
}

/// A domain with one edu engine in it.
pub struct Engine {
    pub device: Arc<dyn Device>,
    pub domain: Arc<dyn Domain>,
}

impl Bench {
    pub fn new(kind: Kind, tables: Tables) -> Result<Self, Failed> {
        let devices = |variable: &str| -> Result<Vec<String>, Failed> {
            let names = std::env::var(variable).map_err(|_| format!("{variable} is not set"))?;
            Ok(names.split_whitespace().map(str::to_owned).collect())
        };
        let only = |variable| devices(variable)?.pop().ok_or(Failed::from(format!("{variable} is empty")));
        Ok(Self {
            kind,
            tables,
            edu: devices("PASSGATE_EDU")?,
            nvme: only("PASSGATE_NVME")?,
            igb: only("PASSGATE_IGB")?,
        })
    }

    /// Makes a domain with these devices, including devices that cannot be stopped reliably.
    pub fn assign(&self, devices: &[&String]) -> Result<Assignment, Failed> {
        let names: Vec<String> = devices.iter().map(|&name| name.clone()).collect();
        Ok(assign(
            self.kind,
            &names,
            Accept { unstoppable: true, ..Accept::default() },
            &Drivers { scratch: true },
            self.tables,
        )?)
    }

    /// Opens a device without its driver, in a new domain in which the devices `together` will be too.
    pub fn raw(&self, name: &str, together: &[PciAddress]) -> Result<VfioDevice, Failed> {
        if self.kind == Kind::Iommufd {
            return Ok(VfioDevice::open_cdev(name, &IommufdDomain::open(self.tables)?, together)?);
        }
        let found = candidate(Path::new(SYSFS), name)?;
        let domain = Type1Domain::open(found.pci.address(), &found.group)?;
        Ok(VfioDevice::open_group(name, &domain)?)
    }

    /// Makes a domain with the first engine that does not cut mappings.
    pub fn whole(&self) -> Result<Engine, Failed> {
        let tables = if self.tables == Tables::Small { Tables::Large } else { self.tables };
        Self::new(self.kind, tables)?.engine()
    }

    /// Makes a domain with the first engine.
    pub fn engine(&self) -> Result<Engine, Failed> {
        let Assignment { domain, mut devices, .. } = self.assign(&[&self.edu[0]])?;
        Ok(Engine { device: devices.remove(0), domain })
    }
}

impl Engine {
    /// Maps the first `pages` pages of `file` at page `page` after BASE, as one writable mapping.
    pub fn map(&self, page: u64, pages: u64, file: &Arc<GuestFile>) -> Result<(), Failed> {
        Ok(self.domain.map(range(page, pages), pages * PAGE, file, Offset(0), true)?)
    }

    pub fn unmap(&self, page: u64, pages: u64) -> Unmap {
        self.domain.unmap(range(page, pages))
    }

    /// Returns the bytes that the device reads at page `page` after BASE.
    pub fn sees(&self, page: u64, len: usize) -> Result<Vec<u8>, Failed> {
        Ok(self.device.dma_read(at(page), len)?)
    }

    /// Returns true if DMA to and from page `page` after BASE reaches page 0 of `file`. An error if only one direction
    /// does.
    pub fn reaches(&self, page: u64, file: &GuestFile) -> Result<bool, Failed> {
        let (here, there) = (fresh(64), fresh(64));
        file.write(0, &here)?;
        let seen = self.sees(page, 64)? == here;
        self.device.dma_write(at(page), &there)?;
        let written = bytes(file, 0, 64)? == there;
        if seen != written {
            return Err(format!("a read {seen}, but a write {written}").into());
        }
        Ok(seen)
    }
}

pub fn range(page: u64, pages: u64) -> PageRange<Iova> {
    PageRange::new(BASE + page * PAGE, pages * PAGE).expect("a small number of pages")
}

pub fn at(page: u64) -> Iova {
    Iova(BASE + page * PAGE)
}

/// Makes a memfd of `pages` pages.
pub fn memfd(pages: u64) -> Result<Arc<GuestFile>, Failed> {
    Ok(Arc::new(GuestFile::memfd("machine", pages * PAGE)?))
}

/// Makes a guest_memfd of `pages` pages that the host may map.
pub fn guest_memfd(pages: u64) -> Result<Arc<GuestFile>, Failed> {
    let (_vm, file) = guest_memfd::shared(pages * PAGE)?;
    Ok(Arc::new(file))
}

/// Returns `len` bytes that differ from those of earlier calls, all from 1 to 120 (so none is a usual poison value).
pub fn fresh(len: usize) -> Vec<u8> {
    use std::sync::atomic::{AtomicU8, Ordering};
    static SALT: AtomicU8 = AtomicU8::new(1);
    let salt = usize::from(SALT.fetch_add(7, Ordering::Relaxed));
    (0..len).map(|i| 1 + ((i * 31 + i / 256 + salt * 17) % 120) as u8).collect()
}

pub fn bytes(file: &GuestFile, offset: u64, len: usize) -> Result<Vec<u8>, Failed> {
    let mut bytes = vec![0; len];
    file.read(offset, &mut bytes)?;
    Ok(bytes)
}

/// Fails the trial, with both values, if they differ.
pub fn same<T: PartialEq + std::fmt::Debug>(what: &str, is: T, should: T) -> Result<(), Failed> {
    if is == should { Ok(()) } else { Err(format!("{what}: {is:x?}, not {should:x?}").into()) }
}

/// Fails the trial if `condition` is false.
pub fn check(what: &str, condition: bool) -> Result<(), Failed> {
    if condition { Ok(()) } else { Err(what.into()) }
}
