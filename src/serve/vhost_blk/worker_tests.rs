//! A worker and its ring, told by hand: what takes so long that no front-end's test waits for it, and what must be met at
//! one step of the worker.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use passgate_backends::iommu::sim::{Memory as Pages, Sim};
use passgate_backends::nvme::sim::{Does, Options, Simulated, When};
use passgate_backends::nvme::{Drive, DriveOptions};
use passgate_backends::{Device, Domain, Windowed};
use passgate_bindings::PageRange;
use passgate_bindings::memory::GuestFile;
use passgate_bindings::units::{Offset, PAGE};
use rustix::event::{PollFd, PollFlags, Timespec};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::super::ring::FAILED;
use super::*;
use crate::serve::{self, Server};

/// Longer than anything takes here.
const LONG: Duration = Duration::from_secs(20);
const NOW: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };
const ENTRIES: u16 = 16;
/// A ring's parts; headers and statuses of requests; their data.
const TABLE: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const REQUESTS: u64 = 0x4000;
const DATA: u64 = 0x8000;

/// Drives of one process share what memory they may have.
static TURN: Mutex<()> = Mutex::new(());

/// A drive, a loop that answers nobody, and one ring of a guest.
struct Bench {
    vring: Vring,
    memory: Memory,
    server: Server,
    drive: Arc<Drive>,
    sim: Simulated,
    windowed: Arc<Windowed>,
    write_through: Arc<AtomicBool>,
    offered: u16,
    _turn: MutexGuard<'static, ()>,
}

impl Bench {
    fn new() -> Self {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let iommu = Arc::new(Sim::new(Sim::CAPABILITIES, Pages::new()).unwrap());
        let sim = Simulated::new(&iommu, Options::default()).unwrap();
        let plain = iommu as Arc<dyn Domain>;
        let drive = Drive::open(sim.registers(), &plain, DriveOptions::default()).unwrap();
        let windowed = Arc::new(Windowed::new(plain, Arc::clone(drive.window())));
        let devices = vec![Arc::clone(&drive) as Arc<dyn Device>];
        let server = Server::bind(serve::Options::nowhere(), Arc::clone(&windowed) as _, devices).unwrap();
        let memory = Memory::new(blank());
        let vring = Vring::new(memory.clone(), ENTRIES).unwrap();
        let write_through = Arc::default();
        Self { vring, memory, server, drive, sim, windowed, write_through, offered: 0, _turn: turn }
    }

    /// A worker's thread for the ring.
    fn worker(&self, polling: Polling) -> (Mailbox, JoinHandle<()>) {
        let (rings, inside) = (vec![(0, self.vring.clone())], self.server.inside());
        Worker::spawn(self.desk(), self.memory.clone(), rings, inside, polling, Arc::default()).unwrap()
    }

    /// A worker's thread for these rings that the drive never wakes. [`Drive`] wakes its workers every second, and whatever else
    /// fails to wake one shows as that delay only.
    fn worker_without_interrupts(&self, vrings: &[Vring]) -> (Mailbox, JoinHandle<()>) {
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap());
        let (sender, orders) = mpsc::channel();
        let mailbox = Mailbox { orders: sender, wake };
        let poller = Poller::new().unwrap();
        poller.add(&*mailbox.wake, Interest::Read, WAKE).unwrap();
        let share = |(index, vring): (u16, &Vring)| {
            let (vring, ring) = (vring.clone(), Ring::new(index, Arc::default()));
            Share { index, vring, ring, kick: None, ended: None }
        };
        let worker = Worker {
            desk: self.desk(),
            memory: self.memory.clone(),
            shares: (0..).zip(vrings).map(share).collect(),
            first: 0,
            orders,
            mailbox: mailbox.clone(),
            inside: self.server.inside(),
            poller,
            moment: Moment::new(Polling::Never),
            counts: Arc::default(),
            done: Vec::new(),
        };
        let thread = std::thread::Builder::new().name("vhost-blk".into());
        (mailbox, thread.spawn(move || worker.run()).unwrap())
    }

    /// Shows the worker other memory, and returns what it had.
    fn replace_memory(&self) -> Arc<GuestMemoryMmap> {
        let before = self.memory.memory().into_inner();
        self.memory.lock().unwrap().replace(blank());
        before
    }

    fn await_used(&self, count: u16) {
        await_that("the ring rests", || self.used() >= count);
    }

    fn desk(&self) -> Desk {
        Desk {
            drive: self.drive.take_queue(0).unwrap(),
            geometry: self.drive.geometry().clone(),
            read_only: false,
            write_through: Arc::clone(&self.write_through),
        }
    }

    /// A front-end sets the ring up, from its beginning.
    fn set_up(&mut self) {
        let memory = self.memory.memory();
        memory.write_slice(&[0; 0x3000], GuestAddress(TABLE)).unwrap();
        self.offered = 0;
        self.vring.get_mut().get_queue_mut().reset();
        self.vring.set_queue_info(TABLE, AVAILABLE, USED).unwrap();
        self.vring.set_queue_ready(true);
        self.vring.set_enabled(true);
    }

    /// The guest offers a request of its `nth` place.
    fn offer(&mut self, nth: u16, kind: u32, data: u32) {
        let (memory, head) = (self.memory.memory(), nth * 3);
        let at = REQUESTS + u64::from(nth) * 32;
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

    fn status(&self, nth: u16) -> u8 {
        self.memory.memory().read_obj(GuestAddress(REQUESTS + u64::from(nth) * 32 + 16)).unwrap()
    }

    fn used(&self) -> u16 {
        self.memory.memory().read_obj(GuestAddress(USED + 2)).unwrap()
    }
}

