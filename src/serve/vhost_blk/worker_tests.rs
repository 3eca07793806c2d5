//! Tests of a worker and its ring that are driven by commands: what takes too long for a front-end's test, and races at one
//! step of the worker.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use passgate_backends::nvme::{Drive, DriveOptions};
use passgate_backends::{Device, Domain, Windowed};
use passgate_bindings::PageRange;
use passgate_bindings::memory::GuestFile;
use passgate_bindings::units::{Offset, PAGE};
use passgate_sim::iommu::{Memory as Pages, Sim};
use passgate_sim::nvme::{CommandFilter, FaultAction, Options, Simulated};
use rustix::event::{PollFd, PollFlags, Timespec};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::super::ring::STATUS_IOERR;
use super::*;
use crate::serve::{self, Server};

/// Longer than anything here takes.
const TIMEOUT: Duration = Duration::from_secs(20);
const NOW: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };
const ENTRIES: u16 = 16;
// Guest-physical addresses: the ring's parts; headers and statuses of requests; their data.
const TABLE: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const REQUESTS: u64 = 0x4000;
const DATA: u64 = 0x8000;

/// Serialises the tests: the drives of one process share the IOVA range of their own memory, and
/// there must be one worker at a time.
static DRIVE_LOCK: Mutex<()> = Mutex::new(());

/// A drive, a server whose loop does not run, and one ring of a guest.
struct Bench {
    vring: Vring,
    memory: Memory,
    server: Server,
    drive: Arc<Drive>,
    sim: Simulated,
    windowed: Arc<Windowed>,
    write_through: Arc<AtomicBool>,
    offered: u16,
    _guard: MutexGuard<'static, ()>,
}

impl Bench {
    fn new() -> Self {
        let guard = DRIVE_LOCK.lock().unwrap_or_else(PoisonError::into_inner);
        let iommu = Arc::new(Sim::new(Sim::CAPABILITIES, Pages::new()).unwrap());
        let sim = Simulated::new(&iommu, Options::default()).unwrap();
        let plain = iommu as Arc<dyn Domain>;
        let drive = Drive::open(sim.registers(), &plain, DriveOptions::default()).unwrap();
        let windowed = Arc::new(Windowed::new(plain, Arc::clone(drive.window())));
        let devices = vec![Arc::clone(&drive) as Arc<dyn Device>];
        let server = Server::bind(serve::Options::nowhere(), Arc::clone(&windowed) as _, devices).unwrap();
        let memory = Memory::new(zeroed_memory());
        let vring = Vring::new(memory.clone(), ENTRIES).unwrap();
        let write_through = Arc::default();
        Self { vring, memory, server, drive, sim, windowed, write_through, offered: 0, _guard: guard }
    }

    /// Starts a worker's thread for the ring.
    fn worker(&self, polling: Polling) -> (Mailbox, JoinHandle<()>) {
        let (rings, inside) = (vec![(0, self.vring.clone())], self.server.inside());
        Worker::spawn(self.context(), self.memory.clone(), rings, inside, polling, Arc::default()).unwrap()
    }

