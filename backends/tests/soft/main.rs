//! The soft domain and its devices on the running kernel: mapped pages are pinned, DMA to unmapped pages faults, and
//! operations in flight are reported.

#![allow(clippy::unwrap_used)] // a panic fails the test

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Once, PoisonError, RwLock, RwLockReadGuard};
use std::time::{Duration, Instant};

use passgate_backends::device::soft::SoftDevice;
use passgate_backends::iommu::soft::SoftDomain;
use passgate_backends::{Device, Domain, Error, Ticket, Unmap};
use passgate_bindings::memory::GuestFile;
use passgate_bindings::units::{Offset, PAGE};
use passgate_bindings::{Iova, PageRange, guest_memfd};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

mod death;
mod fences;
mod limits;
mod model;
mod races;
#[path = "../../../tests/common/skip.rs"]
mod skip;

/// The first IOVA at which the tests map.
const BASE: u64 = 0x4000_0000;

/// The user's budget of locked memory (RLIMIT_MEMLOCK): the test that uses it up locks this for writing, all others for
/// reading. A test may lock it once only: a second read lock would wait behind a waiting writer.
static MEMLOCK_BUDGET: RwLock<()> = RwLock::new(());

/// A domain, a device in it, and guest memory that is not mapped yet.
struct Bench {
    _budget: Option<RwLockReadGuard<'static, ()>>,
    domain: Arc<SoftDomain>,
    device: Arc<SoftDevice>,
    memory: Arc<GuestFile>,
}

impl Bench {
    fn new(pages: u64) -> Self {
        let budget = MEMLOCK_BUDGET.read().unwrap_or_else(PoisonError::into_inner);
        Self::of(SoftDomain::open().unwrap(), pages, Some(budget))
    }

    fn of(domain: Arc<SoftDomain>, pages: u64, budget: Option<RwLockReadGuard<'static, ()>>) -> Self {
        let device = domain.device("soft:0").unwrap();
        Self { _budget: budget, domain, device, memory: memory(pages) }
    }

    /// Maps `count` pages from page `page` on, each as a mapping of its own, at the same offset from [`BASE`].
    fn map(&self, page: u64, count: u64) {
        self.domain.map(iova(page, count), PAGE, &self.memory, Offset(page * PAGE), true).unwrap();
    }

    fn unmap(&self, page: u64, count: u64) -> Unmap {
        self.domain.unmap(iova(page, count))
    }

    fn store(&self, page: u64, value: u64) {
        self.memory.store(page * PAGE, value).unwrap();
    }

    fn load(&self, page: u64) -> u64 {
        self.memory.load(page * PAGE).unwrap()
    }

    fn dma_load(&self, page: u64) -> Result<u64, Error> {
        let bytes = self.device.dma_read(at(page), 8)?;
        Ok(u64::from_ne_bytes(bytes.try_into().unwrap()))
    }

    fn dma_store(&self, page: u64, value: u64) -> Result<(), Error> {
        self.device.dma_write(at(page), &value.to_ne_bytes())
    }
}

/// Makes a guest_memfd, or, if the kernel has none, a memfd, which is pinned and punched in the same way.
fn memory(pages: u64) -> Arc<GuestFile> {
    match guest_memfd::shared(pages * PAGE) {
        Ok((_vm, file)) => Arc::new(file),
        Err(why) => {
            static PRINTED: Once = Once::new();
            PRINTED.call_once(|| println!("a memfd instead of a guest_memfd: {why}"));
            Arc::new(GuestFile::memfd("passgate-test", pages * PAGE).unwrap())
        }
    }
}

fn iova(page: u64, count: u64) -> PageRange<Iova> {
    PageRange::new(BASE + page * PAGE, count * PAGE).unwrap()
}

fn at(page: u64) -> Iova {
    iova(page, 1).start()
}

fn is_fault<T: std::fmt::Debug>(result: Result<T, Error>, page: u64) {
    match result {
        Err(Error::Fault { iova, .. }) => assert_eq!(iova, at(page)),
        other => panic!("no fault: {other:?}"),
    }
}

