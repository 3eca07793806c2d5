//! The NVMe driver with a simulated controller: no data is lost whatever the controller does, and no DMA happens that
//! must not.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a failure here is a failed test

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use passgate_backends::nvme::{Drive, DriveOptions, Fault, Op, Queue, Registers, Submitted};
use passgate_backends::{Domain, Segment, Windowed};
use passgate_bindings::memory::GuestFile;
use passgate_bindings::units::{Offset, PAGE};
use passgate_bindings::{Iova, PageRange};
use passgate_sim::iommu::{Memory, Sim};
use passgate_sim::nvme::{Options, Simulated};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

mod controller;
mod faults;
mod fences;
mod fencing_registers;
mod loads;
mod transfers;
mod window;

/// The IOVA of guest memory.
const BASE: u64 = 0x4000_0000;
/// The size of guest memory, in pages.
const PAGES: u64 = 1024;
/// A timeout that no test reaches unless it fails.
const TIMEOUT: Duration = Duration::from_secs(60);
/// The time after which something that must not happen is taken not to.
const SETTLE_TIME: Duration = Duration::from_millis(60);
/// A command deadline for tests in which it is harmless that a slow command exceeds it too.
const DEADLINE: Duration = Duration::from_millis(150);
/// A command deadline that only commands exceed that never complete.
const LONG_DEADLINE: Duration = Duration::from_secs(2);

/// Serializes the tests: the drivers of one process share a limited IOVA range for their own memory.
static DRIVER_MEMORY: Mutex<()> = Mutex::new(());

/// A simulated drive, its driver, and guest memory that is mapped. On drop it checks that the driver has not violated
/// the specification.
struct Bench {
    drive: Option<Arc<Drive>>,
    windowed: Arc<Windowed>,
    domain: Sim,
    memory: Arc<GuestFile>,
    sim: Simulated,
    _driver_memory: MutexGuard<'static, ()>,
}

impl Bench {
    fn new(options: Options, queues: u16) -> Self {
        Self::with_deadline(options, queues, DEADLINE)
    }

    /// Returns a bench whose commands never exceed their deadline.
    fn without_deadline(options: Options, queues: u16) -> Self {
        Self::with_deadline(options, queues, TIMEOUT)
    }

    fn with_deadline(options: Options, queues: u16, deadline: Duration) -> Self {
        Self::with_registers(options, queues, deadline, |registers| registers)
    }

    /// Returns a bench whose driver accesses the controller's registers through the result of `wrap`.
    fn with_registers(
        options: Options,
        queues: u16,
        deadline: Duration,
        wrap: impl FnOnce(Arc<dyn Registers>) -> Arc<dyn Registers>,
    ) -> Self {
        let driver_memory = DRIVER_MEMORY.lock().unwrap_or_else(PoisonError::into_inner);
        let domain = Sim::new(Sim::CAPABILITIES, Memory::new()).unwrap();
        let sim = Simulated::new(&domain, options).unwrap();
        let shared = Arc::new(domain.clone()) as Arc<dyn Domain>;
        let options = DriveOptions { queues, deadline, ..DriveOptions::default() };
        let drive = Drive::open(wrap(sim.registers()), &shared, options).unwrap();
        let windowed = Windowed::new(shared, Arc::clone(drive.window())).with_timeout(SETTLE_TIME);
        let memory = Arc::new(GuestFile::memfd("guest", PAGES * PAGE).unwrap());
        let bench = Self {
            drive: Some(drive),
            windowed: Arc::new(windowed),
            domain,
            memory,
            sim,
            _driver_memory: driver_memory,
        };
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

    /// Writes a pattern that depends on `seed` to guest memory, and returns it.
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

    /// Returns the content of guest memory.
    fn read_memory(&self, segments: &[Segment]) -> Vec<u8> {
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

/// The owner of a queue, and the results of its requests.
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

    /// Waits until the drive accepts requests again, which is shortly after its controller is ready.
    fn await_open(&mut self) {
        let begun = Instant::now();
        while self.submit(u32::MAX, Op::Flush, &[]) != Submitted::Started {
            assert!(begun.elapsed() < TIMEOUT, "the drive accepts no request");
            self.wait();
        }
        assert_eq!(self.result(u32::MAX), Ok(()));
    }

    /// Takes completions; no request may complete twice.
    fn reap(&mut self) {
        let mut done = Vec::new();
        self.queue.complete(&mut done);
        for completed in done {
            let before = self.results.insert(completed.tag, completed.result);
            assert_eq!(before, None, "request {} completed twice", completed.tag);
        }
    }

    /// Waits for the interrupt for a short time, then takes completions.
    fn wait(&mut self) {
        let wait = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
        poll(&mut [PollFd::new(&self.queue.interrupt(), PollFlags::IN)], Some(&wait)).unwrap();
        let _ = rustix::io::read(self.queue.interrupt(), &mut [0; 8]);
        self.reap();
    }

    /// Waits for the interrupt without a time limit, then takes completions.
    fn sleep(&mut self) {
        let wait = Timespec { tv_sec: TIMEOUT.as_secs() as i64, tv_nsec: 0 };
        let woken = poll(&mut [PollFd::new(&self.queue.interrupt(), PollFlags::IN)], Some(&wait));
        assert_eq!(woken, Ok(1), "the owner is not woken");
        let _ = rustix::io::read(self.queue.interrupt(), &mut [0; 8]);
        self.reap();
    }

    /// Waits for the result of a request in flight.
    fn result(&mut self, tag: u32) -> Result<(), Fault> {
        let begun = Instant::now();
        self.reap();
        loop {
            if let Some(result) = self.results.remove(&tag) {
                return result;
            }
            assert!(begun.elapsed() < TIMEOUT, "request {tag} does not complete");
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

/// Returns a page of guest memory, as one segment.
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
