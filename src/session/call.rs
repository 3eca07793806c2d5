//! One call on a domain, a device or a file, with everything that it needs, and its result as an event of the gate.
//!
//! A call owns what it works on, so that it can run on any thread and outlive the session that asked for it.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use passgate_backends::{Device, Domain, Error, FenceStep, Ticket, Unmap};
use passgate_bindings::guest_memfd::{self, Conversion};
use passgate_bindings::identity::{self, FileError, Identity};
use passgate_bindings::memory::GuestFile;
use passgate_bindings::units::Offset;
use passgate_bindings::{Failed, Iova, PageRange};
use rustix::io::Errno;

use super::Session;
use super::coalesce::{self, CoalescedRequest};
use super::fdstore::{Claim, FdStore, Name};
use crate::gate::{
    Caller, DeviceId, DomainId, Effect, Event, FileId, InvalidationId, JobId, MapResult, Nature, Outcome,
    PageState, Step, UnmapResult,
};
use crate::protocol::verbs::AddMemory;

/// The maximum number of bytes of an unmap or a conversion that the loop runs on its own thread.
const MAX_SMALL_BYTES: u64 = 2 << 20;
/// The maximum number of mappings of a map that the loop runs on its own thread.
const MAX_SMALL_MAPPINGS: u64 = 16;
/// The maximum number of bytes of a map that the loop runs on its own thread.
const MAX_SMALL_MAP_BYTES: u64 = 256 << 10;

/// The result of a call on a domain or a device that the session does not have.
const ENODEV: i32 = 19;

/// One call, ready to run.
#[derive(Debug)]
pub enum Call {
    /// Makes mappings ([`Effect::Map`]).
    Map {
        /// The number of the call.
        job: JobId,
        /// The domain.
        domain: Arc<dyn Domain>,
        /// The whole range.
        iova: PageRange<Iova>,
        /// Bytes per mapping.
        piece: u64,
        /// The file that is mapped.
        file: Arc<GuestFile>,
        /// The offset in the file, in bytes, of the first page.
        offset: Offset,
        /// True if devices may write.
        writable: bool,
        /// The requests of a coalesced call: adjacent ranges in ascending order. Empty for a call of one request.
        shares: Vec<CoalescedRequest>,
    },
    /// Removes every mapping in a range ([`Effect::Unmap`]).
    Unmap {
        /// The number of the call.
        job: JobId,
        /// The number of the domain.
        id: DomainId,
        /// The domain.
        domain: Arc<dyn Domain>,
        /// The whole range.
        iova: PageRange<Iova>,
        /// The requests of a coalesced call, in the order in which they were asked for. Empty for a call of one request.
        shares: Vec<CoalescedRequest>,
        /// Bytes of the range that a coalesced call removed before it failed.
        already: u64,
    },
    /// Removes exactly these ranges, by another page table ([`Effect::Replace`]).
    Replace {
        /// The number of the call.
        job: JobId,
        /// The domain.
        domain: Arc<dyn Domain>,
        /// The ranges: ascending, apart.
        gone: Vec<PageRange<Iova>>,
    },
    /// Does one fence on one device ([`Effect::Fence`]).
    Fence {
        /// The number of the call.
        job: JobId,
        /// The device.
        device: Arc<dyn Device>,
        /// The number of the device.
        id: DeviceId,
        /// The traits of the device as the gate knows them.
        assumed: Nature,
        /// The fence.
        step: FenceStep,
    },
    /// Attaches a fenced device to its domain again ([`Effect::Attach`]).
    Attach {
        /// The number of the call.
        job: JobId,
        /// The device.
        device: Arc<dyn Device>,
        /// The number of the device.
        id: DeviceId,
        /// The traits of the device as the gate knows them.
        assumed: Nature,
    },
    /// Converts pages ([`Effect::Convert`]).
    Convert {
        /// The invalidation.
        invalidation: InvalidationId,
        /// The pages of each file; true if the file converts in place.
        pages: Vec<(Arc<GuestFile>, PageRange<Offset>, bool)>,
        /// The state that they will have.
        to: PageState,
    },
    /// Asks the kernel what a client's descriptors are. May block: the client may have passed a file on a file system of its own.
    Examine {
        /// The client that passed them.
        caller: Caller,
        /// The memory that they are to back.
        memory: AddMemory,
        /// The descriptors in the order in which they were passed.
        fds: Vec<OwnedFd>,
        /// The files of guest memory that are in use already.
        in_use: Vec<Arc<GuestFile>>,
        /// The store that the descriptors are put into, if the session outlives its process.
        store: Option<FdStore>,
    },
}