fn gone(pages: u64) -> Unmap {
    Unmap::Gone { bytes: pages * PAGE }
}

fn ticket(unmap: Unmap, pages: u64) -> Ticket {
    match unmap {
        Unmap::InFlight { bytes, ticket } if bytes == pages * PAGE => ticket,
        other => panic!("nothing in flight: {other:?}"),
    }
}

/// Returns true if `fd` becomes readable within `timeout`.
fn readable(fd: BorrowedFd<'_>, timeout: Duration) -> bool {
    let deadline = Instant::now() + timeout;
    loop {
        let remaining = Timespec::try_from(deadline.saturating_duration_since(Instant::now())).unwrap();
        match poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&remaining)) {
            Ok(ready) => return ready > 0,
            Err(Errno::INTR) => {}
            Err(errno) => panic!("{errno}"),
        }
    }
}

/// Returns the tickets that end within `timeout`, at most `count`. Waits as a session does, on the wake fd.
fn tickets(domain: &SoftDomain, count: usize, timeout: Duration) -> Vec<Ticket> {
    let deadline = Instant::now() + timeout;
    let mut ended = Vec::new();
    while ended.len() < count
        && readable(domain.wake().unwrap(), deadline.saturating_duration_since(Instant::now()))
    {
        domain.poll(&mut ended);
    }
    ended
}

/// Returns the next number of a pseudo-random sequence (a linear congruential generator).
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *state >> 33
}

/// The time-out for events that must come.
const EVENT_TIMEOUT: Duration = Duration::from_secs(60);
/// The time for which a test checks that no event comes.
const QUIET_TIME: Duration = Duration::from_millis(100);

#[test]
fn device_reads_and_writes_the_mapped_pages() {
    let bench = Bench::new(4);
    bench.map(0, 4);
    for page in 0..4 {
        bench.store(page, 0xa0 + page);
        assert_eq!(bench.dma_load(page).unwrap(), 0xa0 + page);
        bench.dma_store(page, 0xb0 + page).unwrap();
        assert_eq!(bench.load(page), 0xb0 + page);
    }
}

#[test]
fn dma_spans_many_mappings() {
    // Longer than the capacity of the device's pipe.
    let bench = Bench::new(64);
    bench.map(0, 64);
    let pattern: Vec<u8> = (0..60 * PAGE).map(|i| (i / 7) as u8).collect();
    bench.device.dma_write(Iova(BASE + 123), &pattern).unwrap();
    assert_eq!(bench.device.dma_read(Iova(BASE + 123), pattern.len()).unwrap(), pattern);
    let mut seen = vec![0; pattern.len()];
    bench.memory.read(123, &mut seen).unwrap();
    assert_eq!(seen, pattern);
}

#[test]
fn unmapped_page_faults_and_is_unchanged() {
    let bench = Bench::new(4);
    bench.map(0, 4);
    bench.store(1, 7);
    assert_eq!(bench.unmap(1, 1), gone(1));
    is_fault(bench.dma_load(1), 1);
    is_fault(bench.dma_store(1, 8), 1);
    assert_eq!(bench.load(1), 7);
    // The pages beside it are not affected, not even by a DMA that ends in the unmapped page.
    bench.dma_store(0, 9).unwrap();
    bench.dma_store(2, 9).unwrap();
    is_fault(bench.device.dma_write(at(0), &[1; 3 * PAGE as usize]), 1);
    assert_eq!((bench.load(0), bench.load(1), bench.load(2)), (0x0101_0101_0101_0101, 7, 9));
    // No bytes of the failed DMA remain in the device's pipe.
    assert_eq!(bench.dma_load(2).unwrap(), 9);
    // A page that was never mapped.
    is_fault(bench.dma_load(77), 77);
    bench.map(1, 1);
    assert_eq!(bench.dma_load(1).unwrap(), 7);
}

