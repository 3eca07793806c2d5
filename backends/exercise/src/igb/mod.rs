//! Intel's 82576 NIC (8086:10c9), for tests of a domain: frames that the PHY loops back, so that the device writes to
//! one address what it has read from another.
//!
//! Every transfer is one frame. Its first kilobyte is in driver memory: an Ethernet header and zeroes. A receive buffer
//! is a kilobyte, so the rest of the frame is received in further buffers, which may begin at any byte: `bytes` are
//! written exactly at `iova`, and no byte after them. For a read the rest of the frame is sent from `iova` and received
//! in driver memory; for a write it is sent from driver memory and received at `iova`.
//!
//! Without interrupts and BAR mappings, with one queue for each direction, both in driver memory. The device does not
//! report that a write faulted: a test must check the memory. A read that faulted yields no frame, or zeroes
//! ([`crate::edu::POISON`]) on QEMU, whose reads never fail. Tested with QEMU's model, not yet with a real device.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use passgate_backends::device::vfio::VfioDevice;
use passgate_backends::device::{OwnMemory, await_that};
use passgate_backends::{Device, Domain, Error, Result};
use passgate_bindings::vfio::device::Region;
use passgate_bindings::{Failed, Iova, PAGE};
use rustix::io::Errno;

use crate::driven::{Driven, Engine};

mod queue;
mod registers;

use queue::{Queue, pieces};
use registers::*;

/// Vendor and device id.
pub const IDS: (u16, u16) = (0x8086, 0x10c9);

/// The maximum number of bytes of guest memory in one frame.
const MAX_PAYLOAD_BYTES: usize = 4096;

/// Offsets in driver memory.
const TX_RING: u64 = 0;
const RX_RING: u64 = 2048;
const FILLER_OUT: u64 = PAGE;
const FILLER_IN: u64 = PAGE + RX_BUFFER_BYTES;
const OUT: u64 = 2 * PAGE;
const IN: u64 = 3 * PAGE;
const PAGES: usize = 4;

/// The Ethernet header: broadcast destination, locally administered source, EtherType "local experimental 1" (IEEE
/// 802).
const HEADER: [u8; 14] = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x02, 0, 0, 0, 0, 1, 0x88, 0xb5];

/// The time after which a frame, or a register operation, counts as failed.
const TIMEOUT: Duration = Duration::from_secs(1);
/// The time before the first register access after a reset, which takes a millisecond.
const RESET_DELAY: Duration = Duration::from_millis(10);
/// The time within which a forced link comes up.
const FORCED_LINK_TIMEOUT: Duration = Duration::from_millis(100);
/// The time within which a negotiated link comes up. Negotiation takes seconds.
const NEGOTIATED_LINK_TIMEOUT: Duration = Duration::from_secs(5);

/// The NIC, as a device.
pub type Igb = Driven<Port>;

