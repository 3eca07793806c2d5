//! Fixtures of tests that run a whole session: a server over the soft domain, and the number of open files.
#![allow(dead_code, unreachable_pub)] // each test binary uses its part

pub mod event_watch;
pub mod hanging;
pub mod skip;

use std::fmt::Debug;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use passgate::gate::Policy;
use passgate::serve::{Handle, Options, Server};
use passgate_backends::Domain;
use passgate_backends::device::soft::SoftDevice;
use passgate_backends::iommu::soft::SoftDomain;
use passgate_bindings::memory::GuestFile;
use passgate_bindings::{Gpa, Iova, PAGE, PageRange, guest_memfd};
use passgate_client::{AddMemory, Answer, Channel, Client, Error, Result, Status};
use tempfile::TempDir;

/// The longest time that a test waits, chosen so that a busy machine does not reach it.
pub const TIMEOUT: Duration = Duration::from_secs(60);
/// The deadline, in milliseconds, of a conversion that must be granted also on a busy machine.
pub const GRANT_DEADLINE_MS: u32 = 20_000;

/// Serializes the tests of a process, because they count its open files.
static EXCLUSIVE: Mutex<()> = Mutex::new(());

/// Waits until no other test of this process runs; for a test without a [`Setup`]. Threads of the test before (a call that
/// returned late, a listener whose daemon has ended) may close their files a little later. This waits up to ten seconds for
/// that, so that this test does not count such files.
pub fn exclusive() -> MutexGuard<'static, ()> {
    static BASELINE: OnceLock<usize> = OnceLock::new();
    let guard = EXCLUSIVE.lock().unwrap_or_else(PoisonError::into_inner);
    let baseline = *BASELINE.get_or_init(open_files);
    let started = Instant::now();
    while open_files() > baseline && started.elapsed() < Duration::from_secs(10) {
        std::thread::yield_now();
    }
    guard
}

/// A server on a thread of its own, over a soft domain with one device.
pub struct Setup {
    pub server: Handle,
    pub domain: Arc<SoftDomain>,
    pub device: Arc<SoftDevice>,
    _dir: TempDir,
    _exclusive: MutexGuard<'static, ()>,
}

impl Setup {
    pub fn new() -> Self {
        Self::with(|_| {})
    }

    /// Starts a server with options that `change` sets.
    pub fn with(change: impl FnOnce(&mut Options)) -> Self {
        Self::over_soft_domain(|| SoftDomain::open().unwrap(), change)
    }

    pub fn with_policy(policy: Policy) -> Self {
        Self::with(|options| options.policy = policy)
    }

    /// Starts a server over the soft domain that `domain` opens.
    pub fn over_soft_domain(
        domain: impl FnOnce() -> Arc<SoftDomain>,
        change: impl FnOnce(&mut Options),
    ) -> Self {
        Self::around_soft_domain(domain, |soft| soft, change)
    }

    /// Starts a server whose domain is `wrap` around the soft domain.
    pub fn around_soft_domain(
        domain: impl FnOnce() -> Arc<SoftDomain>,
        wrap: impl FnOnce(Arc<dyn Domain>) -> Arc<dyn Domain>,
        change: impl FnOnce(&mut Options),
    ) -> Self {
        let guard = exclusive();
        let (dir, domain) = (tempfile::tempdir().unwrap(), domain());
        let mut options = Options::at(dir.path().join("socket"));
        options.allow_dma = true;
        change(&mut options);
        let device = domain.device("soft:0").unwrap();
        let server = Server::bind(options, wrap(domain.clone()), vec![device.clone()]).unwrap();
        Self { server: server.spawn().unwrap(), domain, device, _dir: dir, _exclusive: guard }
    }

    /// Stops the server.
    pub fn stop(self) -> passgate::Result<()> {
        self.server.stop()
    }

    /// Returns a client that the server has accepted.
    pub fn connect(&self) -> Client {
        let mut client = Client::connect(self.server.path()).unwrap();
        client.status().unwrap();
        client
    }

    /// Returns a client with `pages` pages of shared memory at address 0, its channel and the memory.
    pub fn client(&self, pages: u64) -> (Client, Channel, Arc<GuestFile>) {
        let mut client = self.connect();
        let file = memory(pages);
        client.add_memory(&AddMemory::shared(0, pages * PAGE), &[&*file]).unwrap();
        let channel = client.open_channel().unwrap();
        // The server closes its copy of the channel's descriptor before it answers the next call: from here on the
        // number of open files is stable.
        client.status().unwrap();
        (client, channel, file)
    }
}

