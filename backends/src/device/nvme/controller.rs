//! A controller: its registers, its admin queues, its coming up and going down (NVM Express base specification 2.0, 3.5
//! and 3.6).

use std::sync::Arc;
use std::time::{Duration, Instant};

use passgate_bindings::{Failed, Iova, PAGE};
use rustix::io::Errno;

use super::cids::{Names, SerialCids};
use super::command::{Command, Completion, granted};
use super::geometry::{
    Abilities, Geometry, Unfit, abilities, check_command_set, geometry, limit, tells_descriptors,
    tells_limits,
};
use super::pair::Pair;
use super::registers::{
    ACQ, AQA, ASQ, CAP, CC, CC_ENABLE, CC_ENTRIES, CC_SHUT_DOWN, CSTS, CSTS_FATAL, CSTS_READY, CSTS_SHUTDOWN,
    CSTS_SHUTDOWN_DONE, DOORBELLS, GONE, Registers,
};
use crate::device::driven::await_that;
use crate::device::own::OwnMemory;
use crate::iommu::Domain;
use crate::{Error, Result};

/// Entries of the admin queues.
const SLOTS: u16 = 16;
/// Where what the controller says of itself is written.
const IN: u64 = Pair::size(SLOTS);
/// Pages of its own memory.
const PAGES: usize = (IN / PAGE) as usize + 1;

/// In the upper half of CAP: of the command sets (CAP.CSS) the one that is for blocks.
const CAP_NVM: u32 = 1 << 5;

/// There are several command sets, and each namespace has one of them.
const CAP_SEVERAL: u32 = 1 << 11;

/// An admin command that takes longer never completes.
pub(super) const DEADLINE: Duration = Duration::from_secs(2);
/// The step that fails where a completion names no outstanding command.
pub(super) const NONSENSE: &str = "taking a completion that names no outstanding command";
/// How long to look before sleeping between looks.
const SPIN: Duration = Duration::from_micros(50);

/// A controller.
#[derive(Debug)]
pub(super) struct Controller {
    pub(super) registers: Arc<dyn Registers>,
    memory: OwnMemory,
    admin: Pair,
    cids: SerialCids,
    /// Bytes from one doorbell to the next.
    stride: u64,
    /// Entries of a queue at most.
    pub(super) longest: u16,
    /// Bytes of its smallest page.
    smallest: u64,
    /// True where it has several command sets (CAP.CSS).
    several_command_sets: bool,
    /// What it says it is: 4096 bytes, empty until it has come up.
    pub(super) identity: Vec<u8>,
    pub(super) abilities: Abilities,
}

impl Controller {
    /// A controller as it was found.
    pub(super) fn open(registers: Arc<dyn Registers>, domain: &Arc<dyn Domain>) -> Result<Self> {
        let memory = OwnMemory::map(domain, PAGES)?;
        let (low, high) = (registers.get(CAP)?, registers.get(CAP + 4)?);
        if (low, high) == (GONE, GONE) {
            return Err(registers.failed(Failed::new("reading an NVMe controller's CAP", Errno::NODEV)));
        }
        let smallest = PAGE << (high >> 16 & 0xf); // CAP.MPSMIN
        if smallest != PAGE {
            let what = "pages of 4 KiB";
            return Err(Error::Unsupported { device: registers.device().name().to_owned(), what });
        }
        if high & CAP_NVM == 0 {
            let what = "the NVM command set";
            return Err(Error::Unsupported { device: registers.device().name().to_owned(), what });
        }
        let admin = Pair::empty(0, SLOTS, 0, &memory).map_err(|failed| registers.failed(failed))?;
        Ok(Self {
            // CAP.DSTRD
            stride: 4 << (high & 0xf),
            // CAP.MQES counts from 0.
            longest: (low as u16).saturating_add(1),
            smallest,
            several_command_sets: high & CAP_SEVERAL != 0,
            registers,
            memory,
            admin,
            cids: SerialCids::default(),
            identity: Vec::new(),
            abilities: Abilities::default(),
        })
    }

    pub(super) fn failed(&self, call: &'static str, errno: Errno) -> Error {
        self.registers.failed(Failed::new(call, errno))
    }

    /// Takes every queue from the controller, by registers alone.
    pub(super) fn reset(&mut self) -> Result<()> {
        self.registers.set(CC, 0)?;
        self.ready(false, "resetting an NVMe controller")
    }

