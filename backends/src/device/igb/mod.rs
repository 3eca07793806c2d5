//! Intel's 82576 NIC (8086:10c9), to try a domain with: frames that the PHY loops back, so that what the device
//! reads from one place it writes to another.
//!
//! Every transfer is one frame. Its first kilobyte is of the driver's own: an Ethernet header and zeroes. A receive
//! buffer is a kilobyte, so the rest of the frame goes to buffers of its own, which begin at any byte: `bytes` land
//! exactly at `iova`, and a byte behind them is never touched. For a read the rest of the frame is sent from `iova`
//! and received by the driver; for a write it is sent by the driver and received at `iova`.
//!
//! No interrupt, no BAR mapped, one queue each way, both in the driver's own memory. The device cannot tell that a
//! write faulted: look at the memory. A read that faulted brings no frame, or zeroes ([`super::edu::POISON`]) as in
//! QEMU, whose reads never fail. Tried on QEMU's model of the device; on a real one nobody has yet.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use passgate_bindings::vfio::device::Region;
use passgate_bindings::{Failed, Iova, PAGE};
use rustix::io::Errno;

use super::Device;
use super::driven::{Driven, Engine, await_that};
use super::own::OwnMemory;
use super::vfio::VfioDevice;
use crate::iommu::Domain;
use crate::{Error, Result};

mod queue;
mod registers;

use queue::{Queue, pieces};
use registers::*;

/// Vendor and device id.
pub const IDS: (u16, u16) = (0x8086, 0x10c9);

/// Bytes of guest memory in one frame.
const CHUNK: usize = 4096;

/// Where things are in the driver's own memory.
const TX_RING: u64 = 0;
const RX_RING: u64 = 2048;
const FILLER_OUT: u64 = PAGE;
const FILLER_IN: u64 = PAGE + BUFFER;
const OUT: u64 = 2 * PAGE;
const IN: u64 = 3 * PAGE;
const PAGES: usize = 4;

/// A frame to everybody, from an address of nobody's, of a type for experiments (IEEE 802 local experimental 1).
const HEADER: [u8; 14] = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x02, 0, 0, 0, 0, 1, 0x88, 0xb5];

/// A frame that takes longer never arrives.
const DEADLINE: Duration = Duration::from_secs(1);
/// A reset takes a millisecond, a link in loopback less than negotiation, which takes seconds.
const RESET_WAIT: Duration = Duration::from_millis(10);
const FORCED_WAIT: Duration = Duration::from_millis(100);
const LINK_WAIT: Duration = Duration::from_secs(5);

/// The NIC, as a device.
pub type Igb = Driven<Port>;

/// The physical function's first queues.
#[derive(Debug)]
pub struct Port {
    registers: Region,
    memory: OwnMemory,
    tx: Queue,
    rx: Queue,
    device: Arc<VfioDevice>,
}

#[derive(Debug, Clone, Copy)]
enum Direction {
    Out,
    In,
}

/// Drives `device`, which is in `domain`.
pub fn open(device: VfioDevice, domain: &Arc<dyn Domain>) -> Result<Igb> {
    let device = Arc::new(device);
    let memory = OwnMemory::map(domain, PAGES)?;
    memory.file().write(FILLER_OUT, &HEADER).map_err(|failed| device.failed(failed))?;
    let port = Port {
        registers: device.region(0)?,
        memory,
        tx: Queue::new(TRANSMIT, TX_RING),
        rx: Queue::new(RECEIVE, RX_RING),
        device: Arc::clone(&device),
    };
    Driven::new(device, port)
}

impl Port {
    /// Sends a frame with `len` bytes from `source`, and receives them at `target`.
    fn pass(&mut self, source: Iova, target: Iova, len: usize) -> Result<()> {
        let len = len as u64; // at most CHUNK
        let mut last_in = self.put(Direction::In, self.memory.iova(FILLER_IN), 0)?;
        let mut last_len = BUFFER;
        for at in (0..len).step_by(BUFFER as usize) {
            last_in = self.put(Direction::In, Iova(target.0 + at), 0)?;
            last_len = BUFFER.min(len - at);
        }
        self.tell(self.rx)?;

        let frame = (BUFFER + len) << TX_PAYLOAD | TX_DATA;
        let mut last_out = self.put(Direction::Out, self.memory.iova(FILLER_OUT), frame | BUFFER)?;
        for (at, piece) in pieces(source, len) {
            let end = if at.0 + piece == source.0 + len { TX_LAST } else { 0 };
            last_out = self.put(Direction::Out, at, frame | end | piece)?;
        }
        self.tell(self.tx)?;

        let arrived = await_that(DEADLINE, || {
            let sent = self.tx.word(&self.memory, last_out).map_err(|failed| self.device.failed(failed))?;
            let seen = self.rx.word(&self.memory, last_in).map_err(|failed| self.device.failed(failed))?;
            let whole = RX_DONE | RX_LAST;
            Ok(sent & TX_DONE != 0 && seen & whole == whole && seen >> RX_LENGTH & 0xffff == last_len)
        })?;
        if arrived {
            Ok(())
        } else {
            Err(Error::Fault { device: self.device.name().to_owned(), iova: source })
        }
    }

    /// Gives the device what was put into `queue`.
    fn tell(&self, queue: Queue) -> Result<()> {
        self.set(queue.registers + TAIL, queue.tail())
    }

