//! One call on a domain, a device or a file: everything it needs, and what came of it as an event.
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
use super::fdstore::{Claim, FdStore, Name};
use super::joined::{self, Share};
use crate::gate::{
    Caller, DeviceId, DomainId, Effect, Event, FileId, InvalidationId, JobId, MapResult, Nature, Outcome,
    PageState, Step, UnmapResult,
};
use crate::protocol::verbs::AddMemory;

/// Bytes up to which an unmap or a punch runs where it is asked for, without another thread.
const SMALL: u64 = 2 << 20;
/// Mappings up to which a map does.
const FEW: u64 = 16;
/// Bytes up to which a map does.
const SMALL_MAP: u64 = 256 << 10;

/// `ENODEV`: the gate named a domain or a device that the session has not.
const NO_DEVICE: i32 = 19;

/// One call, ready to run.
#[derive(Debug)]
pub enum Call {
    /// Make mappings.
    Map {
        /// Names the result.
        job: JobId,
        /// Where.
        domain: Arc<dyn Domain>,
        /// The whole range.
        iova: PageRange<Iova>,
        /// Bytes per mapping.
        piece: u64,
        /// Of this file.
        file: Arc<GuestFile>,
        /// From here on.
        offset: Offset,
        /// Whether devices may write.
        writable: bool,
        /// All that this call is for, where it is more than one: neighbours in ascending order.
        shares: Vec<Share>,
    },
    /// Take mappings away.
    Unmap {
        /// Names the result.
        job: JobId,
        /// Its name.
        id: DomainId,
        /// Where.
        domain: Arc<dyn Domain>,
        /// The whole range.
        iova: PageRange<Iova>,
        /// All that this call is for, where it is more than one.
        shares: Vec<Share>,
        /// Bytes of the range that a joined call removed before it failed.
        already: u64,
    },
    /// Take just these ranges away, by another page table.
    Replace {
        /// Names the result.
        job: JobId,
        /// Where.
        domain: Arc<dyn Domain>,
        /// Which.
        gone: Vec<PageRange<Iova>>,
    },
    /// Stop a device.
    Fence {
        /// Names the result.
        job: JobId,
        /// Which.
        device: Arc<dyn Device>,
        /// Its name.
        id: DeviceId,
        /// What the gate believes of it.
        believed: Nature,
        /// How.
        step: FenceStep,
    },
    /// Bring a device back.
    Attach {
        /// Names the result.
        job: JobId,
        /// Which.
        device: Arc<dyn Device>,
        /// Its name.
        id: DeviceId,
        /// What the gate believes of it.
        believed: Nature,
    },
    /// Convert pages.
    Convert {
        /// For which invalidation.
        invalidation: InvalidationId,
        /// Which, and whether their file converts in place.
        pages: Vec<(Arc<GuestFile>, PageRange<Offset>, bool)>,
        /// To what.
        to: PageState,
    },
    /// Ask the kernel what a client's descriptors are. A file system of the client's own may take its time.
    Examine {
        /// Who passed them.
        caller: Caller,
        /// For what.
        memory: AddMemory,
        /// As they came.
        fds: Vec<OwnedFd>,
        /// The files that are in use already.
        held: Vec<Arc<GuestFile>>,
        /// Where they are to be kept.
        store: Option<FdStore>,
    },
}

/// A client's descriptor, and what the kernel says of it.
#[derive(Debug)]
pub struct Examined {
    /// The descriptor.
    pub(super) fd: OwnedFd,
    /// What it is, or why it will not do.
    pub(super) file: Result<Identity, FileError>,
    /// Where it was put: the claim of its name, until it is known whether the file is needed.
    pub(super) claim: Option<Claim>,
}

impl Examined {
    /// Under which name it is kept; none where it will not do. The first is guest memory, the second its private side.
    pub(super) fn kept_as(&self, nth: usize) -> Option<Name> {
        let Identity { device, inode, .. } = *self.file.as_ref().ok()?;
        let file = FileId { device, inode };
        Some(if nth == 0 { Name::Memory(file) } else { Name::Private(file) })
    }
}

