//! A PCI device in sysfs: address, driver, IOMMU group, cdev. Nothing here writes to sysfs.

use std::fmt;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::config::is_gone;

/// The mount point of sysfs.
pub const SYSFS: &str = "/sys";

/// A PCI address: domain (segment), bus, device, function.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciAddress {
    domain: u32,
    bus: u8,
    device: u8,
    function: u8,
}

/// A text that is not a PCI address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a PCI address: write it as 0000:04:00.0 or 04:00.0, in hexadecimal")]
pub struct NotAnAddress(pub String);

impl FromStr for PciAddress {
    type Err = NotAnAddress;

    /// Parses `DDDD:BB:DD.F`, or `BB:DD.F` in domain 0, in hexadecimal. The domain has 4 to 8 digits (Intel VMD numbers
    /// domains from 0x10000), bus and device have 2, the function has 1.
    fn from_str(text: &str) -> Result<Self, NotAnAddress> {
        parse(text).ok_or_else(|| NotAnAddress(text.to_owned()))
    }
}

fn parse(text: &str) -> Option<PciAddress> {
    let (head, function) = text.split_once('.')?;
    let mut parts = head.split(':').rev();
    let (device, bus) = (parts.next()?, parts.next()?);
    let domain = match parts.next() {
        Some(domain) if (4..=8).contains(&domain.len()) => hex(domain)?,
        Some(_) => return None,
        None => 0,
    };
    let lengths_are_right =
        parts.next().is_none() && bus.len() == 2 && device.len() == 2 && function.len() == 1;
    let (bus, device, function) = (hex(bus)?, hex(device)?, hex(function)?);
    (lengths_are_right && device < 32 && function < 8).then_some(PciAddress {
        domain,
        bus: u8::try_from(bus).ok()?,
        device: u8::try_from(device).ok()?,
        function: u8::try_from(function).ok()?,
    })
}

/// Parses hexadecimal digits. `from_str_radix` alone would accept a sign.
fn hex(digits: &str) -> Option<u32> {
    let is_hex = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_hexdigit());
    is_hex.then(|| u32::from_str_radix(digits, 16).ok()).flatten()
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:02x}:{:02x}.{:x}", self.domain, self.bus, self.device, self.function)
    }
}

/// An IOMMU group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IommuGroup {
    /// Its number, as in `/dev/vfio/N`.
    pub id: u32,
    /// True where VFIO created the group for a device without an IOMMU (no-IOMMU mode): its DMA cannot be blocked.
    pub noiommu: bool,
    /// The addresses of its devices, ascending.
    pub members: Vec<PciAddress>,
}

/// A range of I/O virtual addresses that is reserved in an IOMMU group, both ends included
/// (Documentation/ABI/testing/sysfs-kernel-iommu_groups).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReservedRegion {
    /// Its first address.
    pub start: u64,
    /// Its last address.
    pub last: u64,
    /// Its kind: `direct`, `direct-relaxable`, `reserved`, `msi`.
    pub kind: String,
}

/// A VFIO character device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CdevName {
    /// Its name under `/dev/vfio/devices`.
    pub name: String,
    /// Major and minor number.
    pub number: (u32, u32),
}

/// A PCI device's directory in sysfs.
#[derive(Debug, Clone)]
pub struct PciDevice {
    address: PciAddress,
    dir: PathBuf,
}

impl PciDevice {
    /// Returns the device at `address`, if it exists. `sysfs` is [`SYSFS`], except in tests.
    pub fn find(sysfs: &Path, address: PciAddress) -> Option<Self> {
        let dir = sysfs.join("bus/pci/devices").join(address.to_string());
        dir.is_dir().then_some(Self { address, dir })
    }

    /// Returns its address.
    pub fn address(&self) -> PciAddress {
        self.address
    }

    /// Returns its directory in sysfs.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Returns the name of the driver that it is bound to.
    pub fn driver(&self) -> Option<String> {
        link_name(&self.dir.join("driver"))
    }

    /// Returns its vendor id and device id.
    pub fn ids(&self) -> Option<(u16, u16)> {
        let id = |name| u16::try_from(self.number(name)?).ok();
        Some((id("vendor")?, id("device")?))
    }

    /// Returns its class code: class, subclass and programming interface, as in 0x010802 for NVMe.
    pub fn class(&self) -> Option<u32> {
        self.number("class")
    }

    /// Returns true where it is a bridge (class 06h), which does no DMA of its own.
    pub fn is_bridge(&self) -> bool {
        self.class().is_some_and(|class| class >> 16 == 0x06)
    }

    /// Returns true where it is a TDISP interface (TDI) that has left CONFIG_UNLOCKED: `tsm/bound` then has the name of the
    /// platform's TSM (Documentation/ABI/testing/sysfs-bus-pci). False where the kernel has no such file, true where it
    /// cannot be read.
    pub fn is_bound_tdi(&self) -> bool {
        text(&self.dir.join("tsm/bound")).is_none_or(|name| !name.trim().is_empty())
    }

