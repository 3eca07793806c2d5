use std::sync::Mutex;
use std::sync::mpsc::channel;

use passgate_bindings::PAGE;

use super::super::{Entered, Segment};
use super::*;
use crate::iommu::sim::{Call, Fault, Memory, Sim};
use crate::{Nature, StopClass};

struct Rig {
    sim: Sim,
    window: Arc<Window>,
    domain: Windowed,
    file: Arc<GuestFile>,
}

fn rig(can: Capabilities) -> Rig {
    let sim = Sim::new(can, Memory::new()).unwrap();
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

    /// Which of the first pages are open.
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

const CUTS: Capabilities = Capabilities { cut: true, replace: true, ..Sim::CAPABILITIES };

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
fn a_map_that_fails_opens_nothing() {
    for fault in [Fault::Errno(Errno::NOMEM), Fault::HalfMapped(Errno::NOMEM)] {
        let rig = rig(Sim::CAPABILITIES);
        rig.sim.fail_next(Call::Map, fault);
        rig.map(0, 4, 1).unwrap_err();
        assert!(rig.open().is_empty(), "{fault:?}");
    }
}

#[test]
fn an_unmap_waits_for_what_is_in_flight() {
    let mut rig = rig(Sim::CAPABILITIES);
    rig.domain = rig.domain.with_patience(Duration::from_secs(20));
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
        assert_eq!(rig.sim.calls(Call::Unmap), 0, "the request still runs");
        rig.window.leave(0);
        assert_eq!(unmapping.join().unwrap(), Unmap::Gone { bytes: 2 * PAGE });
    });
    assert_eq!(rig.open(), [2, 3], "what runs beside it is no reason to wait");
}

#[test]
fn what_does_not_end_is_not_unmapped_and_stays_closed() {
    let mut rig = rig(CUTS);
    rig.domain = rig.domain.with_patience(Duration::from_millis(5));
    rig.map(0, 8, 8).unwrap();
    assert_eq!(rig.enter(0, 1), Entered::In);
    let busy = Unmap::Failed { errno: Errno::BUSY, bytes: 0 };
    assert_eq!(rig.domain.unmap(pages(0, 2)), busy);
    assert_eq!(rig.domain.replace(&[pages(1, 1), pages(4, 1)]), busy);
    assert_eq!((rig.sim.calls(Call::Unmap), rig.sim.calls(Call::Replace)), (0, 0));
    assert_eq!(rig.open(), [2, 3, 5, 6, 7]);
    // A fence has proved that it runs no more.
    rig.window.pause();
    rig.window.void();
    rig.window.lift();
    assert_eq!(rig.domain.unmap(pages(0, 2)), Unmap::Gone { bytes: 2 * PAGE });
    assert_eq!(rig.open(), [2, 3, 5, 6, 7], "page 4 is mapped, but nobody mapped it since");
}

#[test]
fn replace_waits_for_what_is_in_flight_over_any_of_its_ranges() {
    let gone = [pages(1, 1), pages(3, 2), pages(6, 1)];
    for busy in [1, 4, 6] {
        let mut rig = rig(CUTS);
        rig.domain = rig.domain.with_patience(Duration::from_millis(5));
        rig.map(0, 8, 8).unwrap();
        assert_eq!(rig.enter(0, busy), Entered::In);
        assert_eq!(rig.domain.replace(&gone), Unmap::Failed { errno: Errno::BUSY, bytes: 0 }, "page {busy}");
        assert_eq!((rig.sim.calls(Call::Replace), rig.open()), (0, vec![0, 2, 5, 7]));
        rig.window.leave(0);
        assert_eq!(rig.domain.replace(&gone), Unmap::Gone { bytes: 4 * PAGE });
    }
}

#[test]
fn a_cut_or_a_replace_leaves_the_rest_open() {
    let rig = rig(CUTS);
    rig.map(0, 8, 8).unwrap();
    assert_eq!(rig.domain.unmap(pages(2, 1)), Unmap::Gone { bytes: PAGE });
    assert_eq!(rig.open(), [0, 1, 3, 4, 5, 6, 7]);
    assert_eq!(rig.domain.replace(&[pages(0, 1), pages(5, 2)]), Unmap::Gone { bytes: 3 * PAGE });
    assert_eq!(rig.open(), [1, 3, 4, 7]);
}

#[test]
fn a_split_without_cut_fails_and_is_closed_until_it_is_mapped_again() {
    let rig = rig(Sim::CAPABILITIES);
    rig.map(0, 8, 4).unwrap();
    assert!(matches!(rig.domain.unmap(pages(2, 1)), Unmap::Failed { .. }));
    assert_eq!(rig.open(), [0, 1, 3, 4, 5, 6, 7]);
    // By whole pieces, as the gate does it.
    assert_eq!(rig.domain.unmap(pages(0, 4)), Unmap::Gone { bytes: 4 * PAGE });
    rig.map(0, 2, 4).unwrap();
    rig.map(3, 1, 4).unwrap();
    assert_eq!(rig.open(), [0, 1, 3, 4, 5, 6, 7]);
}

#[test]
fn an_unmap_that_fails_half_way_opens_nothing_again() {
    for fault in [Fault::Errno(Errno::IO), Fault::HalfUnmapped(Errno::IO), Fault::Short, Fault::Late] {
        let rig = rig(CUTS);
        let _device = rig.sim.device("sim:0", StopClass::all(), Nature { ats: false, tdi: false });
        rig.map(0, 8, 2).unwrap();
        rig.sim.fail_next(Call::Unmap, fault);
        assert_ne!(rig.domain.unmap(pages(2, 4)), Unmap::Gone { bytes: 4 * PAGE }, "{fault:?}");
        assert_eq!(rig.open(), [0, 1, 6, 7], "{fault:?}");
    }
}