/// A client's descriptor, and its identity.
#[derive(Debug)]
pub struct Examined {
    /// The descriptor.
    pub(super) fd: OwnedFd,
    /// The identity of the file, or the reason why it cannot be guest memory.
    pub(super) file: Result<Identity, FileError>,
    /// The claim on its name in the store, for as long as it is not known if the file is needed.
    pub(super) claim: Option<Claim>,
}

impl Examined {
    /// Returns the name under which the descriptor at position `nth` is stored: the first is guest memory, the second its
    /// private side. None for one that cannot be guest memory.
    pub(super) fn store_name(&self, nth: usize) -> Option<Name> {
        let Identity { device, inode, .. } = *self.file.as_ref().ok()?;
        let file = FileId { device, inode };
        Some(if nth == 0 { Name::Memory(file) } else { Name::Private(file) })
    }
}

/// The result of a call.
#[derive(Debug)]
pub enum Returned {
    /// One event for the gate.
    Fact {
        /// The event.
        event: Event,
        /// The ticket of the operations that are still in flight after an unmap, with its domain and job.
        ticket: Option<(DomainId, Ticket, JobId)>,
    },
    /// Events for the gate, in order.
    Facts(Vec<Event>),
    /// A coalesced call has failed: one call for each of its requests.
    Separate(Vec<Call>),
    /// The identities of a client's descriptors.
    Examined {
        /// The client that passed them.
        caller: Caller,
        /// The memory that they are to back.
        memory: AddMemory,
        /// The descriptors in the order in which they were passed.
        files: Vec<Examined>,
    },
}

/// Returns the fence of a rung; none for [`Step::Unmap`].
pub(super) fn fence_step(step: Step) -> Option<FenceStep> {
    match step {
        Step::Unmap => None,
        Step::Drain => Some(FenceStep::Drain),
        Step::Stop => Some(FenceStep::Stop),
        Step::Master => Some(FenceStep::Master),
        Step::Detach => Some(FenceStep::Detach),
        Step::Reset => Some(FenceStep::Reset),
    }
}

impl Call {
    /// Returns the call that an effect asks for. If the session does not have the domain, device or file, `Err` is the call's
    /// result: it fails with nothing changed. An effect that asks for no call is an error without a result.
    pub(super) fn of(effect: Effect, session: &Session) -> Result<Self, Option<Event>> {
        let device = |id: DeviceId| session.devices.get(usize::from(id.0)).cloned();
        let assumed = |id: DeviceId| session.gate.nature(id);
        match effect {
            Effect::Replace { job, domain, gone, bytes: _ } => match session.domain_of(domain) {
                Some(domain) => Ok(Self::Replace { job, domain, gone }),
                None => Err(Some(failed_unmap(job))),
            },
            Effect::Fence { job, device: id, step } => match (device(id), assumed(id), fence_step(step)) {
                (Some(device), Some(assumed), Some(step)) => {
                    Ok(Self::Fence { job, device, id, assumed, step })
                }
                _ => Err(Some(Event::Fenced { job, errno: ENODEV, took_ns: 0 })),
            },
            Effect::Attach { job, device: id } => match (device(id), assumed(id)) {
                (Some(device), Some(assumed)) => Ok(Self::Attach { job, device, id, assumed }),
                _ => Err(Some(Event::Attached { job, errno: ENODEV })),
            },
            Effect::Convert { invalidation, pages, to } => {
                let parts: Option<Vec<_>> = pages
                    .iter()
                    .map(|part| {
                        let file = session.files.get(part.file)?;
                        Some((file, part.range, session.files.converts_in_place(part.file)))
                    })
                    .collect();
                match parts {
                    Some(pages) => Ok(Self::Convert { invalidation, pages, to }),
                    // All or nothing: a page that was skipped would be reported as converted.
                    None => Err(Some(Event::Converted { invalidation, outcome: Outcome::NotCommitted })),
                }
            }
            _ => Err(None),
        }
    }