#[test]
fn punched_page_that_is_still_mapped_is_read_stale() {
    let bench = Bench::new(1);
    bench.map(0, 1);
    bench.store(0, 0x01d);
    bench.memory.punch(0, PAGE).unwrap();
    assert_eq!(bench.load(0), 0, "the owner sees a fresh page");
    assert_eq!(bench.dma_load(0).unwrap(), 0x01d, "the device still reads the old one: the canonical bug");
    bench.dma_store(0, 0xbad).unwrap();
    assert_eq!(bench.load(0), 0, "and its writes go to the old page");
}

#[test]
fn page_unmapped_before_the_punch_is_never_read_stale() {
    let bench = Bench::new(1);
    bench.map(0, 1);
    bench.store(0, 0x01d);
    assert_eq!(bench.unmap(0, 1), gone(1));
    bench.memory.punch(0, PAGE).unwrap();
    is_fault(bench.dma_load(0), 0);
    is_fault(bench.dma_store(0, 0xbad), 0);
    bench.store(0, 0x2e3);
    bench.map(0, 1);
    assert_eq!(bench.dma_load(0).unwrap(), 0x2e3);
}

#[test]
fn alias_stays_mapped_when_the_other_is_unmapped() {
    let bench = Bench::new(1);
    bench.map(0, 1);
    bench.domain.map(iova(9, 1), PAGE, &bench.memory, Offset(0), true).unwrap();
    assert_eq!(bench.unmap(0, 1), gone(1));
    bench.store(0, 5);
    is_fault(bench.dma_load(0), 0);
    assert_eq!(bench.dma_load(9).unwrap(), 5);
    assert_eq!(bench.unmap(9, 1), gone(1));
    is_fault(bench.dma_load(9), 9);
}

#[test]
fn unmap_of_a_part_of_a_mapping_is_refused() {
    let bench = Bench::new(8);
    bench.domain.map(iova(0, 8), 2 * PAGE, &bench.memory, Offset(0), true).unwrap();
    for (page, count) in [(0, 1), (1, 1), (1, 2), (0, 3), (1, 7), (5, 9)] {
        assert_eq!(bench.unmap(page, count), Unmap::Failed { errno: Errno::INVAL, bytes: 0 });
    }
    assert_eq!(bench.domain.mappings(), 4);
    (0..8).for_each(|page| bench.dma_store(page, page).unwrap());
    assert_eq!(bench.unmap(2, 2), gone(2));
    assert_eq!(bench.unmap(2, 2), gone(0));
    // More than is mapped, with the hole inside.
    assert_eq!(bench.domain.unmap(PageRange::new(0, 2 * BASE).unwrap()), gone(6));
    (0..8).for_each(|page| is_fault(bench.dma_load(page), page));
}

#[test]
fn read_only_mapping_is_not_written() {
    let bench = Bench::new(1);
    bench.domain.map(iova(0, 1), PAGE, &bench.memory, Offset(0), false).unwrap();
    bench.store(0, 3);
    assert_eq!(bench.dma_load(0).unwrap(), 3);
    is_fault(bench.dma_store(0, 4), 0);
    assert_eq!(bench.load(0), 3);
    // The same IOVA mapped again, writable this time.
    assert_eq!(bench.unmap(0, 1), gone(1));
    bench.map(0, 1);
    bench.dma_store(0, 4).unwrap();
    assert_eq!(bench.load(0), 4);
}

#[test]
fn no_page_is_pinned_after_the_unmap() {
    let memory = Arc::new(GuestFile::memfd("witness", 4 * PAGE).unwrap());
    let witness: OwnedFd = memory.as_fd().try_clone_to_owned().unwrap();
    let Bench { domain, device, _budget, .. } = Bench::new(1);
    domain.map(iova(0, 4), PAGE, &memory, Offset(0), true).unwrap();
    device.dma_write(at(0), &[1; 4 * PAGE as usize]).unwrap();
    drop(memory);
    let seal = || rustix::fs::fcntl_add_seals(&witness, rustix::fs::SealFlags::WRITE);
    assert_eq!(seal(), Err(Errno::BUSY));
    assert_eq!(domain.unmap(iova(0, 3)), gone(3));
    assert_eq!(seal(), Err(Errno::BUSY));
    assert_eq!(domain.unmap(iova(3, 1)), gone(1));
    assert_eq!(seal(), Ok(()));
}
