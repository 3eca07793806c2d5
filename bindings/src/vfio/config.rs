//! PCI configuration space: where a function's capabilities lie (PCI 3.0, 6.7; PCIe 6.0, 7.5.3 and 7.9.3).
//!
//! Every pointer comes from the device and is checked; a list that runs in circles ends.

/// The command register.
pub const COMMAND: u16 = 0x04;
/// In the command register: the function answers accesses to its memory.
pub const COMMAND_MEMORY: u16 = 1 << 1;
/// In the command register: Bus Master Enable, the function may issue requests.
pub const COMMAND_MASTER: u16 = 1 << 2;

/// Returns whether the 4 bytes at [`COMMAND`] are those of a function that does not answer: removed, without power
/// (D3cold), or behind a link that is down. Every read of it is completed with all ones then (PCIe 6.0, 2.3.2), and no
/// function has a Status register of all ones, because some bits of it are reserved (7.5.1.1.4).
pub fn is_gone(word: u32) -> bool {
    word >> 16 == 0xffff
}

/// The first byte behind the space that every function has.
const EXTENDED: u16 = 0x100;

/// Links of either list that are followed: no more of them fit.
const LINKS: usize = 48;
const EXTENDED_LINKS: usize = 960;

/// The capabilities that bear on how a function's DMA is stopped: where each begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Capabilities {
    /// PCI Express (id 0x10); none for a conventional PCI device.
    pub express: Option<u16>,
    /// Address Translation Services (extended, id 0x0f): it caches translations.
    pub ats: Option<u16>,
    /// Page Request Interface (extended, id 0x13): it asks for pages.
    pub pri: Option<u16>,
}

impl Capabilities {
    /// Finds them in a space of `size` bytes; `read` gives the 4 bytes at an offset divisible by 4.
    pub fn find<E>(size: u64, mut read: impl FnMut(u16) -> Result<u32, E>) -> Result<Self, E> {
        let mut found = Self::default();
        // Status register, Capabilities List.
        let status = read(COMMAND)? >> 16;
        let mut at = if status != 0xffff && status & 1 << 4 != 0 { read(0x34)? as u16 & 0xfc } else { 0 };
        for _ in 0..LINKS {
            if at < 0x40 {
                break;
            }
            let header = read(at)?;
            if header & 0xff == 0x10 {
                found.express.get_or_insert(at);
            }
            at = (header >> 8) as u16 & 0xfc;
        }
        if size <= u64::from(EXTENDED) {
            return Ok(found);
        }
        at = EXTENDED;
        for _ in 0..EXTENDED_LINKS {
            let header = read(at)?;
            match header {
                0 | u32::MAX => break,
                _ if header & 0xffff == 0x0f => _ = found.ats.get_or_insert(at),
                _ if header & 0xffff == 0x13 => _ = found.pri.get_or_insert(at),
                _ => {}
            }
            at = (header >> 20) as u16 & 0xffc;
            if at < EXTENDED || u64::from(at) + 4 > size {
                break;
            }
        }
        Ok(found)
    }

    /// Whether requests of the function have not been completed yet (Device Status, Transactions Pending; PCIe
    /// 6.0, 7.5.3.5). None for a function that cannot say.
    pub fn transactions_pending<E>(
        &self,
        mut read: impl FnMut(u16) -> Result<u32, E>,
    ) -> Result<Option<bool>, E> {
        let Some(express) = self.express else { return Ok(None) };
        // Device Control at 8, Device Status at 10.
        Ok(Some(read(express + 8)? >> 16 & 1 << 5 != 0))
    }

    /// Whether the function may use its translation cache (ATS Control, Enable).
    pub fn ats_on<E>(&self, mut read: impl FnMut(u16) -> Result<u32, E>) -> Result<bool, E> {
        let Some(ats) = self.ats else { return Ok(false) };
        // ATS Capability at 4, ATS Control at 6.
        Ok(read(ats + 4)? >> 31 != 0)
    }

    /// Whether the function may ask for pages (Page Request Control, Enable).
    pub fn pri_on<E>(&self, mut read: impl FnMut(u16) -> Result<u32, E>) -> Result<bool, E> {
        let Some(pri) = self.pri else { return Ok(false) };
        Ok(read(pri + 4)? & 1 != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A configuration space as bytes; reading beyond it is an error.
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
    fn capabilities_are_found_by_following_the_lists() {
        let found = endpoint().find();
        assert_eq!(found, Ok(Capabilities { express: Some(0x80), ats: Some(0x150), pri: Some(0x160) }));
        let mut conventional = Space::new(256);
        conventional.set(4, 1 << 20).set(0x34, 0x40).set(0x40, 0x0005);
        assert_eq!(conventional.find(), Ok(Capabilities::default()), "MSI alone");
        let mut without = endpoint();
        without.set(4, 0x0006);
        assert_eq!(without.find().unwrap().express, None, "no list, whatever the pointer says");
        let mut inside = endpoint();
        inside.set(0x34, 0x3c).set(0x3c, 0x0010);
        assert_eq!(inside.find().unwrap().express, None, "no capability lies in the header");
    }

    #[test]
    fn a_hidden_first_capability_does_not_end_the_list() {
        let mut space = endpoint();
        space.set(0x100, 0x150 << 20); // as vfio-pci shows one that it hides
        assert_eq!(space.find().unwrap().ats, Some(0x150));
    }

    #[test]
    fn circles_end_and_a_device_that_is_gone_has_nothing() {
        let mut circle = endpoint();
        circle.set(0x50, 0x5001).set(0x100, 0x0001 | 1 << 16 | 0x100 << 20);
        assert_eq!(circle.find(), Ok(Capabilities::default()));
        let gone = Space(vec![0xff; 4096]);
        assert!(is_gone(gone.read(COMMAND).unwrap()) && !is_gone(endpoint().read(COMMAND).unwrap()));
        assert!(is_gone(0xffff_0002), "of a virtual function VFIO makes up the command register");
        assert_eq!(gone.find(), Ok(Capabilities::default()));
        let short = Space(endpoint().0[..64].to_vec());
        assert_eq!(
            Capabilities::find(4096, |at| short.read(at)),
            Err(0x50),
            "what a user without rights sees"
        );
    }

    #[test]
    fn each_bit_is_where_the_specification_has_it() {
        let mut space = endpoint();
        let found = space.find().unwrap();
        let seen = |space: &Space| {
            let read = |at| space.read(at);
            let pending = found.transactions_pending(read).unwrap();
            (pending, found.ats_on(read).unwrap(), found.pri_on(read).unwrap())
        };
        assert_eq!(seen(&space), (Some(false), false, false));
        // Every bit of the registers but the one in question.
        space.set(0x88, !(1 << 21)).set(0x154, !(1 << 31)).set(0x164, !1);
        assert_eq!(seen(&space), (Some(false), false, false));
        space.set(0x88, 1 << 21).set(0x154, 1 << 31).set(0x164, 1);
        assert_eq!(seen(&space), (Some(true), true, true));
        let none = Capabilities::default();
        assert_eq!(none.transactions_pending(|at| space.read(at)), Ok(None));
        assert_eq!(
            (none.ats_on(|at| space.read(at)), none.pri_on(|at| space.read(at))),
            (Ok(false), Ok(false))
        );
    }
}
