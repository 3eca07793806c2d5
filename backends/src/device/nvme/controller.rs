//! A controller: its admin queues, its initialization and its shutdown (NVMe Base 2.0, 3.5.1 and 3.6.1).

use std::sync::Arc;
use std::time::{Duration, Instant};

use passgate_bindings::{Failed, Iova, PAGE};
use rustix::io::Errno;

use super::cids::{CidMatch, SerialCids};
use super::command::{Command, Completion, queues_granted};
use super::geometry::{
    ControllerCaps, Geometry, NamespaceError, apply_limits, check_command_set, controller_caps, geometry,
    has_descriptors, has_limits,
};
use super::queue_pair::QueuePair;
use super::registers::{
    ACQ, ALL_ONES, AQA, ASQ, CAP, CC, CC_EN, CC_ENTRY_SIZES, CC_SHN_NORMAL, CSTS, CSTS_CFS, CSTS_RDY,
    CSTS_SHST, CSTS_SHST_COMPLETE, DOORBELLS, Registers,
};
use crate::device::{OwnMemory, await_that};
use crate::iommu::Domain;
use crate::{Error, Result};

/// The number of entries of each admin queue.
const ADMIN_ENTRIES: u16 = 16;
/// The offset of the buffer for Identify data, in the controller's memory.
const IDENTIFY_OFFSET: u64 = QueuePair::size(ADMIN_ENTRIES);
/// The size of the controller's memory, in pages.
const MEMORY_PAGES: usize = (IDENTIFY_OFFSET / PAGE) as usize + 1;

/// CAP.CSS bit 37, in the upper half of CAP: the NVM command set is supported.
const CAP_CSS_NVM: u32 = 1 << 5;

/// CAP.CSS bit 43, in the upper half of CAP: several command sets may be supported, and each namespace has one of
/// them.
const CAP_CSS_MULTIPLE: u32 = 1 << 11;

/// The time that an admin command has to complete.
pub const ADMIN_TIMEOUT: Duration = Duration::from_secs(2);
/// The call named by the error for a completion whose CID is not outstanding.
pub const UNKNOWN_CID: &str = "taking a completion that names no outstanding command";
/// The time of busy polling for a completion, before sleeping between two polls.
const SPIN_TIME: Duration = Duration::from_micros(50);

/// A controller and its admin queues.
#[derive(Debug)]
pub struct Controller {
    pub(super) registers: Arc<dyn Registers>,
    memory: OwnMemory,
    admin: QueuePair,
    cids: SerialCids,
    /// The distance between two doorbells, in bytes (CAP.DSTRD).
    doorbell_stride: u64,
    /// The largest number of entries of a queue (CAP.MQES).
    pub(super) max_entries: u16,
    /// The smallest memory page size, in bytes (CAP.MPSMIN): the unit of MDTS and WZSL.
    min_page: u64,
    /// True if each namespace has one of several command sets (CAP.CSS).
    several_command_sets: bool,
    /// The Identify Controller data, 4096 bytes; empty before the first initialization.
    pub(super) identity: Vec<u8>,
    pub(super) caps: ControllerCaps,
}

impl Controller {
    /// Reads the capabilities of a controller, in whatever state it is. Fails with `ENODEV` if the device does not
    /// answer, and as unsupported if it has no 4 KiB pages or no NVM command set.
    pub fn open(registers: Arc<dyn Registers>, domain: &Arc<dyn Domain>) -> Result<Self> {
        let memory = OwnMemory::map(domain, MEMORY_PAGES)?;
        let (low, high) = (registers.get(CAP)?, registers.get(CAP + 4)?);
        if (low, high) == (ALL_ONES, ALL_ONES) {
            return Err(registers.failed(Failed::new("reading an NVMe controller's CAP", Errno::NODEV)));
        }
        let min_page = PAGE << (high >> 16 & 0xf); // CAP.MPSMIN
        if min_page != PAGE {
            let what = "pages of 4 KiB";
            return Err(Error::Unsupported { device: registers.device().name().to_owned(), what });
        }
        if high & CAP_CSS_NVM == 0 {
            let what = "the NVM command set";
            return Err(Error::Unsupported { device: registers.device().name().to_owned(), what });
        }
        let admin =
            QueuePair::zeroed(0, ADMIN_ENTRIES, 0, &memory).map_err(|failed| registers.failed(failed))?;
        Ok(Self {
            // 2^(2 + CAP.DSTRD) bytes
            doorbell_stride: 4 << (high & 0xf),
            // CAP.MQES is zero-based.
            max_entries: (low as u16).saturating_add(1),
            min_page,
            several_command_sets: high & CAP_CSS_MULTIPLE != 0,
            registers,
            memory,
            admin,
            cids: SerialCids::default(),
            identity: Vec::new(),
            caps: ControllerCaps::default(),
        })
    }