/// What came of a call.
#[derive(Debug)]
pub enum Returned {
    /// A fact for the gate.
    Fact {
        /// The fact.
        event: Event,
        /// Where operations are in flight: what names them.
        ticket: Option<(DomainId, Ticket, JobId)>,
    },
    /// Facts for the gate, in order.
    Facts(Vec<Event>),
    /// One call for several has failed: the calls that try each by itself.
    Apart(Vec<Call>),
    /// What a client's descriptors are.
    Examined {
        /// Who passed them.
        caller: Caller,
        /// For what.
        memory: AddMemory,
        /// What they are.
        files: Vec<Examined>,
    },
}

/// The fence that a rung is, where it is one.
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
    /// Returns the call that an effect asks for. Where the session has not what the call works on, `Err` is the call's
    /// result: it fails with nothing changed. An effect that asks for no call is an error without a result.
    pub(super) fn of(effect: Effect, session: &Session) -> Result<Self, Option<Event>> {
        let device = |id: DeviceId| session.devices.get(usize::from(id.0)).cloned();
        let believed = |id: DeviceId| session.gate.nature(id);
        match effect {
            Effect::Replace { job, domain, gone, bytes: _ } => match session.domain_of(domain) {
                Some(domain) => Ok(Self::Replace { job, domain, gone }),
                None => Err(Some(failed_unmap(job))),
            },
            Effect::Fence { job, device: id, step } => match (device(id), believed(id), fence_step(step)) {
                (Some(device), Some(believed), Some(step)) => {
                    Ok(Self::Fence { job, device, id, believed, step })
                }
                _ => Err(Some(Event::Fenced { job, errno: NO_DEVICE, took_ns: 0 })),
            },
            Effect::Attach { job, device: id } => match (device(id), believed(id)) {
                (Some(device), Some(believed)) => Ok(Self::Attach { job, device, id, believed }),
                _ => Err(Some(Event::Attached { job, errno: NO_DEVICE })),
            },
            Effect::Convert { invalidation, pages, to } => {
                let held: Option<Vec<_>> = pages
                    .iter()
                    .map(|part| {
                        let file = session.files.get(part.file)?;
                        Some((file, part.range, session.files.in_place(part.file)))
                    })
                    .collect();
                match held {
                    Some(pages) => Ok(Self::Convert { invalidation, pages, to }),
                    // All or nothing: a page that is passed over would be reported as converted.
                    None => Err(Some(Event::Converted { invalidation, outcome: Outcome::NotCommitted })),
                }
            }
            _ => Err(None),
        }
    }

    /// Whether it is over so soon that another thread would cost more.
    pub fn is_small(&self) -> bool {
        match self {
            Self::Map { iova, piece, .. } => iova.len() <= SMALL_MAP && iova.len().div_ceil(*piece) <= FEW,
            Self::Unmap { domain, iova, .. } => iova.len() <= SMALL && !domain.may_wait(*iova),
            Self::Convert { pages, .. } => {
                pages.iter().map(|(_, range, _)| range.len()).sum::<u64>() <= SMALL
            }
            Self::Examine { .. } => true,
            Self::Replace { .. } | Self::Fence { .. } | Self::Attach { .. } => false,
        }
    }

    /// Runs it. Blocks for as long as the kernel does.
    pub fn run(self) -> Returned {
        let start = Instant::now();
        let took = || u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let plain = |event| Returned::Fact { event, ticket: None };
        match self {
            Self::Map { job, domain, iova, piece, file, offset, writable, shares } => {
                let result = match domain.map(iova, piece, &file, offset, writable) {
                    Ok(()) => MapResult::Mapped,
                    Err(error) => {
                        log::warn!("{}: {error}", domain.name());
                        let errno = number(&error);
                        match error {
                            Error::HalfMapped { .. } => MapResult::Unknown { errno },
                            _ => MapResult::Refused { errno },
                        }
                    }
                };
                if shares.is_empty() {
                    return plain(Event::Mapped { job, result });
                }
                if let MapResult::Refused { .. } = result {
                    // Nothing is mapped. Tried one by one, a range that cannot be mapped does not fail its neighbours.
                    let call = |share: &Share| Self::Map {
                        job: share.job,
                        domain: Arc::clone(&domain),
                        iova: share.iova,
                        piece,
                        file: Arc::clone(&file),
                        offset: Offset(offset.0 + (share.iova.start().0 - iova.start().0)),
                        writable,
                        shares: Vec::new(),
                    };
                    return Returned::Apart(shares.iter().map(call).collect());
                }
                let events = shares.iter().map(|share| Event::Mapped { job: share.job, result }).collect();
                Returned::Facts(events)
            }
            Self::Replace { job, domain, gone } => {
                let (result, _) = answered(domain.replace(&gone));
                plain(Event::Unmapped { job, result, took_ns: took() })
            }
            Self::Unmap { job, id, domain, iova, shares, already } => {
                let (result, ticket) = answered(domain.unmap(iova));
                if !shares.is_empty() {
                    return joined::shared((id, domain), result, shares, took());
                }
                let result = joined::with(already, result);
                let event = Event::Unmapped { job, result, took_ns: took() };
                Returned::Fact { event, ticket: ticket.map(|ticket| (id, ticket, job)) }
            }
            Self::Fence { job, device, id, believed, step } => {
                // A TDI may have been bound since the gate heard of the device. Then this fence is one that needs leave,
                // and is announced: it is not done before the gate knows.
                let ends_tdi = matches!(step, FenceStep::Master | FenceStep::Reset);
                let news = if ends_tdi && !believed.tdi { news(&*device, id, believed) } else { None };
                let errno = match news {
                    Some(Event::DeviceNature { tdi: true, .. }) => Errno::BUSY.raw_os_error(),
                    _ => told(device.fence(step)),
                };
                with(news, Event::Fenced { job, errno, took_ns: took() })
            }
            Self::Attach { job, device, id, believed } => {
                let errno = told(device.attach());
                // Told first: whatever counts on the attach counts on this.
                with(news(&*device, id, believed), Event::Attached { job, errno })
            }
            Self::Examine { caller, memory, fds, held, store } => {
                let files = fds.into_iter().map(|fd| Examined { file: examine(&fd, &held), fd, claim: None });
                let mut files: Vec<_> = files.collect();
                // Kept before the memory is added: whatever happens then, the next process has it.
                for (nth, file) in files.iter_mut().enumerate() {
                    if let (Some(store), Some(name)) = (&store, file.kept_as(nth)) {
                        file.claim = Some(store.claim(name.clone()));
                        if let Err(error) = store.put(name, file.fd.as_fd()) {
                            log::error!("guest memory is not kept ({error}): a restart will close it");
                        }
                    }
                }
                Returned::Examined { caller, memory, files }
            }
            Self::Convert { invalidation, pages, to } => {
                plain(Event::Converted { invalidation, outcome: convert(&pages, to) })
            }
        }
    }
}

