//! The exerciser: one queue pair, one command at a time, for DMA of given bytes into given memory.
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

use passgate_bindings::{Failed, Iova, PAGE};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;

use super::CHUNK;
use super::cids::{Names, SerialCids};
use super::command::{Command, Completion, Data, block};
use super::controller::{Controller, DEADLINE, Doorbell, NONSENSE};
use super::geometry::{Scratch, scratch};
use super::pair::Pair;
use super::registers::Registers;
use crate::device::driven::{Driven, Engine};
use crate::device::own::OwnMemory;
use crate::iommu::Domain;
use crate::{Error, Result};

/// Entries of its queues.
const SLOTS: u16 = 64;
/// Where things are in its own memory.
const OUT: u64 = Pair::size(SLOTS);
const IN: u64 = OUT + PAGE;
const LIST: u64 = IN + PAGE;
const PAGES: usize = (LIST / PAGE) as usize + 1;
/// The namespace.
const NAMESPACE: u32 = 1;

/// How soon a completion is found whose interrupt was lost.
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// How long to look before waiting for the interrupt: a fast drive is done by then.
const SPIN: Duration = Duration::from_micros(50);

/// A controller and its one pair.
#[derive(Debug)]
pub struct Exerciser {
    controller: Controller,
    memory: OwnMemory,
    pair: Pair,
    cids: SerialCids,
    interrupt: OwnedFd,
    interrupts: u64,
    may_scratch: bool,
    scratch: Option<Scratch>,
    /// Whether the pair is there.
    running: bool,
}

/// Drives a controller; `scratch` allows the last blocks of namespace 1 to be overwritten.
pub(super) fn open(
    registers: Arc<dyn Registers>,
    domain: &Arc<dyn Domain>,
    scratch: bool,
) -> Result<Driven<Exerciser>> {
    let device = Arc::clone(registers.device());
    let memory = OwnMemory::map(domain, PAGES)?;
    let interrupt = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
        .map_err(|errno| registers.failed(Failed::new("eventfd", errno)))?;
    let pair = Pair::empty(1, SLOTS, 0, &memory).map_err(|failed| registers.failed(failed))?;
    let controller = Controller::open(registers, domain)?;
    let exerciser = Exerciser {
        controller,
        memory,
        pair,
        cids: SerialCids::default(),
        interrupt,
        interrupts: 0,
        may_scratch: scratch,
        scratch: None,
        running: false,
    };
    Driven::new(device, exerciser)
}

impl Driven<Exerciser> {
    /// Interrupts that have come.
    pub fn interrupts(&self) -> u64 {
        self.0.engine().interrupts
    }
}

impl Exerciser {
    fn failed(&self, failed: Failed) -> Error {
        self.controller.registers.failed(failed)
    }

    /// Runs one command to its end; its status. None where it does not come to one. Fails where the controller completes
    /// what is not outstanding.
    fn run(&mut self, command: Command) -> Result<Option<u16>> {
        let cid = self.cids.next();
        let tail = self.pair.put(&self.memory, command, cid).map_err(|failed| self.failed(failed))?;
        self.ring(Doorbell::Submission, tail)?;
        let begun = Instant::now();
        loop {
            let taken = self.pair.take(&self.memory).map_err(|failed| self.failed(failed))?;
            if let Some((Completion { id, status, .. }, head)) = taken {
                self.ring(Doorbell::Completion, head)?;
                self.count_interrupts();
                match self.cids.judge(id) {
                    Names::Current => return Ok(Some(status)),
                    Names::Abandoned => {}
                    Names::Nothing => {
                        self.cids.abandon();
                        return Err(self.failed(Failed::new(NONSENSE, Errno::PROTO)));
                    }
                }
            }
            match begun.elapsed() {
                over if over > DEADLINE => {
                    self.cids.abandon();
                    return Ok(None);
                }
                young if young < SPIN => std::hint::spin_loop(),
                _ => self.wait_for_interrupt(),
            }
        }
    }

    fn ring(&self, which: Doorbell, value: u16) -> Result<()> {
        self.controller.registers.ring(self.controller.doorbell(self.pair.id, which), value.into())
    }