    /// Returns its registers.
    pub fn registers(&self) -> &Arc<dyn Registers> {
        &self.registers
    }

    /// Returns the Identify Controller data, 4096 bytes (NVMe Base 2.0, 5.17.2.1); empty before the first
    /// initialization.
    pub fn identity(&self) -> &[u8] {
        &self.identity
    }

    /// True if it takes SGLs whose data blocks begin and end at any byte (SGLS, bits 1:0, are 01b). False before the
    /// first initialization.
    pub fn has_byte_aligned_sgl(&self) -> bool {
        self.caps.sgl == 1
    }

    pub(super) fn failed(&self, call: &'static str, errno: Errno) -> Error {
        self.registers.failed(Failed::new(call, errno))
    }

    /// Disables the controller, which deletes all its queues (NVMe Base 2.0, 3.7.2). It needs registers only, no DMA.
    pub fn reset(&mut self) -> Result<()> {
        self.registers.set(CC, 0)?;
        self.await_ready(false, "resetting an NVMe controller")
    }

    /// Initializes a controller that has been reset, and identifies it (NVMe Base 2.0, 3.5.1).
    pub fn initialize(&mut self) -> Result<()> {
        let failed = |failed| self.registers.failed(failed);
        // Cleared while the controller is disabled: the Phase Tags start from 0, and it writes nothing meanwhile.
        self.admin = QueuePair::zeroed(0, ADMIN_ENTRIES, 0, &self.memory).map_err(failed)?;
        self.cids.clear();
        let (commands, completions) = self.admin.addresses(&self.memory);
        let last = u32::from(ADMIN_ENTRIES - 1);
        self.registers.set(AQA, last | last << 16)?;
        self.set_address(ASQ, commands)?;
        self.set_address(ACQ, completions)?;
        self.registers.set(CC, CC_ENTRY_SIZES | CC_EN)?;
        self.await_ready(true, "starting an NVMe controller")?;
        let identify = Command::identify(0, self.memory.iova(IDENTIFY_OFFSET));
        self.admin("identifying an NVMe controller", identify)?;
        self.identity = self.identify_data()?;
        self.caps = controller_caps(&self.identity, self.min_page);
        Ok(())
    }

    /// Identifies a namespace. Fails with the reason and the remedy if it cannot be used as a block device.
    pub fn geometry(&mut self, namespace: u32) -> Result<Geometry> {
        let name = self.registers.device().name().to_owned();
        let namespace_error = |namespace_error: NamespaceError| Error::Host {
            what: format!("{name}, namespace {namespace}: {namespace_error}"),
            remedy: "choose another with --namespace (nvme list-ns shows them)",
        };
        let namespace_data = self
            .identify(Command::identify(namespace, self.memory.iova(IDENTIFY_OFFSET)))?
            .unwrap_or_default();
        let mut found = geometry(&self.identity, &namespace_data, namespace).map_err(namespace_error)?;
        // Both Identify commands are optional in the specification. A controller that rejects them has one command set, and
        // no limits besides MDTS.
        let descriptors = match self.several_command_sets || has_descriptors(&self.identity) {
            true => {
                self.identify(Command::identify_descriptors(namespace, self.memory.iova(IDENTIFY_OFFSET)))?
            }
            false => None,
        };
        check_command_set(descriptors.as_deref(), self.several_command_sets).map_err(namespace_error)?;
        if has_limits(&self.identity)
            && let Some(limits) =
                self.identify(Command::identify_command_set(self.memory.iova(IDENTIFY_OFFSET)))?
        {
            apply_limits(&mut found, &limits, self.min_page);
        }
        Ok(found)
    }

