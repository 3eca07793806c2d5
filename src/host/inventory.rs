//! The host's PCI devices: what each is, who has it, how its DMA could be stopped, and why it would not be taken.
//!
//! Everything is read from sysfs, and nothing is opened: what only an open device tells (its migration state, the
//! drain of a driver of passgate's own) is found when it is assigned, and comes on top of the stop class said here.

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
use super::sight::Blind;
use crate::gate::Step;

/// A PCI device, as it is printed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Listed {
    /// Its address, as in `0000:01:00.0`.
    pub address: String,
    /// What it is, in words.
    pub class: &'static str,
    /// Its class code, as in `010802`.
    pub class_code: String,
    /// Vendor and device id, as in `8086:10c9`.
    pub ids: String,
    /// The driver that has it.
    pub driver: Option<String>,
    /// Its IOMMU group, if it has one.
    pub group: Option<Group>,
    /// Its NUMA node; none where the machine has one, or does not say.
    pub numa_node: Option<u32>,
    /// How the kernel can reset it: `flr`, `pm`, `bus` …
    pub reset: Vec<String>,
    /// Whether it caches translations (PCI ATS is on); none where this user may not read its configuration space.
    pub ats: Option<bool>,
    /// Whether it may ask for pages (PRI is on); none as for `ats`.
    pub pri: Option<bool>,
    /// Whether it is a TDISP interface that is locked or runs.
    pub tdi: bool,
    /// How its DMA could be stopped.
    pub stop: Stop,
    /// The processes that have it.
    pub owner: Vec<Process>,
    /// Whether every process could be looked at; where not, `owner` may lack some.
    pub owner_known: bool,
    /// Why not every process could be looked at, with the remedy.
    pub owner_unknown: Option<&'static str>,
    /// Why passgate would not take it, and what to do about it.
    pub refused: Option<String>,
    /// Why it would be taken with `--allow-unstoppable` only, unless its driver in passgate can drain it.
    pub unstoppable: Option<String>,
}

/// The rungs of the ladder that a device has, in the words of `passgate status`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Stop {
    /// In an iommufd.
    pub iommufd: Vec<&'static str>,
    /// In a type1 container.
    pub type1: Vec<&'static str>,
}

/// An IOMMU group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Group {
    /// Its number.
    pub id: u32,
    /// The other devices in it that do DMA.
    pub companions: Vec<String>,
    /// Whether there are none.
    pub isolated: bool,
    /// The domain that the kernel's own drivers get: `DMA`, `DMA-FQ`, or `identity`, which translates nothing.
    pub default_domain: Option<String>,
    /// Whether VFIO made the group up for a device without an IOMMU.
    pub noiommu: bool,
}

/// Every PCI device in address order; none on a host without PCI. `sysfs` and `proc` are elsewhere only in tests,
/// `iommufd` is whether this kernel has `/dev/iommu`.
pub fn inventory(sysfs: &Path, proc: &Path, iommufd: bool) -> Vec<Listed> {
    let mut addresses: Vec<PciAddress> = fs::read_dir(sysfs.join("bus/pci/devices"))
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    addresses.sort();
    let holders = Holders::scan(proc);
    let found = addresses.into_iter().filter_map(|address| PciDevice::find(sysfs, address));
    found.map(|device| list(sysfs, &holders, iommufd, &device)).collect()
}

fn list(sysfs: &Path, holders: &Holders, iommufd: bool, device: &PciDevice) -> Listed {
    let class_code = device.class().unwrap_or(0xff_0000);
    let (vendor, id) = device.ids().unwrap_or((0xffff, 0xffff));
    let config = Config::read(device);
    let companions = companions(sysfs, device);
    let reset = words(device, "reset_method");
    // Without an IOMMU there is nothing to detach from.
    let alone = companions.is_empty() && device.group().is_some_and(|group| !group.noiommu);
    let stop = Stop::of(config.express, !reset.is_empty(), alone);
    let refused = candidate(sysfs, &device.address().to_string()).err().map(|error| error.to_string());
    let cdev = iommufd && device.cdev().is_some();
    let unstoppable = match (&refused, config.express) {
        (None, Some(_)) => stop.doubt(device.address(), cdev, companions.first().copied()),
        _ => None,
    };
    let owner = holders.of(sysfs, device);
    Listed {
        address: device.address().to_string(),
        class: class::word(class_code),
        class_code: format!("{class_code:06x}"),
        ids: format!("{vendor:04x}:{id:04x}"),
        driver: device.driver(),
        group: device.group().map(|group| Group {
            id: group.id,
            isolated: companions.is_empty(),
            companions: companions.iter().map(PciAddress::to_string).collect(),
            default_domain: words(device, "iommu_group/type").pop(),
            noiommu: group.noiommu,
        }),
        numa_node: words(device, "numa_node").pop().and_then(|node| node.parse().ok()),
        reset,
        ats: config.ats,
        pri: config.pri,
        tdi: device.is_bound_tdi(),
        stop,
        owner_known: owner.unseen.is_none() && owner.perhaps.is_empty() || !owner.processes.is_empty(),
        owner_unknown: owner.unseen.map(Blind::words),
        owner: owner.processes,
        refused,
        unstoppable,
    }
}