    /// Returns its IOMMU group; none where it has no group, or the group's devices cannot be listed.
    pub fn group(&self) -> Option<IommuGroup> {
        let dir = self.dir.join("iommu_group");
        let id = link_name(&dir)?.parse().ok()?;
        let noiommu = text(&dir.join("name")).is_none_or(|name| name.trim() == "vfio-noiommu");
        let entries = fs::read_dir(dir.join("devices")).ok()?;
        let names = entries.map(|entry| Some(entry.ok()?.file_name())).collect::<Option<Vec<_>>>()?;
        let mut members: Vec<PciAddress> =
            names.iter().filter_map(|name| name.to_str()?.parse().ok()).collect();
        members.sort();
        // A list without this device is not the list of its group, so it cannot show which other devices are in the group.
        members.contains(&self.address).then_some(IommuGroup { id, noiommu, members })
    }

    /// Returns the reserved regions of its IOMMU group; an empty list where it has no group.
    pub fn reserved_regions(&self) -> Vec<ReservedRegion> {
        let text = fs::read_to_string(self.dir.join("iommu_group/reserved_regions")).unwrap_or_default();
        let address = |text: &str| u64::from_str_radix(text.strip_prefix("0x")?, 16).ok();
        let region = |line: &str| {
            let mut words = line.split_whitespace();
            let (start, last) = (address(words.next()?)?, address(words.next()?)?);
            Some(ReservedRegion { start, last, kind: words.next()?.to_owned() })
        };
        text.lines().filter_map(region).collect()
    }

    /// Returns true where the device does not respond: its configuration space reads as all ones ([`is_gone`]). False where
    /// that cannot be read.
    pub fn is_gone(&self) -> bool {
        let mut head = [0; 8];
        let mut config = fs::File::open(self.dir.join("config"));
        let read = config.as_mut().is_ok_and(|config| config.read_exact(&mut head).is_ok());
        let [_, _, _, _, word @ ..] = head;
        read && is_gone(u32::from_le_bytes(word))
    }

    /// Returns its physical function, if it is a virtual function.
    pub fn physical_function(&self) -> Option<PciAddress> {
        link_name(&self.dir.join("physfn"))?.parse().ok()
    }

    /// Returns its VFIO character device; none where it is not bound to VFIO or the kernel has no such devices. Such a kernel
    /// has the directory, but no device number in it.
    pub fn cdev(&self) -> Option<CdevName> {
        let entry = fs::read_dir(self.dir.join("vfio-dev")).ok()?.flatten().next()?;
        let number = fs::read_to_string(entry.path().join("dev")).ok()?;
        let (major, minor) = number.trim().split_once(':')?;
        Some(CdevName {
            name: entry.file_name().into_string().ok()?,
            number: (major.parse().ok()?, minor.parse().ok()?),
        })
    }

    /// Returns the hexadecimal number in the file `name`.
    fn number(&self, name: &str) -> Option<u32> {
        let text = fs::read_to_string(self.dir.join(name)).ok()?;
        hex(text.trim().strip_prefix("0x")?)
    }
}

/// Returns the contents of the file at `path`: empty where it does not exist, none where it cannot be read.
fn text(path: &Path) -> Option<String> {
    match fs::read_to_string(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Some(String::new()),
        read => read.ok(),
    }
}

