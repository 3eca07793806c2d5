//! A drive as a block device: the generations of its controller, the slots of its queues, and its fences.
//!
//! A *generation* of the controller lasts from one initialization to the next. It ends when the controller is halted,
//! to be fenced or reset. The owner of a queue follows by itself at its next call: it *parks* while the controller is
//! halted, and starts the queue anew in the next generation ([`super::Queue`]). So nothing here accesses a queue's
//! memory before its owner has parked, and no fence waits for an owner: the admission window knows what is in flight.
//!
//! A thread of the drive, the *watchdog*, handles commands that do not complete ([`super::watchdog`]).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use passgate_bindings::{Failed, Iova, PAGE, PageRange};
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

use super::cids::{Cids, MAX_OUTSTANDING};
use super::controller::{Controller, Doorbell};
use super::data::TransferLimits;
use super::geometry::Geometry;
use super::queue::{LIST_BYTES, Queue, now_ms};
use super::queue_pair::QueuePair;
use super::registers::{DOORBELLS, Registers};
use super::watchdog::{Health, WatchdogEvent, run_watchdog};
use crate::device::OwnMemory;
use crate::device::{Device, DeviceTraits, Guard, Step, Steps};
use crate::iommu::Domain;
use crate::window::Window;
use crate::{Error, Result};

/// The pages of the driver's own memory that all queues together may use.
const MAX_MEMORY_PAGES: u64 = 480;
/// The largest number of entries of a queue.
const MAX_ENTRIES: u16 = MAX_OUTSTANDING + 1; // a full queue has one empty entry
/// The largest number of memory ranges by which the window describes one request.
const MAX_WINDOW_RANGES: usize = 128;
/// The largest transfer of one command in bytes, whatever the controller supports: what one PRP list describes.
const MAX_COMMAND_BYTES: u64 = 1 << 20;
/// The time that a drain waits for requests in flight. It is short because the conversion that waits for it may need
/// stronger fences next.
const DRAIN_TIMEOUT: Duration = Duration::from_millis(300);
/// The time that owners have to park.
const PARK_TIMEOUT: Duration = Duration::from_secs(2);
/// The number of attempts to initialize the controller.
const MAX_INIT_ATTEMPTS: u32 = 3;

/// The options of [`Drive::open`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DriveOptions {
    /// The namespace identifier, from 1 on.
    pub namespace: u32,
    /// The number of queues wanted, 1 to 64; fewer may be available ([`Drive::queues`]).
    pub queues: u16,
    /// The time that a command has to complete before it is aborted.
    pub deadline: Duration,
}

impl Default for DriveOptions {
    fn default() -> Self {
        Self { namespace: 1, queues: 1, deadline: Duration::from_secs(5) }
    }
}

/// An NVMe drive as a block device.
#[derive(Debug)]
pub struct Drive {
    inner: Arc<Inner>,
    watchdog: Option<JoinHandle<()>>,
}

/// A generation of the controller: its number, and in the lowest two bits its state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Generation(u64);

impl Generation {
    /// Initialized; its queues may be used.
    const UP: u64 = 0;
    /// To be fenced or reset; its queues are not used.
    pub(super) const HALTED: u64 = 1;
    /// Given up, with all DMA stopped.
    pub(super) const LOST: u64 = 2;
    /// Given up, and not stopped for certain: it may still do DMA.
    pub(super) const UNSTOPPED: u64 = 3;
    const STATE_MASK: u64 = 3;
    /// The generation before the first.
    pub(super) const NONE: Self = Self(Self::HALTED);

    pub(super) fn is_up(self) -> bool {
        self.0 & Self::STATE_MASK == Self::UP
    }

    /// True if the controller was given up, stopped or not.
    pub(super) fn is_lost(self) -> bool {
        self.0 & Self::STATE_MASK >= Self::LOST
    }

    pub(super) fn is_unstopped(self) -> bool {
        self.0 & Self::STATE_MASK == Self::UNSTOPPED
    }

