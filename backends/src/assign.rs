//! Opens the domain and the devices of one VM by the devices' names: selects the backend and the drivers.

use std::path::Path;
use std::sync::Arc;

use passgate_bindings::vfio::PciAddress;
use passgate_bindings::vfio::pci::{PciDevice, SYSFS};

use crate::device::nvme::{self, DriveOptions};
use crate::device::refusal::candidate;
use crate::device::vfio::VfioDevice;
use crate::drivers::Drivers;
use crate::iommu::iommufd::{IommufdDomain, Tables};
use crate::iommu::soft::SoftDomain;
use crate::iommu::type1::Type1Domain;
use crate::{Device, Domain, Error, Result};

/// A backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Kind {
    /// iommufd if this kernel has it and a cdev for each device, else type1; soft if no PCI device is named.
    #[default]
    Auto,
    /// One IOAS of an iommufd.
    Iommufd,
    /// A VFIO container with the type1 IOMMU driver.
    Type1,
    /// Registered buffers of an io_uring, with software devices.
    Soft,
}

/// A domain with its devices attached. Each device has a reference to the domain, so they may be dropped in any order.
#[derive(Debug)]
pub struct Assignment {
    /// The domain.
    pub domain: Arc<dyn Domain>,
    /// The devices, in the order of their names.
    pub devices: Vec<Arc<dyn Device>>,
    /// The devices that are served as block devices ([`Accept::drive`]); each of them is in `devices` too.
    pub drives: Vec<Arc<nvme::Drive>>,
}

/// The use of the devices, and the risks that the operator has accepted for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Accept {
    /// Devices without a fence that reliably stops them. They are refused otherwise ([`Error::Unstoppable`]).
    pub unstoppable: bool,
    /// Set to serve drives as block devices (vhost-user-blk), by the driver of this crate.
    pub drive: Option<DriveOptions>,
}

/// Opens a domain of this kind and attaches the devices with these names (PCI addresses, or `soft:N`). `tables` applies
/// to iommufd only. Devices that `drivers` support, except served drives, get their driver. A device that was attached
/// before an error is closed again.
pub fn assign(
    kind: Kind,
    devices: &[String],
    accept: Accept,
    drivers: &dyn Drivers,
    tables: Tables,
) -> Result<Assignment> {
    match choose(kind, devices, Path::new(SYSFS), Path::new("/dev/iommu").exists())? {
        Choice::Soft(names) => {
            let domain = SoftDomain::open()?;
            let devices = names
                .iter()
                .map(|name| Ok(domain.device(name)? as Arc<dyn Device>))
                .collect::<Result<_>>()?;
            Ok(Assignment { domain, devices, drives: Vec::new() })
        }
        Choice::Iommufd(names) => {
            let domain = IommufdDomain::open(tables)?;
            let together: Vec<PciAddress> = names.iter().filter_map(|name| name.parse().ok()).collect();
            let mut drives = Vec::new();
            let devices = names
                .iter()
                .map(|name| {
                    let opened = VfioDevice::open_cdev(name, &domain, &together)?;
                    let device = start_driver(opened, domain.clone(), accept, drivers, &mut drives)?;
                    stoppable(device, accept, || why_not_detached(name, &together))
                })
                .collect::<Result<_>>()?;
            Ok(Assignment { domain, devices, drives })
        }
        Choice::Type1(names) => {
            let first = names.first().ok_or_else(|| Error::Host {
                what: "a type1 domain needs a device: an empty container maps nothing".to_owned(),
                remedy: "name one with --device, or use --iommu iommufd or soft",
            })?;
            let candidate = candidate(Path::new(SYSFS), first)?;
            let domain = Type1Domain::open(candidate.pci.address(), &candidate.group)?;
            let mut drives = Vec::new();
            let devices = names
                .iter()
                .map(|name| {
                    let opened = VfioDevice::open_group(name, &domain)?;
                    let device = start_driver(opened, domain.clone(), accept, drivers, &mut drives)?;
                    stoppable(device, accept, || Ok(TYPE1_DETACHES_NOTHING.to_owned()))
                })
                .collect::<Result<_>>()?;
            Ok(Assignment { domain, devices, drives })
        }
    }
}

/// The reason for which no device on type1 can be detached, with the remedy.
pub const TYPE1_DETACHES_NOTHING: &str =
    "type1 detaches nothing: use --iommu iommufd (Linux 6.6, CONFIG_VFIO_DEVICE_CDEV)";

/// Returns the device if it has a reliable fence or `accept` permits one without; `why` gives the reason for which it
/// cannot be detached.
fn stoppable(
    device: Arc<dyn Device>,
    accept: Accept,
    why: impl FnOnce() -> Result<String>,
) -> Result<Arc<dyn Device>> {
    if !device.stop_class().is_empty() {
        return Ok(device);
    }
    if !accept.unstoppable {
        return Err(Error::Unstoppable { device: device.name().to_owned(), why: why()? });
    }
    log::warn!(
        "{} cannot be stopped for certain, which --allow-unstoppable accepts: while its DMA does not end, \
         conversions are refused",
        device.name()
    );
    Ok(device)
}