    /// Brings a controller up that has been reset, and learns what it is.
    pub(super) fn come_up(&mut self) -> Result<()> {
        let failed = |failed| self.registers.failed(failed);
        self.admin = Pair::empty(0, SLOTS, 0, &self.memory).map_err(failed)?;
        self.cids.forget();
        let (commands, completions) = self.admin.places(&self.memory);
        let last = u32::from(SLOTS - 1);
        self.registers.set(AQA, last | last << 16)?;
        self.set_address(ASQ, commands)?;
        self.set_address(ACQ, completions)?;
        self.registers.set(CC, CC_ENTRIES | CC_ENABLE)?;
        self.ready(true, "starting an NVMe controller")?;
        let identify = Command::identify(0, self.memory.iova(IN));
        self.admin("identifying an NVMe controller", identify)?;
        self.identity = self.said()?;
        self.abilities = abilities(&self.identity, self.smallest);
        Ok(())
    }

    /// What it says of a namespace.
    pub(super) fn geometry(&mut self, namespace: u32) -> Result<Geometry> {
        let name = self.registers.device().name().to_owned();
        let unfit = |unfit: Unfit| Error::Host {
            what: format!("{name}, namespace {namespace}: {unfit}"),
            mend: "choose another with --namespace (nvme list-ns shows them)",
        };
        let space = self.ask(Command::identify(namespace, self.memory.iova(IN)))?.unwrap_or_default();
        let mut found = geometry(&self.identity, &space, namespace).map_err(unfit)?;
        // It need not know the next questions: without an answer it has one command set, and no limits.
        let descriptors = match self.several_command_sets || tells_descriptors(&self.identity) {
            true => self.ask(Command::identify_descriptors(namespace, self.memory.iova(IN)))?,
            false => None,
        };
        check_command_set(descriptors.as_deref(), self.several_command_sets).map_err(unfit)?;
        if tells_limits(&self.identity)
            && let Some(limits) = self.ask(Command::identify_command_set(self.memory.iova(IN)))?
        {
            limit(&mut found, &limits, self.smallest);
        }
        Ok(found)
    }

    /// Asks for so many I/O queues each way; how many there are.
    pub(super) fn queues(&mut self, count: u16) -> Result<u16> {
        let completion = self.admin("asking an NVMe controller for queues", Command::queues(count))?;
        Ok(granted(completion.result).min(count))
    }

    /// Creates a pair, with interrupts by `vector`.
    pub(super) fn create(&mut self, pair: &Pair, memory: &OwnMemory, vector: u16) -> Result<()> {
        let (commands, completions) = pair.places(memory);
        let create = Command::create_cq(pair.id, pair.slots, completions, vector);
        self.admin("creating a completion queue", create)?;
        self.admin("creating a submission queue", Command::create_sq(pair.id, pair.slots, commands))?;
        Ok(())
    }

    /// Deletes a pair, which completes once what was in it has.
    pub(super) fn delete(&mut self, id: u16) -> Result<()> {
        self.admin("draining a submission queue", Command::delete_sq(id))?;
        self.admin("deleting a completion queue", Command::delete_cq(id))?;
        Ok(())
    }

    /// Shuts it down: its cache is on the medium then (3.6.1).
    pub(super) fn shut_down(&mut self) -> Result<()> {
        self.registers.set(CC, CC_ENTRIES | CC_ENABLE | CC_SHUT_DOWN)?;
        let down = || Ok(self.registers.get(CSTS)? & CSTS_SHUTDOWN == CSTS_SHUTDOWN_DONE);
        if await_that(DEADLINE, down)? {
            return Ok(());
        }
        Err(self.failed("shutting an NVMe controller down", Errno::TIMEDOUT))
    }

    /// Whether it has failed for good or is not there any more.
    pub(super) fn is_gone(&self) -> bool {
        !matches!(self.registers.get(CSTS), Ok(status) if status != GONE)
    }

    /// Whether it cannot go on without a reset although it had come up: it says so, or somebody else has reset it.
    pub(super) fn is_stuck(&self) -> bool {
        matches!(self.registers.get(CSTS), Ok(status) if status & (CSTS_FATAL | CSTS_READY) != CSTS_READY)
    }

    /// Runs an admin command that must succeed.
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

