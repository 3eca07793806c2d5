//! One call on a domain, a device or a file, with everything that it needs, and its result as an event of the gate.
//!
//! A call owns what it works on, so that it can run on any thread and outlive the session that asked for it.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use passgate_backends::{Device, Domain, Error, Step, Ticket, Unmap};
use passgate_bindings::identity::{self, FileError, Identity};
use passgate_bindings::memory::GuestFile;
use passgate_bindings::units::Offset;
use passgate_bindings::{Failed, Iova, PageRange};
use rustix::io::Errno;

use super::Session;
use super::coalesce::{self, CoalescedRequest};
use super::convert;
use super::fdstore::{Claim, FdStore, Name};
use crate::gate::{
    Caller, DeviceId, DeviceTraits, DomainId, Effect, Event, FileId, InvalidationId, JobId, MapResult,
    Outcome, PageState, UnmapResult,
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
        assumed: DeviceTraits,
        /// The fence.
        step: Step,
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
        assumed: DeviceTraits,
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

impl Call {
    /// Returns the call that an effect asks for. If the session does not have the domain, device or file, `Err` is the call's
    /// result: it fails with nothing changed. An effect that asks for no call is an error without a result.
    pub(super) fn of(effect: Effect, session: &Session) -> Result<Self, Option<Event>> {
        let device = |id: DeviceId| session.hardware.device(id).cloned();
        let assumed = |id: DeviceId| session.gate.traits(id);
        match effect {
            Effect::Replace { job, domain, gone, bytes: _ } => match session.hardware.domain(domain).cloned()
            {
                Some(domain) => Ok(Self::Replace { job, domain, gone }),
                None => Err(Some(failed_unmap(job))),
            },
            Effect::Fence { job, device: id, step } => match (device(id), assumed(id)) {
                (Some(device), Some(assumed)) => Ok(Self::Fence { job, device, id, assumed, step }),
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
                let may_end_tdi = step.ends_tdi() && !assumed.tdi;
                let change = if may_end_tdi { trait_change(&*device, id, assumed) } else { None };
                let errno = match change {
                    Some(Event::DeviceTraits { tdi: true, .. }) => Errno::BUSY.raw_os_error(),
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
                one_event(Event::Converted { invalidation, outcome: convert::convert(&pages, to) })
            }
        }
    }
}

/// Returns the device's ATS and TDI state as an event, if it differs from what the gate assumes.
fn trait_change(device: &dyn Device, id: DeviceId, assumed: DeviceTraits) -> Option<Event> {
    let DeviceTraits { ats, tdi, .. } = device.traits();
    ((ats, tdi) != (assumed.ats, assumed.tdi)).then_some(Event::DeviceTraits { device: id, ats, tdi })
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

#[cfg(test)]
mod tests;
