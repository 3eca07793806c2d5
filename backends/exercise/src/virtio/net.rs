//! virtio-net (1af4:1041), for tests of a domain: frames that are looped back. The NIC must receive what it sends, from
//! a reflecting peer (a switch port in loopback; in the test rig a datagram socket connected to itself).
//!
//! Every transfer is one frame: a header in driver memory, then guest memory in a buffer of its own in the same chain,
//! so that `bytes` are written exactly at `iova`. For a read the payload is sent from `iova` and received in driver
//! memory; for a write it is sent from driver memory and received at `iova`. A late frame of an earlier transfer is
//! recognised by its serial number and ignored; its bytes may be at `iova` until the right frame arrives.
//!
//! The device does not report that a write faulted: a test must check the memory. A read that faulted yields no frame,
//! or zeroes ([`crate::edu::POISON`]) on QEMU.

use std::sync::Arc;
use std::time::Duration;

use passgate_backends::device::vfio::VfioDevice;
use passgate_backends::device::{OwnMemory, await_that};
use passgate_backends::{Device, Domain, Error, Result};
use passgate_bindings::{Failed, Iova, PAGE};

use super::queue::Queue;
use super::transport::Transport;
use crate::driven::{Driven, Engine};

/// Vendor and device id.
pub const IDS: (u16, u16) = (0x1af4, 0x1041);

/// The device's queues (5.1.2).
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const QUEUE_SIZE: u16 = 16;

/// The maximum number of bytes of guest memory in one frame, which may have 1514 bytes in all.
const MAX_PAYLOAD_BYTES: usize = 1024;

/// The parts of the header: `struct virtio_net_hdr` (5.1.6); the Ethernet header (broadcast destination, locally
/// administered source, EtherType "local experimental 1" of IEEE 802); the serial number. The header is long enough
/// that no frame is padded to Ethernet's minimum length.
const NET_HEADER: u64 = 12;
const ETHERNET: [u8; 14] = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x02, 0, 0, 0, 0, 2, 0x88, 0xb5];
const SERIAL: u64 = NET_HEADER + 14;
const HEADER: u32 = 12 + 64;

/// Offsets in driver memory.
const RX: u64 = 0;
const TX: u64 = 1024;
const HEADER_OUT: u64 = 2048;
const HEADER_IN: u64 = 2048 + 256;
const OUT: u64 = PAGE;
const IN: u64 = PAGE + 1024;
/// A receive buffer must have at least 1526 bytes (5.1.6.3.1); this is its part after the payload, which is never
/// filled.
const REST: u64 = PAGE + 2048;
const REST_LEN: u32 = 1526;
const PAGES: usize = 2;

/// The time after which a frame counts as lost.
const FRAME_TIMEOUT: Duration = Duration::from_secs(2);

/// The NIC, as a device.
pub type VirtioNet = Driven<Nic>;

/// The driver, with the first pair of queues.
#[derive(Debug)]
pub struct Nic {
    transport: Transport,
    memory: OwnMemory,
    rx: Queue,
    tx: Queue,
    /// The serial number of the last frame sent. No number is used twice, also after a reset of the device.
    serial: u64,
    device: Arc<VfioDevice>,
}

/// Drives `device`, which is in `domain`.
pub fn open(device: VfioDevice, domain: &Arc<dyn Domain>) -> Result<VirtioNet> {
    let device = Arc::new(device);
    let transport = Transport::find(&device)?;
    transport.reset()?; // before driver memory is mapped: the queues of a previous driver may still be enabled
    let memory = OwnMemory::map(domain, PAGES)?;
    let failed = |failed| device.failed(failed);
    memory.file().write(HEADER_OUT + NET_HEADER, &ETHERNET).map_err(failed)?;
    let nic = Nic {
        transport,
        rx: Queue::new(&memory, RX, QUEUE_SIZE).map_err(failed)?,
        tx: Queue::new(&memory, TX, QUEUE_SIZE).map_err(failed)?,
        memory,
        serial: 0,
        device: Arc::clone(&device),
    };
    Driven::new(device, nic)
}