    /// Starts a worker's thread for these rings that the drive never wakes. [`Drive`] wakes its workers every second, which would
    /// hide a missing wake-up.
    fn worker_without_interrupts(&self, vrings: &[Vring]) -> (Mailbox, JoinHandle<()>) {
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap());
        let (sender, commands) = mpsc::channel();
        let mailbox = Mailbox { commands: sender, wake };
        let poller = Poller::new().unwrap();
        poller.add(&*mailbox.wake, Interest::Read, WAKE_TOKEN).unwrap();
        let assign = |(index, vring): (u16, &Vring)| {
            let (vring, ring) = (vring.clone(), Ring::new(index, Arc::default()));
            AssignedRing { index, vring, ring, kick: None, ended: None }
        };
        let worker = Worker {
            context: self.context(),
            memory: self.memory.clone(),
            rings: (0..).zip(vrings).map(assign).collect(),
            first: 0,
            commands,
            mailbox: mailbox.clone(),
            inside: self.server.inside(),
            poller,
            adaptive_poll: AdaptivePoll::new(Polling::Never),
            counts: Arc::default(),
            completions: Vec::new(),
        };
        let thread = std::thread::Builder::new().name("vhost-blk".into());
        (mailbox, thread.spawn(move || worker.run()).unwrap())
    }

    /// Replaces the memory that the worker sees, and returns the previous one.
    fn replace_memory(&self) -> Arc<GuestMemoryMmap> {
        let before = self.memory.memory().into_inner();
        self.memory.lock().unwrap().replace(zeroed_memory());
        before
    }

    fn await_used(&self, count: u16) {
        await_that("the ring makes no progress", || self.used() >= count);
    }

    fn context(&self) -> RingContext {
        RingContext {
            drive: self.drive.take_queue(0).unwrap(),
            geometry: self.drive.geometry().clone(),
            read_only: false,
            write_through: Arc::clone(&self.write_through),
        }
    }

    /// Sets the ring up from the beginning, as a front-end does.
    fn set_up(&mut self) {
        let memory = self.memory.memory();
        memory.write_slice(&[0; 0x3000], GuestAddress(TABLE)).unwrap();
        self.offered = 0;
        self.vring.get_mut().get_queue_mut().reset();
        self.vring.set_queue_info(TABLE, AVAILABLE, USED).unwrap();
        self.vring.set_queue_ready(true);
        self.vring.set_enabled(true);
    }

    /// Offers request `number` to the worker, with `data` bytes of data.
    fn offer(&mut self, number: u16, kind: u32, data: u32) {
        let (memory, head) = (self.memory.memory(), number * 3);
        let at = REQUESTS + u64::from(number) * 32;
        let describe = |index: u16, at: u64, len: u32, flags: u16| {
            let mut bytes = at.to_le_bytes().to_vec();
            bytes.extend(len.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
            bytes.extend((index + 1).to_le_bytes());
            memory.write_slice(&bytes, GuestAddress(TABLE + u64::from(index) * 16)).unwrap();
        };
        describe(head, at, 16, 1);
        describe(head + 1, DATA, data, if kind == OUT { 1 } else { 3 });
        describe(head + 2, at + 16, 1, 2);
        memory.write_obj(kind, GuestAddress(at)).unwrap();
        memory.write_obj(0xeeu8, GuestAddress(at + 16)).unwrap();
        let entry = AVAILABLE + 4 + u64::from(self.offered % ENTRIES) * 2;
        memory.write_obj(head, GuestAddress(entry)).unwrap();
        self.offered += 1;
        memory.write_obj(self.offered, GuestAddress(AVAILABLE + 2)).unwrap();
    }

    fn status(&self, number: u16) -> u8 {
        self.memory.memory().read_obj(GuestAddress(REQUESTS + u64::from(number) * 32 + 16)).unwrap()
    }

    fn used(&self) -> u16 {
        self.memory.memory().read_obj(GuestAddress(USED + 2)).unwrap()
    }
}

/// Returns guest memory that is all zeroes.
fn zeroed_memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap()
}

/// Returns true while a thread of this name sleeps.
fn sleeps(name: &str) -> bool {
    let threads = std::fs::read_dir("/proc/self/task").unwrap().filter_map(Result::ok);
    let mut states = threads.filter_map(|thread| std::fs::read_to_string(thread.path().join("stat")).ok());
    states.any(|stat| stat.contains(&format!("({name}) S")))
}

/// Returns the number of times that the worker's thread has gone to sleep. There is one worker at a time.
fn sleep_count() -> u64 {
    let threads = std::fs::read_dir("/proc/self/task").unwrap().filter_map(Result::ok);
    let mut statuses =
        threads.filter_map(|thread| std::fs::read_to_string(thread.path().join("status")).ok());
    let status = statuses.find(|status| status.starts_with("Name:\tvhost-blk\n")).unwrap();
    let count = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:")).unwrap();
    count.trim().parse().unwrap()
}

fn await_that(otherwise: &str, that: impl Fn() -> bool) {
    let until = Instant::now() + TIMEOUT;
    while !that() {
        assert!(Instant::now() < until, "{otherwise}");
        std::thread::yield_now();
    }
}

/// Waits until a worker's thread sleeps. There is one worker at a time.
fn await_sleep() {
    await_that("the worker does not sleep", || sleeps("vhost-blk"));
}