impl Stop {
    fn of(express: Option<bool>, resets: bool, alone: bool) -> Self {
        let has = |step: Step, detach: bool| match step {
            Step::Unmap => true,
            Step::Master => express == Some(true),
            Step::Detach => detach && alone,
            Step::Reset => resets,
            Step::Drain | Step::Stop => false,
        };
        let steps =
            |detach| Step::LADDER.into_iter().filter(|step| has(*step, detach)).map(Step::word).collect();
        Self { iommufd: steps(true), type1: steps(false) }
    }

    /// What speaks against a device with this stop class, where it would be had by its cdev or not.
    fn doubt(&self, address: PciAddress, cdev: bool, other: Option<PciAddress>) -> Option<String> {
        let (steps, why) = match (cdev, other) {
            (true, other) => (&self.iommufd, other.map(shares_its_group).unwrap_or_default()),
            (false, _) => (&self.type1, TYPE1_DETACHES_NOTHING.to_owned()),
        };
        let error = passgate_backends::Error::Unstoppable { device: address.to_string(), why };
        (steps.len() == 1).then(|| error.to_string())
    }
}

/// What configuration space says; nothing where this user sees the first 64 bytes only.
#[derive(Debug, Default)]
struct Config {
    express: Option<bool>,
    ats: Option<bool>,
    pri: Option<bool>,
}

impl Config {
    fn read(device: &PciDevice) -> Self {
        let bytes = fs::read(device.dir().join("config")).unwrap_or_default();
        let word = |at: u16| -> Option<u32> {
            let at = usize::from(at);
            Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
        };
        // The file is as long as the space, whoever reads it.
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

/// The other devices of its group that do DMA.
fn companions(sysfs: &Path, device: &PciDevice) -> Vec<PciAddress> {
    let members = device.group().map(|group| group.members).unwrap_or_default();
    let does_dma = |other: &PciAddress| {
        *other != device.address() && PciDevice::find(sysfs, *other).is_none_or(|found| !found.is_bridge())
    };
    members.into_iter().filter(does_dma).collect()
}

/// The words in a file of the device; none where there is no such file.
fn words(device: &PciDevice, name: &str) -> Vec<String> {
    let text = fs::read_to_string(device.dir().join(name)).unwrap_or_default();
    text.split_whitespace().map(str::to_owned).collect()
}

#[cfg(test)]
pub(crate) mod fake;

#[cfg(test)]
mod tests {
    use super::fake::Tree;
    use super::*;

    fn all(tree: &Tree, iommufd: bool) -> Vec<Listed> {
        inventory(tree.path(), &tree.path().join("proc"), iommufd)
    }

    #[test]
    fn a_host_without_pci_has_an_empty_list() {
        assert_eq!(inventory(Path::new("/nowhere"), Path::new("/nowhere"), false), []);
    }

    #[test]
    fn each_device_is_listed_with_what_sysfs_says() {
        let tree = Tree::new();
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
        let stop = Stop {
            iommufd: vec!["unmap", "bus-master-off", "detach", "reset"],
            type1: vec!["unmap", "bus-master-off", "reset"],
        };
        let should = Listed {
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
        assert_eq!(*nvme, should);
    }

    #[test]
    fn what_nothing_stops_is_said_for_the_interface_that_this_kernel_has() {
        let tree = Tree::new();
        tree.device("0000:04:00.0", 0xff00, Some("vfio-pci"), Some(1));
        tree.conventional("0000:04:00.0");
        tree.write("bus/pci/devices/0000:04:00.0/vfio-dev/vfio0/dev", "511:0\n");
        let only = all(&tree, true).remove(0);
        assert_eq!((only.stop.iommufd, only.unstoppable), (vec!["unmap", "detach"], None));
        let only = all(&tree, false).remove(0);
        assert_eq!(only.stop.type1, ["unmap"]);
        assert!(only.unstoppable.unwrap().contains("0000:04:00.0 cannot be stopped for certain"));

        tree.device("0000:04:00.1", 0xff00, Some("vfio-pci"), Some(1));
        let shared = all(&tree, true).remove(0);
        assert_eq!(shared.group.unwrap().companions, ["0000:04:00.1"]);
        assert!(shared.unstoppable.unwrap().contains("serve 0000:04:00.1 with it"));
    }

    #[test]
    fn why_a_device_would_not_be_taken_is_said_in_full() {
        let tree = Tree::new();
        tree.device("0000:03:00.0", 0x020000, Some("ixgbe"), Some(3));
        tree.device("0000:05:00.0", 0x030000, Some("vfio-pci"), None);
        tree.device("0000:06:00.0", 0x030000, Some("vfio-pci"), Some(6));
        tree.write("kernel/iommu_groups/6/name", "vfio-noiommu\n");
        let [unbound, without, noiommu] = &all(&tree, true)[..] else { panic!("three devices") };
        let says = |listed: &Listed, what: &str| {
            assert!(listed.refused.as_ref().unwrap().contains(what), "{listed:?}")
        };
        says(unbound, "0000:03:00.0 is bound to ixgbe, not to vfio-pci; bind it: echo vfio-pci >");
        says(without, "has no IOMMU group");
        says(noiommu, "nothing can block its DMA");
        assert_eq!((&without.stop.iommufd[..], &noiommu.stop.iommufd[..]), (&["unmap"][..], &["unmap"][..]));
        assert!(without.group.is_none() && noiommu.group.as_ref().unwrap().noiommu);
    }
}