    /// Has the PHY loop back, and waits for the link. A real one is up once forced; QEMU's comes up only by
    /// negotiation.
    fn link(&self) -> Result<()> {
        let forced = CTRL_FULL_DUPLEX | CTRL_LINK_UP | CTRL_1000 | CTRL_FORCE_SPEED | CTRL_FORCE_DUPLEX;
        self.set(CTRL, self.get(CTRL)? & !CTRL_MASTER_DISABLE | forced)?;
        let loopback = PHY_LOOPBACK | PHY_FULL_DUPLEX | PHY_1000;
        self.set_phy(loopback)?;
        if self.linked(FORCED_WAIT)? {
            return Ok(());
        }
        self.set_phy(loopback | PHY_NEGOTIATE | PHY_NEGOTIATE_AGAIN)?;
        if self.linked(LINK_WAIT)? { Ok(()) } else { Err(self.late("bringing up the link of an igb NIC")) }
    }

    fn linked(&self, within: Duration) -> Result<bool> {
        await_that(within, || Ok(self.get(STATUS)? & STATUS_LINK_UP != 0))
    }

    fn set_phy(&self, value: u32) -> Result<()> {
        const CALL: &str = "writing to the PHY of an igb NIC";
        self.set(MDIC, value | PHY_CONTROL << MDIC_REGISTER | MDIC_PHY_1 | MDIC_WRITE)?;
        if !await_that(DEADLINE, || Ok(self.get(MDIC)? & MDIC_READY != 0))? {
            return Err(self.late(CALL));
        }
        match self.get(MDIC)? & MDIC_ERROR {
            0 => Ok(()),
            _ => Err(self.device.failed(Failed::new(CALL, Errno::IO))),
        }
    }

    /// Empties `queue` and hands it to the device.
    fn set_up(&self, queue: Queue) -> Result<()> {
        let (at, base) = (queue.registers, self.memory.iova(queue.offset).0);
        self.set(at + BASE_LOW, base as u32)?; // the low half
        self.set(at + BASE_HIGH, (base >> 32) as u32)?;
        self.set(at + LENGTH, Queue::BYTES)?;
        self.set(at + HEAD, 0)?;
        self.set(at + TAIL, 0)?;
        self.set(at + CONTROL, QUEUE_ENABLE)
    }

    /// Appends to `queue` of this port, as [`Queue::put`].
    fn put(&mut self, to: Direction, at: Iova, second: u64) -> Result<u32> {
        let queue = match to {
            Direction::Out => &mut self.tx,
            Direction::In => &mut self.rx,
        };
        queue.put(&self.memory, at, second).map_err(|failed| self.device.failed(failed))
    }

    fn get(&self, register: u64) -> Result<u32> {
        self.device.read_u32(self.registers, register)
    }

    fn set(&self, register: u64, value: u32) -> Result<()> {
        self.device.write_u32(self.registers, register, value)
    }

    fn late(&self, call: &'static str) -> Error {
        self.device.failed(Failed::new(call, Errno::TIMEDOUT))
    }
}

impl Engine for Port {
    const CHUNK: usize = CHUNK;

    /// CTRL.RST takes everything from the device but its PCI configuration. It takes no notice of what is under
    /// way, so whatever can be ended in order is ended before.
    fn reset(&mut self) -> Result<()> {
        if let Err(error) = self.stop() {
            log::warn!("resetting all the same: {error}");
        }
        self.set(CTRL, self.get(CTRL)? | CTRL_RESET)?;
        thread::sleep(RESET_WAIT);
        if !await_that(DEADLINE, || Ok(self.get(CTRL)? & CTRL_RESET == 0))? {
            return Err(self.late("resetting an igb NIC"));
        }
        self.set(IMC, u32::MAX)?;
        self.set(EIMC, u32::MAX)
    }

    fn start(&mut self) -> Result<()> {
        self.link()?;
        (self.tx, self.rx) = (Queue::new(TRANSMIT, TX_RING), Queue::new(RECEIVE, RX_RING));
        self.set(SRRCTL, SRRCTL_ADVANCED | (BUFFER / 1024) as u32)?;
        self.set(RLPML, LONGEST)?;
        self.set_up(self.rx)?;
        self.set_up(self.tx)?;
        let everything = RCTL_ALL_UNICAST | RCTL_ALL_MULTICAST | RCTL_BROADCAST | RCTL_LONG;
        self.set(RCTL, RCTL_ENABLE | everything | RCTL_STRIP_CHECKSUM)?;
        self.set(TCTL, self.get(TCTL)? | TCTL_ENABLE | TCTL_PAD)
    }

    /// Both directions off, then the device's own word that no request of it is pending (the datasheet's "master
    /// disable"). A device that cannot issue requests says so too.
    fn stop(&mut self) -> Result<()> {
        self.set(RCTL, 0)?;
        self.set(TCTL, self.get(TCTL)? & !TCTL_ENABLE)?;
        for queue in [RECEIVE, TRANSMIT] {
            self.set(queue + CONTROL, 0)?;
        }
        self.set(CTRL, self.get(CTRL)? | CTRL_MASTER_DISABLE)?;
        let quiet = await_that(DEADLINE, || Ok(self.get(STATUS)? & STATUS_MASTER == 0))?;
        if quiet { Ok(()) } else { Err(self.late("waiting for the requests of an igb NIC to end")) }
    }

    fn read(&mut self, iova: Iova, bytes: &mut [u8]) -> Result<()> {
        self.pass(iova, self.memory.iova(IN), bytes.len())?;
        self.memory.file().read(IN, bytes).map_err(|failed| self.device.failed(failed))
    }

    fn write(&mut self, iova: Iova, bytes: &[u8]) -> Result<()> {
        self.memory.file().write(OUT, bytes).map_err(|failed| self.device.failed(failed))?;
        self.pass(self.memory.iova(OUT), iova, bytes.len()).map_err(|error| match error {
            Error::Fault { device, .. } => Error::Fault { device, iova },
            other => other,
        })
    }
}
