//! An NVMe drive, to try a domain with (NVM Express base specification 2.0): one queue pair, one command at a time.
//!
//! A drive does DMA only to move blocks of its medium, or to say what it is. So bytes of the caller's own choosing go
//! by way of *scratch blocks*, the last of namespace 1, which are overwritten: only where somebody said that they may
//! be ([`crate::Accept::scratch`]). Without, [`Engine::touch`] has the drive write its identification to memory, which
//! changes nothing on it.
//!
//! With a controller that takes scatter-gather lists without alignment, transfers begin and end at any byte; else they
//! are of whole blocks, at multiples of 4 bytes. A DMA that faults is told by the controller (Data Transfer Error).
//! Completions come by interrupt; one that is lost is found within [`LOOK_EVERY`] all the same.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use passgate_bindings::vfio::device::Region;
use passgate_bindings::{Failed, Iova, PAGE};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;

use super::Device;
use super::driven::{Driven, Engine, await_that};
use super::own::OwnMemory;
use super::vfio::VfioDevice;
use crate::iommu::Domain;
use crate::{Error, Result};

mod command;
mod queue;
mod space;

use command::{Command, Completion, Data, block};
use queue::{Pair, SLOTS};
use space::{Scratch, scratch};

/// Class code: mass storage, non-volatile memory, NVM Express I/O controller.
pub const CLASS: u32 = 0x01_08_02;

/// `VFIO_PCI_MSIX_IRQ_INDEX`.
const MSIX: u32 = 2;

/// Registers (3.1.3).
const CAP: u64 = 0x00;
const CC: u64 = 0x14;
const CSTS: u64 = 0x1c;
const AQA: u64 = 0x24;
const ASQ: u64 = 0x28;
const ACQ: u64 = 0x30;
const DOORBELLS: u64 = 0x1000;

const CC_ENABLE: u32 = 1;
const CC_SHUT_DOWN: u32 = 1 << 14;
/// Entries of 2^6 bytes in submission queues, of 2^4 in completion queues; pages of 4096 bytes.
const CC_ENTRIES: u32 = 6 << 16 | 4 << 20;
const CSTS_READY: u32 = 1;
const CSTS_FATAL: u32 = 1 << 1;
const CSTS_SHUTDOWN: u32 = 3 << 2;
const CSTS_SHUTDOWN_DONE: u32 = 2 << 2;

/// Where things are in the driver's own memory.
const ADMIN: u64 = 0;
const IO: u64 = 2 * PAGE;
const OUT: u64 = 4 * PAGE;
const IN: u64 = 5 * PAGE;
const LIST: u64 = 6 * PAGE;
const PAGES: usize = 7;

/// Bytes of one transfer.
const CHUNK: usize = PAGE as usize;

/// A command that takes longer never completes.
const DEADLINE: Duration = Duration::from_secs(2);
/// How soon a completion is found whose interrupt was lost.
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// How long to look before waiting for the interrupt: a fast drive is done by then.
const SPIN: Duration = Duration::from_micros(50);

/// The drive, as a device.
pub type Nvme = Driven<Controller>;

/// A controller and its queues.
#[derive(Debug)]
pub struct Controller {
    registers: Region,
    memory: OwnMemory,
    /// By [`To`].
    queues: [Pair; 2],
    /// Bytes from one doorbell to the next.
    stride: u64,
    interrupt: OwnedFd,
    interrupts: u64,
    /// What it says it is.
    identity: Vec<u8>,
    may_scratch: bool,
    scratch: Option<Scratch>,
    /// Whether the I/O queues are there.
    running: bool,
    device: Arc<VfioDevice>,
}

