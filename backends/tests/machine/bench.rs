//! What a trial works with: the machine's devices, pages with a pattern in them, and ways to look.

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

/// Where the trials map: some free IOVA.
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

    /// A fresh domain with these devices, even where nothing stops them for certain.
    pub fn assign(&self, devices: &[&String]) -> Result<Assignment, Failed> {
        let names: Vec<String> = devices.iter().map(|&name| name.clone()).collect();
        Ok(assign(
            self.kind,
            &names,
            Accept { unstoppable: true, scratch: true, ..Accept::default() },
            self.tables,
        )?)
    }

    /// The device itself, without a driver of its kind, in a fresh domain where `together` will be too.
    pub fn raw(&self, name: &str, together: &[PciAddress]) -> Result<VfioDevice, Failed> {
        if self.kind == Kind::Iommufd {
            return Ok(VfioDevice::open_cdev(name, &IommufdDomain::open(self.tables)?, together)?);
        }
        let found = candidate(Path::new(SYSFS), name)?;
        let domain = Type1Domain::open(found.pci.address(), &found.group)?;
        Ok(VfioDevice::open_group(name, &domain)?)
    }

    /// A fresh domain with the first engine, which cuts no mapping.
    pub fn whole(&self) -> Result<Engine, Failed> {
        let tables = if self.tables == Tables::Small { Tables::Large } else { self.tables };
        Self::new(self.kind, tables)?.engine()
    }

    /// A fresh domain with the first engine.
    pub fn engine(&self) -> Result<Engine, Failed> {
        let Assignment { domain, mut devices, .. } = self.assign(&[&self.edu[0]])?;
        Ok(Engine { device: devices.remove(0), domain })
    }
}

impl Engine {
    /// Maps `pages` of `file` from its start at page `page` after BASE, in one piece, writable.
    pub fn map(&self, page: u64, pages: u64, file: &Arc<GuestFile>) -> Result<(), Failed> {
        Ok(self.domain.map(range(page, pages), pages * PAGE, file, Offset(0), true)?)
    }

    pub fn unmap(&self, page: u64, pages: u64) -> Unmap {
        self.domain.unmap(range(page, pages))
    }

    /// What the device sees at page `page` after BASE.
    pub fn sees(&self, page: u64, len: usize) -> Result<Vec<u8>, Failed> {
        Ok(self.device.dma_read(at(page), len)?)
    }

    /// Whether DMA between the device and page `page` after BASE, which is page 0 of `file`, goes both ways.
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

/// A memfd of `pages` pages.
pub fn memfd(pages: u64) -> Result<Arc<GuestFile>, Failed> {
    Ok(Arc::new(GuestFile::memfd("machine", pages * PAGE)?))
}

/// A guest_memfd of `pages` pages that the host may map.
pub fn guest_memfd(pages: u64) -> Result<Arc<GuestFile>, Failed> {
    let (_vm, file) = guest_memfd::shared(pages * PAGE)?;
    Ok(Arc::new(file))
}

/// `len` bytes unlike any before, none of them 0 or a common poison.
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

/// Fails the trial with both values where they differ.
pub fn same<T: PartialEq + std::fmt::Debug>(what: &str, is: T, should: T) -> Result<(), Failed> {
    if is == should { Ok(()) } else { Err(format!("{what}: {is:x?}, not {should:x?}").into()) }
}

/// Fails the trial where `held` is false.
pub fn check(what: &str, held: bool) -> Result<(), Failed> {
    if held { Ok(()) } else { Err(what.into()) }
}
