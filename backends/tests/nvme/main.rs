//! The driver of NVMe drives in front of a simulated controller: every block arrives, whatever the controller does, and
//! nothing moves that must not.

#![allow(clippy::unwrap_used, clippy::expect_used)] // what is not as it should be fails the test

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use passgate_backends::iommu::sim::{Memory, Sim};
use passgate_backends::nvme::sim::{Options, Simulated};
use passgate_backends::nvme::{Drive, DriveOptions, Fault, Op, Queue, Registers, Submitted};
use passgate_backends::{Domain, Segment, Windowed};
use passgate_bindings::memory::GuestFile;
use passgate_bindings::units::{Offset, PAGE};
use passgate_bindings::{Iova, PageRange};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

mod exerciser;
mod faults;
mod fences;
mod interrupted;
mod loads;
mod trips;
mod window;

/// Where the guest's memory is mapped, and how much there is.
const BASE: u64 = 0x4000_0000;
const PAGES: u64 = 1024;
/// Longer than anything takes here.
const LONG: Duration = Duration::from_secs(60);
/// How long is waited for what must not come.
const SHORT: Duration = Duration::from_millis(60);
/// A deadline for commands that never end, where it does not matter if one that is only slow meets it too.
const DEADLINE: Duration = Duration::from_millis(150);
/// A deadline that only those meet which never end.
const LONG_DEADLINE: Duration = Duration::from_secs(2);

/// Drivers of one process share what memory they may have: one test at a time.
static BUDGET: Mutex<()> = Mutex::new(());

/// A simulated drive, its driver, and guest memory that is mapped. It ends by looking whether the controller has
/// complained.
struct Bench {
    drive: Option<Arc<Drive>>,
    windowed: Arc<Windowed>,
    domain: Sim,
    memory: Arc<GuestFile>,
    sim: Simulated,
    _budget: MutexGuard<'static, ()>,
}

impl Bench {
    fn new(options: Options, queues: u16) -> Self {
        Self::with_deadline(options, queues, DEADLINE)
    }

    /// Where every command is ended by the test, none by its deadline.
    fn patient(options: Options, queues: u16) -> Self {
        Self::with_deadline(options, queues, LONG)
    }

    fn with_deadline(options: Options, queues: u16, deadline: Duration) -> Self {
        Self::behind(options, queues, deadline, |registers| registers)
    }

    /// A bench whose driver accesses the controller's registers through what `wrap` makes of them.
    fn behind(
        options: Options,
        queues: u16,
        deadline: Duration,
        wrap: impl FnOnce(Arc<dyn Registers>) -> Arc<dyn Registers>,
    ) -> Self {
        let budget = BUDGET.lock().unwrap_or_else(PoisonError::into_inner);
        let domain = Sim::new(Sim::CAPABILITIES, Memory::new()).unwrap();
        let sim = Simulated::new(&domain, options).unwrap();
        let shared = Arc::new(domain.clone()) as Arc<dyn Domain>;
        let options = DriveOptions { queues, deadline, ..DriveOptions::default() };
        let drive = Drive::open(wrap(sim.registers()), &shared, options).unwrap();
        let windowed = Windowed::new(shared, Arc::clone(drive.window())).with_patience(SHORT);
        let memory = Arc::new(GuestFile::memfd("guest", PAGES * PAGE).unwrap());
        let bench =
            Self { drive: Some(drive), windowed: Arc::new(windowed), domain, memory, sim, _budget: budget };
        bench.map(0, PAGES);
        bench
    }

    fn drive(&self) -> &Arc<Drive> {
        self.drive.as_ref().unwrap()
    }

    fn owner(&self, nth: u16) -> Owner {
        Owner::new(self.drive().take_queue(nth).unwrap())
    }

    fn map(&self, page: u64, pages: u64) {
        self.windowed.map(pages_at(page, pages), 1 << 30, &self.memory, Offset(page * PAGE), true).unwrap();
    }