/// The first receive queue and the first transmit queue of the physical function.
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
    fn loop_back(&mut self, source: Iova, target: Iova, len: usize) -> Result<()> {
        let len = len as u64; // at most MAX_PAYLOAD_BYTES
        let mut last_in = self.append(Direction::In, self.memory.iova(FILLER_IN), 0)?;
        let mut last_len = RX_BUFFER_BYTES;
        for at in (0..len).step_by(RX_BUFFER_BYTES as usize) {
            last_in = self.append(Direction::In, Iova(target.0 + at), 0)?;
            last_len = RX_BUFFER_BYTES.min(len - at);
        }
        self.write_tail(self.rx)?;

        let frame = (RX_BUFFER_BYTES + len) << TX_PAYLOAD | TX_DATA;
        let mut last_out =
            self.append(Direction::Out, self.memory.iova(FILLER_OUT), frame | RX_BUFFER_BYTES)?;
        for (at, piece) in pieces(source, len) {
            let end = if at.0 + piece == source.0 + len { TX_LAST } else { 0 };
            last_out = self.append(Direction::Out, at, frame | end | piece)?;
        }
        self.write_tail(self.tx)?;

        let arrived = await_that(TIMEOUT, || {
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

    /// Hands the descriptors appended to `queue` to the device, by its tail register.
    fn write_tail(&self, queue: Queue) -> Result<()> {
        self.set(queue.registers + TAIL, queue.tail())
    }

    /// Sets the PHY to loopback, and waits for the link. The link of a real device is up once it is forced; QEMU's
    /// comes up only by negotiation.
    fn link(&self) -> Result<()> {
        let forced = CTRL_FULL_DUPLEX | CTRL_LINK_UP | CTRL_1000 | CTRL_FORCE_SPEED | CTRL_FORCE_DUPLEX;
        self.set(CTRL, self.get(CTRL)? & !CTRL_MASTER_DISABLE | forced)?;
        let loopback = PHY_LOOPBACK | PHY_FULL_DUPLEX | PHY_1000;
        self.set_phy(loopback)?;
        if self.linked(FORCED_LINK_TIMEOUT)? {
            return Ok(());
        }
        self.set_phy(loopback | PHY_NEGOTIATE | PHY_NEGOTIATE_AGAIN)?;
        if self.linked(NEGOTIATED_LINK_TIMEOUT)? {
            Ok(())
        } else {
            Err(self.timed_out("bringing up the link of an igb NIC"))
        }
    }

    fn linked(&self, within: Duration) -> Result<bool> {
        await_that(within, || Ok(self.get(STATUS)? & STATUS_LINK_UP != 0))
    }

    fn set_phy(&self, value: u32) -> Result<()> {
        const CALL: &str = "writing to the PHY of an igb NIC";
        self.set(MDIC, value | PHY_CONTROL << MDIC_REGISTER | MDIC_PHY_1 | MDIC_WRITE)?;
        if !await_that(TIMEOUT, || Ok(self.get(MDIC)? & MDIC_READY != 0))? {
            return Err(self.timed_out(CALL));
        }
        match self.get(MDIC)? & MDIC_ERROR {
            0 => Ok(()),
            _ => Err(self.device.failed(Failed::new(CALL, Errno::IO))),
        }
    }

    /// Programs `queue`, empty, into the device and enables it.
    fn set_up(&self, queue: Queue) -> Result<()> {
        let (at, base) = (queue.registers, self.memory.iova(queue.offset).0);
        self.set(at + BASE_LOW, base as u32)?; // the low half
        self.set(at + BASE_HIGH, (base >> 32) as u32)?;
        self.set(at + LENGTH, Queue::BYTES)?;
        self.set(at + HEAD, 0)?;
        self.set(at + TAIL, 0)?;
        self.set(at + CONTROL, QUEUE_ENABLE)
    }

    /// Appends a descriptor to a queue of this port, as [`Queue::append`].
    fn append(&mut self, to: Direction, at: Iova, second: u64) -> Result<u32> {
        let queue = match to {
            Direction::Out => &mut self.tx,
            Direction::In => &mut self.rx,
        };
        queue.append(&self.memory, at, second).map_err(|failed| self.device.failed(failed))
    }

    fn get(&self, register: u64) -> Result<u32> {
        self.device.read_u32(self.registers, register)
    }

    fn set(&self, register: u64, value: u32) -> Result<()> {
        self.device.write_u32(self.registers, register, value)
    }

    fn timed_out(&self, call: &'static str) -> Error {
        self.device.failed(Failed::new(call, Errno::TIMEDOUT))
    }
}

impl Engine for Port {
    const CHUNK: usize = MAX_PAYLOAD_BYTES;

    /// CTRL.RST resets everything in the device except its PCI configuration, without regard to transfers in progress;
    /// so the device is stopped first, if possible.
    fn reset(&mut self) -> Result<()> {
        if let Err(error) = self.stop() {
            log::warn!("resetting an igb NIC that did not stop: {error}");
        }
        self.set(CTRL, self.get(CTRL)? | CTRL_RESET)?;
        thread::sleep(RESET_DELAY);
        if !await_that(TIMEOUT, || Ok(self.get(CTRL)? & CTRL_RESET == 0))? {
            return Err(self.timed_out("resetting an igb NIC"));
        }
        self.set(IMC, u32::MAX)?;
        self.set(EIMC, u32::MAX)
    }

    fn start(&mut self) -> Result<()> {
        self.link()?;
        (self.tx, self.rx) = (Queue::new(TRANSMIT, TX_RING), Queue::new(RECEIVE, RX_RING));
        self.set(SRRCTL, SRRCTL_ADVANCED | (RX_BUFFER_BYTES / 1024) as u32)?;
        self.set(RLPML, MAX_PACKET_BYTES)?;
        self.set_up(self.rx)?;
        self.set_up(self.tx)?;
        let all_frames = RCTL_ALL_UNICAST | RCTL_ALL_MULTICAST | RCTL_BROADCAST | RCTL_LONG;
        self.set(RCTL, RCTL_ENABLE | all_frames | RCTL_STRIP_CHECKSUM)?;
        self.set(TCTL, self.get(TCTL)? | TCTL_ENABLE | TCTL_PAD)
    }

    /// Disables both directions, then waits until the device reports that no request of it is pending (GIO Master
    /// Disable in the datasheet). It reports that also while bus mastering is off.
    fn stop(&mut self) -> Result<()> {
        self.set(RCTL, 0)?;
        self.set(TCTL, self.get(TCTL)? & !TCTL_ENABLE)?;
        for queue in [RECEIVE, TRANSMIT] {
            self.set(queue + CONTROL, 0)?;
        }
        self.set(CTRL, self.get(CTRL)? | CTRL_MASTER_DISABLE)?;
        let quiet = await_that(TIMEOUT, || Ok(self.get(STATUS)? & STATUS_MASTER == 0))?;
        if quiet { Ok(()) } else { Err(self.timed_out("waiting for the requests of an igb NIC to end")) }
    }

    fn read(&mut self, iova: Iova, bytes: &mut [u8]) -> Result<()> {
        self.loop_back(iova, self.memory.iova(IN), bytes.len())?;
        self.memory.file().read(IN, bytes).map_err(|failed| self.device.failed(failed))
    }

    fn write(&mut self, iova: Iova, bytes: &[u8]) -> Result<()> {
        self.memory.file().write(OUT, bytes).map_err(|failed| self.device.failed(failed))?;
        self.loop_back(self.memory.iova(OUT), iova, bytes.len()).map_err(|error| match error {
            Error::Fault { device, .. } => Error::Fault { device, iova },
            other => other,
        })
    }
}
