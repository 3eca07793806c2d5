//! The NVMe exerciser: one queue pair, one command at a time, for DMA of given bytes into given memory.
//!
//! A drive does DMA only to move blocks of its medium, or to identify itself. So bytes of the caller's choosing go by
//! way of *scratch blocks*, the last of namespace 1, which are overwritten; this must be permitted
//! ([`crate::Drivers::scratch`]). Otherwise only [`Engine::touch`] works: it has the drive write its Identify data to
//! memory, which changes nothing on the medium.
//!
//! With a controller that supports SGLs at any alignment, transfers begin and end at any byte; else they are of whole
//! blocks, at multiples of 4 bytes. A DMA fault is reported by the controller (Data Transfer Error). Completions are
//! signalled by interrupt; one whose interrupt is lost is found within 10 ms.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use passgate_backends::device::OwnMemory;
use passgate_backends::device::vfio::VfioDevice;
use passgate_backends::nvme::low_level::{
    ADMIN_TIMEOUT, CidMatch, Command, Completion, Controller, DataPointer, Doorbell, QueuePair, SerialCids,
    UNKNOWN_CID, sgl_data,
};
use passgate_backends::nvme::{Geometry, Registers, vfio_registers};
use passgate_backends::{Domain, Error, Result};
use passgate_bindings::{Failed, Iova, PAGE};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;

use crate::driven::{Driven, Engine};

/// The longest transfer, in bytes.
const CHUNK: usize = PAGE as usize;
/// The number of entries of each queue.
const QUEUE_ENTRIES: u16 = 64;
// Offsets in the driver's own memory, which begins with the queues: buffers for data out and in, and an SGL.
const OUT_OFFSET: u64 = QueuePair::size(QUEUE_ENTRIES);
const IN_OFFSET: u64 = OUT_OFFSET + PAGE;
const LIST_OFFSET: u64 = IN_OFFSET + PAGE;
const MEMORY_PAGES: usize = (LIST_OFFSET / PAGE) as usize + 1;
/// The namespace identifier.
const NAMESPACE: u32 = 1;

/// The longest delay of a completion whose interrupt was lost.
const POLL_INTERVAL: Duration = Duration::from_millis(10);
/// The time of busy polling before waiting for the interrupt: a fast drive has completed by then.
const SPIN_TIME: Duration = Duration::from_micros(50);

/// A controller and its one I/O queue pair.
#[derive(Debug)]
pub struct Exerciser {
    controller: Controller,
    memory: OwnMemory,
    queue_pair: QueuePair,
    cids: SerialCids,
    interrupt: OwnedFd,
    interrupts: u64,
    may_scratch: bool,
    scratch: Option<Scratch>,
    /// True while the queue pair exists in the controller.
    running: bool,
}

/// A drive as a device that does DMA on demand.
pub type Nvme = Driven<Exerciser>;

/// Opens `device`, which is attached to `domain`, for DMA on demand. `scratch` permits the last blocks of namespace 1
/// to be overwritten.
pub fn open(device: VfioDevice, domain: &Arc<dyn Domain>, scratch: bool) -> Result<Nvme> {
    with_registers(vfio_registers(device)?, domain, scratch)
}