    /// Moves blocks; a transfer that does not reach memory at `iova` is a fault there.
    fn transfer(&mut self, command: Command, iova: Iova) -> Result<()> {
        let status = self.run(command)?;
        let device = || self.controller.registers.device().name().to_owned();
        match status {
            Some(0) => Ok(()),
            Some(Completion::TRANSFER_ERROR) | None => Err(Error::Fault { device: device(), iova }),
            Some(status) => {
                log::warn!("{}: moving blocks: status {status:#x}", device());
                Err(self.failed(Failed::new("moving blocks of an NVMe drive", Errno::IO)))
            }
        }
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

    fn unsupported(&self, what: &'static str) -> Error {
        Error::Unsupported { device: self.controller.registers.device().name().to_owned(), what }
    }

    /// The scratch blocks, and how many of them `len` bytes take.
    fn blocks(&self, len: u64) -> Result<(Scratch, u32)> {
        let none = || self.unsupported("DMA of given bytes without scratch blocks (--scratch)");
        let scratch = self.scratch.ok_or_else(none)?;
        let blocks = len.div_ceil(scratch.block).max(1);
        Ok((scratch, blocks as u32)) // at most CHUNK bytes, and no block is smaller than 512
    }

    /// `len` bytes at `iova`, filled up to whole blocks by bytes of the driver's own.
    fn data(&self, iova: Iova, len: u64, whole: u64) -> Result<Data> {
        if self.controller.abilities.sgl != 1 {
            if len != whole || !iova.0.is_multiple_of(4) {
                return Err(self.unsupported(
                    "DMA of other than whole blocks at multiples of 4 (it takes no scatter-gather lists)",
                ));
            }
            return Ok(Data::Pages(iova, whole));
        }
        if len == whole {
            return Ok(Data::Block(iova, len));
        }
        let pieces = [block(iova, len), block(self.memory.iova(IN), whole - len)];
        for (nth, word) in (0..).zip(pieces.into_iter().flatten()) {
            self.memory.file().store(LIST + nth * 8, word).map_err(|failed| self.failed(failed))?;
        }
        Ok(Data::List(self.memory.iova(LIST), pieces.len() as u64))
    }
}

impl Engine for Exerciser {
    const CHUNK: usize = CHUNK;

    fn reset(&mut self) -> Result<()> {
        self.running = false;
        self.controller.reset()
    }

    fn start(&mut self) -> Result<()> {
        self.pair = Pair::empty(1, SLOTS, 0, &self.memory).map_err(|failed| self.failed(failed))?;
        self.cids.forget();
        if let Err(error) = self.controller.registers.interrupts(&[Some(self.interrupt.as_fd())]) {
            log::debug!("no interrupts, looking all the time: {error}");
        }
        self.controller.come_up()?;
        self.scratch = None;
        if self.may_scratch {
            // A namespace that will not do has no scratch blocks.
            self.scratch = self.controller.geometry(NAMESPACE).ok().as_ref().and_then(scratch);
        }
        self.controller.queues(1)?;
        self.controller.create(&self.pair, &self.memory, 0)?;
        self.running = true;
        Ok(())
    }

    /// The queues are deleted, which completes once all that was in them has; then the controller shuts down, which
    /// is when its cache is on the medium. Both are given [`DEADLINE`].
    fn stop(&mut self) -> Result<()> {
        if std::mem::take(&mut self.running) {
            self.controller.delete(self.pair.id)?;
            self.controller.shut_down()?;
        }
        self.reset()
    }

    fn read(&mut self, iova: Iova, bytes: &mut [u8]) -> Result<()> {
        let len = bytes.len() as u64;
        let (scratch, blocks) = self.blocks(len)?;
        let whole = u64::from(blocks) * scratch.block;
        let data = self.data(iova, len, whole)?;
        self.transfer(Command::write(NAMESPACE, scratch.first, blocks, data, false), iova)?;
        let back = Data::Pages(self.memory.iova(IN), whole);
        let command = Command::read(NAMESPACE, scratch.first, blocks, back);
        self.transfer(command, self.memory.iova(IN))?;
        self.memory.file().read(IN, bytes).map_err(|failed| self.failed(failed))
    }

    fn write(&mut self, iova: Iova, bytes: &[u8]) -> Result<()> {
        let len = bytes.len() as u64;
        let (scratch, blocks) = self.blocks(len)?;
        let whole = u64::from(blocks) * scratch.block;
        self.memory.file().write(OUT, bytes).map_err(|failed| self.failed(failed))?;
        let out = Data::Pages(self.memory.iova(OUT), whole);
        let command = Command::write(NAMESPACE, scratch.first, blocks, out, false);
        self.transfer(command, self.memory.iova(OUT))?;
        let data = self.data(iova, len, whole)?;
        self.transfer(Command::read(NAMESPACE, scratch.first, blocks, data), iova)
    }

    /// What the controller says it is, written to memory by itself. QEMU's does not tell of a fault here.
    fn touch(&mut self, iova: Iova) -> Result<Vec<u8>> {
        match self.controller.run(Command::identify(0, iova))? {
            Some(Completion { status: 0, .. }) => Ok(self.controller.identity.clone()),
            _ => Err(Error::Fault { device: self.controller.registers.device().name().to_owned(), iova }),
        }
    }
}