    /// Returns the same generation in another state.
    pub(super) fn with(self, state: u64) -> Self {
        Self(self.0 & !Self::STATE_MASK | state)
    }

    fn next(self) -> Self {
        Self((self.0 & !Self::STATE_MASK) + 4)
    }
}

/// The state of one queue that outlives its owners.
#[derive(Debug)]
pub(super) struct QueueSlot {
    /// True while the queue has an owner, or has requests in flight without one.
    taken: AtomicBool,
    /// True while the owner does not use the queue, until the next generation.
    pub(super) parked: AtomicBool,
    /// The number of requests that have taken longer than the deadline.
    pub(super) overdue: AtomicU32,
    /// The eventfd of the queue's interrupt vector.
    pub(super) interrupt: OwnedFd,
    /// The queue as its last owner returned it.
    idle: Mutex<Option<IdleQueue>>,
}

/// A queue without an owner, with nothing in flight.
#[derive(Debug)]
pub(super) struct IdleQueue {
    /// The generation in which the queue pair was created.
    pub(super) generation: Generation,
    pub(super) queue_pair: QueuePair,
    pub(super) cids: Cids,
}

/// The state of the drive with respect to fences.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    /// Not fenced.
    Up,
    /// Draining or drained: no request is admitted; the controller is untouched.
    Drained,
    /// Stopped by a stronger fence: an attach initializes the controller anew.
    Fenced,
}

/// The state that the drive, its queues and its watchdog share.
///
/// Lock order: `controller`, then `mode`. Fields are dropped in the order in which they stand: the controller and the
/// memory before the registers, which keep the device open.
#[derive(Debug)]
pub(super) struct Inner {
    controller: Mutex<Controller>,
    pub(super) memory: OwnMemory,
    pub(super) registers: Arc<dyn Registers>,
    pub(super) name: String,
    pub(super) window: Arc<Window>,
    pub(super) geometry: Geometry,
    pub(super) limits: TransferLimits,
    /// The number of entries of each queue.
    pub(super) entries: u16,
    /// The deadline of a command, in milliseconds.
    pub(super) deadline_ms: u64,
    doorbell_stride: u64,
    pub(super) queue_slots: Vec<QueueSlot>,
    /// The interrupt vector of the first queue.
    first_vector: u16,
    generation: AtomicU64,
    mode: Mutex<Mode>,
    /// The time at which a fence had stopped the drive, in milliseconds of [`now_ms`]; 0 while none has.
    stopped_at_ms: AtomicU64,
    watchdog_events: Mutex<Sender<WatchdogEvent>>,
    /// The number of controller resets because of a timeout, a protocol error or a fatal error; fences are not
    /// counted.
    pub(super) recoveries: AtomicU32,
    /// The number of Abort commands so far.
    pub(super) aborts: AtomicU64,
    /// Set once the drive is being closed: the watchdog waits for no owner any more.
    pub(super) closing: AtomicBool,
}