/// A guest's memory, all zeroes.
fn blank() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap()
}

/// True while a thread of this name sleeps.
fn sleeps(name: &str) -> bool {
    let threads = std::fs::read_dir("/proc/self/task").unwrap().filter_map(Result::ok);
    let mut states = threads.filter_map(|thread| std::fs::read_to_string(thread.path().join("stat")).ok());
    states.any(|stat| stat.contains(&format!("({name}) S")))
}

/// How often the worker's thread has gone to sleep. There is one worker at a time.
fn sleep_count() -> u64 {
    let threads = std::fs::read_dir("/proc/self/task").unwrap().filter_map(Result::ok);
    let mut statuses =
        threads.filter_map(|thread| std::fs::read_to_string(thread.path().join("status")).ok());
    let status = statuses.find(|status| status.starts_with("Name:\tvhost-blk\n")).unwrap();
    let count = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:")).unwrap();
    count.trim().parse().unwrap()
}

fn await_that(otherwise: &str, that: impl Fn() -> bool) {
    let until = Instant::now() + LONG;
    while !that() {
        assert!(Instant::now() < until, "{otherwise}");
        std::thread::yield_now();
    }
}

/// Waits until a worker's thread sleeps. There is one worker at a time.
fn await_sleep() {
    await_that("the worker does not sleep", || sleeps("vhost-blk"));
}

/// Waits until a worker's thread has woken up for its last order and sleeps again.
fn await_sleep_after_orders(mailbox: &Mailbox) {
    await_that("the worker does not wake up", || {
        rustix::event::poll(&mut [PollFd::new(&mailbox.wake, PollFlags::IN)], Some(&NOW)) == Ok(0)
    });
    await_sleep();
}

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;

/// A worker that waits for a ring's lock with an order in its hand must not have loaded memory before: whoever removes
/// memory takes that lock once and then says that nobody writes to it any more.
#[test]
fn worker_writes_to_no_memory_that_was_removed_while_it_waited_for_the_ring() {
    let mut bench = Bench::new();
    let (mailbox, thread) = bench.worker(Polling::Never);
    bench.set_up();
    bench.offer(0, GET_ID, 20);
    // What an earlier back-end had in flight is answered by the order itself.
    let (inflight, _file) = super::super::inflight::Inflight::new(1, ENTRIES).unwrap();
    let mut earlier = inflight.queue(0, ENTRIES).unwrap();
    earlier.recover(0);
    earlier.begin(0);
    // It has begun, and sleeps for want of orders.
    let (done, wait) = mpsc::channel();
    mailbox.send(Order::Abandon { ring: 0, done });
    wait.recv_timeout(LONG).unwrap();
    await_sleep();
    let vring = bench.vring.clone();
    let locked = vring.get_mut();
    mailbox.send(Order::Start { ring: 0, inflight: inflight.queue(0, ENTRIES) });
    // It sleeps at the lock.
    await_sleep_after_orders(&mailbox);
    let removed = bench.replace_memory();
    drop(locked);
    mailbox.send(Order::Leave);
    thread.join().unwrap();
    let status: u8 = removed.read_obj(GuestAddress(REQUESTS + 16)).unwrap();
    let used: u16 = removed.read_obj(GuestAddress(USED + 2)).unwrap();
    assert_eq!((status, used), (0xee, 0), "it wrote to memory that was removed");
}