/// Returns a sealed memfd of `pages` pages.
pub fn memory(pages: u64) -> Arc<GuestFile> {
    Arc::new(GuestFile::memfd("test", pages * PAGE).unwrap())
}

/// Returns a guest_memfd, with the VM that it belongs to, where this machine has it; else a memfd, which is punched the same
/// way.
pub fn guest_memory(pages: u64) -> (Arc<GuestFile>, Option<Box<dyn std::any::Any>>) {
    match guest_memfd::shared(pages * PAGE) {
        Ok((vm, file)) => (Arc::new(file), Some(Box::new(vm))),
        Err(error) => {
            eprintln!("a memfd stands in for guest_memfd: {error}");
            (memory(pages), None)
        }
    }
}

/// Returns the invalidation of a begin that must be granted.
#[track_caller]
pub fn granted(answer: Result<Answer>) -> u64 {
    match answer {
        Ok(Answer::Granted { invalidation }) => invalidation,
        other => panic!("expected a grant: {other:?}"),
    }
}

/// Reads the first eight bytes of a page by DMA.
pub fn dma_read(device: &SoftDevice, page: u64) -> passgate_backends::Result<u64> {
    let mut bytes = [0; 8];
    device.read_into(Iova(page * PAGE), &mut bytes).map(|()| u64::from_le_bytes(bytes))
}

/// Writes the first eight bytes of a page by DMA.
pub fn dma_write(device: &SoftDevice, page: u64, value: u64) -> passgate_backends::Result<()> {
    device.write_from(Iova(page * PAGE), &value.to_le_bytes())
}

/// Asserts that DMA to this page faults, for a read and for a write.
#[track_caller]
pub fn assert_faults(device: &SoftDevice, page: u64) {
    for result in [dma_read(device, page).map(drop), dma_write(device, page, 0xbad)] {
        match result {
            Err(passgate_backends::Error::Fault { .. }) => {}
            other => panic!("DMA to page {page} must fault: {other:?}"),
        }
    }
}

/// Returns the guest-physical range of `count` pages from page `first` on.
pub fn pages(first: u64, count: u64) -> PageRange<Gpa> {
    PageRange::new(first * PAGE, count * PAGE).unwrap()
}

/// Returns the number of files that this process has open: those of client, server and devices.
pub fn open_files() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Returns message and errno of a request that passgate has refused.
#[track_caller]
pub fn refused<T: Debug>(result: Result<T>) -> (String, i32) {
    match result {
        Err(Error::Refused { message, errno }) => (message, errno),
        other => panic!("expected a refusal: {other:?}"),
    }
}

/// Asserts that a request was not granted because this guest-physical address is in quarantine.
#[track_caller]
pub fn assert_quarantined(result: Result<Answer>, gpa: u64) {
    match result {
        Ok(Answer::Quarantined { gpa: quarantined }) => assert_eq!(quarantined, Gpa(gpa)),
        other => panic!("expected a range in quarantine: {other:?}"),
    }
}

/// Returns the status without its number of wrong requests: a wrong request may change nothing else.
pub fn status_without_wrong_count(client: &mut Client) -> Status {
    let mut status = client.status().unwrap();
    status.totals.wrong = 0;
    status
}

/// Requests the status until `condition` holds. Each request is a round trip through the server's loop, so this waits for
/// events and not for time. Panics after [`TIMEOUT`].
#[track_caller]
pub fn wait_for_status(client: &mut Client, condition: impl Fn(&Status) -> bool) {
    let started = Instant::now();
    loop {
        let status = client.status().unwrap();
        if condition(&status) {
            return;
        }
        assert!(started.elapsed() < TIMEOUT, "the condition never held: {status:?}");
        std::thread::yield_now();
    }
}

/// Asserts that a request was refused with this errno and one line that contains `expected_text`.
#[track_caller]
pub fn assert_refused<T: Debug>(result: Result<T>, errno: i32, expected_text: &str) {
    let (message, actual) = refused(result);
    assert!(
        actual == errno && message.contains(expected_text),
        "{actual} {message}; expected {errno} and `{expected_text}`"
    );
    assert!(!message.contains('\n'), "not one line: {message}");
}