    /// Requests `count` I/O queues of each kind, and returns how many of them were allocated. Only valid before the
    /// first I/O queue is created.
    pub fn set_queue_count(&mut self, count: u16) -> Result<u16> {
        let completion =
            self.admin("asking an NVMe controller for queues", Command::set_queue_count(count))?;
        Ok(queues_granted(completion.result).min(count))
    }

    /// Creates an I/O queue pair, with interrupts by `vector`.
    pub fn create_queue_pair(
        &mut self,
        queue_pair: &QueuePair,
        memory: &OwnMemory,
        vector: u16,
    ) -> Result<()> {
        let (commands, completions) = queue_pair.addresses(memory);
        // The completion queue first: the submission queue names it.
        let create = Command::create_cq(queue_pair.qid, queue_pair.entries, completions, vector);
        self.admin("creating a completion queue", create)?;
        self.admin(
            "creating a submission queue",
            Command::create_sq(queue_pair.qid, queue_pair.entries, commands),
        )?;
        Ok(())
    }

    /// Deletes an I/O queue pair, after the commands that the controller has taken from it have completed.
    pub fn delete_queue_pair(&mut self, qid: u16) -> Result<()> {
        // In the reverse order: a completion queue with submission queues cannot be deleted.
        self.admin("draining a submission queue", Command::delete_sq(qid))?;
        self.admin("deleting a completion queue", Command::delete_cq(qid))?;
        Ok(())
    }

    /// Shuts the controller down normally: its write cache is on the medium then (NVMe Base 2.0, 3.6.1).
    pub fn shut_down(&mut self) -> Result<()> {
        self.registers.set(CC, CC_ENTRY_SIZES | CC_EN | CC_SHN_NORMAL)?;
        let down = || Ok(self.registers.get(CSTS)? & CSTS_SHST == CSTS_SHST_COMPLETE);
        if await_that(ADMIN_TIMEOUT, down)? {
            return Ok(());
        }
        Err(self.failed("shutting an NVMe controller down", Errno::TIMEDOUT))
    }

    /// True if the device no longer answers: CSTS reads as all ones, or cannot be read.
    pub(super) fn is_gone(&self) -> bool {
        !matches!(self.registers.get(CSTS), Ok(status) if status != ALL_ONES)
    }

    /// True if an initialized controller does nothing without a reset: it reports a fatal error (CSTS.CFS), or is not
    /// ready because it was reset from outside.
    pub(super) fn needs_reset(&self) -> bool {
        matches!(self.registers.get(CSTS), Ok(status) if status & (CSTS_CFS | CSTS_RDY) != CSTS_RDY)
    }

    /// Runs an admin command that must succeed; any other status is an error of `call`.
    pub(super) fn admin(&mut self, call: &'static str, command: Command) -> Result<Completion> {
        match self.run(command)? {
            Some(completion) if completion.status == 0 => Ok(completion),
            Some(Completion { status, .. }) => {
                log::warn!("{}: {call}: status {status:#x}", self.registers.device().name());
                Err(self.failed(call, Errno::IO))
            }
            None => Err(self.failed(call, Errno::TIMEDOUT)),
        }
    }

