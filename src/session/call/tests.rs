use passgate_backends::{Entered, Segment, Window, Windowed};
use passgate_bindings::PAGE;
use passgate_sim::iommu::{self as sim, Fault, Memory, Sim};

use super::convert::convert_by;
use super::*;

/// A device whose traits differ from those that the gate assumes.
#[derive(Debug)]
struct ChangedDevice(passgate_sim::iommu::SimDevice, DeviceTraits);

impl Device for ChangedDevice {
    fn name(&self) -> &str {
        self.0.name()
    }
    fn stop_class(&self) -> passgate_backends::Steps {
        self.0.stop_class()
    }
    fn traits(&self) -> DeviceTraits {
        self.1
    }
    fn fence(&self, step: Step) -> Result<(), Error> {
        self.0.fence(step)
    }
    fn attach(&self) -> Result<(), Error> {
        self.0.attach()
    }
    fn guard(&self) -> passgate_backends::device::Guard<'_> {
        self.0.guard()
    }
}

fn changed_device(ats: bool, tdi: bool) -> (Sim, Arc<dyn Device>) {
    let sim = Sim::new(Sim::CAPABILITIES, Memory::new()).unwrap();
    let traits = DeviceTraits { ats, tdi, tolerant: false };
    let device = sim.device("sim:0", passgate_backends::Steps::all(), traits);
    (sim, Arc::new(ChangedDevice(device, traits)))
}

fn events(returned: Returned) -> Vec<Event> {
    match returned {
        Returned::Fact { event, ticket: None } => vec![event],
        Returned::Facts(events) => events,
        other => panic!("{other:?}"),
    }
}

#[test]
fn fence_that_would_end_a_tdi_unknown_to_the_gate_is_not_done() {
    let fence = |device: &Arc<dyn Device>, tdi, step| {
        let assumed = DeviceTraits { tdi, ..DeviceTraits::default() };
        let device = Arc::clone(device);
        events(Call::Fence { job: JobId(1), device, id: DeviceId(3), assumed, step }.run())
    };
    for step in [Step::Master, Step::Reset] {
        let (sim, device) = changed_device(false, true);
        let [change, Event::Fenced { errno, .. }] = &fence(&device, false, step)[..] else {
            panic!("the change of traits comes first")
        };
        assert_eq!(*change, Event::DeviceTraits { device: DeviceId(3), ats: false, tdi: true });
        assert_eq!((*errno, sim.calls(sim::Call::Fence)), (Errno::BUSY.raw_os_error(), 0));
        assert!(matches!(fence(&device, true, step)[..], [Event::Fenced { errno: 0, .. }]));
        assert!(matches!(fence(&device, false, Step::Detach)[..], [Event::Fenced { errno: 0, .. }]));
        assert_eq!(sim.calls(sim::Call::Fence), 2);
    }
}

#[test]
fn traits_after_an_attach_are_reported_before_the_attach() {
    let attach = |device: &Arc<dyn Device>, ats| {
        let assumed = DeviceTraits { ats, ..DeviceTraits::default() };
        let device = Arc::clone(device);
        events(Call::Attach { job: JobId(1), device, id: DeviceId(3), assumed }.run())
    };
    for (ats, fails) in [(false, false), (true, false), (false, true), (true, true)] {
        let (sim, device) = changed_device(ats, false);
        let fail = || {
            if fails {
                sim.fail_next(sim::Call::Attach, sim::Fault::HalfDone(Errno::IO));
            }
        };
        fail();
        let [change, Event::Attached { errno, .. }] = &attach(&device, !ats)[..] else {
            panic!("the change of traits comes first")
        };
        assert_eq!(*change, Event::DeviceTraits { device: DeviceId(3), ats, tdi: false });
        assert_eq!(*errno != 0, fails);
        fail();
        assert!(matches!(attach(&device, ats)[..], [Event::Attached { .. }]), "nothing has changed");
    }
}

#[test]
fn unmap_that_would_wait_for_io_is_not_small() {
    let sim = Sim::new(Sim::CAPABILITIES, Memory::new()).unwrap();
    let window = Window::new(1, 1);
    let domain: Arc<dyn Domain> = Arc::new(Windowed::new(Arc::new(sim), Arc::clone(&window)));
    let range = |page, pages| PageRange::new(page * PAGE, pages * PAGE).unwrap();
    let file = Arc::new(GuestFile::memfd("call", 4 * PAGE).unwrap());
    domain.map(range(0, 4), PAGE, &file, Offset(0), true).unwrap();
    let unmap = |iova| Call::Unmap {
        job: JobId(1),
        id: DomainId(0),
        domain: Arc::clone(&domain),
        iova,
        shares: Vec::new(),
        already: 0,
    };
    assert!(unmap(range(0, 4)).is_small());
    assert_eq!(window.enter(0, &[Segment { iova: Iova(PAGE), len: 1 }]), Entered::In);
    assert!(!unmap(range(0, 4)).is_small() && !unmap(range(1, 1)).is_small());
    assert!(unmap(range(2, 2)).is_small());
    window.leave(0);
    assert!(unmap(range(0, 4)).is_small());
    assert!(!unmap(PageRange::new(0, MAX_SMALL_BYTES + PAGE).unwrap()).is_small());
}