/// The ring has begun anew, and the guest has a request of the same number at the drive again.
#[test]
fn late_completion_of_an_earlier_life_of_a_ring_answers_no_request_of_this_one() {
    let mut bench = Bench::new();
    bench.sim.fault(When::any().times(2), Does::HoldCompletion);
    let (mailbox, thread) = bench.worker(Polling::Never);
    for life in 1..=2 {
        bench.set_up();
        bench.offer(0, FLUSH, 0);
        mailbox.send(Order::Start { ring: 0, inflight: None });
        assert!(bench.sim.await_held(life, LONG));
    }
    assert!(bench.sim.release_next());
    // The drive completes this one after the late one.
    bench.offer(1, FLUSH, 0);
    mailbox.send(Order::Look);
    bench.await_used(1);
    assert_eq!((bench.status(0), bench.status(1), bench.used()), (0xee, 0, 1));
    assert!(bench.sim.release_next());
    bench.await_used(2);
    assert_eq!(bench.status(0), 0);
    mailbox.send(Order::Leave);
    thread.join().unwrap();
}

/// Whichever ring a worker is at: memory is no worker's only once each of them has been waited for.
#[test]
fn memory_is_replaced_only_once_every_ring_has_been_let_go_of() {
    let memory = Memory::new(blank());
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
            // Who takes a ring from here on must find the new memory.
            let waits = || sleeps("replaces") && memory.memory().num_regions() == 2;
            await_that("it does not wait with the new memory shown", || waits() || replacing.is_finished());
            assert!(!replacing.is_finished(), "it does not wait for the ring");
            drop(locked);
            replacing.join().unwrap();
        });
        memory.lock().unwrap().replace(blank());
    }
}

/// The answer to SET_CONFIG orders what the guest does after it: a worker that looks at its rings meanwhile must not go on
/// with what was chosen before.
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
    mailbox.send(Order::Start { ring: 0, inflight: None });
    bench.await_used(1);
    let vring = bench.vring.clone();
    let locked = vring.get_mut();
    // It never sleeps but at the ring's lock, and has obeyed all its orders before.
    await_sleep();
    bench.write_through.store(true, Ordering::Release);
    bench.offer(1, OUT, 512);
    drop(locked);
    bench.await_used(2);
    assert_eq!(bench.status(1), 0);
    bench.sim.power_cut();
    assert!(bench.sim.medium().read(0, 1) == [0x5a; 512], "what was answered is lost with the power");
    mailbox.send(Order::Leave);
    thread.join().unwrap();
}

/// A front-end has left with a request that the drive does not end. Whatever becomes of it, the memory of the next one has
/// something else where the status was to go.
#[test]
fn request_that_ends_after_its_ring_was_abandoned_writes_to_no_memory() {
    let mut bench = Bench::new();
    bench.sim.fault(When::any(), Does::HoldCompletion);
    let (mailbox, thread) = bench.worker(Polling::Never);
    bench.set_up();
    bench.offer(0, FLUSH, 0);
    mailbox.send(Order::Start { ring: 0, inflight: None });
    assert!(bench.sim.await_held(1, LONG));
    let (ended, gave_up) = mpsc::channel();
    mailbox.send(Order::Stop { ring: 0, ended });
    drop(gave_up);
    let (done, wait) = mpsc::channel();
    mailbox.send(Order::Abandon { ring: 0, done });
    wait.recv_timeout(LONG).unwrap();
    bench.replace_memory();
    bench.memory.memory().write_obj(0xeeu8, GuestAddress(REQUESTS + 16)).unwrap();
    bench.sim.release();
    await_that("the drive does not end it", || bench.drive.window().idle());
    mailbox.send(Order::Look);
    mailbox.send(Order::Leave);
    thread.join().unwrap();
    assert_eq!((bench.status(0), bench.used()), (0xee, 0), "it wrote to the memory of the next front-end");
}

/// A front-end that has the base of a ring takes its memory away, or hands the ring to another back-end.
#[test]
fn end_of_a_ring_is_told_once_the_drive_has_none_of_its_requests() {
    let mut bench = Bench::new();
    bench.sim.fault(When::any().times(2), Does::HoldCompletion);
    let (mailbox, thread) = bench.worker(Polling::Never);
    bench.set_up();
    bench.offer(0, FLUSH, 0);
    bench.offer(1, FLUSH, 0);
    mailbox.send(Order::Start { ring: 0, inflight: None });
    assert!(bench.sim.await_held(2, LONG));
    let (ended, end) = mpsc::channel();
    mailbox.send(Order::Stop { ring: 0, ended });
    await_sleep_after_orders(&mailbox);
    assert_eq!(end.try_recv(), Err(TryRecvError::Empty), "the drive has two of its requests");
    assert!(bench.sim.release_next());
    bench.await_used(1);
    // Whatever the worker does about the completion, it does behind the ring's lock.
    drop(bench.vring.get_mut());
    assert_eq!(end.try_recv(), Err(TryRecvError::Empty), "the drive has one of its requests");
    assert!(bench.sim.release_next());
    assert_eq!(end.recv_timeout(LONG), Ok(2));
    assert_eq!((bench.status(0), bench.status(1), bench.used()), (0, 0, 2));
    mailbox.send(Order::Leave);
    thread.join().unwrap();
}

