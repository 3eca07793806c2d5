//! The names of PCI classes (PCI Code and ID Assignment Specification).

/// Returns the name of a class code: base class, subclass and programming interface, one byte each.
pub(super) fn name(class: u32) -> &'static str {
    match (class >> 16, class >> 8 & 0xff, class & 0xff) {
        (0x01, 0x08, 0x02) => "NVMe drive",
        (0x01, 0x06, _) => "SATA controller",
        (0x01, 0x04, _) => "RAID controller",
        (0x01, 0x07, _) => "SAS controller",
        (0x01, ..) => "storage controller",
        (0x02, 0x00, _) => "Ethernet controller",
        (0x02, 0x07, _) => "InfiniBand controller",
        (0x02, ..) => "network controller",
        (0x03, 0x00, _) => "VGA controller",
        (0x03, 0x02, _) => "3D controller",
        (0x03, ..) => "display controller",
        (0x04, ..) => "multimedia controller",
        (0x05, 0x02, _) => "CXL memory",
        (0x05, ..) => "memory controller",
        (0x06, 0x00, _) => "host bridge",
        (0x06, 0x01, _) => "ISA bridge",
        (0x06, 0x04, _) => "PCI bridge",
        (0x06, ..) => "bridge",
        (0x07, ..) => "communication controller",
        (0x08, 0x06, _) => "IOMMU",
        (0x08, ..) => "system peripheral",
        (0x09, ..) => "input device",
        (0x0b, 0x40, _) => "co-processor",
        (0x0b, ..) => "processor",
        (0x0c, 0x03, _) => "USB controller",
        (0x0c, 0x05, _) => "SMBus controller",
        (0x0c, ..) => "serial bus controller",
        (0x0d, ..) => "wireless controller",
        (0x10, ..) => "encryption controller",
        (0x11, ..) => "signal processor",
        (0x12, ..) => "processing accelerator",
        _ => "other device",
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn subclass_name_is_preferred_to_base_class_name() {
        for (class, name) in [
            (0x010802, "NVMe drive"),
            (0x010800, "storage controller"),
            (0x020000, "Ethernet controller"),
            (0x030200, "3D controller"),
            (0x060400, "PCI bridge"),
            (0x120000, "processing accelerator"),
            (0x00ff00, "other device"),
            (0xff0000, "other device"),
        ] {
            assert_eq!(super::name(class), name, "{class:06x}");
        }
    }
}
