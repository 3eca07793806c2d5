//! A drive as a block device: its controller's life, its queues' seats, and what stops it.
//!
//! The controller lives from one bringing up to the next stop. A queue's owner falls in with that by itself, at its next
//! call: it *parks* while the controller is halted and begins anew in its next life ([`super::Queue`]). So nothing here
//! touches a queue's memory before its owner has parked, and no fence waits for an owner: what is in flight is in the
//! window.
//!
//! A thread of the drive's own, the *keeper*, deals with commands that do not end (`keeper.rs`).

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
use super::data::Rules;
use super::geometry::Geometry;
use super::keeper::{Health, Trouble, keep};
use super::pair::Pair;
use super::queue::{LIST, Queue, now};
use super::registers::{DOORBELLS, Registers};
use crate::device::own::{self, OwnMemory};
use crate::device::{Device, FenceStep, Guard, Nature, StopClass};
use crate::iommu::Domain;
use crate::window::Window;
use crate::{Error, Result};

/// Pages of a driver's own memory that all queues may take.
const PAGES: u64 = 480;
/// Entries of a queue at most.
const LONGEST: u16 = MAX_OUTSTANDING + 1; // a full queue has one empty entry
/// Ranges of memory that are told apart in one request.
const RANGES: usize = 128;
/// Bytes of one command at most, whatever the controller takes: what a list of pages reaches.
const MOST: u64 = 1 << 20;
/// How long a drain waits for what is in flight: stronger fences come after it, and somebody waits for them.
const DRAIN: Duration = Duration::from_millis(300);
/// How long owners have to park.
const PARKING: Duration = Duration::from_secs(2);
/// How often bringing it up is tried.
const TRIES: u32 = 3;

/// What a drive is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DriveOptions {
    /// The namespace, from 1 on.
    pub namespace: u32,
    /// Queues that are wanted; there may be fewer ([`Drive::queues`]).
    pub queues: u16,
    /// How long a command may take until it is given up.
    pub deadline: Duration,
}

impl Default for DriveOptions {
    fn default() -> Self {
        Self { namespace: 1, queues: 1, deadline: Duration::from_secs(5) }
    }
}

/// A drive.
#[derive(Debug)]
pub struct Drive {
    inner: Arc<Inner>,
    keeper: Option<JoinHandle<()>>,
}

/// A life of the controller: its number, and whether it is up, halted, lost, or loose: lost, but not stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Life(u64);

impl Life {
    const UP: u64 = 0;
    pub(super) const HALTED: u64 = 1;
    pub(super) const LOST: u64 = 2;
    pub(super) const LOOSE: u64 = 3;
    const STATE: u64 = 3;
    /// Before the first.
    pub(super) const NONE: Self = Self(Self::HALTED);

    pub(super) fn is_up(self) -> bool {
        self.0 & Self::STATE == Self::UP
    }

    pub(super) fn is_lost(self) -> bool {
        self.0 & Self::STATE >= Self::LOST
    }

    pub(super) fn is_loose(self) -> bool {
        self.0 & Self::STATE == Self::LOOSE
    }

    pub(super) fn with(self, state: u64) -> Self {
        Self(self.0 & !Self::STATE | state)
    }

    fn next(self) -> Self {
        Self((self.0 & !Self::STATE) + 4)
    }
}

/// A queue's place.
#[derive(Debug)]
pub(super) struct Seat {
    taken: AtomicBool,
    /// Whether its owner keeps off the queue until the next life.
    pub(super) parked: AtomicBool,
    /// Requests that take too long.
    pub(super) overdue: AtomicU32,
    pub(super) interrupt: OwnedFd,
    /// The queue as its last owner left it.
    left: Mutex<Option<LeftQueue>>,
}

/// A queue with nothing in flight, between two owners.
#[derive(Debug)]
pub(super) struct LeftQueue {
    /// The life of the controller in which the pair was created.
    pub(super) life: Life,
    pub(super) pair: Pair,
    pub(super) cids: Cids,
}