/// Drives `device`, which is in `domain`; `scratch` allows the last blocks of namespace 1 to be overwritten.
pub fn open(device: VfioDevice, domain: &Arc<dyn Domain>, scratch: bool) -> Result<Nvme> {
    let device = Arc::new(device);
    let memory = OwnMemory::map(domain, PAGES)?;
    let failed = |failed| device.failed(failed);
    let interrupt = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
        .map_err(|errno| failed(Failed::new("eventfd", errno)))?;
    let registers = device.region(0)?;
    let controller = Controller {
        registers,
        queues: empty(&memory).map_err(failed)?,
        // CAP.DSTRD
        stride: 4 << (device.read_u32(registers, CAP + 4)? & 0xf),
        memory,
        interrupt,
        interrupts: 0,
        identity: Vec::new(),
        may_scratch: scratch,
        scratch: None,
        running: false,
        device: Arc::clone(&device),
    };
    Driven::new(device, controller)
}

impl Nvme {
    /// Interrupts that have come.
    pub fn interrupts(&self) -> u64 {
        self.0.engine().interrupts
    }
}

/// Which of the two pairs.
#[derive(Debug, Clone, Copy)]
enum To {
    Admin = 0,
    Io = 1,
}

/// Both pairs, empty.
fn empty(memory: &OwnMemory) -> std::result::Result<[Pair; 2], Failed> {
    Ok([Pair::empty(0, ADMIN, memory)?, Pair::empty(1, IO, memory)?])
}

impl Controller {
    /// Runs one command to its end; its status. None where it does not come to one.
    fn run(&mut self, to: To, command: Command) -> Result<Option<u16>> {
        let pair = &mut self.queues[to as usize];
        let tail = pair.put(&self.memory, command).map_err(|failed| self.device.failed(failed))?;
        let (queue, wanted) = (pair.id, pair.last());
        self.set(self.doorbell(queue, 0), tail.into())?;
        let begun = Instant::now();
        loop {
            let taken = self.queues[to as usize].take(&self.memory);
            let taken = taken.map_err(|failed| self.device.failed(failed))?;
            if let Some((Completion { id, status }, head)) = taken {
                self.set(self.doorbell(queue, 1), head.into())?;
                self.count_interrupts();
                if id == wanted {
                    return Ok(Some(status));
                }
            }
            match begun.elapsed() {
                over if over > DEADLINE => return Ok(None),
                young if young < SPIN => std::hint::spin_loop(),
                _ => self.wait_for_interrupt(),
            }
        }
    }

    /// Runs an admin command that must succeed.
    fn admin(&mut self, call: &'static str, command: Command) -> Result<()> {
        match self.run(To::Admin, command)? {
            Some(0) => Ok(()),
            Some(status) => {
                log::warn!("{}: {call}: status {status:#x}", self.device.name());
                Err(self.device.failed(Failed::new(call, Errno::IO)))
            }
            None => Err(self.device.failed(Failed::new(call, Errno::TIMEDOUT))),
        }
    }

    /// Moves blocks; a transfer that does not reach memory at `iova` is a fault there.
    fn transfer(&mut self, command: Command, iova: Iova) -> Result<()> {
        match self.run(To::Io, command)? {
            Some(0) => Ok(()),
            Some(Completion::TRANSFER_ERROR) | None => {
                Err(Error::Fault { device: self.device.name().to_owned(), iova })
            }
            Some(status) => {
                log::warn!("{}: moving blocks: status {status:#x}", self.device.name());
                Err(self.device.failed(Failed::new("moving blocks of an NVMe drive", Errno::IO)))
            }
        }
    }

    /// The doorbell of a submission queue's tail (0) or a completion queue's head (1) (3.1.3).
    fn doorbell(&self, queue: u16, which: u64) -> u64 {
        DOORBELLS + (u64::from(queue) * 2 + which) * self.stride
    }

    fn wait_for_interrupt(&mut self) {
        let wait = Timespec { tv_sec: 0, tv_nsec: LOOK_EVERY.subsec_nanos().into() };
        // What it says is of no matter: the queue is looked at again.
        let _ = poll(&mut [PollFd::new(&self.interrupt, PollFlags::IN)], Some(&wait));
        self.count_interrupts();
    }