#[test]
fn a_domain_that_cannot_replace_changes_nothing() {
    let rig = rig(Sim::CAPABILITIES);
    rig.map(0, 4, 1).unwrap();
    assert_eq!(rig.domain.replace(&[pages(0, 1)]), Unmap::Failed { errno: Errno::NOSYS, bytes: 0 });
    assert_eq!(rig.open(), [0, 1, 2, 3]);
}

#[test]
fn what_an_earlier_process_mapped_is_open_once_it_is_told() {
    let rig = rig(Sim::CAPABILITIES);
    rig.sim.map(pages(0, 4), PAGE, &rig.file, Offset(0), true).unwrap();
    assert!(rig.open().is_empty());
    rig.domain.resumed(pages(1, 2));
    assert_eq!(rig.open(), [1, 2]);
}

/// Takes down which of its methods was called, and answers none as the trait would by itself.
#[derive(Debug)]
struct Scribe {
    calls: Mutex<Vec<&'static str>>,
    wake: std::os::fd::OwnedFd,
    window: Arc<Window>,
}

impl Scribe {
    fn note(&self, call: &'static str) {
        self.calls.lock().unwrap().push(call);
    }

    /// While the domain changes what is mapped at page 0, nothing enters there.
    fn is_shut(&self, call: &str) {
        let entered = self.window.enter(0, &[Segment { iova: Iova(0), len: 1 }]);
        assert_eq!(entered, Entered::Closed, "in {call}");
    }
}

#[deny(clippy::missing_trait_methods)]
impl Domain for Scribe {
    fn name(&self) -> &'static str {
        self.note("name");
        "scribe"
    }
    fn capabilities(&self) -> Capabilities {
        self.note("capabilities");
        Capabilities { max_mappings: 77, ..CUTS }
    }
    fn map(&self, _: PageRange<Iova>, _: u64, _: &Arc<GuestFile>, _: Offset, _: bool) -> Result<()> {
        self.note("map");
        self.is_shut("map");
        Ok(())
    }
    fn unmap(&self, _: PageRange<Iova>) -> Unmap {
        self.note("unmap");
        self.is_shut("unmap");
        Unmap::InFlight { bytes: 7, ticket: Ticket(7) }
    }
    fn usable(&self) -> Vec<std::ops::RangeInclusive<Iova>> {
        self.note("usable");
        vec![Iova(7)..=Iova(8)]
    }
    fn leave(&self) -> io::Result<(Left, Ids)> {
        self.note("leave");
        Ok((Left::default(), Ids::Type1 { entries: 7 }))
    }
    fn resumed(&self, _: PageRange<Iova>) {
        self.note("resumed");
        self.is_shut("resumed");
    }
    fn may_wait(&self, _: PageRange<Iova>) -> bool {
        self.note("may_wait");
        true
    }
    fn replace(&self, _: &[PageRange<Iova>]) -> Unmap {
        self.note("replace");
        self.is_shut("replace");
        Unmap::Gone { bytes: 7 }
    }
    fn poll(&self, ended: &mut Vec<Ticket>) {
        self.note("poll");
        ended.push(Ticket(7));
    }
    fn wake(&self) -> Option<BorrowedFd<'_>> {
        self.note("wake");
        Some(std::os::fd::AsFd::as_fd(&self.wake))
    }
}

#[test]
fn every_call_reaches_the_domain_and_every_answer_comes_back() {
    let wake = std::fs::File::open("/dev/null").unwrap().into();
    let window = Window::new(1, 1);
    let scribe = Arc::new(Scribe { calls: Mutex::default(), wake, window: Arc::clone(&window) });
    let domain = Windowed::new(Arc::clone(&scribe) as _, window);
    let file = Arc::new(GuestFile::memfd("windowed", PAGE).unwrap());
    let mut ended = Vec::new();
    assert_eq!(domain.name(), "scribe");
    assert_eq!(domain.capabilities().max_mappings, 77);
    domain.map(pages(0, 1), PAGE, &file, Offset(0), true).unwrap();
    assert_eq!(domain.unmap(pages(0, 1)), Unmap::InFlight { bytes: 7, ticket: Ticket(7) });
    assert_eq!(domain.usable(), [Iova(7)..=Iova(8)]);
    assert_eq!(domain.leave().unwrap().1, Ids::Type1 { entries: 7 });
    domain.resumed(pages(0, 1));
    assert!(domain.may_wait(pages(0, 1)));
    assert_eq!(domain.replace(&[pages(0, 1)]), Unmap::Gone { bytes: 7 });
    domain.poll(&mut ended);
    assert_eq!(ended, [Ticket(7)]);
    assert!(domain.wake().is_some());
    let mut calls = scribe.calls.lock().unwrap().clone();
    calls.dedup();
    // A method of the trait that is not in here was forgotten above: clippy says so, and so does this.
    let trait_of_it = include_str!("../iommu/mod.rs").split_once("pub trait Domain").unwrap().1;
    let methods: Vec<_> = trait_of_it
        .lines()
        .filter_map(|line| line.strip_prefix("    fn ").or(line.strip_prefix("    unsafe fn ")))
        .filter_map(|line| line.split('(').next())
        .collect();
    assert!(methods.len() >= 10);
    for method in methods {
        assert!(calls.contains(&method), "{method} is not passed on");
    }
}
