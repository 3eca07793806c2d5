//! A simulated NVMe controller, register by register: for injecting faults where no drive would have them.
//!
//! It is no drive and keeps nobody's data; it stands in front of a simulated IOMMU ([`Sim`]) so that the driver above it
//! meets everything that a controller may do to it: commands that never end, completions that belong to nobody, memory
//! that is not there, a controller that fails, does not come up, or is pulled out. It runs on a thread of its own, woken by
//! doorbells, and interrupts by writing eventfds, so the driver's real threads are exercised.
//!
//! All its DMA goes through the domain, a page at a time: what is not mapped is a fault, of data (Data Transfer Error) or of
//! a queue (CSTS.CFS), and what a fence has stopped does not move. When an unmap or a fence of the domain has returned, no
//! byte of a copy is under way that it forbids.
//!
//! What it is told that the specification does not allow it writes down ([`Simulated::complaints`]): tests end by looking.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use passgate_bindings::Failed;
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

use super::registers::Registers;
use crate::device::sim::SimDevice;
use crate::device::{Device, Nature, StopClass};
use crate::iommu::sim::Sim;
use crate::{Error, Result};

mod commands;
mod faults;
mod function;
mod life;
mod medium;
mod pointers;
mod queues;
mod registers;

pub use commands::opcode;
pub use faults::{Does, Turn, When};
pub use medium::Medium;

use faults::Rules;
use function::Function;
use life::Machine;
use registers::Wires;

/// What a simulated controller is like.
#[derive(Debug, Clone)]
pub struct Options {
    /// Its device's name, for messages.
    pub name: String,
    /// Bytes of a block: 512 or 4096.
    pub block: u32,
    /// Blocks of namespace 1, the only one.
    pub blocks: u64,
    /// MDTS: a command moves at most 2^`mdts` pages; 0 for no limit.
    pub mdts: u8,
    /// Scatter-gather lists: 0 not at all, 1 at any byte, 2 at multiples of 4.
    pub sgl: u8,
    /// Whether what is not flushed is lost with the power ([`Simulated::power_cut`]).
    pub volatile_cache: bool,
    /// Whether it has Write Zeroes.
    pub write_zeroes: bool,
    /// Whether it has Dataset Management.
    pub discard: bool,
    /// WZSL: one Write Zeroes clears at most 2^`zeroes` pages; 0 for no limit.
    pub zeroes: u8,
    /// DMRSL: one range of Dataset Management has at most so many blocks; 0 for no limit.
    pub range: u32,
    /// CSI: the namespace's command set; 0 for the NVM command set.
    pub command_set: u8,
    /// True where the controller has several command sets (CAP.CSS).
    pub several_command_sets: bool,
    /// True where the controller has the list of namespace identification descriptors.
    pub descriptors: bool,
    /// Whether the namespace is write-protected.
    pub read_only: bool,
    /// I/O queues each way that it grants at most.
    pub queues: u16,
    /// Interrupt vectors.
    pub vectors: u32,
    /// Entries of a queue at most (CAP.MQES counts from 0).
    pub entries: u16,
    /// CAP.DSTRD: doorbells are 4·2^`stride` bytes apart.
    pub stride: u8,
    /// CAP.TO: how long it may take to become ready, in units of 500 ms.
    pub patience: u8,
    /// Serial number.
    pub serial: String,
    /// Model number.
    pub model: String,
    /// How it can be stopped.
    pub stop_class: StopClass,
    /// What of it bears on fences.
    pub nature: Nature,
}

impl Default for Options {
    /// A drive as they are today: 64 MiB in blocks of 512 bytes, 128 KiB a command, everything optional there.
    fn default() -> Self {
        Self {
            name: "sim-nvme".to_owned(),
            block: 512,
            blocks: 1 << 17,
            mdts: 5,
            sgl: 0,
            volatile_cache: true,
            write_zeroes: true,
            discard: true,
            zeroes: 0,
            range: 0,
            command_set: 0,
            several_command_sets: false,
            descriptors: true,
            read_only: false,
            queues: 8,
            vectors: 9,
            entries: 1024,
            stride: 0,
            patience: 2,
            serial: "SIMULATED".to_owned(),
            model: "passgate simulated controller".to_owned(),
            stop_class: StopClass::MASTER.union(StopClass::DETACH).union(StopClass::RESET),
            nature: Nature::default(),
        }
    }
}

/// A command that the controller has taken from an I/O queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Taken {
    /// The submission queue.
    pub queue: u16,
    /// Its opcode ([`opcode`]).
    pub opcode: u8,
    /// Its first block, where it has blocks.
    pub first: u64,
    /// How many.
    pub blocks: u64,
}

/// A simulated controller. It is pulled out when dropped.
#[derive(Debug)]
pub struct Simulated {
    core: Arc<Core>,
    registers: Arc<Wires>,
    thread: Option<JoinHandle<()>>,
}

/// What the controller's thread, its registers and its device share.
#[derive(Debug)]
struct Core {
    options: Options,
    port: SimDevice,
    medium: Arc<Medium>,
    machine: Mutex<Machine>,
    changed: Condvar,
    /// DMA that met a fault.
    dma_faults: AtomicU64,
}

