//! PCI configuration space: the capabilities of a function (PCI 3.0, 6.7; PCIe 6.0, 7.5.3 and 7.6.3).
//!
//! Every pointer comes from the device and is checked. The number of list entries is limited, so that a cycle ends.

/// The offset of the Command register (PCIe 6.0, 7.5.1.1.3).
pub const COMMAND: u16 = 0x04;
/// Memory Space Enable in the Command register: the function responds to accesses to its memory BARs.
pub const COMMAND_MEMORY: u16 = 1 << 1;
/// Bus Master Enable in the Command register: the function may issue memory requests.
pub const COMMAND_MASTER: u16 = 1 << 2;

/// Returns true where `word`, the 4 bytes at [`COMMAND`], shows that the function does not respond: it is removed, has no
/// power (D3cold), or its link is down. Then every read returns all ones (PCIe 6.0, 2.3.2); the Status register of a
/// responding function cannot have all ones, because some of its bits are reserved (7.5.1.1.4).
pub fn is_gone(word: u32) -> bool {
    word >> 16 == 0xffff
}

/// The offset of the extended configuration space and of its first capability (PCIe 6.0, 7.6).
const EXTENDED_SPACE: u16 = 0x100;

/// The maximum number of capabilities: 192 bytes have room for that many of 4 bytes.
const MAX_CAPABILITIES: usize = 48;
/// The maximum number of extended capabilities: 3840 bytes have room for that many of 4 bytes.
const MAX_EXTENDED_CAPABILITIES: usize = 960;

/// The offsets of the capabilities that concern a function's DMA.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Capabilities {
    /// PCI Express (id 0x10; PCIe 6.0, 7.5.3); none for a conventional PCI device.
    pub express: Option<u16>,
    /// Address Translation Services (extended, id 0x0f; PCIe 6.0, 10.5.1): the function can cache translations.
    pub ats: Option<u16>,
    /// Page Request Interface (extended, id 0x13; PCIe 6.0, 10.5.2): the function can request pages.
    pub pri: Option<u16>,
}

impl Capabilities {
    /// Finds the capabilities in a configuration space of `size` bytes. `read` returns the 4 bytes at an offset that is a
    /// multiple of 4; its errors are returned.
    pub fn find<E>(size: u64, mut read: impl FnMut(u16) -> Result<u32, E>) -> Result<Self, E> {
        let mut found = Self::default();
        // Bit 4 of the Status register, Capabilities List: the pointer at 0x34 is valid (PCIe 6.0, 7.5.1.1.4).
        let status = read(COMMAND)? >> 16;
        let mut at = if status != 0xffff && status & 1 << 4 != 0 { read(0x34)? as u16 & 0xfc } else { 0 };
        for _ in 0..MAX_CAPABILITIES {
            // 0 ends the list; no capability lies in the header, which ends at 0x40.
            if at < 0x40 {
                break;
            }
            let header = read(at)?;
            if header & 0xff == 0x10 {
                found.express.get_or_insert(at);
            }
            at = (header >> 8) as u16 & 0xfc;
        }
        if size <= u64::from(EXTENDED_SPACE) {
            return Ok(found);
        }
        at = EXTENDED_SPACE;
        for _ in 0..MAX_EXTENDED_CAPABILITIES {
            let header = read(at)?;
            match header {
                0 | u32::MAX => break,
                _ if header & 0xffff == 0x0f => _ = found.ats.get_or_insert(at),
                _ if header & 0xffff == 0x13 => _ = found.pri.get_or_insert(at),
                _ => {}
            }
            at = (header >> 20) as u16 & 0xffc;
            if at < EXTENDED_SPACE || u64::from(at) + 4 > size {
                break;
            }
        }
        Ok(found)
    }

    /// Returns true while requests of the function are not completed (Transactions Pending in Device Status; PCIe 6.0,
    /// 7.5.3.5). None for a function without that register.
    pub fn transactions_pending<E>(
        &self,
        mut read: impl FnMut(u16) -> Result<u32, E>,
    ) -> Result<Option<bool>, E> {
        let Some(express) = self.express else { return Ok(None) };
        // Device Control at 8, Device Status at 10, of which bit 5 is Transactions Pending.
        Ok(Some(read(express + 8)? >> 16 & 1 << 5 != 0))
    }

    /// Returns true where the function may cache translations (Enable in ATS Control; PCIe 6.0, 10.5.1.3).
    pub fn ats_on<E>(&self, mut read: impl FnMut(u16) -> Result<u32, E>) -> Result<bool, E> {
        let Some(ats) = self.ats else { return Ok(false) };
        // ATS Capability at 4, ATS Control at 6, of which bit 15 is Enable.
        Ok(read(ats + 4)? >> 31 != 0)
    }