    /// Runs an admin command. Returns its completion, or None if it did not complete within [`ADMIN_TIMEOUT`], the
    /// controller needs a reset first, or commands that never completed fill the queue. Fails with `EPROTO` after a
    /// completion whose CID is not outstanding; the controller must be reset then.
    pub fn run(&mut self, command: Command) -> Result<Option<Completion>> {
        let Some(cid) = self.cids.allocate(self.admin.capacity()) else { return Ok(None) };
        let pushed = self.admin.push(&self.memory, command, cid);
        let tail = pushed.map_err(|failed| self.registers.failed(failed))?;
        self.registers.set(self.doorbell(0, Doorbell::Submission), tail.into())?;
        let begun = Instant::now();
        loop {
            let taken = self.admin.pop(&self.memory).map_err(|failed| self.registers.failed(failed))?;
            if let Some((completion, head)) = taken {
                self.registers.set(self.doorbell(0, Doorbell::Completion), head.into())?;
                match self.cids.classify(completion.cid) {
                    CidMatch::Current => return Ok(Some(completion)),
                    CidMatch::Abandoned => {}
                    CidMatch::Unknown => {
                        self.cids.abandon();
                        return Err(self.failed(UNKNOWN_CID, Errno::PROTO));
                    }
                }
            }
            match begun.elapsed() {
                elapsed if elapsed < SPIN_TIME => std::hint::spin_loop(),
                elapsed if elapsed > ADMIN_TIMEOUT || self.is_gone() || self.needs_reset() => {
                    self.cids.abandon();
                    return Ok(None);
                }
                elapsed => std::thread::sleep(elapsed.min(Duration::from_millis(1))),
            }
        }
    }

    /// Returns the register offset of a doorbell (NVMe over PCIe Transport 1.0, SQyTDBL and CQyHDBL).
    pub fn doorbell(&self, queue: u16, which: Doorbell) -> u64 {
        DOORBELLS + (u64::from(queue) * 2 + which as u64) * self.doorbell_stride
    }

    /// Runs an Identify command. Returns the 4096 bytes that it has written, or None if the controller rejects it.
    fn identify(&mut self, command: Command) -> Result<Option<Vec<u8>>> {
        match self.run(command)? {
            Some(completion) if completion.status == 0 => self.identify_data().map(Some),
            Some(_) => Ok(None),
            None => Err(self.failed("identifying a namespace", Errno::TIMEDOUT)),
        }
    }

    /// Returns the 4096 bytes that the last Identify command has written.
    fn identify_data(&self) -> Result<Vec<u8>> {
        let mut bytes = vec![0; PAGE as usize];
        self.memory
            .file()
            .read(IDENTIFY_OFFSET, &mut bytes)
            .map_err(|failed| self.registers.failed(failed))?;
        Ok(bytes)
    }

    /// Waits until CSTS.RDY is `ready`, for as long as the controller states. Fails with `EIO` if it is gone or
    /// reports a fatal error, with `ETIMEDOUT` if it takes longer.
    fn await_ready(&self, ready: bool, call: &'static str) -> Result<()> {
        // CAP.TO, in units of 500 ms; 0 is taken as 1.
        let within = Duration::from_millis(500) * (self.registers.get(CAP)? >> 24).max(1);
        let mut fatal = false;
        let done = await_that(within, || {
            let status = self.registers.get(CSTS)?;
            // After CC.EN is cleared, CFS may stay set until the reset has completed.
            fatal = status == ALL_ONES || ready && status & CSTS_CFS != 0;
            Ok(fatal || (status & CSTS_RDY != 0) == ready)
        })?;
        match (done, fatal) {
            (true, false) => Ok(()),
            (_, true) => Err(self.failed(call, Errno::IO)),
            (false, false) => Err(self.failed(call, Errno::TIMEDOUT)),
        }
    }

    fn set_address(&self, register: u64, at: Iova) -> Result<()> {
        self.registers.set(register, at.0 as u32)?; // the low half
        self.registers.set(register + 4, (at.0 >> 32) as u32)
    }
}

/// One of the two doorbells of a queue pair.
#[derive(Debug, Clone, Copy)]
pub enum Doorbell {
    /// The tail of the submission queue.
    Submission = 0,
    /// The head of the completion queue.
    Completion = 1,
}