/// Returns the last component of the target of the link at `path`.
fn link_name(path: &Path) -> Option<String> {
    Some(fs::read_link(path).ok()?.file_name()?.to_str()?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pci_address_is_parsed_strictly_and_printed_in_full() {
        for (text, full) in [
            ("0000:04:00.0", "0000:04:00.0"),
            ("04:00.0", "0000:04:00.0"),
            ("FFFF:ff:1F.7", "ffff:ff:1f.7"),
            ("10000:e1:00.0", "10000:e1:00.0"),
        ] {
            assert_eq!(text.parse::<PciAddress>().unwrap().to_string(), full);
        }
        for text in [
            "",
            "0",
            "04:00",
            "04.0",
            "4:00.0",
            "04:0.0",
            "04:00.00",
            "04:00.8",
            "04:20.0",
            "000:04:00.0",
            "0000:04:00.0 ",
            " 04:00.0",
            "0000:04:00.0.0",
            "00:0000:04:00.0",
            "+000:04:00.0",
            "0000:+4:00.0",
            "0000:04:00.-",
            "../04:00.0",
            "0000:04:00.0/..",
            "123456789:04:00.0",
            "g000:04:00.0",
            "soft:0",
        ] {
            let error = text.parse::<PciAddress>().unwrap_err().to_string();
            assert!(error.contains("is not a PCI address: write it as 0000:04:00.0"), "{text}: {error}");
        }
    }

    #[test]
    fn absent_device_is_not_found() {
        assert!(PciDevice::find(Path::new("/nowhere"), "04:00.0".parse().unwrap()).is_none());
    }

    #[test]
    fn properties_are_read_from_sysfs() {
        let sysfs = tempfile::tempdir().unwrap();
        let group = sysfs.path().join("kernel/iommu_groups/7/devices");
        fs::create_dir_all(&group).unwrap();
        for name in ["0000:04:00.1", "0000:04:00.0"] {
            fs::create_dir(group.join(name)).unwrap();
        }
        let dir = sysfs.path().join("bus/pci/devices/0000:04:00.0");
        fs::create_dir_all(dir.join("vfio-dev/vfio3")).unwrap();
        fs::write(dir.join("vendor"), "0x1234\n").unwrap();
        fs::write(dir.join("device"), "0x11e8\n").unwrap();
        fs::write(dir.join("class"), "0x00ff00\n").unwrap();
        std::os::unix::fs::symlink(sysfs.path().join("kernel/iommu_groups/7"), dir.join("iommu_group"))
            .unwrap();
        std::os::unix::fs::symlink("../../../bus/pci/drivers/vfio-pci", dir.join("driver")).unwrap();

        let device = PciDevice::find(sysfs.path(), "04:00.0".parse().unwrap()).unwrap();
        assert_eq!(device.driver().as_deref(), Some("vfio-pci"));
        assert_eq!(device.ids(), Some((0x1234, 0x11e8)));
        assert_eq!(device.cdev(), None, "a kernel without VFIO character devices");
        fs::write(dir.join("vfio-dev/vfio3/dev"), "511:3\n").unwrap();
        assert_eq!(device.cdev(), Some(CdevName { name: "vfio3".to_owned(), number: (511, 3) }));
        assert!(!device.is_bridge());
        assert_eq!(device.class(), Some(0xff00));
        let members = vec!["04:00.0".parse().unwrap(), "04:00.1".parse().unwrap()];
        assert_eq!(device.group(), Some(IommuGroup { id: 7, noiommu: false, members }));
        fs::remove_dir(group.join("0000:04:00.0")).unwrap();
        assert_eq!(device.group(), None, "a list without the device is not the list of its group");
        fs::remove_dir_all(&group).unwrap();
        assert_eq!(device.group(), None, "a group that cannot be listed may have other devices");
        fs::create_dir_all(group.join("0000:04:00.0")).unwrap();
        fs::create_dir(sysfs.path().join("kernel/iommu_groups/7/name")).unwrap();
        assert!(device.group().unwrap().noiommu, "a name that cannot be read may be vfio-noiommu");
        assert_eq!((device.reserved_regions(), device.physical_function()), (vec![], None));
        assert!(!device.is_gone(), "it cannot be read");
        for (bytes, gone) in [([0xff; 64], true), ([0x10; 64], false)] {
            fs::write(dir.join("config"), bytes).unwrap();
            assert_eq!(device.is_gone(), gone);
        }
        let regions =
            "0x00000000bf000000 0x00000000bfffffff direct\n0x00000000fee00000 0x00000000feefffff msi\n";
        fs::write(sysfs.path().join("kernel/iommu_groups/7/reserved_regions"), regions).unwrap();
        std::os::unix::fs::symlink("../0000:03:00.0", dir.join("physfn")).unwrap();
        let region = |start, last, kind: &str| ReservedRegion { start, last, kind: kind.to_owned() };
        let both = [region(0xbf00_0000, 0xbfff_ffff, "direct"), region(0xfee0_0000, 0xfeef_ffff, "msi")];
        assert_eq!(device.reserved_regions(), both);
        assert_eq!(device.physical_function(), "03:00.0".parse().ok());
    }

    #[test]
    fn tdi_is_bound_where_its_tsm_is_named() {
        let sysfs = tempfile::tempdir().unwrap();
        let dir = sysfs.path().join("bus/pci/devices/0000:04:00.0");
        fs::create_dir_all(dir.join("tsm")).unwrap();
        let device = PciDevice::find(sysfs.path(), "04:00.0".parse().unwrap()).unwrap();
        assert!(!device.is_bound_tdi(), "connected at most");
        fs::write(dir.join("tsm/bound"), "\n").unwrap();
        assert!(!device.is_bound_tdi(), "unlocked");
        fs::write(dir.join("tsm/bound"), "tsm0\n").unwrap();
        assert!(device.is_bound_tdi());
        fs::remove_file(dir.join("tsm/bound")).unwrap();
        fs::create_dir(dir.join("tsm/bound")).unwrap();
        assert!(device.is_bound_tdi(), "a state that cannot be read counts as bound");
    }
}
