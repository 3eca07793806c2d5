//! A device's configuration space, as sysfs shows it beside what the kernel assigned.
//!
//! A configuration that was reset and not restored has no addresses in it any more: the device answers no access, for
//! ever, and every reset saves and restores just that.

use std::fs;

use passgate_bindings::vfio::pci::PciDevice;

/// Base address registers of a function: PCI 3.0, 6.2.5.
const BARS: usize = 6;
const FIRST_BAR_OFFSET: usize = 0x10;
/// Set in a BAR of I/O ports, whose address begins at bit 2.
const BAR_IO: u64 = 1;
/// `IORESOURCE_MEM_64` and `IORESOURCE_UNSET`, include/linux/ioport.h.
const RESOURCE_64_BITS: u64 = 0x0010_0000;
const RESOURCE_UNSET: u64 = 0x2000_0000;

/// Returns, in words, the first base address register that does not hold what the kernel assigned; none where all do,
/// or where it cannot be read. Something about a device that is open, or being reset, is never said.
pub(super) fn lost(device: &PciDevice) -> Option<String> {
    // The BARs of a virtual function read zero always: SR-IOV 1.1, 3.4.1.11.
    if device.dir().join("physfn").exists() {
        return None;
    }
    let config = fs::read(device.dir().join("config")).ok()?;
    let resource = fs::read_to_string(device.dir().join("resource")).ok()?;
    let register = |at: usize| -> Option<u64> {
        let offset = FIRST_BAR_OFFSET + 4 * at;
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
    use crate::host::inventory::fake::Tree;

    const ADDRESS: &str = "0000:04:00.0";

    #[test]
    fn a_base_address_that_the_kernel_did_not_give_is_told() {
        let tree = Tree::new();
        tree.device(ADDRESS, 0x020000, Some("vfio-pci"), Some(7));
        let device = PciDevice::find(tree.path(), ADDRESS.parse().unwrap()).unwrap();
        assert_eq!(lost(&device), None, "nothing can be read");
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
            lost(&device)
        };
        assert_eq!(with([0xfe00_0000, 0x6001, 0, 0x0100_0004, 0xc0, 0]), None);
        tree.link(&format!("bus/pci/devices/{ADDRESS}/physfn"), ".");
        assert_eq!(with([0; 6]), None, "a virtual function has none");
        tree.remove(&format!("bus/pci/devices/{ADDRESS}/physfn"));
        let said = with([0; 6]).unwrap();
        assert!(said.contains("BAR 0 holds 0x0, and the kernel gave it 0xfe000000"), "{said}");
        assert!(with([0xfe00_0000, 1, 0, 0x0100_0004, 0xc0, 0]).unwrap().contains("BAR 1 holds 0x0"));
        assert!(
            with([0xfe00_0000, 0x6001, 0, 0x0100_0004, 0, 0]).unwrap().contains("BAR 3 holds 0x1000000,")
        );
    }
}