impl Drive {
    /// Initializes a drive by its registers ([`super::serve`] does so for a VFIO device). `domain` is the one that
    /// the device is attached to; the queues are mapped there.
    ///
    /// Fails if the namespace cannot be used, the device has no MSI-X, or there is no memory for the queues.
    pub fn open(
        registers: Arc<dyn Registers>,
        domain: &Arc<dyn Domain>,
        options: DriveOptions,
    ) -> Result<Arc<Self>> {
        let mut controller = Controller::open(Arc::clone(&registers), domain)?;
        controller.reset()?;
        controller.initialize()?;
        let geometry = controller.geometry(options.namespace)?;
        let vectors = u16::try_from(registers.vectors()?).unwrap_or(u16::MAX);
        if vectors == 0 {
            let what = "interrupts by MSI-X";
            return Err(Error::Unsupported { device: registers.device().name().to_owned(), what });
        }
        // The admin queue always has vector 0. With a vector to spare the I/O queues begin at 1; else the first
        // shares it.
        let granted = controller.set_queue_count(options.queues.clamp(1, 64))?;
        let queues = granted.min(vectors);
        let first_vector = u16::from(vectors > queues);
        let entries = queue_entries(queues, controller.max_entries);
        let Some(entries) = entries else {
            return Err(Error::Host {
                what: format!("{}: no memory for {queues} queues", registers.device().name()),
                remedy: "ask for fewer with --num-queues",
            });
        };
        let memory = OwnMemory::map(domain, (queue_bytes(entries) * u64::from(queues) / PAGE) as usize)?;
        let queue_slots = (0..queues).map(|_| QueueSlot::new(&*registers)).collect::<Result<Vec<_>>>()?;
        // One command transfers whole blocks, and no more than 65536 of them: its block count has 16 bits.
        let block = u64::from(geometry.block);
        let max_bytes =
            controller.caps.max_transfer.unwrap_or(MAX_COMMAND_BYTES).min(MAX_COMMAND_BYTES).min(block << 16)
                / block
                * block;
        let (watchdog_events, events) = mpsc::channel();
        let inner = Arc::new(Inner {
            name: registers.device().name().to_owned(),
            window: Window::new(usize::from(queues) * usize::from(entries), MAX_WINDOW_RANGES),
            limits: TransferLimits { block, max_bytes: max_bytes.max(block), sgl: controller.caps.sgl },
            geometry,
            entries,
            deadline_ms: options.deadline.as_millis() as u64,
            doorbell_stride: controller.doorbell(0, Doorbell::Completion) - DOORBELLS,
            queue_slots,
            first_vector,
            generation: AtomicU64::new(Generation::NONE.0),
            mode: Mutex::new(Mode::Up),
            stopped_at_ms: AtomicU64::new(0),
            watchdog_events: Mutex::new(watchdog_events),
            recoveries: AtomicU32::new(0),
            aborts: AtomicU64::new(0),
            closing: AtomicBool::new(false),
            controller: Mutex::new(controller),
            memory,
            registers,
        });
        inner.create_queue_pairs(&mut inner.controller())?;
        inner.set_generation(inner.generation().next());
        let shared = Arc::clone(&inner);
        let watchdog = std::thread::Builder::new()
            .name("nvme-watchdog".into())
            .spawn(move || run_watchdog(&shared, &events));
        let watchdog = watchdog.map_err(|error| {
            let errno = Errno::from_io_error(&error).unwrap_or(Errno::AGAIN);
            inner.registers.failed(Failed::new("starting a thread", errno))
        })?;
        Ok(Arc::new(Self { inner, watchdog: Some(watchdog) }))
    }

    /// Returns the properties of the drive and its namespace.
    pub fn geometry(&self) -> &Geometry {
        &self.inner.geometry
    }

    /// Returns the admission window for guest requests: the pages that the drive's DMA may access, none at first.
    pub fn window(&self) -> &Arc<Window> {
        &self.inner.window
    }

    /// Returns an eventfd that becomes and stays readable once the kernel wants the device back; the kernel waits
    /// until the drive and its queues are dropped. None if removal is not reported.
    pub fn removal(&self) -> Option<BorrowedFd<'_>> {
        self.inner.registers.removal()
    }

    /// Returns the number of interventions so far. Does not block.
    pub fn health(&self) -> Health {
        self.inner.health()
    }

    /// Returns the number of queues.
    pub fn queues(&self) -> u16 {
        self.inner.queue_slots.len() as u16 // made of a u16
    }

    /// Takes queue `index` for one thread. Fails with `EBUSY` if it has an owner, or was dropped with requests in
    /// flight, and with `ENOENT` if there is no such queue.
    pub fn take_queue(&self, index: u16) -> Result<Queue> {
        let failed = |errno| self.inner.registers.failed(Failed::new("taking a queue", errno));
        let queue_slot =
            self.inner.queue_slots.get(usize::from(index)).ok_or_else(|| failed(Errno::NOENT))?;
        if queue_slot.taken.swap(true, Ordering::AcqRel) {
            return Err(failed(Errno::BUSY));
        }
        Ok(Queue::new(Arc::clone(&self.inner), index, queue_slot.idle().take()))
    }
}

