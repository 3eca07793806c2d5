//! The checks of a device in sysfs, before any file is opened, and the reasons for which a device is refused.
//!
//! Refused are devices whose DMA nothing can block (no IOMMU, VFIO's no-IOMMU mode), devices that VFIO refuses in any
//! case or without a secret (VF token), devices that are bound to a host driver, and devices in a group with another
//! device that is bound to a host driver.

use std::path::Path;

use passgate_bindings::vfio::PciAddress;
use passgate_bindings::vfio::pci::{IommuGroup, PciDevice};

use crate::{Error, Result};

/// A device that may be opened.
#[derive(Debug)]
pub struct Candidate {
    /// Its directory in sysfs.
    pub pci: PciDevice,
    /// Its IOMMU group.
    pub group: IommuGroup,
    /// The other devices of its group, except bridges: they share its address space.
    pub companions: Vec<PciAddress>,
}

impl Candidate {
    /// Returns the first device of its group that is not among `together`. If there is one, a detach is no proof: the
    /// kernel moves a group to the blocking domain only when its last device is detached.
    pub fn first_outside(&self, together: &[PciAddress]) -> Option<PciAddress> {
        self.companions.iter().copied().find(|other| !together.contains(other))
    }
}

/// Checks the device called `name`. `sysfs` is [`SYSFS`](passgate_bindings::vfio::pci::SYSFS) except in tests.
pub fn candidate(sysfs: &Path, name: &str) -> Result<Candidate> {
    let address: PciAddress = name.parse().map_err(|_| Error::Host {
        what: format!("`{name}` is not a PCI address"),
        remedy: "write it as 0000:04:00.0 or 04:00.0, in hexadecimal",
    })?;
    let pci = PciDevice::find(sysfs, address).ok_or_else(|| Error::Host {
        what: format!("{address}: there is no such PCI device"),
        remedy: "`lspci -D` lists those that there are",
    })?;
    let group = pci.group().ok_or_else(|| Error::Host {
        what: format!("{address} has no IOMMU group: no IOMMU stands between it and memory"),
        remedy: "switch the IOMMU on in the firmware and the kernel (intel_iommu=on, amd_iommu=on)",
    })?;
    if group.noiommu || pci.cdev().is_some_and(|cdev| cdev.name.starts_with("noiommu-")) {
        return Err(Error::Host {
            what: format!("{address} is in VFIO's no-IOMMU mode: nothing can block its DMA"),
            remedy: "switch the IOMMU on and enable_unsafe_noiommu_mode off; passgate refuses such a device",
        });
    }
    let driver = pci.driver();
    if pci.is_bridge() {
        return Err(Error::Host {
            what: format!("{address} is a bridge, which does no DMA of its own"),
            remedy: "name the device behind it (`passgate list` shows them)",
        });
    }
    if pci.is_gone() {
        return Err(Error::Gone { device: address.to_string() });
    }
    check_vfio_accepts(sysfs, &pci)?;
    if !driver.as_deref().is_some_and(is_vfio) {
        return Err(Error::Unbound {
            device: address.to_string(),
            driver: driver.unwrap_or_else(|| "no driver".to_owned()),
        });
    }
    let mut companions = Vec::new();
    for other in group.members.iter().filter(|other| **other != address) {
        let Some(found) = PciDevice::find(sysfs, *other) else {
            // A member without an entry in sysfs may do DMA, so it counts as a companion.
            companions.push(*other);
            continue;
        };
        if !found.is_bridge() {
            companions.push(*other);
        }
        if let Some(driver) = found.driver().filter(|driver| !shares(driver)) {
            return Err(Error::Host {
                what: format!(
                    "{address}: its IOMMU group {} also holds {other}, which {driver} has",
                    group.id
                ),
                remedy: "bind every device of the group to vfio-pci (docs/guide/serve.md), or to no driver; or put \
                       the card into another slot",
            });
        }
    }
    Ok(Candidate { pci, group, companions })
}

