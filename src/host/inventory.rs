//! The inventory of the host's PCI devices: their class, the processes that have them open, the steps that stop their
//! DMA, and why passgate would refuse to assign them.
//!
//! Everything is read from sysfs, and no device is opened. Steps that only an open device reports (its migration state, the
//! drain of a driver in passgate) are found when it is assigned, and are not listed here.

use std::fs;
use std::path::Path;

use passgate_backends::assign::{TYPE1_DETACHES_NOTHING, shares_its_group};
use passgate_backends::device::refusal::candidate;
use passgate_bindings::vfio::PciAddress;
use passgate_bindings::vfio::config::Capabilities;
use passgate_bindings::vfio::pci::PciDevice;
use serde::Serialize;

use super::class;
use super::holder::{Holders, Process};
use super::visibility::Blind;
use crate::gate::{Rung, Step};

/// A PCI device, as `passgate list --json` prints it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ListedDevice {
    /// The address, as in `0000:01:00.0`.
    pub address: String,
    /// The name of the class.
    pub class: &'static str,
    /// The class code in hexadecimal, as in `010802`.
    pub class_code: String,
    /// The vendor and device ID in hexadecimal, as in `8086:10c9`.
    pub ids: String,
    /// The driver that it is bound to; none if it is bound to none.
    pub driver: Option<String>,
    /// The IOMMU group; none if it has none.
    pub group: Option<Group>,
    /// The NUMA node; none if the machine has only one, or does not report it.
    pub numa_node: Option<u32>,
    /// The methods by which the kernel can reset it: `flr`, `pm`, `bus` …
    pub reset: Vec<String>,
    /// True if it caches translations (ATS is enabled); none if this user may not read its configuration space.
    pub ats: Option<bool>,
    /// True if it may request pages (PRI is enabled); none as for `ats`.
    pub pri: Option<bool>,
    /// True if it is a TDISP interface (TDI) that is locked or runs.
    pub tdi: bool,
    /// The steps that would stop its DMA.
    pub stop: StopSteps,
    /// The processes that have it open.
    pub owner: Vec<Process>,
    /// False if `owner` is empty and yet a process may have it open: one that was not visible, or one with a device that the
    /// kernel does not name.
    pub owner_known: bool,
    /// The reason why some process was not visible, with the remedy.
    pub owner_unknown: Option<&'static str>,
    /// The reason why passgate would refuse to assign it, with the remedy; none if it would not.
    pub refused: Option<String>,
    /// The reason why it would be assigned only with `--allow-unstoppable`, unless its driver in passgate can drain it.
    pub unstoppable: Option<String>,
}

/// The steps that would stop a device, by the names that `passgate status` prints.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct StopSteps {
    /// The steps in an iommufd.
    pub iommufd: Vec<&'static str>,
    /// The steps in a type1 container.
    pub type1: Vec<&'static str>,
}

/// An IOMMU group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Group {
    /// The number of the group.
    pub id: u32,
    /// The addresses of the other devices in it that do DMA: all but bridges.
    pub companions: Vec<String>,
    /// True if there are none.
    pub isolated: bool,
    /// The type of the domain that the drivers of the host use: `DMA`, `DMA-FQ`, or `identity`, which translates nothing.
    pub default_domain: Option<String>,
    /// True if VFIO has made up the group for a device without an IOMMU (no-IOMMU mode).
    pub noiommu: bool,
}

/// Returns every PCI device in the order of addresses; none on a host without PCI. `sysfs` and `proc` are `/sys` and `/proc`
/// except in tests. `iommufd` is true if this kernel has `/dev/iommu`.
pub fn inventory(sysfs: &Path, proc: &Path, iommufd: bool) -> Vec<ListedDevice> {
    let mut addresses: Vec<PciAddress> = fs::read_dir(sysfs.join("bus/pci/devices"))
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    addresses.sort();
    let holders = Holders::scan(proc);
    let found = addresses.into_iter().filter_map(|address| PciDevice::find(sysfs, address));
    found.map(|device| describe_device(sysfs, &holders, iommufd, &device)).collect()
}