impl Drop for Drive {
    fn drop(&mut self) {
        self.inner.closing.store(true, Ordering::Release);
        self.inner.notify_watchdog(WatchdogEvent::Stop);
        if self.watchdog.take().is_some_and(|watchdog| watchdog.join().is_err()) {
            log::error!("the watchdog thread of an NVMe drive panicked; this is a bug of passgate");
        }
    }
}

/// Returns the memory of one queue in bytes: the queue pair, and a list for each command.
fn queue_bytes(entries: u16) -> u64 {
    (QueuePair::size(entries) + LIST_BYTES * u64::from(entries)).next_multiple_of(PAGE)
}

/// Returns the number of entries for each of `queues` queues; None if there is no memory for them.
fn queue_entries(queues: u16, max_entries: u16) -> Option<u16> {
    [MAX_ENTRIES, 64, 32, 16, 8]
        .into_iter()
        .map(|entries| entries.min(max_entries))
        .find(|entries| *entries >= 2 && queue_bytes(*entries) * u64::from(queues) <= MAX_MEMORY_PAGES * PAGE)
}

impl QueueSlot {
    fn new(registers: &dyn Registers) -> Result<Self> {
        let interrupt = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        Ok(Self {
            taken: AtomicBool::new(false),
            parked: AtomicBool::new(true),
            overdue: AtomicU32::new(0),
            idle: Mutex::default(),
            interrupt: interrupt.map_err(|errno| registers.failed(Failed::new("eventfd", errno)))?,
        })
    }

    fn idle(&self) -> MutexGuard<'_, Option<IdleQueue>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stores the queue of an owner that is dropped, with nothing in flight.
    pub(super) fn return_queue(&self, idle: IdleQueue) {
        *self.idle() = Some(idle);
        // Last, so that the next owner finds the queue.
        self.taken.store(false, Ordering::Release);
    }

    /// Wakes the owner, by the eventfd that it waits for.
    pub(super) fn wake(&self) {
        let _ = rustix::io::write(&self.interrupt, &1u64.to_ne_bytes());
    }
}

impl Inner {
    /// Returns the current generation.
    pub(super) fn generation(&self) -> Generation {
        Generation(self.generation.load(Ordering::SeqCst))
    }

    /// Publishes a generation and wakes all owners, who follow it.
    pub(super) fn set_generation(&self, generation: Generation) {
        self.generation.store(generation.0, Ordering::SeqCst);
        // Before the owners' parked flags are read, as the owner stores its flag before it reads the generation: one
        // of the two sides sees the other's store ([`super::queue`]).
        fence(Ordering::SeqCst);
        self.queue_slots.iter().for_each(QueueSlot::wake);
    }

    pub(super) fn queue_slot(&self, index: u16) -> &QueueSlot {
        &self.queue_slots[usize::from(index)]
    }

    /// Returns the offset of a queue's memory.
    pub(super) fn queue_offset(&self, index: u16) -> u64 {
        queue_bytes(self.entries) * u64::from(index)
    }

    /// Returns the offset of the list of the command whose CID has this index.
    pub(super) fn list_offset(&self, queue: u16, cid_index: u16) -> u64 {
        self.queue_offset(queue) + QueuePair::size(self.entries) + LIST_BYTES * u64::from(cid_index)
    }

    pub(super) fn doorbell(&self, queue: u16, which: Doorbell) -> u64 {
        DOORBELLS + (u64::from(queue) * 2 + which as u64) * self.doorbell_stride
    }

    pub(super) fn notify_watchdog(&self, event: WatchdogEvent) {
        let watchdog_events = self.watchdog_events.lock().unwrap_or_else(PoisonError::into_inner);
        // The watchdog has ended once the drive is closed.
        let _ = watchdog_events.send(event);
    }

    /// True if a fence has stopped the drive, for certain, for longer than `time`.
    pub(super) fn is_stopped_for(&self, time: Duration) -> bool {
        let since = self.stopped_at_ms.load(Ordering::Acquire);
        since != 0 && now_ms().saturating_sub(since) > time.as_millis() as u64
    }