    /// Fills bytes of guest memory with what nobody else writes.
    fn fill(&self, segments: &[Segment], seed: u64) -> Vec<u8> {
        let len = segments.iter().map(|segment| segment.len as usize).sum();
        let bytes = pattern(seed, len);
        let mut rest = &bytes[..];
        for segment in segments {
            let (now, later) = rest.split_at(segment.len as usize);
            self.memory.write(segment.iova.0 - BASE, now).unwrap();
            rest = later;
        }
        bytes
    }

    /// What is in guest memory.
    fn seen(&self, segments: &[Segment]) -> Vec<u8> {
        let mut all = Vec::new();
        for segment in segments {
            let mut bytes = vec![0; segment.len as usize];
            self.memory.read(segment.iova.0 - BASE, &mut bytes).unwrap();
            all.append(&mut bytes);
        }
        all
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.drive = None;
        if !std::thread::panicking() {
            assert_eq!(self.sim.complaints(), Vec::<String>::new());
        }
    }
}

/// Whoever owns a queue, and what has come back to him.
struct Owner {
    queue: Queue,
    results: BTreeMap<u32, Result<(), Fault>>,
}

impl Owner {
    fn new(queue: Queue) -> Self {
        Self { queue, results: BTreeMap::new() }
    }

    fn submit(&mut self, tag: u32, op: Op, segments: &[Segment]) -> Submitted {
        let submitted = self.queue.submit(tag, &op, segments);
        self.queue.ring();
        submitted
    }

    fn start(&mut self, tag: u32, op: Op, segments: &[Segment]) {
        assert_eq!(self.submit(tag, op, segments), Submitted::Started);
    }

    /// Waits until the drive takes requests again: its controller is up a moment before.
    fn await_open(&mut self) {
        let begun = Instant::now();
        while self.submit(u32::MAX, Op::Flush, &[]) != Submitted::Started {
            assert!(begun.elapsed() < LONG, "the drive takes nothing");
            self.wait();
        }
        assert_eq!(self.result(u32::MAX), Ok(()));
    }

    /// Takes what has come; nothing comes twice.
    fn look(&mut self) {
        let mut done = Vec::new();
        self.queue.complete(&mut done);
        for completed in done {
            let before = self.results.insert(completed.tag, completed.result);
            assert_eq!(before, None, "request {} came back twice", completed.tag);
        }
    }

    /// Waits for the interrupt, and looks.
    fn wait(&mut self) {
        let wait = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
        poll(&mut [PollFd::new(&self.queue.interrupt(), PollFlags::IN)], Some(&wait)).unwrap();
        let _ = rustix::io::read(self.queue.interrupt(), &mut [0; 8]);
        self.look();
    }

    /// As an owner who waits for nothing but interrupts.
    fn sleep(&mut self) {
        let wait = Timespec { tv_sec: LONG.as_secs() as i64, tv_nsec: 0 };
        let woken = poll(&mut [PollFd::new(&self.queue.interrupt(), PollFlags::IN)], Some(&wait));
        assert_eq!(woken, Ok(1), "nobody wakes him");
        let _ = rustix::io::read(self.queue.interrupt(), &mut [0; 8]);
        self.look();
    }

    /// The result of a request that is under way.
    fn result(&mut self, tag: u32) -> Result<(), Fault> {
        let begun = Instant::now();
        self.look();
        loop {
            if let Some(result) = self.results.remove(&tag) {
                return result;
            }
            assert!(begun.elapsed() < LONG, "request {tag} does not come back");
            self.wait();
        }
    }

    fn run(&mut self, op: Op, segments: &[Segment]) -> Result<(), Fault> {
        self.start(u32::MAX, op, segments);
        self.result(u32::MAX)
    }
}

fn pages_at(page: u64, pages: u64) -> PageRange<Iova> {
    PageRange::new(BASE + page * PAGE, pages * PAGE).unwrap()
}

fn segment(offset: u64, len: u32) -> Segment {
    Segment { iova: Iova(BASE + offset), len }
}

/// A page of guest memory.
fn page(nth: u64) -> [Segment; 1] {
    [segment(nth * PAGE, PAGE as u32)]
}

fn write(first: u64, blocks: u32) -> Op {
    Op::Write { first, blocks, fua: false }
}

fn read(first: u64, blocks: u32) -> Op {
    Op::Read { first, blocks }
}

fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..len).map(|_| next()).collect()
}
