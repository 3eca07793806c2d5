//! A simulated NVMe controller at register level, for the injection of faults that real drives do not have on demand.
//!
//! It is not a drive to store data on. It does DMA through a simulated IOMMU ([`Sim`]), so that the driver meets
//! everything that a controller may do: commands that never complete, completions with wrong CIDs, unmapped memory, a
//! controller that fails, cannot be initialized, or is removed. It runs on its own thread, woken by doorbells, and
//! signals interrupts by writing eventfds, so that the driver's real threads are exercised.
//!
//! All its DMA goes through the domain, a page at a time. Unmapped memory is a fault, of data (Data Transfer Error)
//! or of a queue (CSTS.CFS); after a fence nothing moves. Once an unmap or a fence of the domain has returned, no
//! copy that it forbids is in progress.
//!
//! Whatever the driver does against the specification is recorded ([`Simulated::complaints`]): tests check this at
//! their end.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use passgate_backends::nvme::Registers;
use passgate_backends::{Device, DeviceTraits, Error, Result, Step, Steps};
use passgate_bindings::Failed;
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

use crate::iommu::{Sim, SimDevice};

mod commands;
mod faults;
mod function;
mod medium;
mod pointers;
mod queues;
mod registers;
mod state;

pub use commands::opcode;
pub use faults::{CommandFilter, FaultAction, ReadyChange};
pub use medium::Medium;

use faults::FaultRules;
use function::Function;
use registers::SimRegisters;
use state::State;

/// The properties of a simulated controller.
#[derive(Debug, Clone)]
pub struct Options {
    /// The name of its device, for messages.
    pub name: String,
    /// The size of a block in bytes: 512 or 4096.
    pub block: u32,
    /// The number of blocks of namespace 1, the only one.
    pub blocks: u64,
    /// MDTS: a command transfers at most 2^`mdts` pages; 0 for no limit.
    pub mdts: u8,
    /// SGL support (SGLS, bits 1:0): 0 none, 1 at any alignment, 2 at multiples of 4 bytes.
    pub sgl: u8,
    /// True if it has a volatile write cache, whose content is lost without power ([`Simulated::power_cut`]).
    pub volatile_cache: bool,
    /// True if it has Write Zeroes.
    pub write_zeroes: bool,
    /// True if it has Dataset Management.
    pub discard: bool,
    /// WZSL: a Write Zeroes command has at most 2^`wzsl` pages; 0 for no limit.
    pub wzsl: u8,
    /// DMRSL: a range of Dataset Management has at most this number of blocks; 0 for no limit.
    pub dmrsl: u32,
    /// CSI: the Command Set Identifier of the namespace; 0 for the NVM command set.
    pub command_set: u8,
    /// True if the controller has several command sets (CAP.CSS, bit 43).
    pub several_command_sets: bool,
    /// True if the controller has the list of namespace identification descriptors.
    pub descriptors: bool,
    /// True if the namespace is write-protected.
    pub read_only: bool,
    /// The largest number of I/O queues of each kind.
    pub queues: u16,
    /// The number of interrupt vectors.
    pub vectors: u32,
    /// The largest number of entries of a queue (CAP.MQES, which is zero-based).
    pub entries: u16,
    /// CAP.DSTRD: the distance of doorbells is 2^(2 + `stride`) bytes.
    pub stride: u8,
    /// CAP.TO: the longest time to become ready or not ready, in units of 500 ms.
    pub ready_timeout: u8,
    /// The serial number.
    pub serial: String,
    /// The model number.
    pub model: String,
    /// The fences that its device has.
    pub stop_class: Steps,
    /// The properties of its device that fences depend on.
    pub traits: DeviceTraits,
}

impl Default for Options {
    /// A typical drive: 64 MiB in blocks of 512 bytes, 128 KiB per command, all optional commands.
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
            wzsl: 0,
            dmrsl: 0,
            command_set: 0,
            several_command_sets: false,
            descriptors: true,
            read_only: false,
            queues: 8,
            vectors: 9,
            entries: 1024,
            stride: 0,
            ready_timeout: 2,
            serial: "SIMULATED".to_owned(),
            model: "passgate simulated controller".to_owned(),
            stop_class: Steps::of(&[Step::Master, Step::Detach, Step::Reset]),
            traits: DeviceTraits::default(),
        }
    }
}

/// A command that the controller has fetched from an I/O queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FetchedCommand {
    /// The identifier of the submission queue.
    pub queue: u16,
    /// The opcode ([`opcode`]).
    pub opcode: u8,
    /// The first block; 0 for a command without blocks.
    pub first: u64,
    /// The number of blocks.
    pub blocks: u64,
}

/// A simulated controller. Dropping it removes it.
#[derive(Debug)]
pub struct Simulated {
    core: Arc<Core>,
    registers: Arc<SimRegisters>,
    thread: Option<JoinHandle<()>>,
}

/// The state that the controller's thread, its registers and its device share.
#[derive(Debug)]
struct Core {
    options: Options,
    port: SimDevice,
    medium: Arc<Medium>,
    state: Mutex<State>,
    changed: Condvar,
    /// The number of DMA accesses that faulted.
    dma_faults: AtomicU64,
}