    pub(super) fn controller(&self) -> MutexGuard<'_, Controller> {
        self.controller.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn mode(&self) -> MutexGuard<'_, Mode> {
        self.mode.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn failed(&self, call: &'static str, errno: Errno) -> Error {
        self.registers.failed(Failed::new(call, errno))
    }

    /// Creates the queues of a controller that has been initialized. Their owners are parked.
    fn create_queue_pairs(&self, controller: &mut Controller) -> Result<()> {
        // Vectors before the first I/O queue's signal nothing: the admin queue is polled.
        let eventfds = std::iter::repeat_n(None, self.first_vector.into());
        let eventfds: Vec<_> = eventfds
            .chain(self.queue_slots.iter().map(|queue_slot| Some(queue_slot.interrupt.as_fd())))
            .collect();
        self.registers.set_interrupts(&eventfds)?;
        let queues = self.queue_slots.len() as u16; // made of a u16
        if controller.set_queue_count(queues)? < queues {
            return Err(self.failed("asking an NVMe controller for its queues again", Errno::NODEV));
        }
        for index in 0..queues {
            let queue_pair =
                QueuePair::zeroed(index + 1, self.entries, self.queue_offset(index), &self.memory);
            let queue_pair = queue_pair.map_err(|failed| self.registers.failed(failed))?;
            controller.create_queue_pair(&queue_pair, &self.memory, self.first_vector + index)?;
        }
        Ok(())
    }

    /// Halts the queues: after a success no owner uses one before the next generation. Fails with `ETIMEDOUT` if an
    /// owner does not park in time.
    pub(super) fn halt(&self) -> Result<()> {
        let generation = self.generation();
        if generation.is_up() {
            self.set_generation(generation.with(Generation::HALTED));
        }
        let until = Instant::now() + PARK_TIMEOUT;
        let busy = |queue_slot: &&QueueSlot| {
            queue_slot.taken.load(Ordering::SeqCst) && !queue_slot.parked.load(Ordering::SeqCst)
        };
        while let Some(queue_slot) = self.queue_slots.iter().find(busy) {
            if Instant::now() > until {
                return Err(self.failed("waiting for the owner of a queue", Errno::TIMEDOUT));
            }
            queue_slot.wake();
            std::thread::sleep(Duration::from_micros(200));
        }
        Ok(())
    }

    /// Stops the device by `step`. After a success, requests that were in flight no longer count as such in the
    /// window.
    fn stop(&self, step: Step) -> Result<()> {
        {
            let mut mode = self.mode();
            *mode = Mode::Fenced;
            // No request enters the window after this; those in it count until the fence has succeeded.
            self.window.pause();
            let generation = self.generation();
            if generation.is_up() {
                self.set_generation(generation.with(Generation::HALTED));
            }
        }
        self.registers.device().fence(step)?;
        self.window.void();
        self.stopped_at_ms.store(now_ms().max(1), Ordering::Release);
        Ok(())
    }

    /// Fences a drive whose device is out of its domain, and returns true for it. A failed replace leaves a device
    /// detached without notice to its driver (`iommu/iommufd/attachments.rs`).
    pub(super) fn fence_detached(&self) -> bool {
        let detached = !self.registers.is_attached() && *self.mode() != Mode::Fenced;
        if detached {
            log::warn!(
                "{}: the device was left detached from its domain: stopped until it is attached",
                self.name
            );
            if let Err(error) = self.stop(Step::Detach) {
                log::warn!("{error}");
            }
        }
        detached
    }

    /// Resets the controller and initializes it anew. `while_disabled` is called in between, while the controller is
    /// disabled.
    pub(super) fn reinitialize(
        &self,
        controller: &mut Controller,
        while_disabled: impl Fn() -> Result<()>,
    ) -> Result<()> {
        self.halt()?;
        let mut result = Ok(());
        for _ in 0..MAX_INIT_ATTEMPTS {
            result = controller.reset().and_then(|()| while_disabled());
            result = result
                .and_then(|()| controller.initialize())
                .and_then(|()| self.create_queue_pairs(controller));
            if result.is_ok() || controller.is_gone() {
                break;
            }
        }
        result
    }

