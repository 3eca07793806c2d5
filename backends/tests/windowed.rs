//! A windowed domain with a simulated domain inside: pages are open while they are mapped, and an unmap waits for the
//! requests in flight.

#![allow(clippy::unwrap_used)] // a failure here is a failed test
#![cfg(not(loom))]

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use passgate_backends::handover::{DomainIds, Handover};
use passgate_backends::{
    DeviceTraits, Domain, DomainCaps, Entered, Result, Segment, Steps, Ticket, Unmap, Window, Windowed,
};
use passgate_bindings::memory::GuestFile;
use passgate_bindings::units::Offset;
use passgate_bindings::{Iova, PAGE, PageRange};
use passgate_sim::iommu::{Call, Fault, Memory, Sim};
use rustix::io::Errno;

struct Rig {
    sim: Sim,
    window: Arc<Window>,
    domain: Windowed,
    file: Arc<GuestFile>,
}

fn rig(capabilities: DomainCaps) -> Rig {
    let sim = Sim::new(capabilities, Memory::new()).unwrap();
    let window = Window::new(4, 4);
    let domain = Windowed::new(Arc::new(sim.clone()), Arc::clone(&window));
    Rig { sim, window, domain, file: Arc::new(GuestFile::memfd("windowed", 64 * PAGE).unwrap()) }
}

fn pages(page: u64, count: u64) -> PageRange<Iova> {
    PageRange::new(page * PAGE, count * PAGE).unwrap()
}

impl Rig {
    fn map(&self, page: u64, count: u64, piece: u64) -> Result<()> {
        self.domain.map(pages(page, count), piece * PAGE, &self.file, Offset(page * PAGE), true)
    }

    fn enter(&self, slot: usize, page: u64) -> Entered {
        self.window.enter(slot, &[Segment { iova: Iova(page * PAGE), len: PAGE as u32 }])
    }

    /// Returns the pages below 16 that are open.
    fn open(&self) -> Vec<u64> {
        (0..16)
            .filter(|page| {
                let entered = self.enter(3, *page) == Entered::In;
                self.window.leave(3);
                entered
            })
            .collect()
    }
}

const CUTS: DomainCaps = DomainCaps { cut: true, replace: true, ..Sim::CAPABILITIES };

#[test]
fn pages_are_open_while_they_are_mapped() {
    let rig = rig(Sim::CAPABILITIES);
    assert!(rig.open().is_empty());
    rig.map(2, 6, 2).unwrap();
    assert_eq!(rig.open(), [2, 3, 4, 5, 6, 7]);
    assert_eq!(rig.domain.unmap(pages(4, 2)), Unmap::Gone { bytes: 2 * PAGE });
    assert_eq!(rig.open(), [2, 3, 6, 7]);
    rig.map(4, 2, 1).unwrap();
    assert_eq!(rig.open(), [2, 3, 4, 5, 6, 7]);
}

#[test]
fn failed_map_opens_nothing() {
    for fault in [Fault::Errno(Errno::NOMEM), Fault::HalfMapped(Errno::NOMEM)] {
        let rig = rig(Sim::CAPABILITIES);
        rig.sim.fail_next(Call::Map, fault);
        rig.map(0, 4, 1).unwrap_err();
        assert!(rig.open().is_empty(), "{fault:?}");
    }
}

#[test]
fn unmap_waits_for_requests_in_flight() {
    let mut rig = rig(Sim::CAPABILITIES);
    rig.domain = rig.domain.with_timeout(Duration::from_secs(20));
    rig.map(0, 4, 1).unwrap();
    assert_eq!(rig.enter(0, 1), Entered::In);
    assert_eq!(rig.enter(1, 3), Entered::In);
    assert!(rig.domain.may_wait(pages(0, 2)) && !rig.domain.may_wait(pages(2, 1)));
    let (begun, wait_begun) = channel();
    std::thread::scope(|scope| {
        let unmapping = scope.spawn(|| {
            begun.send(()).unwrap();
            rig.domain.unmap(pages(0, 2))
        });
        wait_begun.recv().unwrap();
        while rig.enter(2, 0) != Entered::Closed {
            rig.window.leave(2);
            std::hint::spin_loop();
        }
        assert_eq!(rig.sim.calls(Call::Unmap), 0, "the request is still in flight");
        rig.window.leave(0);
        assert_eq!(unmapping.join().unwrap(), Unmap::Gone { bytes: 2 * PAGE });
    });
    assert_eq!(rig.open(), [2, 3], "a request over other pages is not waited for");
}

