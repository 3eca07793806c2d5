//! The registers and descriptors of the Intel 82576 that this driver uses, with the names of its datasheet (document
//! 320961, chapters 7 and 8).

/// Device Control.
pub(super) const CTRL: u64 = 0x0000;
pub(super) const CTRL_FULL_DUPLEX: u32 = 1;
/// Requests that the device issue no more requests ([`STATUS_MASTER`] is clear once none is pending).
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

/// MDI Control: an access to a register of the PHY. Data in the low half, then register, PHY address and operation.
pub(super) const MDIC: u64 = 0x0020;
pub(super) const MDIC_REGISTER: u32 = 16;
pub(super) const MDIC_PHY_1: u32 = 1 << 21;
pub(super) const MDIC_WRITE: u32 = 1 << 26;
pub(super) const MDIC_READY: u32 = 1 << 28;
pub(super) const MDIC_ERROR: u32 = 1 << 30;

/// The Control register of the PHY (IEEE 802.3, 22.2.4.1).
pub(super) const PHY_CONTROL: u32 = 0;
pub(super) const PHY_1000: u32 = 1 << 6;
pub(super) const PHY_FULL_DUPLEX: u32 = 1 << 8;
pub(super) const PHY_NEGOTIATE_AGAIN: u32 = 1 << 9;
pub(super) const PHY_NEGOTIATE: u32 = 1 << 12;
pub(super) const PHY_LOOPBACK: u32 = 1 << 14;

/// Interrupt Mask Clear and Extended Interrupt Mask Clear: a one masks the interrupt.
pub(super) const IMC: u64 = 0x00d8;
pub(super) const EIMC: u64 = 0x1528;

/// Receive Control.
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
/// The maximum packet length of the device in bytes.
pub(super) const MAX_PACKET_BYTES: u32 = 9728;

/// The registers of the first receive queue and of the first transmit queue, which have the same layout.
pub(super) const RECEIVE: u64 = 0xc000;
pub(super) const TRANSMIT: u64 = 0xe000;
pub(super) const BASE_LOW: u64 = 0x00;
pub(super) const BASE_HIGH: u64 = 0x04;
pub(super) const LENGTH: u64 = 0x08;
pub(super) const HEAD: u64 = 0x10;
pub(super) const TAIL: u64 = 0x18;
pub(super) const CONTROL: u64 = 0x28;
pub(super) const QUEUE_ENABLE: u32 = 1 << 25;

/// Split and Replication Receive Control: the buffer size in KiB, and advanced descriptors with one buffer.
pub(super) const SRRCTL: u64 = RECEIVE + 0x0c;
pub(super) const SRRCTL_ADVANCED: u32 = 1 << 25;

/// The size of a receive buffer in bytes, the smallest that the device supports (1 in SRRCTL.BSIZEPACKET).
pub(super) const RX_BUFFER_BYTES: u64 = 1024;

/// Bits of the second word of an advanced transmit descriptor: data descriptor (DTYP, DEXT, IFCS).
pub(super) const TX_DATA: u64 = 3 << 20 | 1 << 29 | 1 << 25;
/// Bits of the second word of a frame's last descriptor: end of packet, report status (EOP, RS).
pub(super) const TX_LAST: u64 = 1 << 24 | 1 << 27;
/// The lowest bit of the length of the whole frame (PAYLEN).
pub(super) const TX_PAYLOAD: u64 = 46;
/// Written back by the device: descriptor done (DD).
pub(super) const TX_DONE: u64 = 1 << 32;

/// Written back by the device in the second word of an advanced receive descriptor: descriptor done (DD), end of packet
/// (EOP), and the lowest bit of the length.
pub(super) const RX_DONE: u64 = 1;
pub(super) const RX_LAST: u64 = 1 << 1;
pub(super) const RX_LENGTH: u64 = 32;