    fn count_interrupts(&mut self) {
        let mut count = [0; 8];
        if rustix::io::read(&self.interrupt, &mut count).is_ok() {
            self.interrupts += u64::from_ne_bytes(count);
        }
    }

    /// Waits until the controller is ready, or not.
    fn ready(&self, ready: bool, call: &'static str) -> Result<()> {
        // CAP.TO, in units of 500 ms.
        let within = Duration::from_millis(500) * (self.get(CAP)? >> 24).max(1);
        let mut fatal = false;
        let came = await_that(within, || {
            let status = self.get(CSTS)?;
            fatal = status == u32::MAX || ready && status & CSTS_FATAL != 0;
            Ok(fatal || (status & CSTS_READY != 0) == ready)
        })?;
        match (came, fatal) {
            (true, false) => Ok(()),
            (_, true) => Err(self.device.failed(Failed::new(call, Errno::IO))),
            (false, false) => Err(self.device.failed(Failed::new(call, Errno::TIMEDOUT))),
        }
    }

    /// Learns what the controller is, and where the scratch blocks are.
    fn identify(&mut self) -> Result<()> {
        let at = self.memory.iova(IN);
        let mut identity = vec![0; CHUNK];
        self.admin("identifying an NVMe controller", Command::identify(0, at))?;
        self.load(IN, &mut identity)?;
        self.identity = identity;
        self.scratch = None;
        if self.may_scratch {
            let mut space = vec![0; CHUNK];
            self.admin("identifying an NVMe namespace", Command::identify(1, at))?;
            self.load(IN, &mut space)?;
            self.scratch = scratch(&space);
        }
        Ok(())
    }

    /// Whether lists may have pieces of any length at any byte (Identify Controller, SGLS).
    fn takes_lists(&self) -> bool {
        self.identity.get(536).is_some_and(|sgls| sgls & 3 == 1)
    }

    /// The scratch blocks, and how many of them `len` bytes take.
    fn blocks(&self, len: u64) -> Result<(Scratch, u16)> {
        let what = "DMA of given bytes without scratch blocks (--scratch)";
        let none = || Error::Unsupported { device: self.device.name().to_owned(), what };
        let scratch = self.scratch.ok_or_else(none)?;
        let blocks = len.div_ceil(scratch.block).max(1);
        Ok((scratch, blocks as u16)) // at most CHUNK bytes, and no block is smaller than 512
    }

    /// `len` bytes at `iova`, filled up to whole blocks by bytes of the driver's own.
    fn data(&self, iova: Iova, len: u64, whole: u64) -> Result<Data> {
        if !self.takes_lists() {
            if len != whole || !iova.0.is_multiple_of(4) {
                let what =
                    "DMA of other than whole blocks at multiples of 4 (it takes no scatter-gather lists)";
                return Err(Error::Unsupported { device: self.device.name().to_owned(), what });
            }
            return Ok(Data::Pages(iova, whole));
        }
        if len == whole {
            return Ok(Data::Block(iova, len));
        }
        let pieces = [block(iova, len), block(self.memory.iova(IN), whole - len)];
        for (nth, word) in (0..).zip(pieces.into_iter().flatten()) {
            self.memory.file().store(LIST + nth * 8, word).map_err(|failed| self.device.failed(failed))?;
        }
        Ok(Data::List(self.memory.iova(LIST), pieces.len() as u64))
    }

    fn load(&self, from: u64, bytes: &mut [u8]) -> Result<()> {
        self.memory.file().read(from, bytes).map_err(|failed| self.device.failed(failed))
    }

    fn get(&self, register: u64) -> Result<u32> {
        self.device.read_u32(self.registers, register)
    }

    fn set(&self, register: u64, value: u32) -> Result<()> {
        self.device.write_u32(self.registers, register, value)
    }

    fn set_address(&self, register: u64, at: Iova) -> Result<()> {
        self.set(register, at.0 as u32)?; // the low half
        self.set(register + 4, (at.0 >> 32) as u32)
    }
}