fn describe_device(sysfs: &Path, holders: &Holders, iommufd: bool, device: &PciDevice) -> ListedDevice {
    let class_code = device.class().unwrap_or(0xff_0000);
    let (vendor, id) = device.ids().unwrap_or((0xffff, 0xffff));
    let config = ConfigSpace::read(device);
    let companions = companions(sysfs, device);
    let reset = read_words(device, "reset_method");
    // A detach stops DMA only if the device is alone in its group, and behind an IOMMU.
    let alone = companions.is_empty() && device.group().is_some_and(|group| !group.noiommu);
    let stop = StopSteps::of(config.express, !reset.is_empty(), alone);
    let refused = candidate(sysfs, &device.address().to_string()).err().map(|error| error.to_string());
    let cdev = iommufd && device.cdev().is_some();
    let unstoppable = match (&refused, config.express) {
        (None, Some(_)) => stop.unstoppable_reason(device.address(), cdev, companions.first().copied()),
        _ => None,
    };
    let owner = holders.of(sysfs, device);
    ListedDevice {
        address: device.address().to_string(),
        class: class::name(class_code),
        class_code: format!("{class_code:06x}"),
        ids: format!("{vendor:04x}:{id:04x}"),
        driver: device.driver(),
        group: device.group().map(|group| Group {
            id: group.id,
            isolated: companions.is_empty(),
            companions: companions.iter().map(PciAddress::to_string).collect(),
            default_domain: read_words(device, "iommu_group/type").pop(),
            noiommu: group.noiommu,
        }),
        numa_node: read_words(device, "numa_node").pop().and_then(|node| node.parse().ok()),
        reset,
        ats: config.ats,
        pri: config.pri,
        tdi: device.is_bound_tdi(),
        stop,
        owner_known: owner.incomplete.is_none() && owner.possible.is_empty() || !owner.processes.is_empty(),
        owner_unknown: owner.incomplete.map(Blind::describe),
        owner: owner.processes,
        refused,
        unstoppable,
    }
}

impl StopSteps {
    fn of(express: Option<bool>, resets: bool, alone: bool) -> Self {
        let has = |rung: Rung, detach: bool| match rung {
            Rung::Unmap => true,
            Rung::Fence(Step::Master) => express == Some(true),
            Rung::Fence(Step::Detach) => detach && alone,
            Rung::Fence(Step::Reset) => resets,
            // Only an open device reports these.
            Rung::Fence(Step::Drain | Step::Stop) => false,
        };
        let steps =
            |detach| Rung::LADDER.into_iter().filter(|rung| has(*rung, detach)).map(Rung::word).collect();
        Self { iommufd: steps(true), type1: steps(false) }
    }

    /// Returns why the device would be refused as unstoppable; none if any step but an unmap stops it. `cdev` is true if
    /// it would be opened by its cdev, in an iommufd. `other` is another device of its group.
    fn unstoppable_reason(
        &self,
        address: PciAddress,
        cdev: bool,
        other: Option<PciAddress>,
    ) -> Option<String> {
        let (steps, why) = match (cdev, other) {
            (true, other) => (&self.iommufd, other.map(shares_its_group).unwrap_or_default()),
            (false, _) => (&self.type1, TYPE1_DETACHES_NOTHING.to_owned()),
        };
        let error = passgate_backends::Error::Unstoppable { device: address.to_string(), why };
        (steps.len() == 1).then(|| error.to_string())
    }
}

/// The capabilities in configuration space; none if this user may read only its first 64 bytes.
#[derive(Debug, Default)]
struct ConfigSpace {
    express: Option<bool>,
    ats: Option<bool>,
    pri: Option<bool>,
}

impl ConfigSpace {
    fn read(device: &PciDevice) -> Self {
        let bytes = fs::read(device.dir().join("config")).unwrap_or_default();
        let word = |at: u16| -> Option<u32> {
            let at = usize::from(at);
            Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
        };
        // The length of the file is that of the space, although this user may read less of it.
        let size = fs::metadata(device.dir().join("config")).map_or(0, |meta| meta.len());
        let found = Capabilities::find(size.max(bytes.len() as u64), |at| word(at).ok_or(()));
        let Ok(found) = found else { return Self::default() };
        if device.is_gone() {
            return Self::default();
        }
        Self {
            express: Some(found.express.is_some()),
            ats: found.ats_on(|at| word(at).ok_or(())).ok(),
            pri: found.pri_on(|at| word(at).ok_or(())).ok(),
        }
    }
}

/// Returns the other devices of its group that do DMA.
fn companions(sysfs: &Path, device: &PciDevice) -> Vec<PciAddress> {
    let members = device.group().map(|group| group.members).unwrap_or_default();
    let does_dma = |other: &PciAddress| {
        *other != device.address() && PciDevice::find(sysfs, *other).is_none_or(|found| !found.is_bridge())
    };
    members.into_iter().filter(does_dma).collect()
}

/// Returns the words in a file of the device; none if there is no such file.
fn read_words(device: &PciDevice, name: &str) -> Vec<String> {
    let text = fs::read_to_string(device.dir().join(name)).unwrap_or_default();
    text.split_whitespace().map(str::to_owned).collect()
}