impl Nic {
    /// Sends a frame with `len` bytes from `source` and receives them at `target`. Returns false if the frame is lost.
    fn loop_back(&mut self, source: Iova, target: Iova, len: usize) -> Result<bool> {
        let Ok(len) = u32::try_from(len) else { return Ok(false) }; // at most MAX_PAYLOAD_BYTES
        self.serial += 1;
        let memory = &self.memory;
        let failed = |failed| self.device.failed(failed);
        // Not aligned, so not written by one access. That is safe: the device reads it only after the notification.
        memory.file().write(HEADER_OUT + SERIAL, &self.serial.to_le_bytes()).map_err(failed)?;
        let room = [(memory.iova(HEADER_IN), HEADER), (target, len), (memory.iova(REST), REST_LEN)];
        let receives = self.rx.submit(memory, &[], &room).map_err(failed)?;
        self.transport.notify(RECEIVE, &self.rx)?;
        let frame = [(memory.iova(HEADER_OUT), HEADER), (source, len)];
        self.tx.submit(memory, &frame, &[]).map_err(failed)?;
        self.transport.notify(TRANSMIT, &self.tx)?;

        let (mut sent, mut seen) = (false, false);
        await_that(FRAME_TIMEOUT, || {
            sent |= self.tx.pop_used(memory).map_err(failed)?.is_some();
            if let Some(received) = self.rx.pop_used(memory).map_err(failed)? {
                seen = is_frame(memory, received, (receives, len, self.serial)).map_err(failed)?;
                if !seen {
                    self.rx.make_available(memory, receives).map_err(failed)?;
                    self.transport.notify(RECEIVE, &self.rx)?;
                }
            }
            Ok(sent && seen || self.transport.needs_reset()?)
        })?;
        Ok(sent && seen)
    }

    fn fault(&self, iova: Iova) -> Error {
        Error::Fault { device: self.device.name().to_owned(), iova }
    }
}

/// Returns true if the received frame (its chain and its number of bytes) is the one with this serial number and `len`
/// bytes of payload, and not a late one or one of another sender.
fn is_frame(
    memory: &OwnMemory,
    received: (u32, u32),
    (chain, len, serial): (u16, u32, u64),
) -> Result<bool, Failed> {
    let mut header = [0; HEADER as usize];
    memory.file().read(HEADER_IN, &mut header)?;
    let header = &header[NET_HEADER as usize..];
    Ok(received == (u32::from(chain), HEADER + len)
        && header.starts_with(&ETHERNET)
        && header[ETHERNET.len()..].starts_with(&serial.to_le_bytes()))
}

impl Engine for Nic {
    const CHUNK: usize = MAX_PAYLOAD_BYTES;

    fn reset(&mut self) -> Result<()> {
        self.transport.reset()
    }

    fn start(&mut self) -> Result<()> {
        let failed = |failed| self.device.failed(failed);
        self.rx = Queue::new(&self.memory, RX, QUEUE_SIZE).map_err(failed)?;
        self.tx = Queue::new(&self.memory, TX, QUEUE_SIZE).map_err(failed)?;
        self.transport.negotiate()?;
        self.transport.set_up(RECEIVE, &mut self.rx, &self.memory)?;
        self.transport.set_up(TRANSMIT, &mut self.tx, &self.memory)?;
        self.transport.set_driver_ok()
    }

    /// Receive buffers are taken back only by a reset; nothing else is in flight between transfers.
    fn stop(&mut self) -> Result<()> {
        self.transport.reset()
    }

    fn read(&mut self, iova: Iova, bytes: &mut [u8]) -> Result<()> {
        if !self.loop_back(iova, self.memory.iova(IN), bytes.len())? {
            return Err(self.fault(iova));
        }
        self.memory.file().read(IN, bytes).map_err(|failed| self.device.failed(failed))
    }

    fn write(&mut self, iova: Iova, bytes: &[u8]) -> Result<()> {
        self.memory.file().write(OUT, bytes).map_err(|failed| self.device.failed(failed))?;
        if self.loop_back(self.memory.iova(OUT), iova, bytes.len())? { Ok(()) } else { Err(self.fault(iova)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use passgate_sim::iommu::{Memory, Sim};

    #[test]
    fn only_the_last_frame_sent_is_accepted() {
        let domain: Arc<dyn Domain> = Arc::new(Sim::new(Sim::CAPABILITIES, Memory::new()).unwrap());
        let memory = OwnMemory::map(&domain, PAGES).unwrap();
        let put = |at, bytes: &[u8]| memory.file().write(HEADER_IN + at, bytes).unwrap();
        let is = |received| is_frame(&memory, received, (3, 100, 0x0123_4567_89ab)).unwrap();
        put(NET_HEADER, &ETHERNET);
        put(SERIAL, &0x0123_4567_89ab_u64.to_le_bytes());
        assert!(is((3, HEADER + 100)));
        assert!(!is((2, HEADER + 100)), "another chain");
        assert!(!is((3, HEADER + 99)), "truncated");
        put(SERIAL, &[0xaa]);
        assert!(!is((3, HEADER + 100)), "late");
        put(SERIAL, &0x0123_4567_89ab_u64.to_le_bytes());
        put(SERIAL - 1, &[0]);
        assert!(!is((3, HEADER + 100)), "of another sender");
    }
}