/// Returns the reason for which a device that is assigned with the devices `together` cannot be detached, or an empty
/// text.
fn why_not_detached(name: &str, together: &[PciAddress]) -> Result<String> {
    let found = candidate(Path::new(SYSFS), name)?;
    Ok(found.first_outside(together).map(shares_its_group).unwrap_or_default())
}

/// Returns the reason for which a device cannot be detached whose IOMMU group includes `other`, which is not assigned
/// with it.
pub fn shares_its_group(other: PciAddress) -> String {
    format!("{other} shares its IOMMU group, so that detaching it proves nothing: serve {other} with it")
}

/// Returns true if the device is a drive that is served as a block device.
fn is_served_drive(device: &VfioDevice, accept: Accept) -> Result<bool> {
    Ok(accept.drive.is_some() && device.class()? == nvme::CLASS)
}

/// Returns true if a driver is started for the device: this crate's, or one of `drivers`.
pub(crate) fn has_driver(device: &VfioDevice, accept: Accept, drivers: &dyn Drivers) -> Result<bool> {
    Ok(is_served_drive(device, accept)? || drivers.supports(device)?)
}

/// Starts the device's driver, or returns the device itself if there is none. A drive that is served as a block device
/// is added to `drives` too.
pub(crate) fn start_driver(
    device: VfioDevice,
    domain: Arc<dyn Domain>,
    accept: Accept,
    drivers: &dyn Drivers,
    drives: &mut Vec<Arc<nvme::Drive>>,
) -> Result<Arc<dyn Device>> {
    if let Some(options) = accept.drive
        && is_served_drive(&device, accept)?
    {
        let drive = nvme::serve(device, &domain, options)?;
        drives.push(Arc::clone(&drive));
        return Ok(drive);
    }
    if drivers.supports(&device)? {
        return drivers.start(device, domain);
    }
    Ok(Arc::new(device))
}

/// A selected backend and the full names of its devices.
#[derive(Debug, PartialEq, Eq)]
enum Choice {
    Soft(Vec<String>),
    Iommufd(Vec<String>),
    Type1(Vec<String>),
}