#[test]
fn conversion_that_fails_half_way_is_unknown_from_that_offset_on() {
    let file = Arc::new(GuestFile::memfd("call", 8 * PAGE).unwrap());
    let part = |page, pages| (Arc::clone(&file), PageRange::new(page * PAGE, pages * PAGE).unwrap(), true);
    let pages = [part(0, 2), part(4, 1), part(6, 2)];
    let fails = |nth, errno, partial| {
        let mut calls = 0;
        convert_by(&pages, |_, _, _| {
            calls += 1;
            match calls - 1 == nth {
                true => Err(Failed { call: "convert", errno, partial }),
                false => Ok(()),
            }
        })
    };
    assert_eq!(fails(3, Errno::AGAIN, 0), Outcome::Committed);
    assert_eq!(fails(0, Errno::AGAIN, 0), Outcome::NotCommitted);
    let unknown =
        |errno: Errno, pages| Outcome::Unknown { errno: errno.raw_os_error(), offset: pages * PAGE };
    assert_eq!(fails(1, Errno::AGAIN, 0), unknown(Errno::AGAIN, 2));
    assert_eq!(fails(2, Errno::AGAIN, 0), unknown(Errno::AGAIN, 3));
    // One page of the third part was converted: the kernel reports the offset in the file at which it stopped.
    assert_eq!(fails(2, Errno::IO, 7 * PAGE), unknown(Errno::IO, 4));
    assert_eq!(fails(0, Errno::IO, 0), unknown(Errno::IO, 0));
}

/// Returns a map of four pages of `file`, for one job or, by `shares`, for several.
fn map(sim: &Sim, file: &Arc<GuestFile>, shares: Vec<CoalescedRequest>) -> Call {
    Call::Map {
        job: JobId(1),
        domain: Arc::new(sim.clone()),
        iova: PageRange::new(0, 4 * PAGE).unwrap(),
        piece: PAGE,
        file: Arc::clone(file),
        offset: Offset(8 * PAGE),
        writable: true,
        shares,
    }
}

fn request(job: u64, page: u64, pages: u64) -> CoalescedRequest {
    let iova = PageRange::new(page * PAGE, pages * PAGE).unwrap();
    CoalescedRequest { job: JobId(job), iova, bytes: iova.len() }
}

#[test]
fn map_with_failed_roll_back_is_unknown_and_one_rolled_back_is_refused() {
    let file = Arc::new(GuestFile::memfd("call", 16 * PAGE).unwrap());
    let unknown = MapResult::Unknown { errno: Errno::BUSY.raw_os_error() };
    let refused = |errno: Errno| MapResult::Refused { errno: errno.raw_os_error() };
    let run = |fault, shares| {
        let sim = Sim::new(Sim::CAPABILITIES, Memory::new()).unwrap();
        sim.fail_next(sim::Call::Map, fault);
        map(&sim, &file, shares).run()
    };
    let half = Fault::HalfMapped(Errno::BUSY);
    for (fault, wanted) in [(Fault::Errno(Errno::NOMEM), refused(Errno::NOMEM)), (half, unknown)] {
        let returned = run(fault, Vec::new());
        let Returned::Fact { event, ticket: None } = returned else { panic!("{returned:?}") };
        assert_eq!(event, Event::Mapped { job: JobId(1), result: wanted });
    }
    // It is not known which of the coalesced requests has mappings left.
    let returned = run(half, vec![request(1, 0, 1), request(2, 1, 3)]);
    let Returned::Facts(events) = returned else { panic!("{returned:?}") };
    assert_eq!(events, [1, 2].map(|job| Event::Mapped { job: JobId(job), result: unknown }));
}

#[test]
fn range_that_cannot_be_mapped_does_not_fail_those_coalesced_with_it() {
    let sim = Sim::new(Sim::CAPABILITIES, Memory::new()).unwrap();
    let file = Arc::new(GuestFile::memfd("call", 16 * PAGE).unwrap());
    sim.fail_next(sim::Call::Map, Fault::Errno(Errno::NOMEM));
    let shares = vec![request(1, 0, 1), request(2, 1, 2), request(3, 3, 1)];
    let Returned::Separate(calls) = map(&sim, &file, shares).run() else { panic!("one result for all") };
    let mut results = Vec::new();
    for (call, offset) in calls.into_iter().zip([8, 9, 11]) {
        let Call::Map { job, offset: from, .. } = &call else { panic!("{call:?}") };
        assert_eq!(*from, Offset(offset * PAGE), "of {job:?}");
        if *job == JobId(2) {
            sim.fail_next(sim::Call::Map, Fault::Errno(Errno::NOMEM));
        }
        let Returned::Fact { event: Event::Mapped { job, result }, .. } = call.run() else { panic!() };
        results.push((job.0, result == MapResult::Mapped));
    }
    assert_eq!(results, [(1, true), (2, false), (3, true)]);
}