/// A guest that the device has not asked for a kick gives none (virtio 1.2, 2.7.10): what it has offered by the time that it
/// is asked must be found without.
#[test]
fn request_offered_between_a_look_at_its_ring_and_the_sleep_needs_no_kick() {
    let mut bench = Bench::new();
    // A second ring, which does not begin: it is looked at after the first.
    let other = Vring::new(bench.memory.clone(), ENTRIES).unwrap();
    let (mailbox, thread) = bench.worker_without_interrupts(&[bench.vring.clone(), other.clone()]);
    bench.set_up();
    mailbox.send(Order::Start { ring: 0, inflight: None });
    let kick = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
    mailbox.send(Order::Kick { ring: 0, kick: Some(kick.try_clone().unwrap()) });
    await_sleep_after_orders(&mailbox);
    let before = sleep_count();
    let locked = other.get_mut();
    // A kick for nothing.
    rustix::io::write(&kick, &1u64.to_ne_bytes()).unwrap();
    // It has looked at the first ring, and sleeps at the lock of the second.
    await_that("the worker does not wake up", || sleep_count() > before && sleeps("vhost-blk"));
    bench.offer(0, GET_ID, 20);
    drop(locked);
    bench.await_used(1);
    assert_eq!(bench.status(0), 0);
    mailbox.send(Order::Leave);
    thread.join().unwrap();
}

/// The drive has not ended a request in the time that a front-end has; the next one comes, and then it ends.
#[test]
fn who_gave_up_waiting_for_the_end_of_a_ring_does_not_end_the_next_ones() {
    let mut bench = Bench::new();
    bench.sim.fault(When::any(), Does::HoldCompletion);
    let (mailbox, thread) = bench.worker(Polling::Never);
    bench.set_up();
    bench.offer(0, FLUSH, 0);
    mailbox.send(Order::Start { ring: 0, inflight: None });
    assert!(bench.sim.await_held(1, LONG));
    let (ended, gave_up) = mpsc::channel();
    mailbox.send(Order::Stop { ring: 0, ended });
    drop(gave_up);
    bench.set_up();
    mailbox.send(Order::Start { ring: 0, inflight: None });
    bench.offer(1, FLUSH, 0);
    mailbox.send(Order::Look);
    let until = Instant::now() + LONG;
    while bench.used() == 0 {
        assert!(Instant::now() < until, "a ring that was set up anew rests");
        std::thread::yield_now();
    }
    assert_eq!((bench.status(0), bench.status(1)), (0xee, 0));
    // What was late is nobody's.
    bench.sim.release();
    bench.offer(2, FLUSH, 0);
    mailbox.send(Order::Look);
    while bench.used() < 2 {
        assert!(Instant::now() < until, "a ring rests");
        std::thread::yield_now();
    }
    assert_eq!((bench.status(0), bench.used()), (0xee, 2));
    mailbox.send(Order::Leave);
    thread.join().unwrap();
}

/// Whoever knows says that the pages are open, and the drive takes nothing: it is fenced, and nobody attaches it again.
#[test]
fn nothing_is_held_for_ever_that_is_said_to_be_open() {
    let mut bench = Bench::new();
    let (mut desk, memory) = (bench.desk(), bench.memory.memory());
    bench.set_up();
    bench.offer(0, IN, 512);
    let (vring, mut ring, begun) = (bench.vring.clone(), Ring::new(0, Arc::default()), Instant::now());
    let mut locked = vring.get_mut();
    let queue = locked.get_queue_mut();
    ring.start(queue, &memory, None, &desk);
    for second in 0..=30 {
        let now = begun + Duration::from_secs(second);
        ring.tick(queue, &memory, now);
        ring.pull(queue, &memory, &mut desk, true);
        let asked: Vec<_> = ring.questions.drain(..).collect();
        assert_eq!((asked.len(), bench.status(0)), (1, 0xee), "after {second} s");
        ring.answered(queue, &memory, asked[0].head, asked[0].ticket, Admits::Open);
    }
    ring.tick(queue, &memory, begun + Duration::from_secs(32));
    ring.pull(queue, &memory, &mut desk, true);
    assert_eq!((bench.status(0), bench.used(), ring.questions.len()), (FAILED, 1, 0));
}