/// Selects the backend for these devices and checks their names; `iommufd` is true if the kernel has iommufd.
fn choose(kind: Kind, devices: &[String], sysfs: &Path, iommufd: bool) -> Result<Choice> {
    let (mut soft, mut real) = (Vec::new(), Vec::new());
    for name in devices {
        match name.strip_prefix("soft:") {
            Some(number) if number.parse::<u32>().is_ok() => soft.push(name.clone()),
            Some(_) => {
                return Err(Error::Host {
                    what: format!("`{name}` names no software device"),
                    remedy: "write soft:0, soft:1, …",
                });
            }
            None => real.push(name.parse::<PciAddress>().map_err(|error| Error::Host {
                what: format!("`{}` names no device", error.0),
                remedy: "write a PCI address as 0000:04:00.0 or 04:00.0, or a software device as soft:0",
            })?),
        }
    }
    if let (Some(soft), Some(real)) = (soft.first(), real.first()) {
        return Err(Error::Host {
            what: format!("{soft} and {real} cannot be in one domain"),
            remedy: "serve software devices and real ones separately",
        });
    }
    let names: Vec<_> = real.iter().map(PciAddress::to_string).collect();
    for (n, name) in soft.iter().chain(&names).enumerate() {
        if soft.iter().chain(&names).take(n).any(|before| before == name) {
            return Err(Error::Host { what: format!("{name} is named twice"), remedy: "name it once" });
        }
    }
    let has_cdev =
        |address: &PciAddress| PciDevice::find(sysfs, *address).is_some_and(|device| device.cdev().is_some());
    match kind {
        Kind::Auto if names.is_empty() => Ok(Choice::Soft(soft)),
        Kind::Auto if iommufd && real.iter().all(has_cdev) => Ok(Choice::Iommufd(names)),
        Kind::Auto => Ok(Choice::Type1(names)),
        Kind::Soft => match names.first() {
            None => Ok(Choice::Soft(soft)),
            Some(real) => Err(Error::Host {
                what: format!("{real} cannot be in a soft domain"),
                remedy: "use --iommu auto, or name soft:0",
            }),
        },
        Kind::Iommufd | Kind::Type1 => match soft.first() {
            Some(soft) => Err(Error::Host {
                what: format!("{soft} can be in a soft domain only"),
                remedy: "use --iommu soft, or name a PCI device",
            }),
            None if kind == Kind::Iommufd => Ok(Choice::Iommufd(names)),
            None => Ok(Choice::Type1(names)),
        },
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::device::Guard;
    use crate::{NoDrivers, Step, Steps};

    /// A device with these fences.
    #[derive(Debug)]
    struct Fences(Steps);

    impl Device for Fences {
        fn name(&self) -> &str {
            "fences:0"
        }
        fn stop_class(&self) -> Steps {
            self.0
        }
        fn fence(&self, _: Step) -> Result<()> {
            Ok(())
        }
        fn attach(&self) -> Result<()> {
            Ok(())
        }
        fn guard(&self) -> Guard<'_> {
            Guard::None
        }
    }

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|&name| name.to_owned()).collect()
    }

    #[test]
    fn auto_selects_the_backend_that_host_and_names_allow() {
        let sysfs = tempfile::tempdir().unwrap();
        let cdev = sysfs.path().join("bus/pci/devices/0000:04:00.0/vfio-dev/vfio0");
        fs::create_dir_all(&cdev).unwrap();
        fs::write(cdev.join("dev"), "511:0").unwrap();
        let auto =
            |devices: &[&str], iommufd| choose(Kind::Auto, &names(devices), sysfs.path(), iommufd).unwrap();

        assert_eq!(auto(&[], true), Choice::Soft(vec![]));
        assert_eq!(auto(&["soft:0", "soft:1"], true), Choice::Soft(names(&["soft:0", "soft:1"])));
        assert_eq!(auto(&["04:00.0"], true), Choice::Iommufd(names(&["0000:04:00.0"])));
        assert_eq!(auto(&["04:00.0"], false), Choice::Type1(names(&["0000:04:00.0"])));
        let both = names(&["0000:04:00.0", "0000:05:00.0"]);
        assert_eq!(auto(&["04:00.0", "05:00.0"], true), Choice::Type1(both), "the second has no cdev");
    }

    #[test]
    fn conflicting_device_names_are_refused_in_one_line() {
        for (kind, devices, says) in [
            (Kind::Auto, &["soft:0", "04:00.0"][..], "soft:0 and 0000:04:00.0 cannot be in one domain"),
            (Kind::Auto, &["04:00.0", "0000:04:00.0"], "0000:04:00.0 is named twice"),
            (Kind::Auto, &["soft:1", "soft:1"], "soft:1 is named twice"),
            (Kind::Auto, &["soft:"], "`soft:` names no software device"),
            (Kind::Auto, &["4:0.0"], "`4:0.0` names no device: write a PCI address as 0000:04:00.0"),
            (Kind::Soft, &["04:00.0"], "0000:04:00.0 cannot be in a soft domain"),
            (Kind::Type1, &["soft:0"], "soft:0 can be in a soft domain only"),
        ] {
            let error = choose(kind, &names(devices), Path::new("/nowhere"), true).unwrap_err().to_string();
            assert!(error.contains(says) && error.contains(": ") && !error.contains('\n'), "{error}");
        }
    }

    #[test]
    fn software_devices_are_opened_by_their_names() {
        let soft = match assign(
            Kind::Auto,
            &names(&["soft:0", "soft:7"]),
            Accept::default(),
            &NoDrivers,
            Tables::default(),
        ) {
            Err(Error::Ring(_)) => return, // no io_uring here, which the tests of the soft domain report
            other => other.unwrap(),
        };
        assert_eq!(soft.domain.name(), "soft");
        let found: Vec<_> = soft.devices.iter().map(|device| device.name()).collect();
        assert_eq!(found, ["soft:0", "soft:7"]);
        assert_eq!(
            assign(Kind::Soft, &[], Accept::default(), &NoDrivers, Tables::default()).unwrap().devices.len(),
            0
        );
    }

    #[test]
    fn unstoppable_device_is_refused_unless_accepted() {
        let device = |class| Arc::new(Fences(class)) as Arc<dyn Device>;
        let none = device(Steps::empty());
        let why = || Ok(shares_its_group("04:00.1".parse().unwrap()));
        let error = stoppable(none.clone(), Accept::default(), why).unwrap_err().to_string();
        assert!(error.starts_with("fences:0 cannot be stopped for certain"), "{error}");
        assert!(
            error.contains("serve 0000:04:00.1 with it; or accept that (serve --allow-unstoppable)"),
            "{error}"
        );
        assert!(!error.contains('\n'), "{error}");
        let unused = || -> Result<String> { panic!("the reason is not needed") };
        assert!(stoppable(none, Accept { unstoppable: true, ..Accept::default() }, unused).is_ok());
        for class in [Steps::DRAIN, Steps::STOP, Steps::MASTER, Steps::DETACH, Steps::RESET] {
            assert!(stoppable(device(class), Accept::default(), unused).is_ok(), "{class:?}");
        }
    }

    #[test]
    fn type1_domain_without_a_device_is_refused() {
        let error = assign(Kind::Type1, &[], Accept::default(), &NoDrivers, Tables::default())
            .unwrap_err()
            .to_string();
        assert!(error.contains("needs a device"), "{error}");
    }

    #[test]
    fn missing_device_is_refused_by_every_backend() {
        for kind in [Kind::Auto, Kind::Type1] {
            let error =
                assign(kind, &names(&["ffff:ff:1f.7"]), Accept::default(), &NoDrivers, Tables::default())
                    .unwrap_err()
                    .to_string();
            assert!(error.contains("ffff:ff:1f.7: there is no such PCI device"), "{error}");
        }
    }
}