#[cfg(test)]
pub(crate) mod fake;

#[cfg(test)]
mod tests {
    use super::fake::FakeTree;
    use super::*;

    fn all(tree: &FakeTree, iommufd: bool) -> Vec<ListedDevice> {
        inventory(tree.path(), &tree.path().join("proc"), iommufd)
    }

    #[test]
    fn host_without_pci_has_empty_inventory() {
        assert_eq!(inventory(Path::new("/nowhere"), Path::new("/nowhere"), false), []);
    }

    #[test]
    fn device_is_listed_with_its_sysfs_attributes() {
        let tree = FakeTree::new();
        tree.device("0000:01:00.0", 0x010802, Some("vfio-pci"), Some(7));
        tree.endpoint("0000:01:00.0", true);
        tree.write("bus/pci/devices/0000:01:00.0/numa_node", "1\n");
        tree.write("bus/pci/devices/0000:01:00.0/reset_method", "flr bus\n");
        tree.write("kernel/iommu_groups/7/type", "identity\n");
        tree.device("0000:00:01.0", 0x060400, Some("pcieport"), Some(7));

        let [bridge, nvme] = &all(&tree, true)[..] else { panic!("two devices") };
        assert!(bridge.refused.as_ref().unwrap().contains("0000:00:01.0 is a bridge"));
        assert_eq!((bridge.ats, bridge.numa_node), (None, None), "its configuration space is not there");
        let group = Group {
            id: 7,
            companions: vec![],
            isolated: true,
            default_domain: Some("identity".into()),
            noiommu: false,
        };
        let stop = StopSteps {
            iommufd: vec!["unmap", "bus-master-off", "detach", "reset"],
            type1: vec!["unmap", "bus-master-off", "reset"],
        };
        let expected = ListedDevice {
            address: "0000:01:00.0".into(),
            class: "NVMe drive",
            class_code: "010802".into(),
            ids: "1b36:0010".into(),
            driver: Some("vfio-pci".into()),
            group: Some(group),
            numa_node: Some(1),
            reset: vec!["flr".into(), "bus".into()],
            ats: Some(true),
            pri: Some(false),
            tdi: false,
            stop,
            owner: vec![],
            owner_known: true,
            owner_unknown: None,
            refused: None,
            unstoppable: None,
        };
        assert_eq!(*nvme, expected);
    }

    #[test]
    fn unstoppable_is_decided_for_the_iommu_interface_of_this_kernel() {
        let tree = FakeTree::new();
        tree.device("0000:04:00.0", 0xff00, Some("vfio-pci"), Some(1));
        tree.conventional("0000:04:00.0");
        tree.write("bus/pci/devices/0000:04:00.0/vfio-dev/vfio0/dev", "511:0\n");
        let device = all(&tree, true).remove(0);
        assert_eq!((device.stop.iommufd, device.unstoppable), (vec!["unmap", "detach"], None));
        let device = all(&tree, false).remove(0);
        assert_eq!(device.stop.type1, ["unmap"]);
        assert!(device.unstoppable.unwrap().contains("0000:04:00.0 cannot be stopped for certain"));

        tree.device("0000:04:00.1", 0xff00, Some("vfio-pci"), Some(1));
        let shared = all(&tree, true).remove(0);
        assert_eq!(shared.group.unwrap().companions, ["0000:04:00.1"]);
        assert!(shared.unstoppable.unwrap().contains("serve 0000:04:00.1 with it"));
    }

    #[test]
    fn refusal_reason_is_listed_in_full() {
        let tree = FakeTree::new();
        tree.device("0000:03:00.0", 0x020000, Some("ixgbe"), Some(3));
        tree.device("0000:05:00.0", 0x030000, Some("vfio-pci"), None);
        tree.device("0000:06:00.0", 0x030000, Some("vfio-pci"), Some(6));
        tree.write("kernel/iommu_groups/6/name", "vfio-noiommu\n");
        let [unbound, without, noiommu] = &all(&tree, true)[..] else { panic!("three devices") };
        let assert_refused = |listed: &ListedDevice, reason: &str| {
            assert!(listed.refused.as_ref().unwrap().contains(reason), "{listed:?}")
        };
        assert_refused(unbound, "0000:03:00.0 is bound to ixgbe, not to vfio-pci; bind it: echo vfio-pci >");
        assert_refused(without, "has no IOMMU group");
        assert_refused(noiommu, "nothing can block its DMA");
        assert_eq!((&without.stop.iommufd[..], &noiommu.stop.iommufd[..]), (&["unmap"][..], &["unmap"][..]));
        assert!(without.group.is_none() && noiommu.group.as_ref().unwrap().noiommu);
    }
}
