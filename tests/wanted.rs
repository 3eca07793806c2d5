//! A device that the host wants back. A program of its own: with `--restart hold` its domain stays open until the process
//! ends, and the tests of a daemon count what is open.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a panic fails the test

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use passgate::client::{AddMemory, Client};
use passgate::serve::{Hold, Options, Server};
use passgate::session::fdstore::{FdStore, Kept, Name};
use passgate_backends::device::Guard;
use passgate_backends::device::soft::SoftDevice;
use passgate_backends::iommu::soft::SoftDomain;
use passgate_backends::{Accept, Assignment, Device, Domain, FenceStep, StopClass};
use passgate_bindings::PAGE;
use passgate_bindings::memory::GuestFile;
use rustix::event::{EventfdFlags, eventfd};

/// Longer than any alarm of an idle daemon is set for.
const IDLE: Duration = Duration::from_secs(2);

/// Longer than anything takes here: whoever waits in vain fails after that.
const LIMIT: Duration = Duration::from_secs(60);

/// A device that the host may want back.
#[derive(Debug)]
struct Wanted {
    inner: Arc<SoftDevice>,
    request: Arc<OwnedFd>,
    fences: Arc<Mutex<Vec<FenceStep>>>,
}

impl Device for Wanted {
    fn name(&self) -> &str {
        self.inner.name()
    }
    fn stop_class(&self) -> StopClass {
        self.inner.stop_class()
    }
    fn fence(&self, step: FenceStep) -> passgate_backends::Result<()> {
        self.fences.lock().unwrap().push(step);
        self.inner.fence(step)
    }
    fn attach(&self) -> passgate_backends::Result<()> {
        self.inner.attach()
    }
    fn wanted(&self) -> Option<BorrowedFd<'_>> {
        Some(self.request.as_fd())
    }
    fn guard(&self) -> Guard<'_> {
        self.inner.guard()
    }
}

#[test]
fn a_device_that_the_host_wants_back_is_told_stopped_and_let_go() {
    // A stream of events blocks until one comes: whoever waits in vain ends this program instead of hanging.
    std::thread::spawn(|| {
        std::thread::sleep(2 * LIMIT);
        eprintln!("the daemon does not end");
        std::process::abort();
    });
    for holds in [false, true] {
        let (dir, domain) = (tempfile::tempdir().unwrap(), SoftDomain::open().unwrap());
        let request = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap());
        let (inner, fences) = (domain.device("soft:0").unwrap(), Arc::default());
        let device = Arc::new(Wanted { inner, request: Arc::clone(&request), fences: Arc::clone(&fences) });
        let left = Arc::downgrade(&device);
        let devices: Vec<Arc<dyn Device>> = vec![device];
        let (store, removed) = FdStore::detached();
        let hold = holds.then(|| {
            let assign = || {
                let (domain, devices): (Arc<dyn Domain>, _) = (domain.clone(), devices.clone());
                Ok(Assignment { domain, devices, drives: Vec::new() })
            };
            let (kept, names) = (Kept::of(Default::default()), ["soft:0".to_owned()]);
            Hold::open(store, kept, &names, Accept::default(), LIMIT, assign).unwrap().1
        });
        let options = Options::at(dir.path().join("socket"));
        let server = Server::holding(options, domain, devices, hold).unwrap().spawn().unwrap();
        let memory = GuestFile::memfd("wanted", PAGE).unwrap();
        let mut client = Client::connect(server.path()).unwrap();
        client.add_memory(&AddMemory::shared(0, PAGE), &[&memory]).unwrap();
        let mut events = Client::connect(server.path()).unwrap().subscribe().unwrap();
        assert!(fences.lock().unwrap().is_empty());
        // An alarm that the last call has set would wake the daemon: it is idle once that is over.
        std::thread::sleep(IDLE);
        rustix::io::write(&*request, &1u64.to_ne_bytes()).unwrap();
        let told = events.next().unwrap().unwrap();
        assert_eq!((told.event.as_str(), &told.details["device"]), ("device.wanted", &"soft:0".into()));
        // It ends by itself, in order: nobody tells it to, and nothing wakes it.
        events.by_ref().take_while(Result::is_ok).for_each(drop);
        let since = Instant::now();
        while fences.lock().unwrap().is_empty() && since.elapsed() < LIMIT {
            std::thread::yield_now();
        }
        assert!(!fences.lock().unwrap().is_empty(), "nothing is done until something wakes the daemon");
        server.stop().unwrap();
        let removed: Vec<_> = removed.try_iter().collect();
        assert_eq!(
            removed.contains(&Name::Ledger) && removed.contains(&Name::Guardian),
            holds,
            "{removed:?}"
        );
        // What outlives a daemon is closed with the process.
        assert_eq!(left.upgrade().is_some(), holds);
    }
}