/// Waits until a worker's thread has woken up for its last command and sleeps again.
fn await_sleep_after_commands(mailbox: &Mailbox) {
    await_that("the worker does not wake up", || {
        rustix::event::poll(&mut [PollFd::new(&mailbox.wake, PollFlags::IN)], Some(&NOW)) == Ok(0)
    });
    await_sleep();
}

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;

/// A worker that waits for a ring's lock to execute a command must not have loaded memory before: the thread that removes memory
/// takes that lock once, and then relies on it that no worker writes to the memory.
#[test]
fn worker_does_not_write_to_memory_removed_while_it_waited_for_the_ring_lock() {
    let mut bench = Bench::new();
    let (mailbox, thread) = bench.worker(Polling::Never);
    bench.set_up();
    bench.offer(0, GET_ID, 20);
    // The request that an earlier back-end had in flight is answered by the command itself.
    let (inflight, _file) = super::super::inflight::Inflight::new(1, ENTRIES).unwrap();
    let mut earlier = inflight.queue(0, ENTRIES).unwrap();
    earlier.recover(0);
    earlier.mark(0);
    // The thread has started, and sleeps because there is no command.
    let (done, wait) = mpsc::channel();
    mailbox.send(WorkerCommand::Abandon { ring: 0, done });
    wait.recv_timeout(TIMEOUT).unwrap();
    await_sleep();
    let vring = bench.vring.clone();
    let locked = vring.get_mut();
    mailbox.send(WorkerCommand::Start { ring: 0, inflight: inflight.queue(0, ENTRIES) });
    // It sleeps at the lock.
    await_sleep_after_commands(&mailbox);
    let removed = bench.replace_memory();
    drop(locked);
    mailbox.send(WorkerCommand::Exit);
    thread.join().unwrap();
    let status: u8 = removed.read_obj(GuestAddress(REQUESTS + 16)).unwrap();
    let used: u16 = removed.read_obj(GuestAddress(USED + 2)).unwrap();
    assert_eq!((status, used), (0xee, 0), "it wrote to memory that was removed");
}

/// The ring was started again, and a request with the same head is in flight again.
#[test]
fn completion_of_an_earlier_ring_generation_is_dropped() {
    let mut bench = Bench::new();
    bench.sim.fault(CommandFilter::any().times(2), FaultAction::StallCompletion);
    let (mailbox, thread) = bench.worker(Polling::Never);
    for generation in 1..=2 {
        bench.set_up();
        bench.offer(0, FLUSH, 0);
        mailbox.send(WorkerCommand::Start { ring: 0, inflight: None });
        assert!(bench.sim.await_stalled(generation, TIMEOUT));
    }
    assert!(bench.sim.release_next());
    // The drive completes this one after the late one.
    bench.offer(1, FLUSH, 0);
    mailbox.send(WorkerCommand::Poll);
    bench.await_used(1);
    assert_eq!((bench.status(0), bench.status(1), bench.used()), (0xee, 0, 1));
    assert!(bench.sim.release_next());
    bench.await_used(2);
    assert_eq!(bench.status(0), 0);
    mailbox.send(WorkerCommand::Exit);
    thread.join().unwrap();
}

/// Whichever ring a worker is serving, the previous memory is unused only once every ring's lock was taken.
#[test]
fn replacing_memory_waits_for_every_ring_lock() {
    let memory = Memory::new(zeroed_memory());
    let vrings: Vec<_> = (0..3).map(|_| Vring::new(memory.clone(), ENTRIES).unwrap()).collect();
    for busy in &vrings {
        let locked = busy.get_mut();
        std::thread::scope(|scope| {
            let replacing = std::thread::Builder::new().name("replaces".into());
            let replacing = replacing.spawn_scoped(scope, || {
                let two = [(GuestAddress(0), 0x1000), (GuestAddress(0x2000), 0x1000)];
                let other = GuestMemoryMmap::from_ranges(&two).unwrap();
                replace_memory(&memory, vrings.iter(), other);
            });
            let replacing = replacing.unwrap();
            // A worker that takes a ring's lock from here on must load the new memory.
            let waits = || sleeps("replaces") && memory.memory().num_regions() == 2;
            await_that("it does not wait with the new memory shown", || waits() || replacing.is_finished());
            assert!(!replacing.is_finished(), "it does not wait for the ring");
            drop(locked);
            replacing.join().unwrap();
        });
        memory.lock().unwrap().replace(zeroed_memory());
    }
}

