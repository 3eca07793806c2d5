//! Registers and descriptors of the Intel 82576 that this driver uses, by the names of its datasheet (320961, chapters 7
//! and 8).

/// Device Control.
pub(super) const CTRL: u64 = 0x0000;
pub(super) const CTRL_FULL_DUPLEX: u32 = 1;
/// Asks the device to issue no more requests; STATUS says when none is pending.
pub(super) const CTRL_MASTER_DISABLE: u32 = 1 << 2;
pub(super) const CTRL_LINK_UP: u32 = 1 << 6;
pub(super) const CTRL_1000: u32 = 2 << 8;
pub(super) const CTRL_FORCE_SPEED: u32 = 1 << 11;
pub(super) const CTRL_FORCE_DUPLEX: u32 = 1 << 12;
pub(super) const CTRL_RESET: u32 = 1 << 26;

/// Device Status.
pub(super) const STATUS: u64 = 0x0008;
pub(super) const STATUS_LINK_UP: u32 = 1 << 1;
pub(super) const STATUS_MASTER: u32 = 1 << 19;

/// MDI Control: a register of the PHY. Data in the low half, then register, PHY and what to do.
pub(super) const MDIC: u64 = 0x0020;
pub(super) const MDIC_REGISTER: u32 = 16;
pub(super) const MDIC_PHY_1: u32 = 1 << 21;
pub(super) const MDIC_WRITE: u32 = 1 << 26;
pub(super) const MDIC_READY: u32 = 1 << 28;
pub(super) const MDIC_ERROR: u32 = 1 << 30;

/// The PHY's control register (IEEE 802.3, 22.2.4.1).
pub(super) const PHY_CONTROL: u32 = 0;
pub(super) const PHY_1000: u32 = 1 << 6;
pub(super) const PHY_FULL_DUPLEX: u32 = 1 << 8;
pub(super) const PHY_NEGOTIATE_AGAIN: u32 = 1 << 9;
pub(super) const PHY_NEGOTIATE: u32 = 1 << 12;
pub(super) const PHY_LOOPBACK: u32 = 1 << 14;

/// Interrupt Mask Clear, and the extended one: ones mask.
pub(super) const IMC: u64 = 0x00d8;
pub(super) const EIMC: u64 = 0x1528;

/// Receive Control: everything that arrives, up to 9 728 bytes, without its checksum.
pub(super) const RCTL: u64 = 0x0100;
pub(super) const RCTL_ENABLE: u32 = 1 << 1;
pub(super) const RCTL_ALL_UNICAST: u32 = 1 << 3;
pub(super) const RCTL_ALL_MULTICAST: u32 = 1 << 4;
pub(super) const RCTL_LONG: u32 = 1 << 5;
pub(super) const RCTL_BROADCAST: u32 = 1 << 15;
pub(super) const RCTL_STRIP_CHECKSUM: u32 = 1 << 26;

/// Transmit Control.
pub(super) const TCTL: u64 = 0x0400;
pub(super) const TCTL_ENABLE: u32 = 1 << 1;
pub(super) const TCTL_PAD: u32 = 1 << 3;

/// Receive Long Packet Maximum Length, for [`RCTL_LONG`].
pub(super) const RLPML: u64 = 0x5004;
pub(super) const LONGEST: u32 = 9728;

/// The registers of the first receive queue and of the first transmit queue, which are alike.
pub(super) const RECEIVE: u64 = 0xc000;
pub(super) const TRANSMIT: u64 = 0xe000;
pub(super) const BASE_LOW: u64 = 0x00;
pub(super) const BASE_HIGH: u64 = 0x04;
pub(super) const LENGTH: u64 = 0x08;
pub(super) const HEAD: u64 = 0x10;
pub(super) const TAIL: u64 = 0x18;
pub(super) const CONTROL: u64 = 0x28;
pub(super) const QUEUE_ENABLE: u32 = 1 << 25;

/// Split and Replication Receive Control: buffers of so many KiB, advanced descriptors with one buffer.
pub(super) const SRRCTL: u64 = RECEIVE + 0x0c;
pub(super) const SRRCTL_ADVANCED: u32 = 1 << 25;

/// Bytes of a receive buffer, the fewest that the device knows: 1 in SRRCTL's packet size.
pub(super) const BUFFER: u64 = 1024;

/// In the second word of an advanced transmit descriptor: a data descriptor, and of a frame's last one
/// that it is the last and that the device says when it is done.
pub(super) const TX_DATA: u64 = 3 << 20 | 1 << 29 | 1 << 25;
pub(super) const TX_LAST: u64 = 1 << 24 | 1 << 27;
/// Where the length of the whole frame is.
pub(super) const TX_PAYLOAD: u64 = 46;
/// Written back.
pub(super) const TX_DONE: u64 = 1 << 32;

/// Written back in the second word of an advanced receive descriptor: done, the frame's last, length.
pub(super) const RX_DONE: u64 = 1;
pub(super) const RX_LAST: u64 = 1 << 1;
pub(super) const RX_LENGTH: u64 = 32;
