//! A device that the host requests back (VFIO_PCI_REQ_IRQ_INDEX). A test program of its own: with `--restart hold` the domain
//! stays open until the process ends, which would disturb tests that count open files.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a panic fails the test

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use passgate::serve::{Options, Server, Takeover};
use passgate::session::fdstore::{FdStore, Name, StoredFds};
use passgate_backends::device::Guard;
use passgate_backends::device::soft::SoftDevice;
use passgate_backends::iommu::soft::SoftDomain;
use passgate_backends::{Accept, Assignment, Device, Domain, NoDrivers, Step, Steps};
use passgate_bindings::PAGE;
use passgate_bindings::memory::GuestFile;
use passgate_client::{AddMemory, Client};
use rustix::event::{EventfdFlags, eventfd};

/// The time after which a daemon without requests has no armed alarm.
const IDLE_TIME: Duration = Duration::from_secs(2);

/// The longest time that the test waits for anything.
const TIMEOUT: Duration = Duration::from_secs(60);

/// A software device that the test can request back by an eventfd.
#[derive(Debug)]
struct RequestedDevice {
    inner: Arc<SoftDevice>,
    request: Arc<OwnedFd>,
    fences: Arc<Mutex<Vec<Step>>>,
}

impl Device for RequestedDevice {
    fn name(&self) -> &str {
        self.inner.name()
    }
    fn stop_class(&self) -> Steps {
        self.inner.stop_class()
    }
    fn fence(&self, step: Step) -> passgate_backends::Result<()> {
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
fn device_request_is_reported_and_device_stopped_and_closed() {
    // The event stream blocks until an event comes: this watchdog ends the program instead of letting it hang.
    std::thread::spawn(|| {
        std::thread::sleep(2 * TIMEOUT);
        eprintln!("the daemon does not end");
        std::process::abort();
    });
    for restart_hold in [false, true] {
        let (dir, domain) = (tempfile::tempdir().unwrap(), SoftDomain::open().unwrap());
        let request = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap());
        let (inner, fences) = (domain.device("soft:0").unwrap(), Arc::default());
        let device =
            Arc::new(RequestedDevice { inner, request: Arc::clone(&request), fences: Arc::clone(&fences) });
        let device_ref = Arc::downgrade(&device);
        let devices: Vec<Arc<dyn Device>> = vec![device];
        let (store, removed) = FdStore::detached();
        let hold = restart_hold.then(|| {
            let assign = || {
                let (domain, devices): (Arc<dyn Domain>, _) = (domain.clone(), devices.clone());
                Ok(Assignment { domain, devices, drives: Vec::new() })
            };
            let (kept, names) = (StoredFds::of(Default::default()), ["soft:0".to_owned()]);
            Takeover::open(store, kept, &names, Accept::default(), &NoDrivers, TIMEOUT, assign).unwrap().1
        });
        let options = Options::at(dir.path().join("socket"));
        let server = Server::bind_with_takeover(options, domain, devices, hold).unwrap().spawn().unwrap();
        let memory = GuestFile::memfd("wanted", PAGE).unwrap();
        let mut client = Client::connect(server.path()).unwrap();
        client.add_memory(&AddMemory::shared(0, PAGE), &[&memory]).unwrap();
        let mut events = Client::connect(server.path()).unwrap().subscribe().unwrap();
        assert!(fences.lock().unwrap().is_empty());
        // An alarm that the last call has armed would wake the daemon: wait until it has expired.
        std::thread::sleep(IDLE_TIME);
        rustix::io::write(&*request, &1u64.to_ne_bytes()).unwrap();
        let notice = events.next().unwrap().unwrap();
        assert_eq!((notice.event.as_str(), &notice.details["device"]), ("device.wanted", &"soft:0".into()));
        // The daemon ends by itself: no client asks it to, and nothing but the request wakes it.
        events.by_ref().take_while(Result::is_ok).for_each(drop);
        let started = Instant::now();
        while fences.lock().unwrap().is_empty() && started.elapsed() < TIMEOUT {
            std::thread::yield_now();
        }
        assert!(!fences.lock().unwrap().is_empty(), "the request did not wake the daemon");
        server.stop().unwrap();
        let removed: Vec<_> = removed.try_iter().collect();
        assert_eq!(
            removed.contains(&Name::Ledger) && removed.contains(&Name::Guardian),
            restart_hold,
            "{removed:?}"
        );
        // Descriptors for the next daemon stay open until the process ends.
        assert_eq!(device_ref.upgrade().is_some(), restart_hold);
    }
}