impl Simulated {
    /// Returns a controller whose device is attached to `domain`; powered on, not enabled.
    pub fn new(domain: &Sim, options: Options) -> Result<Self> {
        let port = domain.device(&options.name, options.stop_class, options.traits);
        let medium = Arc::new(Medium::new(options.block, options.blocks, options.volatile_cache));
        let core = Arc::new(Core {
            port,
            medium,
            state: Mutex::new(State::new(FaultRules::default())),
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
        let registers = Arc::new(SimRegisters::new(Arc::clone(&core), device, removal));
        Ok(Self { core, registers, thread: Some(thread) })
    }

    /// Returns its registers, for a driver.
    pub fn registers(&self) -> Arc<dyn Registers> {
        Arc::clone(&self.registers) as Arc<dyn Registers>
    }

    /// Returns its blocks.
    pub fn medium(&self) -> &Medium {
        &self.core.medium
    }

    /// Injects a fault into the commands that `when` selects, from now on. If several faults apply, the one set first
    /// does.
    pub fn fault(&self, when: CommandFilter, action: FaultAction) {
        self.core.lock().faults.add(when, action);
    }

    /// Removes all faults. Stalled commands stay so until [`Simulated::release`].
    pub fn behave(&self) {
        let mut state = self.core.lock();
        state.faults = FaultRules::default();
    }

    /// Sets the outcome of the next enabling (CC.EN set); several calls set those of the next ones in turn.
    pub fn next_enable(&self, change: ReadyChange) {
        self.core.lock().faults.enables.push_back(change);
    }

    /// Sets the outcome of the next disabling (CC.EN cleared), likewise.
    pub fn next_disable(&self, change: ReadyChange) {
        self.core.lock().faults.disables.push_back(change);
    }

    /// With false, Abort commands report that they aborted nothing, and do so. Initially true.
    pub fn obey_aborts(&self, obey: bool) {
        self.core.lock().faults.ignore_aborts = !obey;
    }

    /// With false, no interrupts are signalled. Initially true.
    pub fn raise_interrupts(&self, raise: bool) {
        self.core.lock().faults.suppress_interrupts = !raise;
    }

    /// Resumes all stalled and delayed commands. Returns their number.
    pub fn release(&self) -> usize {
        let released = self.core.lock().resume_all();
        self.core.changed.notify_all();
        released
    }

    /// Resumes the command that has been stalled for longest. False if there is none.
    pub fn release_next(&self) -> bool {
        let released = self.core.lock().resume_next();
        self.core.changed.notify_all();
        released
    }

    /// Returns the number of commands that are stalled or delayed.
    pub fn stalled_commands(&self) -> usize {
        self.core.lock().pending_count()
    }

    /// Waits until `count` commands are stalled or delayed. False if that takes longer than `within`.
    pub fn await_stalled(&self, count: usize, within: Duration) -> bool {
        self.core.await_that(within, |state| state.pending_count() >= count)
    }

    /// Waits until `count` I/O commands have been fetched in all. False if that takes longer than `within`.
    pub fn await_taken(&self, count: u64, within: Duration) -> bool {
        self.core.await_that(within, |state| state.fetched >= count)
    }

    /// Returns the number of I/O commands fetched so far.
    pub fn taken(&self) -> u64 {
        self.core.lock().fetched
    }

    /// Returns the I/O commands fetched last, oldest first, a few thousand at most.
    pub fn history(&self) -> Vec<FetchedCommand> {
        self.core.lock().history.iter().copied().collect()
    }

    /// Returns the number of times that it became ready after being enabled.
    pub fn enabled(&self) -> u64 {
        self.core.lock().enabled
    }

    /// Returns the number of DMA accesses that faulted.
    pub fn dma_faults(&self) -> u64 {
        self.core.dma_faults.load(Ordering::Relaxed)
    }

    /// Returns the violations of the specification by the driver, described.
    pub fn complaints(&self) -> Vec<String> {
        self.core.lock().violations.clone()
    }

    /// Makes it report a fatal error (CSTS.CFS) and stop, until it is reset.
    pub fn fail(&self) {
        self.core.lock().fatal = true;
        self.core.changed.notify_all();
    }

    /// Requests the device back, as the kernel does when a device is unbound. The controller continues to work.
    pub fn request_removal(&self) {
        let _ = rustix::io::write(&self.registers.removal, &1u64.to_ne_bytes());
    }

    /// Removes it: its registers read as all ones, and it does no DMA any more.
    pub fn vanish(&self) {
        self.core.lock().unplug();
        self.core.changed.notify_all();
    }

    /// Interrupts its power: the content of the write cache is lost, and its registers are as after power-on.
    pub fn power_cut(&self) {
        let mut state = self.core.lock();
        self.core.medium.discard_cache();
        state.reset_function();
        drop(state);
        self.core.changed.notify_all();
    }
}

impl Drop for Simulated {
    fn drop(&mut self) {
        {
            let mut state = self.core.lock();
            state.unplug();
            state.stopping = true;
        }
        self.core.changed.notify_all();
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            log::error!("a simulated controller panicked; this is a bug of the simulator");
        }
    }
}

impl Core {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn await_that(&self, within: Duration, predicate: impl Fn(&State) -> bool) -> bool {
        let until = Instant::now() + within;
        let mut state = self.lock();
        while !predicate(&state) {
            let remaining = until.saturating_duration_since(Instant::now());
            if remaining.is_zero() {
                return false;
            }
            state = self.changed.wait_timeout(state, remaining).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    fn failed(&self, source: Failed) -> Error {
        Error::Device { device: self.options.name.clone(), source, remedy: "" }
    }
}

#[cfg(test)]
mod tests;