    /// Returns true if the call is so short that handing it to another thread, two wake-ups, would cost more than the call.
    pub fn is_small(&self) -> bool {
        match self {
            Self::Map { iova, piece, .. } => {
                iova.len() <= MAX_SMALL_MAP_BYTES && iova.len().div_ceil(*piece) <= MAX_SMALL_MAPPINGS
            }
            Self::Unmap { domain, iova, .. } => iova.len() <= MAX_SMALL_BYTES && !domain.may_wait(*iova),
            Self::Convert { pages, .. } => {
                pages.iter().map(|(_, range, _)| range.len()).sum::<u64>() <= MAX_SMALL_BYTES
            }
            // Short as a rule. If it blocks, the loop is taken over like in any other call.
            Self::Examine { .. } => true,
            Self::Replace { .. } | Self::Fence { .. } | Self::Attach { .. } => false,
        }
    }

    /// Runs the call. Blocks for as long as the kernel does, possibly for ever.
    pub fn run(self) -> Returned {
        let start = Instant::now();
        let took_ns = || u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let one_event = |event| Returned::Fact { event, ticket: None };
        match self {
            Self::Map { job, domain, iova, piece, file, offset, writable, shares } => {
                let result = match domain.map(iova, piece, &file, offset, writable) {
                    Ok(()) => MapResult::Mapped,
                    Err(error) => {
                        log::warn!("{}: {error}", domain.name());
                        let errno = errno_of(&error);
                        match error {
                            Error::HalfMapped { .. } => MapResult::Unknown { errno },
                            _ => MapResult::Refused { errno },
                        }
                    }
                };
                if shares.is_empty() {
                    return one_event(Event::Mapped { job, result });
                }
                if let MapResult::Refused { .. } = result {
                    // Nothing is mapped. Each request is tried by itself, so that one that cannot be mapped does not
                    // fail the others.
                    let call = |share: &CoalescedRequest| Self::Map {
                        job: share.job,
                        domain: Arc::clone(&domain),
                        iova: share.iova,
                        piece,
                        file: Arc::clone(&file),
                        offset: Offset(offset.0 + (share.iova.start().0 - iova.start().0)),
                        writable,
                        shares: Vec::new(),
                    };
                    return Returned::Separate(shares.iter().map(call).collect());
                }
                let events = shares.iter().map(|share| Event::Mapped { job: share.job, result }).collect();
                Returned::Facts(events)
            }
            Self::Replace { job, domain, gone } => {
                let (result, _) = unmap_result(domain.replace(&gone));
                one_event(Event::Unmapped { job, result, took_ns: took_ns() })
            }
            Self::Unmap { job, id, domain, iova, shares, already } => {
                let (result, ticket) = unmap_result(domain.unmap(iova));
                if !shares.is_empty() {
                    return coalesce::split_result((id, domain), result, shares, took_ns());
                }
                let result = coalesce::add_bytes(already, result);
                let event = Event::Unmapped { job, result, took_ns: took_ns() };
                Returned::Fact { event, ticket: ticket.map(|ticket| (id, ticket, job)) }
            }
            Self::Fence { job, device, id, assumed, step } => {
                // A TDI may have been bound since the traits were last read. Bus-master-off and reset end it, which takes a
                // policy that allows it and a notice, so the gate must know of the TDI before either is done.
                let ends_tdi = matches!(step, FenceStep::Master | FenceStep::Reset);
                let change =
                    if ends_tdi && !assumed.tdi { trait_change(&*device, id, assumed) } else { None };
                let errno = match change {
                    Some(Event::DeviceNature { tdi: true, .. }) => Errno::BUSY.raw_os_error(),
                    _ => logged_errno(device.fence(step)),
                };
                after_change(change, Event::Fenced { job, errno, took_ns: took_ns() })
            }
            Self::Attach { job, device, id, assumed } => {
                let errno = logged_errno(device.attach());
                // Before the result of the attach: what the gate does about that depends on the traits.
                after_change(trait_change(&*device, id, assumed), Event::Attached { job, errno })
            }
            Self::Examine { caller, memory, fds, in_use, store } => {
                let files =
                    fds.into_iter().map(|fd| Examined { file: examine(&fd, &in_use), fd, claim: None });
                let mut files: Vec<_> = files.collect();
                // Stored before the memory is added, so that a process that ends at any later time leaves the files to the
                // next.
                for (nth, file) in files.iter_mut().enumerate() {
                    if let (Some(store), Some(name)) = (&store, file.store_name(nth)) {
                        file.claim = Some(store.claim(name.clone()));
                        if let Err(error) = store.put(name, file.fd.as_fd()) {
                            log::error!("guest memory is not kept ({error}): a restart will close it");
                        }
                    }
                }
                Returned::Examined { caller, memory, files }
            }
            Self::Convert { invalidation, pages, to } => {
                one_event(Event::Converted { invalidation, outcome: convert(&pages, to) })
            }
        }
    }
}