/// Refuses a device that VFIO refuses whatever driver it is bound to, before it is bound in vain.
pub fn check_vfio_accepts(sysfs: &Path, pci: &PciDevice) -> Result<()> {
    let address = pci.address();
    // A `direct-relaxable` region need not be mapped; with a `direct` region the kernel refuses every domain without
    // it.
    if let Some(region) = pci.reserved_regions().iter().find(|region| region.kind == "direct") {
        return Err(Error::Host {
            what: format!(
                "{address} needs a 1:1 mapping of {:#x} to {:#x} that the firmware demands (RMRR, IVMD; `direct` in its \
                 iommu_group/reserved_regions), and the kernel refuses to assign such a device",
                region.start, region.last
            ),
            remedy: "switch off in the firmware's setup what uses it (USB keyboard emulation, remote management, shared \
                   graphics memory), or take another device",
        });
    }
    if let Some(physical) = pci.physical_function()
        && let Some(driver) = PciDevice::find(sysfs, physical).and_then(|physical| physical.driver())
        && is_vfio(&driver)
    {
        return Err(Error::Host {
            what: format!(
                "{address} is a virtual function of {physical}, which {driver} has; VFIO then opens it only with the VF \
                 token of whoever has that"
            ),
            remedy: "bind the physical function to its driver of the host and make its virtual functions there, or give \
                   passgate the physical function",
        });
    }
    Ok(())
}

/// Returns true for vfio-pci and its variants for one kind of device (mlx5_vfio_pci, nvgrace-gpu-vfio-pci…).
fn is_vfio(driver: &str) -> bool {
    driver.contains("vfio")
}

