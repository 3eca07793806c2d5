//! The NVMe exerciser with a simulated controller: DMA of given bytes into given memory, one command at a time.

#![allow(clippy::unwrap_used)] // a failure here is a failed test

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use passgate_backends::{Device, Domain, Error, Step, Unmap};
use passgate_bindings::memory::GuestFile;
use passgate_bindings::units::{Offset, PAGE};
use passgate_bindings::{Iova, PageRange};
use passgate_exercise::nvme::{self, Nvme};
use passgate_sim::iommu::{Memory, Sim};
use passgate_sim::nvme::{Options, Simulated};

/// The IOVA of guest memory.
const BASE: u64 = 0x4000_0000;
/// A timeout that no test reaches unless it fails.
const TIMEOUT: Duration = Duration::from_secs(60);
/// The time after which something that must not happen is taken not to.
const SETTLE_TIME: Duration = Duration::from_millis(60);

/// Serializes the tests: the drivers of one process share a limited IOVA range for their own memory.
static DRIVER_MEMORY: Mutex<()> = Mutex::new(());

/// An exerciser, its controller, and guest memory that is mapped.
struct Bench {
    nvme: Option<Nvme>,
    domain: Sim,
    memory: Arc<GuestFile>,
    sim: Simulated,
    _driver_memory: MutexGuard<'static, ()>,
}

impl Bench {
    fn new(options: Options, scratch: bool) -> Self {
        let driver_memory = DRIVER_MEMORY.lock().unwrap_or_else(PoisonError::into_inner);
        let domain = Sim::new(Sim::CAPABILITIES, Memory::new()).unwrap();
        let sim = Simulated::new(&domain, options).unwrap();
        let shared = Arc::new(domain.clone()) as Arc<dyn Domain>;
        let nvme = Some(nvme::with_registers(sim.registers(), &shared, scratch).unwrap());
        let memory = Arc::new(GuestFile::memfd("guest", 16 * PAGE).unwrap());
        domain.map(pages_at(0, 16), 1 << 30, &memory, Offset(0), true).unwrap();
        Self { nvme, domain, memory, sim, _driver_memory: driver_memory }
    }

    fn nvme(&self) -> &Nvme {
        self.nvme.as_ref().unwrap()
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.nvme = None;
        if !std::thread::panicking() {
            assert_eq!(self.sim.complaints(), Vec::<String>::new());
            assert_eq!(self.domain.mapping_count(), 1, "only guest memory is mapped");
        }
    }
}

#[test]
fn transfers_of_any_length_use_scratch_blocks() {
    for (sgl, block) in [(0, 512), (0, 4096), (1, 512), (1, 4096)] {
        let bench = Bench::new(Options { sgl, block, ..Options::default() }, true);
        let lengths: &[usize] = if sgl == 1 { &[1, 77, 4096, 9000] } else { &[4096, 8192] };
        for (seed, len) in (0..).zip(lengths) {
            let at = if sgl == 1 { 3 } else { 0 };
            let bytes = pattern(seed, *len);
            bench.nvme().dma_write(Iova(BASE + PAGE + at), &bytes).unwrap();
            let mut seen = vec![0; *len];
            bench.memory.read(PAGE + at, &mut seen).unwrap();
            assert!(seen == bytes, "sgl {sgl}, blocks of {block}, {len} bytes written");
            let bytes = pattern(seed + 100, *len);
            bench.memory.write(8 * PAGE + at, &bytes).unwrap();
            let read = bench.nvme().dma_read(Iova(BASE + 8 * PAGE + at), *len).unwrap();
            assert!(read == bytes, "sgl {sgl}, blocks of {block}, {len} bytes read");
        }
        assert_eq!(bench.sim.dma_faults(), 0);
    }
}

#[test]
fn without_scratch_blocks_the_drive_only_identifies_itself() {
    let bench = Bench::new(Options::default(), false);
    assert!(matches!(bench.nvme().dma_write(Iova(BASE), &[1; 512]), Err(Error::Unsupported { .. })));
    let identity = bench.nvme().touch(Iova(BASE + PAGE)).unwrap();
    let mut seen = vec![0; identity.len()];
    bench.memory.read(PAGE, &mut seen).unwrap();
    assert!(seen == identity && seen[4..13] == *b"SIMULATED");
    assert_eq!(bench.sim.taken(), 0);
}

#[test]
fn unmapped_memory_is_a_dma_fault_and_nothing_more() {
    let bench = Bench::new(Options::default(), true);
    assert_eq!(bench.domain.unmap(pages_at(0, 16)), Unmap::Gone { bytes: 16 * PAGE });
    for failed in [
        bench.nvme().dma_write(Iova(BASE), &[1; 4096]),
        bench.nvme().dma_read(Iova(BASE), 4096).map(|_| ()),
        bench.nvme().touch(Iova(BASE)).map(|_| ()),
    ] {
        assert!(matches!(failed, Err(Error::Fault { iova: Iova(BASE), .. })), "{failed:?}");
    }
    bench.domain.map(pages_at(0, 16), 1 << 30, &bench.memory, Offset(0), true).unwrap();
    bench.nvme().dma_write(Iova(BASE), &[1; 4096]).unwrap();
}

#[test]
fn every_fence_stops_the_load_and_attach_resumes_it() {
    let bench = Bench::new(Options::default(), true);
    for step in [Step::Drain, Step::Master, Step::Detach, Step::Reset] {
        let pages: Vec<_> = (0..8).map(|page| Iova(BASE + page * PAGE)).collect();
        let load = bench.nvme().start(&pages).unwrap();
        assert!(bench.sim.await_taken(bench.sim.taken() + 20, TIMEOUT), "no load");
        bench.nvme().fence(step).unwrap();
        let before = snapshot(&bench.memory);
        assert!(!bench.sim.await_taken(bench.sim.taken() + 1, SETTLE_TIME), "{step:?}: commands continue");
        assert!(snapshot(&bench.memory) == before, "{step:?}: DMA continues");
        bench.nvme().attach().unwrap();
        assert!(bench.sim.await_taken(bench.sim.taken() + 20, TIMEOUT), "{step:?}: the load does not resume");
        drop(load);
    }
}

fn snapshot(memory: &GuestFile) -> Vec<u8> {
    let mut bytes = vec![0; memory.size() as usize];
    memory.read(0, &mut bytes).unwrap();
    bytes
}

fn pages_at(page: u64, pages: u64) -> PageRange<Iova> {
    PageRange::new(BASE + page * PAGE, pages * PAGE).unwrap()
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