/// Returns the device's ATS and TDI state as an event, if it differs from what the gate assumes.
fn trait_change(device: &dyn Device, id: DeviceId, assumed: Nature) -> Option<Event> {
    let passgate_backends::Nature { ats, tdi } = device.nature();
    ((ats, tdi) != (assumed.ats, assumed.tdi)).then_some(Event::DeviceNature { device: id, ats, tdi })
}

/// Returns an event, after the change of traits that must come first, if there is one.
fn after_change(change: Option<Event>, event: Event) -> Returned {
    match change {
        Some(change) => Returned::Facts(vec![change, event]),
        None => Returned::Fact { event, ticket: None },
    }
}

/// Returns the identity of a client's file. A file with the device and inode number of another one in use is refused here,
/// before it is stored under these numbers.
fn examine(fd: &OwnedFd, in_use: &[Arc<GuestFile>]) -> Result<Identity, FileError> {
    let found = identity::identify(fd)?;
    for other in in_use {
        check_distinct(fd, &found, other)?;
    }
    Ok(found)
}

/// Returns an error if a file in use has the device and inode number of this one and is, or may be, another file.
pub(super) fn check_distinct(fd: impl AsFd, found: &Identity, other: &GuestFile) -> Result<(), FileError> {
    let Identity { device, inode, .. } = *found;
    let stat = rustix::fs::fstat(other).map_err(|errno| Failed::new("fstat", errno))?;
    if (stat.st_dev, stat.st_ino) == (device, inode) && !identity::same_file(fd, other)? {
        return Err(FileError::Collides { device, inode });
    }
    Ok(())
}

/// Returns the result of an unmap in a domain that the session does not have.
pub(super) fn failed_unmap(job: JobId) -> Event {
    Event::Unmapped { job, result: UnmapResult::Failed { errno: ENODEV, bytes: 0 }, took_ns: 0 }
}

/// Returns a domain's result as the gate takes it, and the ticket of the operations in flight.
fn unmap_result(result: Unmap) -> (UnmapResult, Option<Ticket>) {
    match result {
        Unmap::Gone { bytes } => (UnmapResult::Gone { bytes }, None),
        Unmap::InFlight { bytes, ticket } => (UnmapResult::InFlight { bytes }, Some(ticket)),
        Unmap::Failed { errno, bytes } => (UnmapResult::Failed { errno: errno.raw_os_error(), bytes }, None),
    }
}

/// Logs a failure, and returns its errno; 0 for success.
fn logged_errno(result: Result<(), Error>) -> i32 {
    result.err().map_or(0, |error| {
        log::warn!("{error}");
        errno_of(&error)
    })
}

/// Returns the errno of an error; `EIO` for one that has none.
fn errno_of(error: &Error) -> i32 {
    error.errno().unwrap_or(Errno::IO).raw_os_error()
}