    /// Returns true where the function may request pages (Enable in Page Request Control; PCIe 6.0, 10.5.2.2).
    pub fn pri_on<E>(&self, mut read: impl FnMut(u16) -> Result<u32, E>) -> Result<bool, E> {
        let Some(pri) = self.pri else { return Ok(false) };
        // Page Request Control at 4, of which bit 0 is Enable.
        Ok(read(pri + 4)? & 1 != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A configuration space as bytes. A read beyond its end is an error.
    struct Space(Vec<u8>);

    impl Space {
        fn new(size: usize) -> Self {
            Self(vec![0; size])
        }

        fn set(&mut self, at: usize, value: u32) -> &mut Self {
            self.0[at..at + 4].copy_from_slice(&value.to_le_bytes());
            self
        }

        fn read(&self, at: u16) -> Result<u32, u16> {
            let bytes = self.0.get(usize::from(at)..usize::from(at) + 4).ok_or(at)?;
            Ok(u32::from_le_bytes(bytes.try_into().unwrap()))
        }

        fn find(&self) -> Result<Capabilities, u16> {
            Capabilities::find(self.0.len() as u64, |at| self.read(at))
        }
    }

    /// Power management at 0x50, then PCI Express at 0x80; AER at 0x100, ATS at 0x150, PRI at 0x160.
    fn endpoint() -> Space {
        let mut space = Space::new(4096);
        space.set(4, 1 << 20 | 0x0006).set(0x34, 0x53).set(0x50, 0x8001).set(0x80, 0x0010);
        space.set(0x100, 0x0001 | 1 << 16 | 0x150 << 20);
        space.set(0x150, 0x000f | 1 << 16 | 0x160 << 20).set(0x160, 0x0013 | 1 << 16);
        space
    }

    #[test]
    fn find_follows_both_capability_lists() {
        let found = endpoint().find();
        assert_eq!(found, Ok(Capabilities { express: Some(0x80), ats: Some(0x150), pri: Some(0x160) }));
        let mut conventional = Space::new(256);
        conventional.set(4, 1 << 20).set(0x34, 0x40).set(0x40, 0x0005);
        assert_eq!(conventional.find(), Ok(Capabilities::default()), "MSI alone");
        let mut without = endpoint();
        without.set(4, 0x0006);
        assert_eq!(without.find().unwrap().express, None, "no list, whatever the pointer is");
        let mut inside = endpoint();
        inside.set(0x34, 0x3c).set(0x3c, 0x0010);
        assert_eq!(inside.find().unwrap().express, None, "no capability lies in the header");
    }

    #[test]
    fn hidden_first_extended_capability_does_not_end_the_list() {
        let mut space = endpoint();
        space.set(0x100, 0x150 << 20); // as vfio-pci shows a capability that it hides
        assert_eq!(space.find().unwrap().ats, Some(0x150));
    }

    #[test]
    fn cyclic_list_ends_and_absent_device_has_no_capabilities() {
        let mut cycle = endpoint();
        cycle.set(0x50, 0x5001).set(0x100, 0x0001 | 1 << 16 | 0x100 << 20);
        assert_eq!(cycle.find(), Ok(Capabilities::default()));
        let gone = Space(vec![0xff; 4096]);
        assert!(is_gone(gone.read(COMMAND).unwrap()) && !is_gone(endpoint().read(COMMAND).unwrap()));
        assert!(is_gone(0xffff_0002), "VFIO emulates the command register of a virtual function");
        assert_eq!(gone.find(), Ok(Capabilities::default()));
        let short = Space(endpoint().0[..64].to_vec());
        assert_eq!(
            Capabilities::find(4096, |at| short.read(at)),
            Err(0x50),
            "an unprivileged user reads only the first 64 bytes"
        );
    }

    #[test]
    fn status_bits_are_at_the_offsets_of_the_specification() {
        let mut space = endpoint();
        let found = space.find().unwrap();
        let bits = |space: &Space| {
            let read = |at| space.read(at);
            let pending = found.transactions_pending(read).unwrap();
            (pending, found.ats_on(read).unwrap(), found.pri_on(read).unwrap())
        };
        assert_eq!(bits(&space), (Some(false), false, false));
        // All bits of the registers except the one that is read.
        space.set(0x88, !(1 << 21)).set(0x154, !(1 << 31)).set(0x164, !1);
        assert_eq!(bits(&space), (Some(false), false, false));
        space.set(0x88, 1 << 21).set(0x154, 1 << 31).set(0x164, 1);
        assert_eq!(bits(&space), (Some(true), true, true));
        let none = Capabilities::default();
        assert_eq!(none.transactions_pending(|at| space.read(at)), Ok(None));
        assert_eq!(
            (none.ats_on(|at| space.read(at)), none.pri_on(|at| space.read(at))),
            (Ok(false), Ok(false))
        );
    }
}