    /// Starts the next generation of an initialized controller if `allowed`, which decides under the lock of the
    /// mode: a fence may have come meanwhile.
    pub(super) fn start_generation(&self, mut allowed: impl FnMut(&mut Mode) -> bool) {
        let mut mode = self.mode();
        if allowed(&mut mode) {
            self.set_generation(self.generation().next());
        }
    }
}

impl Device for Drive {
    fn name(&self) -> &str {
        &self.inner.name
    }

    fn stop_class(&self) -> Steps {
        self.inner.registers.device().stop_class() | Steps::DRAIN
    }

    fn wanted(&self) -> Option<BorrowedFd<'_>> {
        self.inner.registers.device().wanted()
    }

    fn traits(&self) -> DeviceTraits {
        self.inner.registers.device().traits()
    }

    /// Fences the drive. A drain is a pause: the queues stay, and requests are refused as
    /// [`super::Submitted::Closed`] meanwhile. Anything stronger goes to the device at once, without waiting for an
    /// owner or the watchdog; once it has succeeded, requests that were in flight no longer count as such.
    fn fence(&self, step: Step) -> Result<()> {
        let (inner, device) = (&self.inner, self.inner.registers.device());
        if step == Step::Drain {
            {
                let mut mode = inner.mode();
                if *mode == Mode::Up {
                    *mode = Mode::Drained;
                }
                inner.window.pause();
            }
            if inner.window.await_idle(DRAIN_TIMEOUT) {
                return Ok(());
            }
            return Err(inner.failed("drain", Errno::TIMEDOUT));
        }
        if !device.stop_class().has(step) {
            return device.fence(step); // fails as unsupported
        }
        inner.stop(step)
    }

    /// Ends a drain, or initializes a fenced drive anew. Waits for owners to park, and for the watchdog's current
    /// step.
    fn attach(&self) -> Result<()> {
        let inner = &self.inner;
        let mut controller = inner.controller();
        inner.fence_detached();
        {
            let mut mode = inner.mode();
            if *mode != Mode::Fenced && inner.generation().is_up() {
                *mode = Mode::Up;
                inner.window.lift();
                return Ok(());
            }
        }
        let stopped_at_ms = inner.stopped_at_ms.swap(0, Ordering::AcqRel);
        if let Err(error) = inner.reinitialize(&mut controller, || inner.registers.device().attach()) {
            if controller.is_gone() {
                inner.lose(&controller, &error);
            }
            // Owners count the time of the stop from its beginning.
            inner.stopped_at_ms.store(stopped_at_ms, Ordering::Release);
            return Err(error);
        }
        inner.start_generation(|mode| {
            *mode = Mode::Up;
            inner.window.lift();
            true
        });
        Ok(())
    }

    fn reserved(&self) -> Option<PageRange<Iova>> {
        OwnMemory::reserved()
    }

    fn guard(&self) -> Guard<'_> {
        self.inner.registers.device().guard()
    }
}

impl Drop for Inner {
    /// Closes in order if possible: the commands in the queues end, and the cache goes to the medium. The reset at
    /// the end is for the memory that is shared with the controller, and is freed next.
    fn drop(&mut self) {
        let (generation, queues) = (self.generation(), self.queue_slots.len() as u16);
        let controller = self.controller.get_mut().unwrap_or_else(PoisonError::into_inner);
        if generation.is_up() && !controller.is_gone() {
            let deleted = (1..=queues).try_for_each(|queue| controller.delete_queue_pair(queue));
            if let Err(error) = deleted.and_then(|()| controller.shut_down()) {
                log::warn!("closing: {error}");
            }
        }
        if let Err(error) = controller.reset() {
            log::warn!("closing: {error}");
        }
    }
}