/// What bears on a device's fences now, where it is not what the gate believes.
fn news(device: &dyn Device, id: DeviceId, believed: Nature) -> Option<Event> {
    let passgate_backends::Nature { ats, tdi } = device.nature();
    ((ats, tdi) != (believed.ats, believed.tdi)).then_some(Event::DeviceNature { device: id, ats, tdi })
}

/// A fact, behind what must be known before it.
fn with(news: Option<Event>, event: Event) -> Returned {
    match news {
        Some(news) => Returned::Facts(vec![news, event]),
        None => Returned::Fact { event, ticket: None },
    }
}

/// What a client's descriptor is. A file with the numbers of another one in use is refused here, before it is kept under
/// these numbers.
fn examine(fd: &OwnedFd, held: &[Arc<GuestFile>]) -> Result<Identity, FileError> {
    let found = identity::identify(fd)?;
    for other in held {
        distinct(fd, &found, other)?;
    }
    Ok(found)
}

/// An error where a file in use has the numbers of this one and is another, or may be.
pub(super) fn distinct(fd: impl AsFd, found: &Identity, other: &GuestFile) -> Result<(), FileError> {
    let Identity { device, inode, .. } = *found;
    let stat = rustix::fs::fstat(other).map_err(|errno| Failed::new("fstat", errno))?;
    if (stat.st_dev, stat.st_ino) == (device, inode) && !identity::same_file(fd, other)? {
        return Err(FileError::Collides { device, inode });
    }
    Ok(())
}

