//! Events: requests of clients, results of effects, and time passing.
//!
//! An event states a fact; the gate has no other source of facts. Results carry the kernel's answer as it was and how long the
//! call took, so that a log of events replays to the same state.

use passgate_backends::{DeviceTraits, DomainCaps, Steps};
use passgate_bindings::units::Offset;
use passgate_bindings::{Gpa, PageRange};
use serde::{Deserialize, Serialize};

use super::ids::{ClientId, DeviceId, DomainId, FileId, InvalidationId, JobId, RegionId};
use super::ledger::PageState;
use super::ranges::Ranges;
use super::rung::Rung;
use super::verdict::Reason;

pub use passgate_client::{Outcome, OutcomeKind};

/// The socket through which a client's request came; its answer goes the same way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Door {
    /// A varlink call on the control socket.
    Control,
    /// A record on the notification channel.
    Channel,
}

/// The origin of a request, and the address of its answer. The cookie comes back untouched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Caller {
    /// The connection.
    pub client: ClientId,
    /// The socket.
    pub door: Door,
    /// The caller's own number for the request.
    pub cookie: u64,
}

impl Caller {
    /// Stands for a client where nobody waits for an answer.
    pub(super) fn internal(client: ClientId) -> Self {
        Self { client, door: Door::Control, cookie: 0 }
    }
}

/// Pages of a file, from an offset on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Backing {
    /// The file.
    pub file: FileId,
    /// The offset in bytes at which the region starts; page-aligned.
    pub offset: Offset,
}

/// A guest memory region as its owner describes it. Devices see it at IOVA = guest-physical address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionSpec {
    /// Its guest-physical addresses.
    pub gpa: PageRange<Gpa>,
    /// The memory that is mapped for devices: a shared memfd, or a guest_memfd that can be mapped.
    pub backing: Backing,
    /// True if devices may write.
    pub writable: bool,
    /// The maximum of bytes per kernel mapping: a power of two, at least a page; 0 leaves it to the gate. Pages convert
    /// singly whatever this is.
    pub piece: u64,
    /// The size in bytes of the file's own pages (hugetlbfs); a power of two, at least 4096.
    pub page: u64,
    /// The state of pages that no other region of the file has described before.
    pub initial: PageState,
}

/// The end of a conversion as its owner reports it, before it is checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReportedEnd {
    /// The reported outcome.
    pub kind: OutcomeKind,
    /// The errno of its kernel call; 0 where there was none.
    pub errno: i32,
    /// The number of bytes of the range that it reached.
    pub offset: u64,
}

/// The highest errno there is (`include/linux/err.h`).
const MAX_ERRNO: i32 = 4095;

/// `EPROTO`: stands for an errno that is none.
const NO_ERRNO: i32 = 71;

impl ReportedEnd {
    /// Returns the outcome of a conversion of `length` bytes. A report that contradicts itself is *unknown*: committed with an errno, or
    /// with an offset other than 0 and `length`; not committed with an offset other than 0; an errno outside 0 to 4095, or an
    /// offset beyond the range.
    pub fn outcome(self, length: u64) -> Outcome {
        let Self { kind, errno, offset } = self;
        let valid = (0..=MAX_ERRNO).contains(&errno) && offset <= length;
        match kind {
            OutcomeKind::Committed if valid && errno == 0 && (offset == 0 || offset == length) => {
                Outcome::Committed
            }
            // A call that failed and changed nothing has an errno.
            OutcomeKind::NotCommitted if valid && offset == 0 => Outcome::NotCommitted,
            _ => Outcome::Unknown {
                errno: if (0..=MAX_ERRNO).contains(&errno) { errno } else { NO_ERRNO },
                offset: offset.min(length),
            },
        }
    }
}

/// The party that converts the pages between begin and end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Performer {
    /// The client, which then sends `end`.
    Client,
    /// passgate itself ([`super::Effect::Convert`]).
    Passgate,
}

/// The result of an unmap: of the domain's own [`passgate_backends::iommu::Unmap`] what the gate may know and an audit log can store. The
/// ticket of operations in flight stays with the session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum UnmapResult {
    /// It succeeded: `bytes` are unmapped, and nothing is in flight.
    Gone {
        /// Bytes unmapped.
        bytes: u64,
    },
    /// It succeeded: `bytes` are unmapped, but operations over them are in flight. [`Event::FlightEnded`] with the same job follows
    /// once they have ended.
    InFlight {
        /// Bytes unmapped.
        bytes: u64,
    },
    /// The call failed; it is unknown which pages are still mapped.
    Failed {
        /// The kernel's answer.
        errno: i32,
        /// Bytes unmapped before the failure.
        bytes: u64,
    },
}

/// The result of a map.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MapResult {
    /// The whole range is mapped.
    Mapped,
    /// Nothing of it is mapped.
    Refused {
        /// The kernel's answer.
        errno: i32,
    },
    /// It failed, and some of the range may be mapped.
    Unknown {
        /// The kernel's answer to the map, not to its roll-back.
        errno: i32,
    },
}

