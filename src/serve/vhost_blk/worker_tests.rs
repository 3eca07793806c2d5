//! What takes so long that no front-end's test waits for it: a worker and its ring, told by hand.

use std::sync::{Mutex, MutexGuard, PoisonError};

use passgate_backends::iommu::sim::{Memory as Pages, Sim};
use passgate_backends::nvme::sim::{Does, Options, Simulated, When};
use passgate_backends::nvme::{Drive, DriveOptions};
use passgate_backends::{Device, Domain, Windowed};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::super::ring::FAILED;
use super::*;
use crate::serve::{self, Server};

/// Longer than anything takes here.
const LONG: Duration = Duration::from_secs(20);
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
        let windowed = Windowed::new(plain, Arc::clone(drive.window()));
        let devices = vec![Arc::clone(&drive) as Arc<dyn Device>];
        let server = Server::bind(serve::Options::nowhere(), Arc::new(windowed), devices).unwrap();
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
        let memory = Memory::new(memory);
        let vring = Vring::new(memory.clone(), ENTRIES).unwrap();
        Self { vring, memory, server, drive, sim, offered: 0, _turn: turn }
    }

    fn desk(&self) -> Desk {
        Desk {
            drive: self.drive.take_queue(0).unwrap(),
            geometry: self.drive.geometry().clone(),
            read_only: false,
            write_through: false,
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
        describe(head + 1, DATA, data, 3);
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

const IN: u32 = 0;
const FLUSH: u32 = 4;

/// The drive has not ended a request in the time that a front-end has; the next one comes, and then it ends.
#[test]
fn who_gave_up_waiting_for_the_end_of_a_ring_does_not_end_the_next_ones() {
    let mut bench = Bench::new();
    bench.sim.fault(When::any(), Does::HoldCompletion);
    let (rings, inside) = (vec![(0, bench.vring.clone())], bench.server.inside());
    let worker =
        Worker::spawn(bench.desk(), bench.memory.clone(), rings, inside, Polling::Never, Arc::default());
    let (mailbox, thread) = worker.unwrap();
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