/// The result of an unmap that was not called.
pub(super) fn failed_unmap(job: JobId) -> Event {
    Event::Unmapped { job, result: UnmapResult::Failed { errno: NO_DEVICE, bytes: 0 }, took_ns: 0 }
}

/// What a domain answered, and what names the operations in flight.
fn answered(went: Unmap) -> (UnmapResult, Option<Ticket>) {
    match went {
        Unmap::Gone { bytes } => (UnmapResult::Gone { bytes }, None),
        Unmap::InFlight { bytes, ticket } => (UnmapResult::InFlight { bytes }, Some(ticket)),
        Unmap::Failed { errno, bytes } => (UnmapResult::Failed { errno: errno.raw_os_error(), bytes }, None),
    }
}

/// 0, or the errno of a failure that is logged.
fn told(result: Result<(), Error>) -> i32 {
    result.err().map_or(0, |error| {
        log::warn!("{error}");
        number(&error)
    })
}

fn number(error: &Error) -> i32 {
    error.errno().unwrap_or(Errno::IO).raw_os_error()
}

/// Changes pages: in place where the file can, else by taking them away. To shared by taking nothing away: the
/// next touch brings a fresh page.
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

/// Changes pages by `change`, one part after the other, until one fails.
fn convert_by(
    pages: &[(Arc<GuestFile>, PageRange<Offset>, bool)],
    mut change: impl FnMut(&GuestFile, PageRange<Offset>, bool) -> Result<(), Failed<u64>>,
) -> Outcome {
    let mut before = 0;
    for (file, range, in_place) in pages {
        match change(file, *range, *in_place) {
            Ok(()) => before += range.len(),
            // The kernel's check comes before any change.
            Err(failed) if failed.errno == Errno::AGAIN && before == 0 => return Outcome::NotCommitted,
            Err(failed) => {
                log::warn!("{failed}");
                let into = failed.partial.saturating_sub(range.start().0).min(range.len());
                return Outcome::Unknown { errno: failed.errno.raw_os_error(), offset: before + into };
            }
        }
    }
    Outcome::Committed
}

#[cfg(test)]
mod tests {
    use passgate_backends::iommu::sim::{self, Fault, Memory, Sim};
    use passgate_backends::{Entered, Segment, Window, Windowed};
    use passgate_bindings::PAGE;

    use super::*;

    /// A device whose nature changes while somebody believes another.
    #[derive(Debug)]
    struct Changing(passgate_backends::iommu::sim::SimDevice, passgate_backends::Nature);

    impl Device for Changing {
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

    fn changed(ats: bool, tdi: bool) -> (Sim, Arc<dyn Device>) {
        let sim = Sim::new(Sim::CAPABILITIES, Memory::new()).unwrap();
        let nature = passgate_backends::Nature { ats, tdi };
        let device = sim.device("sim:0", passgate_backends::StopClass::all(), nature);
        (sim, Arc::new(Changing(device, nature)))
    }