/// An event of the gate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Event {
    /// A domain exists. Before any region or device.
    DomainAdded {
        /// Its number from now on.
        domain: DomainId,
        /// Its capabilities.
        #[serde(rename = "able")]
        caps: DomainCaps,
    },
    /// A device is attached to a domain and can be stopped by these steps.
    DeviceAdded {
        /// Its number from now on.
        device: DeviceId,
        /// The domain that it is attached to.
        domain: DomainId,
        /// The fences that it has.
        steps: Steps,
        /// The traits that decide which of them prove anything.
        #[serde(rename = "nature")]
        traits: DeviceTraits,
    },
    /// A client adds memory.
    AddRegion {
        /// The caller; it will own the region.
        caller: Caller,
        /// The region.
        spec: RegionSpec,
    },
    /// A client takes memory away: every mapping of the region goes, then the region.
    RemoveRegion {
        /// The caller; must be the owner.
        caller: Caller,
        /// The region.
        region: RegionId,
    },
    /// A client announces that ranges are about to be converted.
    Begin {
        /// The caller; only this client may end it.
        caller: Caller,
        /// The ranges; may cross regions, may not touch addresses without a region.
        ranges: Ranges,
        /// The state that the pages will have.
        to: PageState,
        /// The party that converts them.
        performer: Performer,
        /// The time in nanoseconds within which the answer must come.
        deadline_ns: u64,
    },
    /// The client that began reports the end of its conversion.
    End {
        /// The caller.
        caller: Caller,
        /// The invalidation that it began.
        invalidation: InvalidationId,
        /// The outcome.
        outcome: Outcome,
    },
    /// [`super::Effect::Convert`] has returned.
    Converted {
        /// The invalidation.
        invalidation: InvalidationId,
        /// The outcome.
        outcome: Outcome,
    },
    /// [`super::Effect::Map`] has returned.
    Mapped {
        /// The call.
        job: JobId,
        /// The result.
        result: MapResult,
    },
    /// [`super::Effect::Unmap`] or [`super::Effect::Replace`] has returned.
    Unmapped {
        /// The call.
        job: JobId,
        /// The result.
        result: UnmapResult,
        /// The duration of the call in nanoseconds.
        took_ns: u64,
    },
    /// The operations that were in flight over the pages of an unmap have ended.
    #[serde(rename = "released")]
    FlightEnded {
        /// The unmap.
        job: JobId,
    },
    /// [`super::Effect::Fence`] has returned.
    Fenced {
        /// The call.
        job: JobId,
        /// The kernel's errno; 0 for success.
        errno: i32,
        /// The duration of the call in nanoseconds.
        took_ns: u64,
    },
    /// [`super::Effect::Attach`] has returned.
    Attached {
        /// The call.
        job: JobId,
        /// The kernel's errno; 0 for success.
        errno: i32,
    },
    /// The ATS and TDI state of a device was read again: before the result of every attach, and whenever it is found to have
    /// changed.
    #[serde(rename = "device-nature")]
    DeviceTraits {
        /// The device.
        device: DeviceId,
        /// As [`DeviceTraits::ats`].
        ats: bool,
        /// As [`DeviceTraits::tdi`].
        tdi: bool,
    },
    /// The time that [`super::Effect::Arm`] asked for has passed.
    Expired {
        /// The invalidation.
        invalidation: InvalidationId,
        /// The rung that was to be over by now.
        rung: Rung,
    },
    /// A tick has passed ([`super::Gate::is_fragmented`]): mappings that were quiet meanwhile are merged.
    Quiet,
    /// A connection is gone, at whatever point.
    ClientGone {
        /// The client.
        client: ClientId,
    },
    /// Pages that an earlier daemon had in quarantine. Before any region.
    Quarantine {
        /// The file.
        file: FileId,
        /// The pages.
        range: PageRange<Offset>,
        /// The invalidation since which they are in quarantine; numbers of this gate count on from the highest.
        invalidation: InvalidationId,
        /// The reason.
        reason: Reason,
    },
    /// A client takes over the memory that an earlier daemon's clients had (`gate::adopt`).
    Adopt {
        /// The caller; it will own the memory.
        caller: Caller,
    },
    /// The removals of this client (a vhost-user front-end) must succeed: what it removes, or leaves behind, is unmapped by
    /// every fence that its devices have, reset included. Before anything else of it. Logs call it `insists`.
    #[serde(rename = "insists")]
    MustUnmap {
        /// The client.
        client: ClientId,
    },
    /// An operator ends the quarantine that an invalidation left, and says what the pages are now.
    Release {
        /// The caller.
        caller: Caller,
        /// The invalidation that the quarantine dates from.
        invalidation: InvalidationId,
        /// The state of the pages: shared, private or hole.
        to: PageState,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn end_that_contradicts_itself_is_unknown() {
        const LENGTH: u64 = 16384;
        let says = |kind, errno, offset| ReportedEnd { kind, errno, offset }.outcome(LENGTH);
        let unknown = |errno, offset| Outcome::Unknown { errno, offset };
        for offset in [0, LENGTH] {
            assert_eq!(says(OutcomeKind::Committed, 0, offset), Outcome::Committed);
        }
        for errno in [0, 5, MAX_ERRNO] {
            assert_eq!(says(OutcomeKind::NotCommitted, errno, 0), Outcome::NotCommitted);
            assert_eq!(says(OutcomeKind::Unknown, errno, 4096), unknown(errno, 4096));
        }
        assert_eq!(says(OutcomeKind::Committed, 5, 0), unknown(5, 0));
        assert_eq!(says(OutcomeKind::Committed, 5, LENGTH), unknown(5, LENGTH));
        assert_eq!(says(OutcomeKind::Committed, 0, 4096), unknown(0, 4096));
        assert_eq!(says(OutcomeKind::NotCommitted, 0, 1), unknown(0, 1));
        assert_eq!(says(OutcomeKind::NotCommitted, 5, LENGTH), unknown(5, LENGTH));
        for word in [OutcomeKind::Committed, OutcomeKind::NotCommitted, OutcomeKind::Unknown] {
            assert_eq!(says(word, 0, LENGTH + 1), unknown(0, LENGTH), "{word:?}");
            for errno in [-5, MAX_ERRNO + 1, i32::MIN, i32::MAX] {
                assert_eq!(says(word, errno, 0), unknown(NO_ERRNO, 0), "{word:?} {errno}");
            }
        }
    }
}