#[test]
fn range_with_a_request_that_does_not_end_stays_mapped_and_closed() {
    let mut rig = rig(CUTS);
    rig.domain = rig.domain.with_timeout(Duration::from_millis(5));
    rig.map(0, 8, 8).unwrap();
    assert_eq!(rig.enter(0, 1), Entered::In);
    let busy = Unmap::Failed { errno: Errno::BUSY, bytes: 0 };
    assert_eq!(rig.domain.unmap(pages(0, 2)), busy);
    assert_eq!(rig.domain.replace(&[pages(1, 1), pages(4, 1)]), busy);
    assert_eq!((rig.sim.calls(Call::Unmap), rig.sim.calls(Call::Replace)), (0, 0));
    assert_eq!(rig.open(), [2, 3, 5, 6, 7]);
    // A fence has proved that its DMA has ended.
    rig.window.pause();
    rig.window.void();
    rig.window.lift();
    assert_eq!(rig.domain.unmap(pages(0, 2)), Unmap::Gone { bytes: 2 * PAGE });
    assert_eq!(rig.open(), [2, 3, 5, 6, 7], "page 4 is mapped, but was not mapped again since");
}

#[test]
fn replace_waits_for_requests_over_any_of_its_ranges() {
    let gone = [pages(1, 1), pages(3, 2), pages(6, 1)];
    for busy in [1, 4, 6] {
        let mut rig = rig(CUTS);
        rig.domain = rig.domain.with_timeout(Duration::from_millis(5));
        rig.map(0, 8, 8).unwrap();
        assert_eq!(rig.enter(0, busy), Entered::In);
        assert_eq!(rig.domain.replace(&gone), Unmap::Failed { errno: Errno::BUSY, bytes: 0 }, "page {busy}");
        assert_eq!((rig.sim.calls(Call::Replace), rig.open()), (0, vec![0, 2, 5, 7]));
        rig.window.leave(0);
        assert_eq!(rig.domain.replace(&gone), Unmap::Gone { bytes: 4 * PAGE });
    }
}

#[test]
fn cut_and_replace_leave_the_rest_open() {
    let rig = rig(CUTS);
    rig.map(0, 8, 8).unwrap();
    assert_eq!(rig.domain.unmap(pages(2, 1)), Unmap::Gone { bytes: PAGE });
    assert_eq!(rig.open(), [0, 1, 3, 4, 5, 6, 7]);
    assert_eq!(rig.domain.replace(&[pages(0, 1), pages(5, 2)]), Unmap::Gone { bytes: 3 * PAGE });
    assert_eq!(rig.open(), [1, 3, 4, 7]);
}

#[test]
fn failed_split_stays_closed_until_mapped_again() {
    let rig = rig(Sim::CAPABILITIES);
    rig.map(0, 8, 4).unwrap();
    assert!(matches!(rig.domain.unmap(pages(2, 1)), Unmap::Failed { .. }));
    assert_eq!(rig.open(), [0, 1, 3, 4, 5, 6, 7]);
    // By whole pieces, as the gate does.
    assert_eq!(rig.domain.unmap(pages(0, 4)), Unmap::Gone { bytes: 4 * PAGE });
    rig.map(0, 2, 4).unwrap();
    rig.map(3, 1, 4).unwrap();
    assert_eq!(rig.open(), [0, 1, 3, 4, 5, 6, 7]);
}

#[test]
fn partial_unmap_opens_nothing_again() {
    for fault in [Fault::Errno(Errno::IO), Fault::HalfUnmapped(Errno::IO), Fault::Short, Fault::Late] {
        let rig = rig(CUTS);
        let _device = rig.sim.device("sim:0", Steps::all(), DeviceTraits::default());
        rig.map(0, 8, 2).unwrap();
        rig.sim.fail_next(Call::Unmap, fault);
        assert_ne!(rig.domain.unmap(pages(2, 4)), Unmap::Gone { bytes: 4 * PAGE }, "{fault:?}");
        assert_eq!(rig.open(), [0, 1, 6, 7], "{fault:?}");
    }
}

#[test]
fn unsupported_replace_closes_nothing() {
    let rig = rig(Sim::CAPABILITIES);
    rig.map(0, 4, 1).unwrap();
    assert_eq!(rig.domain.replace(&[pages(0, 1)]), Unmap::Failed { errno: Errno::NOSYS, bytes: 0 });
    assert_eq!(rig.open(), [0, 1, 2, 3]);
}

#[test]
fn announced_mapping_of_an_earlier_process_is_open() {
    let rig = rig(Sim::CAPABILITIES);
    rig.sim.map(pages(0, 4), PAGE, &rig.file, Offset(0), true).unwrap();
    assert!(rig.open().is_empty());
    rig.domain.resumed(pages(1, 2));
    assert_eq!(rig.open(), [1, 2]);
}