/// Writes that are offered after SET_CONFIG was answered must use the new setting, also if a worker is polling its rings at the
/// time.
#[test]
fn write_offered_after_the_cache_is_switched_off_is_on_the_medium_when_answered() {
    let mut bench = Bench::new();
    let guest = Arc::new(GuestFile::memfd("guest", PAGE).unwrap());
    guest.write(0, &[0x5a; 512]).unwrap();
    let data = PageRange::new(DATA, PAGE).unwrap();
    bench.windowed.map(data, PAGE, &guest, Offset(0), true).unwrap();
    let (mailbox, thread) = bench.worker(Polling::Always);
    bench.set_up();
    bench.offer(0, FLUSH, 0);
    mailbox.send(WorkerCommand::Start { ring: 0, inflight: None });
    bench.await_used(1);
    let vring = bench.vring.clone();
    let locked = vring.get_mut();
    // It polls without end and sleeps only at the ring's lock, after all its commands.
    await_sleep();
    bench.write_through.store(true, Ordering::Release);
    bench.offer(1, OUT, 512);
    drop(locked);
    bench.await_used(2);
    assert_eq!(bench.status(1), 0);
    bench.sim.power_cut();
    assert!(bench.sim.medium().read(0, 1) == [0x5a; 512], "what was answered is lost with the power");
    mailbox.send(WorkerCommand::Exit);
    thread.join().unwrap();
}

/// A front-end has disconnected with a request that the drive does not complete. The memory of the next front-end has something
/// else at the address of its status.
#[test]
fn completion_after_abandon_writes_to_no_memory() {
    let mut bench = Bench::new();
    bench.sim.fault(CommandFilter::any(), FaultAction::StallCompletion);
    let (mailbox, thread) = bench.worker(Polling::Never);
    bench.set_up();
    bench.offer(0, FLUSH, 0);
    mailbox.send(WorkerCommand::Start { ring: 0, inflight: None });
    assert!(bench.sim.await_stalled(1, TIMEOUT));
    let (ended, gave_up) = mpsc::channel();
    mailbox.send(WorkerCommand::Stop { ring: 0, ended });
    drop(gave_up);
    let (done, wait) = mpsc::channel();
    mailbox.send(WorkerCommand::Abandon { ring: 0, done });
    wait.recv_timeout(TIMEOUT).unwrap();
    bench.replace_memory();
    bench.memory.memory().write_obj(0xeeu8, GuestAddress(REQUESTS + 16)).unwrap();
    bench.sim.release();
    await_that("the drive does not end it", || bench.drive.window().idle());
    mailbox.send(WorkerCommand::Poll);
    mailbox.send(WorkerCommand::Exit);
    thread.join().unwrap();
    assert_eq!((bench.status(0), bench.used()), (0xee, 0), "it wrote to the memory of the next front-end");
}

/// A front-end that has received the base of a ring may remove its memory, or give the ring to another back-end.
#[test]
fn ring_end_is_reported_once_no_request_is_in_flight() {
    let mut bench = Bench::new();
    bench.sim.fault(CommandFilter::any().times(2), FaultAction::StallCompletion);
    let (mailbox, thread) = bench.worker(Polling::Never);
    bench.set_up();
    bench.offer(0, FLUSH, 0);
    bench.offer(1, FLUSH, 0);
    mailbox.send(WorkerCommand::Start { ring: 0, inflight: None });
    assert!(bench.sim.await_stalled(2, TIMEOUT));
    let (ended, end) = mpsc::channel();
    mailbox.send(WorkerCommand::Stop { ring: 0, ended });
    await_sleep_after_commands(&mailbox);
    assert_eq!(end.try_recv(), Err(TryRecvError::Empty), "the drive has two of its requests");
    assert!(bench.sim.release_next());
    bench.await_used(1);
    // The worker handles a completion under the ring's lock.
    drop(bench.vring.get_mut());
    assert_eq!(end.try_recv(), Err(TryRecvError::Empty), "the drive has one of its requests");
    assert!(bench.sim.release_next());
    assert_eq!(end.recv_timeout(TIMEOUT), Ok(2));
    assert_eq!((bench.status(0), bench.status(1), bench.used()), (0, 0, 2));
    mailbox.send(WorkerCommand::Exit);
    thread.join().unwrap();
}