/// Whether the drive may do DMA, as the fences have it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    Up,
    /// Nothing is in flight and nothing begins; the controller is as it was.
    Drained,
    /// It was stopped by something stronger: it must be brought up anew.
    Fenced,
}

/// What the drive, its queues and its keeper share. The controller's memory goes before its registers do, and these
/// hold the device.
#[derive(Debug)]
pub(super) struct Inner {
    control: Mutex<Controller>,
    pub(super) memory: OwnMemory,
    pub(super) registers: Arc<dyn Registers>,
    pub(super) name: String,
    pub(super) window: Arc<Window>,
    pub(super) geometry: Geometry,
    pub(super) rules: Rules,
    /// Entries of each queue.
    pub(super) slots: u16,
    pub(super) deadline_ms: u64,
    stride: u64,
    pub(super) seats: Vec<Seat>,
    /// The vector of the first queue.
    first_vector: u16,
    life: AtomicU64,
    mode: Mutex<Mode>,
    /// When a fence had stopped the drive, in milliseconds; 0 where none has.
    stopped: AtomicU64,
    troubles: Mutex<Sender<Trouble>>,
    /// How often the controller was reset because of what it did, or did not do.
    pub(super) recoveries: AtomicU32,
    /// Abort commands that it was given.
    pub(super) aborts: AtomicU64,
    /// The drive is being closed: the keeper waits for nobody.
    pub(super) leaving: AtomicBool,
}

impl Drive {
    /// Brings a drive up, whatever its registers are those of: [`super::serve`] does it for a device behind VFIO.
    /// `domain` is the one that the device is in; its queues are mapped there.
    pub fn open(
        registers: Arc<dyn Registers>,
        domain: &Arc<dyn Domain>,
        options: DriveOptions,
    ) -> Result<Arc<Self>> {
        let mut controller = Controller::open(Arc::clone(&registers), domain)?;
        controller.reset()?;
        controller.come_up()?;
        let geometry = controller.geometry(options.namespace)?;
        let vectors = u16::try_from(registers.vectors()?).unwrap_or(u16::MAX);
        if vectors == 0 {
            let what = "interrupts by MSI-X";
            return Err(Error::Unsupported { device: registers.device().name().to_owned(), what });
        }
        // One vector more than queues leaves the first to the admin queues; else a queue shares it.
        let granted = controller.queues(options.queues.clamp(1, 64))?;
        let queues = granted.min(vectors);
        let first_vector = u16::from(vectors > queues);
        let slots = entries(queues, controller.longest);
        let Some(slots) = slots else {
            return Err(Error::Host {
                what: format!(
                    "{}: {queues} queues are more than there is memory for",
                    registers.device().name()
                ),
                mend: "ask for fewer with --num-queues",
            });
        };
        let memory = OwnMemory::map(domain, (size(slots) * u64::from(queues) / PAGE) as usize)?;
        let seats = (0..queues).map(|_| Seat::new(&*registers)).collect::<Result<Vec<_>>>()?;
        let block = u64::from(geometry.block);
        let most = controller.abilities.most.unwrap_or(MOST).min(MOST).min(block << 16) / block * block;
        let (troubles, told) = mpsc::channel();
        let inner = Arc::new(Inner {
            name: registers.device().name().to_owned(),
            window: Window::new(usize::from(queues) * usize::from(slots), RANGES),
            rules: Rules { block, most: most.max(block), sgl: controller.abilities.sgl },
            geometry,
            slots,
            deadline_ms: options.deadline.as_millis() as u64,
            stride: controller.doorbell(0, Doorbell::Completion) - DOORBELLS,
            seats,
            first_vector,
            life: AtomicU64::new(Life::NONE.0),
            mode: Mutex::new(Mode::Up),
            stopped: AtomicU64::new(0),
            troubles: Mutex::new(troubles),
            recoveries: AtomicU32::new(0),
            aborts: AtomicU64::new(0),
            leaving: AtomicBool::new(false),
            control: Mutex::new(controller),
            memory,
            registers,
        });
        inner.create(&mut inner.control())?;
        inner.set_life(inner.life().next());
        let keeping = Arc::clone(&inner);
        let keeper =
            std::thread::Builder::new().name("nvme-keeper".into()).spawn(move || keep(&keeping, &told));
        let keeper = keeper.map_err(|error| {
            let errno = Errno::from_io_error(&error).unwrap_or(Errno::AGAIN);
            inner.registers.failed(Failed::new("starting a thread", errno))
        })?;
        Ok(Arc::new(Self { inner, keeper: Some(keeper) }))
    }