/// Returns true if the kernel lets VFIO use a group while a device of it is bound to this driver, because the driver
/// does no DMA (`driver_managed_dma` in `struct pci_driver`).
fn shares(driver: &str) -> bool {
    is_vfio(driver) || ["pci-stub", "pcieport"].contains(&driver)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::path::PathBuf;

    use tempfile::TempDir;

    use super::*;

    struct Sysfs(TempDir);

    impl Sysfs {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn device(&self, address: &str, class: &str, driver: Option<&str>, group: Option<u32>) -> PathBuf {
            let dir = self.0.path().join("bus/pci/devices").join(address);
            fs::create_dir_all(&dir).unwrap();
            fs::write(dir.join("class"), class).unwrap();
            if let Some(driver) = driver {
                symlink(format!("../drivers/{driver}"), dir.join("driver")).unwrap();
            }
            if let Some(group) = group {
                let at = self.0.path().join(format!("kernel/iommu_groups/{group}"));
                fs::create_dir_all(at.join("devices").join(address)).unwrap();
                symlink(at, dir.join("iommu_group")).unwrap();
            }
            dir
        }

        fn refusal(&self, name: &str) -> String {
            let error = candidate(self.0.path(), name).unwrap_err().to_string();
            assert!(!error.contains('\n'), "{error}");
            error
        }
    }

    const DISPLAY: &str = "0x030000";

    #[test]
    fn vfio_device_alone_in_its_group_is_accepted() {
        let sysfs = Sysfs::new();
        sysfs.device("0000:01:00.0", DISPLAY, Some("vfio-pci"), Some(7));
        sysfs.device("0000:00:01.0", "0x060400", Some("pcieport"), Some(7));
        let found = candidate(sysfs.0.path(), "01:00.0").unwrap();
        assert_eq!((found.group.id, found.companions.len()), (7, 0), "a bridge is not a companion");
    }

    #[test]
    fn device_with_a_direct_reserved_region_is_refused_with_the_range() {
        let sysfs = Sysfs::new();
        for driver in ["vfio-pci", "xhci_hcd"] {
            let name = if driver == "vfio-pci" { "0000:01:00.0" } else { "0000:01:00.1" };
            sysfs.device(name, "0x0c0330", Some(driver), Some(7));
            let regions = sysfs.0.path().join("kernel/iommu_groups/7/reserved_regions");
            fs::write(&regions, "0xfee00000 0xfeefffff msi\n0xbf000000 0xbfffffff direct\n").unwrap();
            let refusal = sysfs.refusal(name);
            assert!(
                refusal.starts_with(&format!("{name} needs a 1:1 mapping of 0xbf000000 to 0xbfffffff")),
                "{refusal}"
            );
            fs::write(&regions, "0xbf000000 0xbfffffff direct-relaxable\n").unwrap();
            assert!(!candidate(sysfs.0.path(), name).is_err_and(|error| error.to_string().contains("1:1")));
        }
    }

    #[test]
    fn virtual_function_of_a_vfio_physical_function_is_refused() {
        let sysfs = Sysfs::new();
        let dir = sysfs.device("0000:01:10.0", "0x020000", Some("vfio-pci"), Some(8));
        let physical = sysfs.device("0000:01:00.0", "0x020000", Some("igb"), Some(7));
        symlink("../0000:01:00.0", dir.join("physfn")).unwrap();
        candidate(sysfs.0.path(), "01:10.0").unwrap();
        fs::remove_file(physical.join("driver")).unwrap();
        symlink("../drivers/vfio-pci", physical.join("driver")).unwrap();
        let refusal = sysfs.refusal("01:10.0");
        assert!(
            refusal.starts_with("0000:01:10.0 is a virtual function of 0000:01:00.0, which vfio-pci has"),
            "{refusal}"
        );
        assert!(refusal.contains("VF token") && refusal.contains("bind the physical function to its driver"));
    }

    #[test]
    fn device_that_reads_all_ones_is_refused_as_gone() {
        let sysfs = Sysfs::new();
        let dir = sysfs.device("0000:01:00.0", DISPLAY, Some("vfio-pci"), Some(7));
        fs::write(dir.join("config"), [0xff; 64]).unwrap();
        let refusal = sysfs.refusal("01:00.0");
        assert!(refusal.starts_with("0000:01:00.0 does not answer"), "{refusal}");
        assert!(refusal.contains("echo 1 > /sys/bus/pci/devices/0000:01:00.0/remove"), "{refusal}");
    }

    #[test]
    fn companions_bound_to_vfio_are_listed() {
        let sysfs = Sysfs::new();
        sysfs.device("0000:01:00.0", DISPLAY, Some("mlx5_vfio_pci"), Some(7));
        sysfs.device("0000:01:00.1", DISPLAY, None, Some(7));
        let found = candidate(sysfs.0.path(), "01:00.0").unwrap();
        let second = "01:00.1".parse().unwrap();
        assert_eq!(found.companions, [second]);
        assert_eq!(found.first_outside(&[]), Some(second), "alone, a detach is no proof");
        assert_eq!(found.first_outside(&[found.pci.address()]), Some(second));
        assert_eq!(found.first_outside(&[second]), None, "together it is");
        fs::remove_dir_all(sysfs.0.path().join("bus/pci/devices/0000:01:00.1")).unwrap();
        let found = candidate(sysfs.0.path(), "01:00.0").unwrap();
        assert_eq!(
            found.first_outside(&[]),
            Some(second),
            "a device without an entry in sysfs does not count as a bridge"
        );
    }

    #[test]
    fn each_refusal_names_the_remedy() {
        let sysfs = Sysfs::new();
        assert!(sysfs.refusal("nonsense").contains("`nonsense` is not a PCI address: write it as"));
        assert!(sysfs.refusal("09:00.0").contains("0000:09:00.0: there is no such PCI device"));

        sysfs.device("0000:02:00.0", DISPLAY, Some("vfio-pci"), None);
        assert!(sysfs.refusal("02:00.0").contains("intel_iommu=on"));

        sysfs.device("0000:03:00.0", DISPLAY, Some("nvme"), Some(3));
        let unbound = sysfs.refusal("03:00.0");
        assert!(unbound.starts_with("0000:03:00.0 is bound to nvme, not to vfio-pci"), "{unbound}");
        assert!(unbound.contains("echo vfio-pci > /sys/bus/pci/devices/0000:03:00.0/driver_override"));
        sysfs.device("0000:03:00.1", DISPLAY, None, Some(8));
        assert!(sysfs.refusal("03:00.1").starts_with("0000:03:00.1 is bound to no driver"));

        sysfs.device("0000:04:00.0", DISPLAY, Some("vfio-pci"), Some(4));
        sysfs.device("0000:04:00.1", DISPLAY, Some("snd_hda_intel"), Some(4));
        let shared = sysfs.refusal("04:00.0");
        assert!(shared.contains("group 4 also holds 0000:04:00.1, which snd_hda_intel has"), "{shared}");

        sysfs.device("0000:07:00.0", DISPLAY, Some("vfio-pci"), Some(9));
        sysfs.device("0000:07:1f.0", "0x060100", Some("lpc_ich"), Some(9));
        let shared = sysfs.refusal("07:00.0");
        assert!(shared.contains("group 9 also holds 0000:07:1f.0, which lpc_ich has"), "{shared}");
        assert!(sysfs.refusal("07:1f.0").starts_with("0000:07:1f.0 is a bridge"));

        sysfs.device("0000:05:00.0", DISPLAY, Some("vfio-pci"), Some(5));
        fs::write(sysfs.0.path().join("kernel/iommu_groups/5/name"), "vfio-noiommu\n").unwrap();
        assert!(sysfs.refusal("05:00.0").contains("nothing can block its DMA"));

        let cdev =
            sysfs.device("0000:06:00.0", DISPLAY, Some("vfio-pci"), Some(6)).join("vfio-dev/noiommu-vfio0");
        fs::create_dir_all(&cdev).unwrap();
        fs::write(cdev.join("dev"), "511:0").unwrap();
        assert!(sysfs.refusal("06:00.0").contains("nothing can block its DMA"));
    }
}