    /// Runs an admin command to its end; none where it does not come to one: not in time, or not before a reset. Fails
    /// where the controller completes what is not outstanding: it is to be reset.
    pub(super) fn run(&mut self, command: Command) -> Result<Option<Completion>> {
        let cid = self.cids.next();
        let put = self.admin.put(&self.memory, command, cid);
        let tail = put.map_err(|failed| self.registers.failed(failed))?;
        self.registers.set(self.doorbell(0, Doorbell::Submission), tail.into())?;
        let begun = Instant::now();
        loop {
            let taken = self.admin.take(&self.memory).map_err(|failed| self.registers.failed(failed))?;
            if let Some((completion, head)) = taken {
                self.registers.set(self.doorbell(0, Doorbell::Completion), head.into())?;
                match self.cids.judge(completion.id) {
                    Names::Current => return Ok(Some(completion)),
                    Names::Abandoned => {}
                    Names::Nothing => {
                        self.cids.abandon();
                        return Err(self.failed(NONSENSE, Errno::PROTO));
                    }
                }
            }
            match begun.elapsed() {
                young if young < SPIN => std::hint::spin_loop(),
                over if over > DEADLINE || self.is_gone() || self.is_stuck() => {
                    self.cids.abandon();
                    return Ok(None);
                }
                young => std::thread::sleep(young.min(Duration::from_millis(1))),
            }
        }
    }

    /// Where a doorbell of a pair is (3.1.3).
    pub(super) fn doorbell(&self, queue: u16, which: Doorbell) -> u64 {
        DOORBELLS + (u64::from(queue) * 2 + which as u64) * self.stride
    }

    /// Runs an Identify and returns the 4096 bytes that it has written; none where the controller does not take it.
    fn ask(&mut self, identify: Command) -> Result<Option<Vec<u8>>> {
        match self.run(identify)? {
            Some(completion) if completion.status == 0 => self.said().map(Some),
            Some(_) => Ok(None),
            None => Err(self.failed("identifying a namespace", Errno::TIMEDOUT)),
        }
    }

    /// The 4096 bytes that an Identify has written.
    fn said(&self) -> Result<Vec<u8>> {
        let mut bytes = vec![0; PAGE as usize];
        self.memory.file().read(IN, &mut bytes).map_err(|failed| self.registers.failed(failed))?;
        Ok(bytes)
    }

    /// Waits until the controller is ready, or not.
    fn ready(&self, ready: bool, call: &'static str) -> Result<()> {
        // CAP.TO, in units of 500 ms.
        let within = Duration::from_millis(500) * (self.registers.get(CAP)? >> 24).max(1);
        let mut fatal = false;
        let came = await_that(within, || {
            let status = self.registers.get(CSTS)?;
            fatal = status == GONE || ready && status & CSTS_FATAL != 0;
            Ok(fatal || (status & CSTS_READY != 0) == ready)
        })?;
        match (came, fatal) {
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

/// Which of a pair's doorbells.
#[derive(Debug, Clone, Copy)]
pub(super) enum Doorbell {
    /// A submission queue's tail.
    Submission = 0,
    /// A completion queue's head.
    Completion = 1,
}

#[cfg(test)]
mod tests {
    use super::super::sim::{Does, Options, Simulated, When, opcode};
    use super::*;
    use crate::iommu::sim::{Memory, Sim};

    /// What the late one says would be taken for what the next one has come to.
    #[test]
    fn late_completion_of_a_command_that_was_given_up_ends_no_later_command() {
        const INVALID_NAMESPACE: u16 = 0x0b;
        let domain = Sim::new(Sim::CAPABILITIES, Memory::new()).unwrap();
        let sim = Simulated::new(&domain, Options::default()).unwrap();
        let mut controller =
            Controller::open(sim.registers(), &(Arc::new(domain) as Arc<dyn Domain>)).unwrap();
        controller.reset().unwrap();
        controller.come_up().unwrap();
        sim.fault(When::admin(opcode::SET_FEATURES), Does::HoldData);
        assert_eq!(controller.run(Command::queues(1)).unwrap(), None);
        assert_eq!(sim.release(), 1);
        let to = controller.memory.iova(IN);
        for (namespace, status) in [(2, INVALID_NAMESPACE), (1, 0), (2, INVALID_NAMESPACE)] {
            let completion = controller.run(Command::identify(namespace, to)).unwrap().unwrap();
            assert_eq!(completion.status, status, "namespace {namespace}");
        }
    }
}