    /// What it is.
    pub fn geometry(&self) -> &Geometry {
        &self.inner.geometry
    }

    /// What its DMA may touch: nothing, until pages are opened there.
    pub fn window(&self) -> &Arc<Window> {
        &self.inner.window
    }

    /// Readable once somebody wants the device back, and stays so: he waits until the drive and its queues are dropped.
    /// None where nobody can say so.
    pub fn removal(&self) -> Option<BorrowedFd<'_>> {
        self.inner.registers.removal()
    }

    /// What it had to be helped with so far; waits for nobody.
    pub fn health(&self) -> Health {
        self.inner.health()
    }

    /// Its queues.
    pub fn queues(&self) -> u16 {
        self.inner.seats.len() as u16 // made of a u16
    }

    /// Takes a queue, for one thread; `EBUSY` where somebody has it, or left it with something in flight, `ENOENT` where
    /// there is none.
    pub fn take_queue(&self, nth: u16) -> Result<Queue> {
        let failed = |errno| self.inner.registers.failed(Failed::new("taking a queue", errno));
        let seat = self.inner.seats.get(usize::from(nth)).ok_or_else(|| failed(Errno::NOENT))?;
        if seat.taken.swap(true, Ordering::AcqRel) {
            return Err(failed(Errno::BUSY));
        }
        Ok(Queue::new(Arc::clone(&self.inner), nth, seat.left().take()))
    }
}

impl Drop for Drive {
    fn drop(&mut self) {
        self.inner.leaving.store(true, Ordering::Release);
        self.inner.trouble(Trouble::Leave);
        if self.keeper.take().is_some_and(|keeper| keeper.join().is_err()) {
            log::error!("the keeper of a drive panicked; this is a bug of passgate");
        }
    }
}

/// Bytes of one queue: its pair, and a list for each command.
fn size(slots: u16) -> u64 {
    (Pair::size(slots) + LIST * u64::from(slots)).next_multiple_of(PAGE)
}

/// Entries of each of so many queues, where there is memory for that.
fn entries(queues: u16, longest: u16) -> Option<u16> {
    [LONGEST, 64, 32, 16, 8]
        .into_iter()
        .map(|slots| slots.min(longest))
        .find(|slots| *slots >= 2 && size(*slots) * u64::from(queues) <= PAGES * PAGE)
}

impl Seat {
    fn new(registers: &dyn Registers) -> Result<Self> {
        let interrupt = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        Ok(Self {
            taken: AtomicBool::new(false),
            parked: AtomicBool::new(true),
            overdue: AtomicU32::new(0),
            left: Mutex::default(),
            interrupt: interrupt.map_err(|errno| registers.failed(Failed::new("eventfd", errno)))?,
        })
    }

    fn left(&self) -> MutexGuard<'_, Option<LeftQueue>> {
        self.left.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its owner has left it so, with nothing in flight.
    pub(super) fn give_back(&self, left: LeftQueue) {
        *self.left() = Some(left);
        self.taken.store(false, Ordering::Release);
    }

    /// Has its owner look.
    pub(super) fn wake(&self) {
        let _ = rustix::io::write(&self.interrupt, &1u64.to_ne_bytes());
    }
}

impl Inner {
    pub(super) fn life(&self) -> Life {
        Life(self.life.load(Ordering::SeqCst))
    }