/// A guest whose notifications are disabled sends no kick (virtio 1.2, 2.7.10): requests that it has offered by the time that
/// they are enabled must be found without one.
#[test]
fn request_offered_before_the_worker_sleeps_needs_no_kick() {
    let mut bench = Bench::new();
    // A second ring, which is not started: it is polled after the first.
    let other = Vring::new(bench.memory.clone(), ENTRIES).unwrap();
    let (mailbox, thread) = bench.worker_without_interrupts(&[bench.vring.clone(), other.clone()]);
    bench.set_up();
    mailbox.send(WorkerCommand::Start { ring: 0, inflight: None });
    let kick = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
    mailbox.send(WorkerCommand::Kick { ring: 0, kick: Some(kick.try_clone().unwrap()) });
    await_sleep_after_commands(&mailbox);
    let before = sleep_count();
    let locked = other.get_mut();
    // A kick without a request.
    rustix::io::write(&kick, &1u64.to_ne_bytes()).unwrap();
    // It has polled the first ring, and sleeps at the lock of the second.
    await_that("the worker does not wake up", || sleep_count() > before && sleeps("vhost-blk"));
    bench.offer(0, GET_ID, 20);
    drop(locked);
    bench.await_used(1);
    assert_eq!(bench.status(0), 0);
    mailbox.send(WorkerCommand::Exit);
    thread.join().unwrap();
}

/// The drive has not completed a request within the front-end's time-out; the next front-end comes, and then it completes.
#[test]
fn abandoned_stop_does_not_end_the_restarted_ring() {
    let mut bench = Bench::new();
    bench.sim.fault(CommandFilter::any(), FaultAction::StallCompletion);
    let (mailbox, thread) = bench.worker(Polling::Never);
    bench.set_up();
    bench.offer(0, FLUSH, 0);
    mailbox.send(WorkerCommand::Start { ring: 0, inflight: None });
    assert!(bench.sim.await_stalled(1, TIMEOUT));
    let (ended, gave_up) = mpsc::channel();
    mailbox.send(WorkerCommand::Stop { ring: 0, ended });
    drop(gave_up);
    bench.set_up();
    mailbox.send(WorkerCommand::Start { ring: 0, inflight: None });
    bench.offer(1, FLUSH, 0);
    mailbox.send(WorkerCommand::Poll);
    let until = Instant::now() + TIMEOUT;
    while bench.used() == 0 {
        assert!(Instant::now() < until, "a ring that was set up again makes no progress");
        std::thread::yield_now();
    }
    assert_eq!((bench.status(0), bench.status(1)), (0xee, 0));
    // The late completion is dropped.
    bench.sim.release();
    bench.offer(2, FLUSH, 0);
    mailbox.send(WorkerCommand::Poll);
    while bench.used() < 2 {
        assert!(Instant::now() < until, "a ring makes no progress");
        std::thread::yield_now();
    }
    assert_eq!((bench.status(0), bench.used()), (0xee, 2));
    mailbox.send(WorkerCommand::Exit);
    thread.join().unwrap();
}

/// The session reports the pages as open, and the drive accepts nothing: it is fenced, and is not attached again.
#[test]
fn request_reported_open_but_refused_by_the_drive_times_out() {
    let mut bench = Bench::new();
    let (mut context, memory) = (bench.context(), bench.memory.memory());
    bench.set_up();
    bench.offer(0, IN, 512);
    let (vring, mut ring, begun) = (bench.vring.clone(), Ring::new(0, Arc::default()), Instant::now());
    let mut locked = vring.get_mut();
    let queue = locked.get_queue_mut();
    ring.start(queue, &memory, None, &context);
    for second in 0..=30 {
        let now = begun + Duration::from_secs(second);
        ring.tick(queue, &memory, now);
        ring.pull(queue, &memory, &mut context, true);
        let queries: Vec<_> = ring.queries.drain(..).collect();
        assert_eq!((queries.len(), bench.status(0)), (1, 0xee), "after {second} s");
        ring.query_answered(queue, &memory, queries[0].head, queries[0].ticket, DmaAccess::Open);
    }
    ring.tick(queue, &memory, begun + Duration::from_secs(32));
    ring.pull(queue, &memory, &mut context, true);
    assert_eq!((bench.status(0), bench.used(), ring.queries.len()), (STATUS_IOERR, 1, 0));
}