impl Engine for Controller {
    const CHUNK: usize = CHUNK;

    fn reset(&mut self) -> Result<()> {
        self.running = false;
        self.set(CC, 0)?;
        self.ready(false, "resetting an NVMe controller")
    }

    fn start(&mut self) -> Result<()> {
        let failed = |failed| self.device.failed(failed);
        self.queues = empty(&self.memory).map_err(failed)?;
        if let Err(error) = self.device.file().set_irqs(MSIX, 0, &[Some(self.interrupt.as_fd())]) {
            log::debug!("{}: no interrupts, looking all the time: {error}", self.device.name());
        }
        let [admin, io] = self.queues;
        let (commands, completions) = admin.places(&self.memory);
        let last = u32::from(SLOTS - 1);
        self.set(AQA, last | last << 16)?;
        self.set_address(ASQ, commands)?;
        self.set_address(ACQ, completions)?;
        self.set(CC, CC_ENTRIES | CC_ENABLE)?;
        self.ready(true, "starting an NVMe controller")?;
        self.identify()?;
        self.admin("asking an NVMe controller for queues", Command::one_queue_each())?;
        let (commands, completions) = io.places(&self.memory);
        self.admin("creating a completion queue", Command::create_cq(io.id, SLOTS, completions))?;
        self.admin("creating a submission queue", Command::create_sq(io.id, SLOTS, commands))?;
        self.running = true;
        Ok(())
    }

    /// The queues are deleted, which completes once all that was in them has; then the controller shuts down, which
    /// is when its cache is on the medium (3.6.1). Both are given [`DEADLINE`].
    fn stop(&mut self) -> Result<()> {
        if std::mem::take(&mut self.running) {
            let [_, io] = self.queues;
            self.admin("draining a submission queue", Command::delete_sq(io.id))?;
            self.admin("deleting a completion queue", Command::delete_cq(io.id))?;
            self.set(CC, CC_ENTRIES | CC_ENABLE | CC_SHUT_DOWN)?;
            let down = || Ok(self.get(CSTS)? & CSTS_SHUTDOWN == CSTS_SHUTDOWN_DONE);
            if !await_that(DEADLINE, down)? {
                let call = "shutting an NVMe controller down";
                return Err(self.device.failed(Failed::new(call, Errno::TIMEDOUT)));
            }
        }
        self.reset()
    }

    fn read(&mut self, iova: Iova, bytes: &mut [u8]) -> Result<()> {
        let len = bytes.len() as u64;
        let (scratch, blocks) = self.blocks(len)?;
        let whole = u64::from(blocks) * scratch.block;
        let data = self.data(iova, len, whole)?;
        self.transfer(Command::write(scratch.first, blocks, data), iova)?;
        let back = Data::Pages(self.memory.iova(IN), whole);
        self.transfer(Command::read(scratch.first, blocks, back), self.memory.iova(IN))?;
        self.load(IN, bytes)
    }

    fn write(&mut self, iova: Iova, bytes: &[u8]) -> Result<()> {
        let len = bytes.len() as u64;
        let (scratch, blocks) = self.blocks(len)?;
        let whole = u64::from(blocks) * scratch.block;
        self.memory.file().write(OUT, bytes).map_err(|failed| self.device.failed(failed))?;
        let out = Data::Pages(self.memory.iova(OUT), whole);
        self.transfer(Command::write(scratch.first, blocks, out), self.memory.iova(OUT))?;
        let data = self.data(iova, len, whole)?;
        self.transfer(Command::read(scratch.first, blocks, data), iova)
    }

    /// What the controller says it is, written to memory by itself. QEMU's does not tell of a fault here.
    fn touch(&mut self, iova: Iova) -> Result<Vec<u8>> {
        match self.run(To::Admin, Command::identify(0, iova))? {
            Some(0) => Ok(self.identity.clone()),
            _ => Err(Error::Fault { device: self.device.name().to_owned(), iova }),
        }
    }
}