    pub(super) fn set_life(&self, life: Life) {
        self.life.store(life.0, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        self.seats.iter().for_each(Seat::wake);
    }

    pub(super) fn seat(&self, nth: u16) -> &Seat {
        &self.seats[usize::from(nth)]
    }

    /// Where a queue's memory begins.
    pub(super) fn offset(&self, nth: u16) -> u64 {
        size(self.slots) * u64::from(nth)
    }

    /// The offset of the list of the command whose identifier has this index.
    pub(super) fn list(&self, nth: u16, index: u16) -> u64 {
        self.offset(nth) + Pair::size(self.slots) + LIST * u64::from(index)
    }

    pub(super) fn doorbell(&self, queue: u16, which: Doorbell) -> u64 {
        DOORBELLS + (u64::from(queue) * 2 + which as u64) * self.stride
    }

    pub(super) fn trouble(&self, trouble: Trouble) {
        let troubles = self.troubles.lock().unwrap_or_else(PoisonError::into_inner);
        // Nobody hears it once the drive is closed.
        let _ = troubles.send(trouble);
    }

    /// Whether a fence has stopped the drive, for certain, so long ago.
    pub(super) fn is_stopped_for(&self, time: Duration) -> bool {
        let since = self.stopped.load(Ordering::Acquire);
        since != 0 && now().saturating_sub(since) > time.as_millis() as u64
    }

    pub(super) fn control(&self) -> MutexGuard<'_, Controller> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn mode(&self) -> MutexGuard<'_, Mode> {
        self.mode.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn failed(&self, call: &'static str, errno: Errno) -> Error {
        self.registers.failed(Failed::new(call, errno))
    }

    /// Creates the queues of a controller that has come up. Their owners are parked.
    fn create(&self, controller: &mut Controller) -> Result<()> {
        let eventfds = std::iter::repeat_n(None, self.first_vector.into());
        let eventfds: Vec<_> =
            eventfds.chain(self.seats.iter().map(|seat| Some(seat.interrupt.as_fd()))).collect();
        self.registers.interrupts(&eventfds)?;
        let queues = self.seats.len() as u16; // made of a u16
        if controller.queues(queues)? < queues {
            return Err(self.failed("asking an NVMe controller for its queues again", Errno::NODEV));
        }
        for nth in 0..queues {
            let pair = Pair::empty(nth + 1, self.slots, self.offset(nth), &self.memory);
            let pair = pair.map_err(|failed| self.registers.failed(failed))?;
            controller.create(&pair, &self.memory, self.first_vector + nth)?;
        }
        Ok(())
    }

    /// Halts the queues: when it returns no owner touches one before the next life.
    pub(super) fn halt(&self) -> Result<()> {
        let life = self.life();
        if life.is_up() {
            self.set_life(life.with(Life::HALTED));
        }
        let until = Instant::now() + PARKING;
        let busy = |seat: &&Seat| seat.taken.load(Ordering::SeqCst) && !seat.parked.load(Ordering::SeqCst);
        while let Some(seat) = self.seats.iter().find(busy) {
            if Instant::now() > until {
                return Err(self.failed("waiting for the owner of a queue", Errno::TIMEDOUT));
            }
            seat.wake();
            std::thread::sleep(Duration::from_micros(200));
        }
        Ok(())
    }

    /// Stops the device by `step`. What was in flight counts no more once that is done.
    fn stop(&self, step: FenceStep) -> Result<()> {
        {
            let mut mode = self.mode();
            *mode = Mode::Fenced;
            self.window.pause();
            let life = self.life();
            if life.is_up() {
                self.set_life(life.with(Life::HALTED));
            }
        }
        self.registers.device().fence(step)?;
        self.window.void();
        self.stopped.store(now().max(1), Ordering::Release);
        Ok(())
    }

    /// Makes a drive whose device is not in its domain a fenced one, and returns true for it: a replace that failed has left
    /// it detached (`iommu/iommufd/seats.rs`), which its driver was not told.
    pub(super) fn stop_detached(&self) -> bool {
        let detached = !self.registers.is_attached() && *self.mode() != Mode::Fenced;
        if detached {
            log::warn!(
                "{}: it was left detached from its domain: it is stopped until it is attached",
                self.name
            );
            if let Err(error) = self.stop(FenceStep::Detach) {
                log::warn!("{error}");
            }
        }
        detached
    }

    /// Takes the queues from the controller and brings it up anew, with what `between` does while it is down.
    pub(super) fn revive(&self, controller: &mut Controller, between: impl Fn() -> Result<()>) -> Result<()> {
        self.halt()?;
        let mut result = Ok(());
        for _ in 0..TRIES {
            result = controller.reset().and_then(|()| between());
            result = result.and_then(|()| controller.come_up()).and_then(|()| self.create(controller));
            if result.is_ok() || controller.is_gone() {
                break;
            }
        }
        result
    }

    /// The controller goes on in a new life, unless a fence has come meanwhile.
    pub(super) fn go_on(&self, mut up: impl FnMut(&mut Mode) -> bool) {
        let mut mode = self.mode();
        if up(&mut mode) {
            self.set_life(self.life().next());
        }
    }
}

impl Device for Drive {
    fn name(&self) -> &str {
        &self.inner.name
    }

    fn stop_class(&self) -> StopClass {
        self.inner.registers.device().stop_class() | StopClass::DRAIN
    }

    fn wanted(&self) -> Option<BorrowedFd<'_>> {
        self.inner.registers.device().wanted()
    }

    fn nature(&self) -> Nature {
        self.inner.registers.device().nature()
    }

    /// A drain is a pause: the queues stay, what is asked for meanwhile is [`super::Submitted::Closed`]. Anything
    /// stronger goes to the device at once, and what was in flight counts no more once it is done.
    fn fence(&self, step: FenceStep) -> Result<()> {
        let (inner, device) = (&self.inner, self.inner.registers.device());
        if step == FenceStep::Drain {
            {
                let mut mode = inner.mode();
                if *mode == Mode::Up {
                    *mode = Mode::Drained;
                }
                inner.window.pause();
            }
            if inner.window.await_idle(DRAIN) {
                return Ok(());
            }
            return Err(inner.failed("drain", Errno::TIMEDOUT));
        }
        if !device.stop_class().has(step) {
            return device.fence(step); // which says so
        }
        inner.stop(step)
    }

    fn attach(&self) -> Result<()> {
        let inner = &self.inner;
        let mut controller = inner.control();
        inner.stop_detached();
        {
            let mut mode = inner.mode();
            if *mode != Mode::Fenced && inner.life().is_up() {
                *mode = Mode::Up;
                inner.window.lift();
                return Ok(());
            }
        }
        let stopped = inner.stopped.swap(0, Ordering::AcqRel);
        if let Err(error) = inner.revive(&mut controller, || inner.registers.device().attach()) {
            if controller.is_gone() {
                inner.lose(&controller, &error);
            }
            // Its owners go on counting from when it was stopped.
            inner.stopped.store(stopped, Ordering::Release);
            return Err(error);
        }
        inner.go_on(|mode| {
            *mode = Mode::Up;
            inner.window.lift();
            true
        });
        Ok(())
    }

    fn reserved(&self) -> Option<PageRange<Iova>> {
        own::window()
    }

    fn guard(&self) -> Guard<'_> {
        self.inner.registers.device().guard()
    }
}

impl Drop for Inner {
    /// In order where it can be: what is in the queues ends, the cache goes to the medium. Then the controller lets go of
    /// the memory that it shares with this process.
    fn drop(&mut self) {
        let (life, queues) = (self.life(), self.seats.len() as u16);
        let controller = self.control.get_mut().unwrap_or_else(PoisonError::into_inner);
        if life.is_up() && !controller.is_gone() {
            let deleted = (1..=queues).try_for_each(|queue| controller.delete(queue));
            if let Err(error) = deleted.and_then(|()| controller.shut_down()) {
                log::warn!("closing: {error}");
            }
        }
        if let Err(error) = controller.reset() {
            log::warn!("closing: {error}");
        }
    }
}