    fn events(returned: Returned) -> Vec<Event> {
        match returned {
            Returned::Fact { event, ticket: None } => vec![event],
            Returned::Facts(events) => events,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn no_fence_ends_a_tdi_of_which_the_gate_has_not_heard() {
        let fence = |device: &Arc<dyn Device>, tdi, step| {
            let believed = Nature { tdi, ..Nature::default() };
            let device = Arc::clone(device);
            events(Call::Fence { job: JobId(1), device, id: DeviceId(3), believed, step }.run())
        };
        for step in [FenceStep::Master, FenceStep::Reset] {
            let (sim, device) = changed(false, true);
            let [news, Event::Fenced { errno, .. }] = &fence(&device, false, step)[..] else {
                panic!("news first")
            };
            assert_eq!(*news, Event::DeviceNature { device: DeviceId(3), ats: false, tdi: true });
            assert_eq!((*errno, sim.calls(sim::Call::Fence)), (Errno::BUSY.raw_os_error(), 0));
            assert!(matches!(fence(&device, true, step)[..], [Event::Fenced { errno: 0, .. }]));
            assert!(matches!(fence(&device, false, FenceStep::Detach)[..], [Event::Fenced { errno: 0, .. }]));
            assert_eq!(sim.calls(sim::Call::Fence), 2);
        }
    }

    #[test]
    fn what_an_attach_has_made_of_a_device_is_told_before_the_attach() {
        let attach = |device: &Arc<dyn Device>, ats| {
            let believed = Nature { ats, ..Nature::default() };
            let device = Arc::clone(device);
            events(Call::Attach { job: JobId(1), device, id: DeviceId(3), believed }.run())
        };
        for (ats, fails) in [(false, false), (true, false), (false, true), (true, true)] {
            let (sim, device) = changed(ats, false);
            let fail = || {
                if fails {
                    sim.fail_next(sim::Call::Attach, sim::Fault::HalfDone(Errno::IO));
                }
            };
            fail();
            let [news, Event::Attached { errno, .. }] = &attach(&device, !ats)[..] else {
                panic!("news first")
            };
            assert_eq!(*news, Event::DeviceNature { device: DeviceId(3), ats, tdi: false });
            assert_eq!(*errno != 0, fails);
            fail();
            assert!(matches!(attach(&device, ats)[..], [Event::Attached { .. }]), "nothing new");
        }
    }

    #[test]
    fn an_unmap_that_would_wait_for_io_is_not_small() {
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
        assert!(!unmap(PageRange::new(0, SMALL + PAGE).unwrap()).is_small());
    }

    #[test]
    fn a_conversion_that_fails_after_a_part_of_it_is_unknown_from_there_on() {
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
        // Of the third part one page was changed: the kernel says up to where in the file.
        assert_eq!(fails(2, Errno::IO, 7 * PAGE), unknown(Errno::IO, 4));
        assert_eq!(fails(0, Errno::IO, 0), unknown(Errno::IO, 0));
    }

    /// A map of the first four pages of `file`, for one job or for more.
    fn map(sim: &Sim, file: &Arc<GuestFile>, shares: Vec<Share>) -> Call {
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

    fn share(job: u64, page: u64, pages: u64) -> Share {
        let iova = PageRange::new(page * PAGE, pages * PAGE).unwrap();
        Share { job: JobId(job), iova, bytes: iova.len() }
    }

    #[test]
    fn a_map_that_was_not_taken_back_is_unknown_and_one_that_was_is_refused() {
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
        // Of several in one call nobody knows whose pages are left.
        let returned = run(half, vec![share(1, 0, 1), share(2, 1, 3)]);
        let Returned::Facts(events) = returned else { panic!("{returned:?}") };
        assert_eq!(events, [1, 2].map(|job| Event::Mapped { job: JobId(job), result: unknown }));
    }

    #[test]
    fn a_range_that_cannot_be_mapped_does_not_fail_its_neighbours() {
        let sim = Sim::new(Sim::CAPABILITIES, Memory::new()).unwrap();
        let file = Arc::new(GuestFile::memfd("call", 16 * PAGE).unwrap());
        sim.fail_next(sim::Call::Map, Fault::Errno(Errno::NOMEM));
        let shares = vec![share(1, 0, 1), share(2, 1, 2), share(3, 3, 1)];
        let Returned::Apart(calls) = map(&sim, &file, shares).run() else { panic!("one result for all") };
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
