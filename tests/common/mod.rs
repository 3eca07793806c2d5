//! What the tests of a whole session share: a server over the soft domain, and a count of what is open.
#![allow(dead_code, unreachable_pub)] // each test binary uses its part

pub mod fake;
pub mod skip;
pub mod watch;

use std::fmt::Debug;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use passgate::client::{AddMemory, Answer, Channel, Client, Status};
use passgate::gate::Policy;
use passgate::serve::{Handle, Options, Server};
use passgate::{Error, Result};
use passgate_backends::Domain;
use passgate_backends::device::soft::SoftDevice;
use passgate_backends::iommu::soft::SoftDomain;
use passgate_bindings::memory::GuestFile;
use passgate_bindings::{Gpa, Iova, PAGE, PageRange, guest_memfd};
use tempfile::TempDir;

/// Longer than anything takes here, also where much else runs: whoever waits in vain fails after that.
pub const LONG: Duration = Duration::from_secs(60);
/// The deadline of a conversion that is to be granted, in milliseconds: no machine is that slow.
pub const PATIENT_MS: u32 = 20_000;

/// Tests count the open files of this process: one at a time.
static ONE: Mutex<()> = Mutex::new(());

/// Waits for its turn; for a test without a [`Setup`]. Threads that the one before has left behind (a call that came back
/// late, a listener whose daemon has gone) may close their files a little later: that is waited for, as long as it may take,
/// so that no such file is in this test's count.
pub fn alone() -> MutexGuard<'static, ()> {
    static FEWEST: OnceLock<usize> = OnceLock::new();
    let one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let fewest = *FEWEST.get_or_init(open_files);
    let start = Instant::now();
    while open_files() > fewest && start.elapsed() < Duration::from_secs(10) {
        std::thread::yield_now();
    }
    one
}

/// A server on a thread of its own, over a soft domain with one device.
pub struct Setup {
    pub server: Handle,
    pub domain: Arc<SoftDomain>,
    pub device: Arc<SoftDevice>,
    _dir: TempDir,
    _one: MutexGuard<'static, ()>,
}

impl Setup {
    pub fn new() -> Self {
        Self::with(|_| {})
    }

    /// A server with other options.
    pub fn with(change: impl FnOnce(&mut Options)) -> Self {
        Self::over(|| SoftDomain::open().unwrap(), change)
    }

    pub fn policy(policy: Policy) -> Self {
        Self::with(|options| options.policy = policy)
    }

    pub fn over(domain: impl FnOnce() -> Arc<SoftDomain>, change: impl FnOnce(&mut Options)) -> Self {
        Self::behind(domain, |soft| soft, change)
    }

    /// A server whose domain is `wrap` around the soft one.
    pub fn behind(
        domain: impl FnOnce() -> Arc<SoftDomain>,
        wrap: impl FnOnce(Arc<dyn Domain>) -> Arc<dyn Domain>,
        change: impl FnOnce(&mut Options),
    ) -> Self {
        let one = alone();
        let (dir, domain) = (tempfile::tempdir().unwrap(), domain());
        let mut options = Options::at(dir.path().join("socket"));
        options.allow_dma = true;
        change(&mut options);
        let device = domain.device("soft:0").unwrap();
        let server = Server::bind(options, wrap(domain.clone()), vec![device.clone()]).unwrap();
        Self { server: server.spawn().unwrap(), domain, device, _dir: dir, _one: one }
    }

    /// Stops the server.
    pub fn stop(self) -> Result<()> {
        self.server.stop()
    }

    /// A client that the server has accepted.
    pub fn connect(&self) -> Client {
        let mut client = Client::connect(self.server.path()).unwrap();
        client.status().unwrap();
        client
    }

    /// A client with `pages` pages of shared memory at 0, and its channel.
    pub fn client(&self, pages: u64) -> (Client, Channel, Arc<GuestFile>) {
        let mut client = self.connect();
        let file = memory(pages);
        client.add_memory(&AddMemory::shared(0, pages * PAGE), &[&*file]).unwrap();
        let channel = client.open_channel().unwrap();
        // By the next answer the server has closed its copy of what it handed out.
        client.status().unwrap();
        (client, channel, file)
    }
}

/// `pages` pages of sealed memfd.
pub fn memory(pages: u64) -> Arc<GuestFile> {
    Arc::new(GuestFile::memfd("test", pages * PAGE).unwrap())
}

/// Real guest_memfd where this machine has it, and what keeps its VM; else a memfd, which is punched the same way.
pub fn guest_memory(pages: u64) -> (Arc<GuestFile>, Option<Box<dyn std::any::Any>>) {
    match guest_memfd::shared(pages * PAGE) {
        Ok((vm, file)) => (Arc::new(file), Some(Box::new(vm))),
        Err(why) => {
            eprintln!("a memfd stands in for guest_memfd: {why}");
            (memory(pages), None)
        }
    }
}

/// What became of a begin that must be granted.
#[track_caller]
pub fn granted(answer: Result<Answer>) -> u64 {
    match answer {
        Ok(Answer::Granted { invalidation }) => invalidation,
        other => panic!("this was to be granted: {other:?}"),
    }
}

/// The device reads the first bytes of a page.
pub fn dma_read(device: &SoftDevice, page: u64) -> passgate_backends::Result<u64> {
    let mut bytes = [0; 8];
    device.read_into(Iova(page * PAGE), &mut bytes).map(|()| u64::from_le_bytes(bytes))
}

/// The device writes the first bytes of a page.
pub fn dma_write(device: &SoftDevice, page: u64, value: u64) -> passgate_backends::Result<()> {
    device.write_from(Iova(page * PAGE), &value.to_le_bytes())
}

/// The device must meet a fault in this page, reading and writing.
#[track_caller]
pub fn assert_faults(device: &SoftDevice, page: u64) {
    for result in [dma_read(device, page).map(drop), dma_write(device, page, 0xbad)] {
        match result {
            Err(passgate_backends::Error::Fault { .. }) => {}
            other => panic!("DMA into page {page} was to fault: {other:?}"),
        }
    }
}

/// `count` pages of guest memory from page `first` on.
pub fn pages(first: u64, count: u64) -> PageRange<Gpa> {
    PageRange::new(first * PAGE, count * PAGE).unwrap()
}

/// Files that this process has open: client, server and devices.
pub fn open_files() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Message and errno of a request that passgate found wrong.
#[track_caller]
pub fn refused<T: Debug>(result: Result<T>) -> (String, i32) {
    match result {
        Err(Error::Refused { message, errno }) => (message, errno),
        other => panic!("this was to be refused: {other:?}"),
    }
}

/// What of a status may not change by a request that was wrong.
pub fn substance(client: &mut Client) -> Status {
    let mut status = client.status().unwrap();
    status.totals.wrong = 0;
    status
}

/// Asks until it is so. Each question is a whole round trip, so this waits for events and not for time; a test
/// that would wait for ever fails.
#[track_caller]
pub fn until(client: &mut Client, is_so: impl Fn(&Status) -> bool) {
    let start = Instant::now();
    loop {
        let status = client.status().unwrap();
        if is_so(&status) {
            return;
        }
        assert!(start.elapsed() < LONG, "it never came to be so: {status:?}");
        std::thread::yield_now();
    }
}

/// Refused by errno, with words that tell what is wrong.
#[track_caller]
pub fn assert_refused<T: Debug>(result: Result<T>, errno: i32, words: &str) {
    let (message, got) = refused(result);
    assert!(got == errno && message.contains(words), "{got} {message}; wanted {errno} and `{words}`");
    assert!(!message.contains('\n'), "one line: {message}");
}