/// As [`open`], with any implementation of the registers.
pub fn with_registers(
    registers: Arc<dyn Registers>,
    domain: &Arc<dyn Domain>,
    scratch: bool,
) -> Result<Nvme> {
    let device = Arc::clone(registers.device());
    let memory = OwnMemory::map(domain, MEMORY_PAGES)?;
    let interrupt = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
        .map_err(|errno| registers.failed(Failed::new("eventfd", errno)))?;
    let queue_pair =
        QueuePair::zeroed(1, QUEUE_ENTRIES, 0, &memory).map_err(|failed| registers.failed(failed))?;
    let controller = Controller::open(registers, domain)?;
    let exerciser = Exerciser {
        controller,
        memory,
        queue_pair,
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
    /// Returns the number of interrupts so far.
    pub fn interrupts(&self) -> u64 {
        self.0.engine().interrupts
    }
}

impl Exerciser {
    fn failed(&self, failed: Failed) -> Error {
        self.controller.registers().failed(failed)
    }

    /// Runs one command and returns its status, or None if it does not complete within [`ADMIN_TIMEOUT`], or commands
    /// that never completed fill the queue. Fails with
    /// `EPROTO` after a completion whose CID is not outstanding.
    fn run(&mut self, command: Command) -> Result<Option<u16>> {
        let Some(cid) = self.cids.allocate(self.queue_pair.capacity()) else { return Ok(None) };
        let tail = self.queue_pair.push(&self.memory, command, cid).map_err(|failed| self.failed(failed))?;
        self.ring(Doorbell::Submission, tail)?;
        let begun = Instant::now();
        loop {
            let taken = self.queue_pair.pop(&self.memory).map_err(|failed| self.failed(failed))?;
            if let Some((Completion { cid: completed, status, .. }, head)) = taken {
                self.ring(Doorbell::Completion, head)?;
                self.count_interrupts();
                match self.cids.classify(completed) {
                    CidMatch::Current => return Ok(Some(status)),
                    CidMatch::Abandoned => {}
                    CidMatch::Unknown => {
                        self.cids.abandon();
                        return Err(self.failed(Failed::new(UNKNOWN_CID, Errno::PROTO)));
                    }
                }
            }
            match begun.elapsed() {
                elapsed if elapsed > ADMIN_TIMEOUT => {
                    self.cids.abandon();
                    return Ok(None);
                }
                elapsed if elapsed < SPIN_TIME => std::hint::spin_loop(),
                _ => self.wait_for_interrupt(),
            }
        }
    }

    fn ring(&self, which: Doorbell, value: u16) -> Result<()> {
        self.controller.registers().ring(self.controller.doorbell(self.queue_pair.qid, which), value.into())
    }

    /// Moves blocks. A transfer that cannot access memory at `iova`, or does not complete, is a DMA fault there.
    fn transfer(&mut self, command: Command, iova: Iova) -> Result<()> {
        let status = self.run(command)?;
        let device = || self.controller.registers().device().name().to_owned();
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
        let wait = Timespec { tv_sec: 0, tv_nsec: POLL_INTERVAL.subsec_nanos().into() };
        // The result does not matter: the completion queue is read again in any case.
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
        Error::Unsupported { device: self.controller.registers().device().name().to_owned(), what }
    }

    /// Returns the scratch blocks, and the number of them that `len` bytes need.
    fn blocks(&self, len: u64) -> Result<(Scratch, u32)> {
        let none = || self.unsupported("DMA of given bytes without scratch blocks (--scratch)");
        let scratch = self.scratch.ok_or_else(none)?;
        let blocks = len.div_ceil(scratch.block).max(1);
        Ok((scratch, blocks as u32)) // at most CHUNK bytes, and no block is smaller than 512 bytes
    }

    /// Returns the data pointer for `len` bytes at `iova`, padded to `whole` bytes (whole blocks) with memory of the
    /// driver's own.
    fn data(&self, iova: Iova, len: u64, whole: u64) -> Result<DataPointer> {
        if !self.controller.has_byte_aligned_sgl() {
            if len != whole || !iova.0.is_multiple_of(4) {
                return Err(self.unsupported(
                    "DMA of other than whole blocks at multiples of 4 (it takes no scatter-gather lists)",
                ));
            }
            return Ok(DataPointer::Contiguous(iova, whole));
        }
        if len == whole {
            return Ok(DataPointer::SglData(iova, len));
        }
        let pieces = [sgl_data(iova, len), sgl_data(self.memory.iova(IN_OFFSET), whole - len)];
        for (nth, word) in (0..).zip(pieces.into_iter().flatten()) {
            self.memory.file().store(LIST_OFFSET + nth * 8, word).map_err(|failed| self.failed(failed))?;
        }
        Ok(DataPointer::SglList(self.memory.iova(LIST_OFFSET), pieces.len() as u64))
    }
}

impl Engine for Exerciser {
    const CHUNK: usize = CHUNK;

    fn reset(&mut self) -> Result<()> {
        self.running = false;
        self.controller.reset()
    }

    fn start(&mut self) -> Result<()> {
        self.queue_pair =
            QueuePair::zeroed(1, QUEUE_ENTRIES, 0, &self.memory).map_err(|failed| self.failed(failed))?;
        self.cids.clear();
        if let Err(error) = self.controller.registers().set_interrupts(&[Some(self.interrupt.as_fd())]) {
            log::debug!("no interrupts, polling instead: {error}");
        }
        self.controller.initialize()?;
        self.scratch = None;
        if self.may_scratch {
            // A namespace that cannot be used has no scratch blocks.
            self.scratch = self.controller.geometry(NAMESPACE).ok().as_ref().and_then(scratch);
        }
        self.controller.set_queue_count(1)?;
        self.controller.create_queue_pair(&self.queue_pair, &self.memory, 0)?;
        self.running = true;
        Ok(())
    }

    /// Deletes the queues, which completes once all their commands have; then shuts the controller down, which puts
    /// its cache on the medium. Each step has `ADMIN_TIMEOUT`.
    fn stop(&mut self) -> Result<()> {
        if std::mem::take(&mut self.running) {
            self.controller.delete_queue_pair(self.queue_pair.qid)?;
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
        let back = DataPointer::Contiguous(self.memory.iova(IN_OFFSET), whole);
        let command = Command::read(NAMESPACE, scratch.first, blocks, back);
        self.transfer(command, self.memory.iova(IN_OFFSET))?;
        self.memory.file().read(IN_OFFSET, bytes).map_err(|failed| self.failed(failed))
    }

    fn write(&mut self, iova: Iova, bytes: &[u8]) -> Result<()> {
        let len = bytes.len() as u64;
        let (scratch, blocks) = self.blocks(len)?;
        let whole = u64::from(blocks) * scratch.block;
        self.memory.file().write(OUT_OFFSET, bytes).map_err(|failed| self.failed(failed))?;
        let out = DataPointer::Contiguous(self.memory.iova(OUT_OFFSET), whole);
        let command = Command::write(NAMESPACE, scratch.first, blocks, out, false);
        self.transfer(command, self.memory.iova(OUT_OFFSET))?;
        let data = self.data(iova, len, whole)?;
        self.transfer(Command::read(NAMESPACE, scratch.first, blocks, data), iova)
    }

    /// Has the controller write its Identify data to memory. QEMU's controller does not report a DMA fault here.
    fn touch(&mut self, iova: Iova) -> Result<Vec<u8>> {
        match self.controller.run(Command::identify(0, iova))? {
            Some(Completion { status: 0, .. }) => Ok(self.controller.identity().to_vec()),
            _ => Err(Error::Fault { device: self.controller.registers().device().name().to_owned(), iova }),
        }
    }
}

/// The blocks that the exerciser may overwrite.
#[derive(Debug, Clone, Copy)]
struct Scratch {
    first: u64,
    /// The size of a block, in bytes.
    block: u64,
}

/// Returns the last blocks of a namespace, for one transfer of the exerciser; None if the namespace is too small, or
/// its blocks are larger than a transfer.
fn scratch(geometry: &Geometry) -> Option<Scratch> {
    let (chunk, block) = (CHUNK as u64, u64::from(geometry.block));
    let first = geometry.blocks.checked_sub(chunk / block).filter(|_| block <= chunk)?;
    Some(Scratch { first, block })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scratch_blocks_are_the_last_of_the_namespace() {
        let scratch = |blocks, shift: u32| {
            scratch(&Geometry { blocks, block: 1 << shift, ..Geometry::default() })
                .map(|s| (s.first, s.block))
        };
        assert_eq!(scratch(1000, 9), Some((992, 512)));
        assert_eq!(scratch(1000, 12), Some((999, 4096)));
        assert_eq!(scratch(1000, 13), None, "a block is longer than a transfer");
        assert_eq!(scratch(7, 9), None, "too few blocks");
    }
}
