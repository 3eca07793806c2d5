//! The base address registers of a device, compared with the addresses that the kernel has assigned.
//!
//! In a configuration space that was reset and not restored they are zero. The device then answers no access to its BARs any
//! more, and every further reset saves and restores that state.

use std::fs;

use passgate_bindings::vfio::pci::PciDevice;

/// The number of base address registers of a function: PCI 3.0, 6.2.5.
const BARS: usize = 6;
/// The offset of the first one in configuration space: PCI 3.0, 6.1.
const FIRST_BAR_OFFSET: usize = 0x10;
/// The bit that is set in a BAR of I/O ports, whose address begins at bit 2; that of memory begins at bit 4: PCI 3.0,
/// 6.2.5.1.
const BAR_IO: u64 = 1;
/// `IORESOURCE_MEM_64`, include/linux/ioport.h.
const RESOURCE_64_BITS: u64 = 0x0010_0000;
/// `IORESOURCE_UNSET`, include/linux/ioport.h.
const RESOURCE_UNSET: u64 = 0x2000_0000;

/// Returns text about the first base address register that differs from the kernel's assignment; none if there is none, or if
/// the configuration space cannot be read. It has a meaning only while the device is neither open nor being reset.
pub(super) fn find_lost_bar(device: &PciDevice) -> Option<String> {
    // The BARs of a virtual function are always zero: SR-IOV 1.1, 3.4.1.11.
    if device.dir().join("physfn").exists() {
        return None;
    }
    let config = fs::read(device.dir().join("config")).ok()?;
    let resource = fs::read_to_string(device.dir().join("resource")).ok()?;
    let register = |index: usize| -> Option<u64> {
        let offset = FIRST_BAR_OFFSET + 4 * index;
        Some(u32::from_le_bytes(config.get(offset..offset + 4)?.try_into().ok()?).into())
    };
    for (bar, line) in resource.lines().take(BARS).enumerate() {
        let mut numbers =
            line.split_whitespace().map(|word| u64::from_str_radix(word.trim_start_matches("0x"), 16));
        let (Some(Ok(start)), Some(Ok(_)), Some(Ok(flags))) =
            (numbers.next(), numbers.next(), numbers.next())
        else {
            continue;
        };
        if start == 0 || flags & RESOURCE_UNSET != 0 {
            continue;
        }
        let low = register(bar)?;
        let mask = if low & BAR_IO != 0 { !0x3 } else { !0xf };
        let high = if flags & RESOURCE_64_BITS != 0 { register(bar + 1)? } else { 0 };
        let found = (low & mask) | high << 32;
        if found != start {
            return Some(format!(
                "its configuration is lost: BAR {bar} holds {found:#x}, and the kernel gave it {start:#x}"
            ));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::inventory::fake::FakeTree;

    const ADDRESS: &str = "0000:04:00.0";

    #[test]
    fn bar_that_differs_from_kernel_assignment_is_reported() {
        let tree = FakeTree::new();
        tree.device(ADDRESS, 0x020000, Some("vfio-pci"), Some(7));
        let device = PciDevice::find(tree.path(), ADDRESS.parse().unwrap()).unwrap();
        assert_eq!(find_lost_bar(&device), None, "nothing can be read");
        let none = "0x0000000000000000 0x0000000000000000 0x0000000000000000\n";
        let resource = [
            "0x00000000fe000000 0x00000000fe01ffff 0x0000000000040200\n",
            "0x0000000000006000 0x000000000000601f 0x0000000000040101\n",
            none,
            "0x000000c001000000 0x000000c001003fff 0x0000000000140204\n",
            none,
            none,
            "0x00000000fe400000 0x00000000fe43ffff 0x0000000000046200\n",
        ];
        tree.write(&format!("bus/pci/devices/{ADDRESS}/resource"), resource.concat());
        let mut config = [0; 64];
        let mut with = |bars: [u32; 6]| {
            for (bar, value) in bars.into_iter().enumerate() {
                config[16 + 4 * bar..20 + 4 * bar].copy_from_slice(&value.to_le_bytes());
            }
            tree.write(&format!("bus/pci/devices/{ADDRESS}/config"), config);
            find_lost_bar(&device)
        };
        assert_eq!(with([0xfe00_0000, 0x6001, 0, 0x0100_0004, 0xc0, 0]), None);
        tree.link(&format!("bus/pci/devices/{ADDRESS}/physfn"), ".");
        assert_eq!(with([0; 6]), None, "a virtual function has no addresses in its BARs");
        tree.remove(&format!("bus/pci/devices/{ADDRESS}/physfn"));
        let text = with([0; 6]).unwrap();
        assert!(text.contains("BAR 0 holds 0x0, and the kernel gave it 0xfe000000"), "{text}");
        assert!(with([0xfe00_0000, 1, 0, 0x0100_0004, 0xc0, 0]).unwrap().contains("BAR 1 holds 0x0"));
        assert!(
            with([0xfe00_0000, 0x6001, 0, 0x0100_0004, 0, 0]).unwrap().contains("BAR 3 holds 0x1000000,")
        );
    }
}