/// Converts pages: in place if the file can, else by a punched hole. A page that becomes shared in a file that does not
/// convert in place is left as it is: it was punched when it became private, and the next access allocates a new one.
fn convert(pages: &[(Arc<GuestFile>, PageRange<Offset>, bool)], to: PageState) -> Outcome {
    convert_by(pages, |file, range, in_place| match (to, in_place) {
        (PageState::Shared, true) => guest_memfd::convert(file, range, Conversion::ToShared),
        (PageState::Private, true) => guest_memfd::convert(file, range, Conversion::ToPrivate),
        (PageState::Shared, false) => Ok(()),
        _ => file.punch(range.start().0, range.len()).map_err(|failed| Failed {
            call: failed.call,
            errno: failed.errno,
            partial: 0,
        }),
    })
}

/// Converts pages by `change`, one part after the other, until one fails.
fn convert_by(
    pages: &[(Arc<GuestFile>, PageRange<Offset>, bool)],
    mut change: impl FnMut(&GuestFile, PageRange<Offset>, bool) -> Result<(), Failed<u64>>,
) -> Outcome {
    let mut before = 0;
    for (file, range, in_place) in pages {
        match change(file, *range, *in_place) {
            Ok(()) => before += range.len(),
            // EAGAIN: the kernel found a page in use (pinned, or with a raised reference count) before it changed any.
            Err(failed) if failed.errno == Errno::AGAIN && before == 0 => return Outcome::NotCommitted,
            Err(failed) => {
                log::warn!("{failed}");
                // `partial` is the offset in the file at which the kernel stopped; 0 where it reports none.
                let into = failed.partial.saturating_sub(range.start().0).min(range.len());
                return Outcome::Unknown { errno: failed.errno.raw_os_error(), offset: before + into };
            }
        }
    }
    Outcome::Committed
}

#[cfg(test)]
mod tests {
    use passgate_backends::{Entered, Segment, Window, Windowed};
    use passgate_bindings::PAGE;
    use passgate_sim::iommu::{self as sim, Fault, Memory, Sim};

    use super::*;

    /// A device whose traits differ from those that the gate assumes.
    #[derive(Debug)]
    struct ChangedDevice(passgate_sim::iommu::SimDevice, passgate_backends::Nature);

    impl Device for ChangedDevice {
        fn name(&self) -> &str {
            self.0.name()
        }
        fn stop_class(&self) -> passgate_backends::StopClass {
            self.0.stop_class()
        }
        fn nature(&self) -> passgate_backends::Nature {
            self.1
        }
        fn fence(&self, step: FenceStep) -> Result<(), Error> {
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
        let nature = passgate_backends::Nature { ats, tdi };
        let device = sim.device("sim:0", passgate_backends::StopClass::all(), nature);
        (sim, Arc::new(ChangedDevice(device, nature)))
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
            let assumed = Nature { tdi, ..Nature::default() };
            let device = Arc::clone(device);
            events(Call::Fence { job: JobId(1), device, id: DeviceId(3), assumed, step }.run())
        };
        for step in [FenceStep::Master, FenceStep::Reset] {
            let (sim, device) = changed_device(false, true);
            let [change, Event::Fenced { errno, .. }] = &fence(&device, false, step)[..] else {
                panic!("the change of traits comes first")
            };
            assert_eq!(*change, Event::DeviceNature { device: DeviceId(3), ats: false, tdi: true });
            assert_eq!((*errno, sim.calls(sim::Call::Fence)), (Errno::BUSY.raw_os_error(), 0));
            assert!(matches!(fence(&device, true, step)[..], [Event::Fenced { errno: 0, .. }]));
            assert!(matches!(fence(&device, false, FenceStep::Detach)[..], [Event::Fenced { errno: 0, .. }]));
            assert_eq!(sim.calls(sim::Call::Fence), 2);
        }
    }

    #[test]
    fn traits_after_an_attach_are_reported_before_the_attach() {
        let attach = |device: &Arc<dyn Device>, ats| {
            let assumed = Nature { ats, ..Nature::default() };
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
            assert_eq!(*change, Event::DeviceNature { device: DeviceId(3), ats, tdi: false });
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
        let part =
            |page, pages| (Arc::clone(&file), PageRange::new(page * PAGE, pages * PAGE).unwrap(), true);
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
}