impl Simulated {
    /// A controller in `domain`, attached, powered on, not enabled.
    pub fn new(domain: &Sim, options: Options) -> Result<Self> {
        let port = domain.device(&options.name, options.stop_class, options.nature);
        let medium = Arc::new(Medium::new(options.block, options.blocks, options.volatile_cache));
        let core = Arc::new(Core {
            port,
            medium,
            machine: Mutex::new(Machine::new(Rules::default())),
            changed: Condvar::new(),
            dma_faults: AtomicU64::new(0),
            options,
        });
        let running = Arc::clone(&core);
        let thread = std::thread::Builder::new().name("nvme-sim".into()).spawn(move || running.run());
        let thread = thread.map_err(|error| {
            let errno = Errno::from_io_error(&error).unwrap_or(Errno::AGAIN);
            core.failed(Failed::new("starting a thread", errno))
        })?;
        let device = Arc::new(Function::new(Arc::clone(&core))) as Arc<dyn Device>;
        let removal = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let removal = removal.map_err(|errno| core.failed(Failed::new("eventfd", errno)))?;
        let registers = Arc::new(Wires::new(Arc::clone(&core), device, removal));
        Ok(Self { core, registers, thread: Some(thread) })
    }

    /// Its registers, for a driver; they know its device.
    pub fn registers(&self) -> Arc<dyn Registers> {
        Arc::clone(&self.registers) as Arc<dyn Registers>
    }

    /// What its blocks are.
    pub fn medium(&self) -> &Medium {
        &self.core.medium
    }

    /// From now on, what `when` picks meets this fault. Of several rules that fit, the first that was set counts.
    pub fn fault(&self, when: When, does: Does) {
        self.core.lock().rules.add(when, does);
    }

    /// No more faults; what is held stays so until [`Simulated::release`].
    pub fn behave(&self) {
        let mut machine = self.core.lock();
        machine.rules = Rules::default();
    }

    /// How the next enabling (CC.EN set) goes; told several times, the next several.
    pub fn next_enable(&self, turn: Turn) {
        self.core.lock().rules.enables.push_back(turn);
    }

    /// How the next disabling (CC.EN cleared) goes.
    pub fn next_disable(&self, turn: Turn) {
        self.core.lock().rules.disables.push_back(turn);
    }

    /// Whether Abort commands end what they name, or say that they did not. They do, at first.
    pub fn obey_aborts(&self, obey: bool) {
        self.core.lock().rules.deaf_to_aborts = !obey;
    }

    /// Whether interrupts are raised. They are, at first.
    pub fn raise_interrupts(&self, raise: bool) {
        self.core.lock().rules.mute = !raise;
    }

    /// Commands that are held go on. Returns how many.
    pub fn release(&self) -> usize {
        let released = self.core.lock().release();
        self.core.changed.notify_all();
        released
    }

    /// The command that has been held longest goes on. Returns whether there is one.
    pub fn release_next(&self) -> bool {
        let released = self.core.lock().release_next();
        self.core.changed.notify_all();
        released
    }

    /// Commands that are held or delayed now.
    pub fn held(&self) -> usize {
        self.core.lock().held()
    }

    /// Waits until so many commands are held or delayed; whether that came in time.
    pub fn await_held(&self, count: usize, within: Duration) -> bool {
        self.core.await_that(within, |machine| machine.held() >= count)
    }

    /// Waits until so many I/O commands were taken since the beginning; whether that came in time.
    pub fn await_taken(&self, count: u64, within: Duration) -> bool {
        self.core.await_that(within, |machine| machine.taken >= count)
    }

    /// I/O commands taken since the beginning.
    pub fn taken(&self) -> u64 {
        self.core.lock().taken
    }

    /// The last I/O commands that were taken, oldest first, a few thousand at most.
    pub fn history(&self) -> Vec<Taken> {
        self.core.lock().history.iter().copied().collect()
    }

    /// How often it was enabled.
    pub fn enabled(&self) -> u64 {
        self.core.lock().enabled
    }

    /// DMA that met a fault, since the beginning.
    pub fn dma_faults(&self) -> u64 {
        self.core.dma_faults.load(Ordering::Relaxed)
    }

    /// What it was told that the specification does not allow, in words.
    pub fn complaints(&self) -> Vec<String> {
        self.core.lock().complaints.clone()
    }

    /// It reports a fatal error (CSTS.CFS) and does nothing more until it is reset.
    pub fn fail(&self) {
        self.core.lock().fatal = true;
        self.core.changed.notify_all();
    }

    /// Somebody wants the device back, as the kernel does where a device is unbound: it says so, and goes on.
    pub fn ask_back(&self) {
        let _ = rustix::io::write(&self.registers.removal, &1u64.to_ne_bytes());
    }

    /// It is pulled out: its registers read as all ones and it does no DMA, ever again.
    pub fn vanish(&self) {
        self.core.lock().vanish();
        self.core.changed.notify_all();
    }

    /// Its power fails for a moment: what was not flushed is lost, and it is as if it had just been plugged in.
    pub fn power_cut(&self) {
        let mut machine = self.core.lock();
        self.core.medium.lose();
        machine.reset_function();
        drop(machine);
        self.core.changed.notify_all();
    }
}

impl Drop for Simulated {
    fn drop(&mut self) {
        {
            let mut machine = self.core.lock();
            machine.vanish();
            machine.leaving = true;
        }
        self.core.changed.notify_all();
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            log::error!("a simulated controller panicked; this is a bug of the simulator");
        }
    }
}

impl Core {
    fn lock(&self) -> MutexGuard<'_, Machine> {
        self.machine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn await_that(&self, within: Duration, that: impl Fn(&Machine) -> bool) -> bool {
        let until = Instant::now() + within;
        let mut machine = self.lock();
        while !that(&machine) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            machine = self.changed.wait_timeout(machine, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    fn failed(&self, source: Failed) -> Error {
        Error::Device { device: self.options.name.clone(), source, mend: "" }
    }
}

#[cfg(test)]
mod tests;