/// A domain that records the calls to it, and returns other values than the trait's defaults.
#[derive(Debug)]
struct Recorder {
    calls: Mutex<Vec<&'static str>>,
    wake: std::os::fd::OwnedFd,
    window: Arc<Window>,
}

impl Recorder {
    fn record(&self, call: &'static str) {
        self.calls.lock().unwrap().push(call);
    }

    /// Checks that page 0 is closed, as it must be while its mapping changes.
    fn assert_closed(&self, call: &str) {
        let entered = self.window.enter(0, &[Segment { iova: Iova(0), len: 1 }]);
        assert_eq!(entered, Entered::Closed, "in {call}");
    }
}

#[deny(clippy::missing_trait_methods)]
impl Domain for Recorder {
    fn name(&self) -> &'static str {
        self.record("name");
        "recorder"
    }
    fn capabilities(&self) -> DomainCaps {
        self.record("capabilities");
        DomainCaps { max_mappings: 77, ..CUTS }
    }
    fn map(&self, _: PageRange<Iova>, _: u64, _: &Arc<GuestFile>, _: Offset, _: bool) -> Result<()> {
        self.record("map");
        self.assert_closed("map");
        Ok(())
    }
    fn unmap(&self, _: PageRange<Iova>) -> Unmap {
        self.record("unmap");
        self.assert_closed("unmap");
        Unmap::InFlight { bytes: 7, ticket: Ticket(7) }
    }
    fn usable(&self) -> Vec<std::ops::RangeInclusive<Iova>> {
        self.record("usable");
        vec![Iova(7)..=Iova(8)]
    }
    fn leave(&self) -> io::Result<(Handover, DomainIds)> {
        self.record("leave");
        Ok((Handover::default(), DomainIds::Type1 { entries: 7 }))
    }
    fn resumed(&self, _: PageRange<Iova>) {
        self.record("resumed");
        self.assert_closed("resumed");
    }
    fn may_wait(&self, _: PageRange<Iova>) -> bool {
        self.record("may_wait");
        true
    }
    fn replace(&self, _: &[PageRange<Iova>]) -> Unmap {
        self.record("replace");
        self.assert_closed("replace");
        Unmap::Gone { bytes: 7 }
    }
    fn poll(&self, ended: &mut Vec<Ticket>) {
        self.record("poll");
        ended.push(Ticket(7));
    }
    fn wake(&self) -> Option<BorrowedFd<'_>> {
        self.record("wake");
        Some(std::os::fd::AsFd::as_fd(&self.wake))
    }
}

#[test]
fn windowed_forwards_every_call_and_result() {
    let wake = std::fs::File::open("/dev/null").unwrap().into();
    let window = Window::new(1, 1);
    let recorder = Arc::new(Recorder { calls: Mutex::default(), wake, window: Arc::clone(&window) });
    let domain = Windowed::new(Arc::clone(&recorder) as _, window);
    let file = Arc::new(GuestFile::memfd("windowed", PAGE).unwrap());
    let mut ended = Vec::new();
    assert_eq!(domain.name(), "recorder");
    assert_eq!(domain.capabilities().max_mappings, 77);
    domain.map(pages(0, 1), PAGE, &file, Offset(0), true).unwrap();
    assert_eq!(domain.unmap(pages(0, 1)), Unmap::InFlight { bytes: 7, ticket: Ticket(7) });
    assert_eq!(domain.usable(), [Iova(7)..=Iova(8)]);
    assert_eq!(domain.leave().unwrap().1, DomainIds::Type1 { entries: 7 });
    domain.resumed(pages(0, 1));
    assert!(domain.may_wait(pages(0, 1)));
    assert_eq!(domain.replace(&[pages(0, 1)]), Unmap::Gone { bytes: 7 });
    domain.poll(&mut ended);
    assert_eq!(ended, [Ticket(7)]);
    assert!(domain.wake().is_some());
    let mut calls = recorder.calls.lock().unwrap().clone();
    calls.dedup();
    // Every method of the trait must be called above. Clippy checks the impl; this checks the forwarding.
    let trait_of_it = include_str!("../src/iommu/mod.rs").split_once("pub trait Domain").unwrap().1;
    let methods: Vec<_> = trait_of_it
        .lines()
        .filter_map(|line| line.strip_prefix("    fn ").or(line.strip_prefix("    unsafe fn ")))
        .filter_map(|line| line.split('(').next())
        .collect();
    assert!(methods.len() >= 10);
    for method in methods {
        assert!(calls.contains(&method), "{method} is not forwarded");
    }
}
